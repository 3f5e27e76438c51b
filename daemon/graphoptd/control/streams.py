"""Methods that may answer more than once: following the log, waiting, watching figures.

A stream ends when its end is reached, when the client sends anything or leaves, or when the service
stops. Without `more` each gives one answer.
"""

import asyncio
from collections.abc import Awaitable
from dataclasses import asdict, dataclass, field
from typing import Any

from graphopt.documents import rule
from graphopt.engine.builder_jobs import BuilderStatus
from graphopt.errors import DeadlineError, ProtocolError
from graphopt.tables import count_word
from graphoptd.control.looks import snapshot
from graphoptd.control.task import Answer, Task
from graphoptd.settings import SECONDS_MAX

_SLICE_S = 0.25  # of waiting for the background: how late a client that left is noticed
_PROGRESS_S = 1.0  # between two lines of progress
_LINES_MAX = 1_000  # of one part of the log


@dataclass(frozen=True, slots=True)
class SettleParams:
    """Without `timeout_s`, as long as it takes."""

    timeout_s: float | None = field(default=None, metadata=rule(low=0, high=SECONDS_MAX))


@dataclass(frozen=True, slots=True)
class LogsParams:
    """The last `count` lines, or those after `after` of the run `epoch`; `follow` goes on."""

    count: int = field(default=100, metadata=rule(low=0, high=1_000_000))
    after: int | None = field(default=None, metadata=rule(low=0))
    epoch: str = field(default="", metadata=rule(chars_max=64))
    follow: bool = False


@dataclass(frozen=True, slots=True)
class TopParams:
    """A snapshot every `interval_s`, `count` times; without `count`, until the client leaves."""

    interval_s: float = field(default=1.0, metadata=rule(low=0.1, high=3_600))
    count: int | None = field(default=None, metadata=rule(low=1, high=1_000_000))


async def settle(task: Task, params: SettleParams) -> Answer:
    """Waits until the background has nothing better to offer."""
    clock, host = task.context.clock, task.context.host
    start_s = clock()
    said_s = start_s
    gone = asyncio.ensure_future(task.readable())
    try:
        while True:
            waited_s = clock() - start_s
            left_s = None if params.timeout_s is None else params.timeout_s - waited_s
            slice_s = _SLICE_S if left_s is None else max(0.0, min(_SLICE_S, left_s))
            if await task.lanes.wait.run(lambda: host.settle(slice_s)):  # noqa: B023 - awaited here
                return Answer({"settled": True, "waited_s": round(clock() - start_s, 3)})
            if left_s is not None and left_s <= slice_s:
                raise too_late(params.timeout_s or 0.0, host.better.status())
            if gone.done() or task.stopping.is_set():
                return Answer({"settled": False, "waited_s": round(clock() - start_s, 3)})
            if task.call.more and clock() - said_s >= _PROGRESS_S:
                said_s = clock()
                at = {"builder": asdict(host.better.status())}
                await task.part({"settled": False, "waited_s": round(said_s - start_s, 3), **at})
    finally:
        await _ended(gone)


def too_late(timeout_s: float, builder: BuilderStatus) -> DeadlineError:
    """Why `settle` gave up: a builder that gets no time is another matter than one at work."""
    message = f"the background still has work after {timeout_s:g} s"
    if builder.state == "starved":
        share = "" if builder.share_pct is None else f" with {builder.share_pct:.3g}% of a core"
        return DeadlineError(
            f"{message}: the builder is starved{share}",
            where="settle",
            remedy="leave it some time on a core, or raise builder.floor_pct; models serve meanwhile",
        )
    if builder.state in ("building", "starting", "restarting"):
        jobs = count_word(builder.queued, "job")
        message += f": the builder is {builder.state}, {jobs} without an answer"
    return DeadlineError(
        message, where="settle", remedy="wait longer: graphoptctl settle --timeout S"
    )


async def logs(task: Task, params: LogsParams) -> Answer:
    """The last lines of the log; with `follow` and `more`, the coming ones too."""
    if params.follow and not task.call.more:
        raise ProtocolError("following needs more: true", where="follow", remedy="set it")
    ring = task.context.ring
    last = params.after if params.after is not None else -params.count or ring.read(-1, 1).last
    pieces: list[Any] = []
    missed = 0
    epoch = params.epoch
    while True:
        page = ring.read(last, _LINES_MAX, epoch)
        epoch, last, missed = page.epoch, page.last, missed + page.missed
        lines = [[number, line] for number, line in page.lines]
        if task.call.more and lines:
            await task.part({"lines": lines})
        else:
            pieces += lines
        if len(page.lines) < _LINES_MAX:
            break
    if params.follow:
        last = await _follow(task, epoch, last)
    head = {"epoch": epoch, "last": last, "missed": missed if params.after is not None else 0}
    return Answer({**head, "lines": pieces}, rows="lines")


async def top(task: Task, params: TopParams) -> Answer:
    """Figures of the service and its models, again and again."""
    left = params.count if task.call.more else 1
    gone = asyncio.ensure_future(task.readable())
    try:
        while True:
            found = await task.lanes.look.run(lambda: snapshot(task.context))
            left = None if left is None else left - 1
            if left == 0:
                return Answer(found)
            await task.part(found)
            if await _first(params.interval_s, gone, task.stopping.wait()):
                return Answer(found)
    finally:
        await _ended(gone)


async def _follow(task: Task, epoch: str, last: int) -> int:
    """Sends what is logged after `last`; returns the last line sent."""
    loop = asyncio.get_running_loop()
    news = asyncio.Event()

    def tell() -> None:
        loop.call_soon_threadsafe(news.set)

    unsubscribe = task.context.ring.subscribe(tell)
    gone = asyncio.ensure_future(task.readable())
    try:
        while True:
            page = task.context.ring.read(last, _LINES_MAX, epoch)
            last = page.last
            if page.lines:
                lines = [[number, line] for number, line in page.lines]
                await task.part(
                    {"lines": lines, **({"missed": page.missed} if page.missed else {})}
                )
                continue
            if await _first(None, gone, task.stopping.wait(), news.wait()):
                if gone.done() or task.stopping.is_set():
                    return last
                news.clear()
    finally:
        unsubscribe()
        await _ended(gone)


async def _first(timeout_s: float | None, *waits: Awaitable[Any]) -> bool:
    """Whether one of `waits` came before the time was over. The first one stays alive."""
    keep = waits[0]
    tasks = [asyncio.ensure_future(each) for each in waits]
    try:
        done, _ = await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        return bool(done)
    finally:
        for each in tasks:
            if each is not keep:
                await _ended(each)


async def _ended(future: "asyncio.Future[Any]") -> None:
    future.cancel()
    await asyncio.wait([future])
