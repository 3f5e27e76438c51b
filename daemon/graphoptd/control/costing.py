"""What the cost model knows, and measuring this host for it.

A calibration runs in a process of its own, one at a time; it ends when its client leaves. Requests go
on being served beside it, slower, and the figures are the better the fewer there are. The service
takes the new layer when it is whole.
"""

import asyncio
import json
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import cost_models
import graphopt
from cost_models.host_model import calibration_path
from graphopt.documents import rule
from graphopt.errors import BusyError, GraphoptError, PreconditionError
from graphopt.limits import NAME_CHARS_MAX
from graphoptd.control.task import Answer, Task
from graphoptd.events import emit
from graphoptd.settings import THREADS_MAX

LINE_BYTES_MAX = 1 << 16
WITHIN_MAX_S = 240.0
SLOWEST_S = 300.0  # a calibration takes up to 2 minutes; one that hangs is ended

_running = asyncio.Lock()  # one at a time in a service


@dataclass(frozen=True, slots=True)
class CostParams:
    """`glob` as file names have it: `backends.openvino.*`."""

    glob: str | None = field(default=None, metadata=rule(chars_max=NAME_CHARS_MAX))


@dataclass(frozen=True, slots=True)
class CalibrateParams:
    """`threads`: counts to measure with; by default one, and what a request gets at most.

    `within_s`: seconds after which no further graph is measured.
    """

    threads: tuple[int, ...] = field(
        default=(), metadata=rule(low=1, high=THREADS_MAX, count_max=8)
    )
    within_s: float | None = field(default=None, metadata=rule(low=1, high=WITHIN_MAX_S))


class CalibrationError(GraphoptError):
    """A calibration ended without a result."""

    code = "cost.calibration_failed"


async def cost(task: Task, params: CostParams) -> Answer:
    """The coefficients of the cost model in force, each with unit, range and origin."""
    model = task.context.host.better.costs.model
    found = [asdict(each) for each in model.effective()] if model is not None else []
    if params.glob is not None:
        found = [row for row in found if fnmatchcase(row["name"], params.glob)]
    return Answer({"coefficients": found}, rows="coefficients")


async def calibrate(task: Task, params: CalibrateParams) -> Answer:
    """Measures this host for the cost model and takes the result over."""
    model = task.context.host.better.costs.model
    if model is None:
        raise PreconditionError(
            "no cost model is installed", where="calibrate", remedy="install graphopt whole"
        )
    folder = task.context.host.folder
    if folder is None:
        raise PreconditionError(
            "there is no state folder to keep the result in", where="calibrate",
            remedy="start the service with one",
        )  # fmt: skip
    if _running.locked():
        raise BusyError("a calibration is running", where="calibrate", remedy="wait for its end")
    async with _running:
        path = calibration_path(folder.path)
        start_s = task.context.clock()
        last: Mapping[str, Any] = {}
        async for last in _lines(task, command(path, params)):
            if "done" in last and task.call.more:
                await task.part(last)
        if "path" not in last:
            raise CalibrationError(
                str(last.get("error") or "the process ended without a result"),
                where=str(path), remedy="the log of the service may say more",
            )  # fmt: skip
        changed = await task.lanes.change.run(model.reload)
    took_s = round(task.context.clock() - start_s, 1)
    emit(
        "cost.calibrated", path=str(path), count=len(changed), duration_ms=took_s * 1e3,
        peer_uid=task.peer.uid,
    )  # fmt: skip
    return Answer({"path": str(path), "took_s": took_s, "changed": len(changed)})


def command(path: Path, params: CalibrateParams) -> list[str]:
    """What runs a calibration: these very sources, wherever they lie."""
    roots = [str(Path(p.__file__ or "").resolve().parents[1]) for p in (cost_models, graphopt)]
    program = (
        f"import sys; sys.path[:0] = {roots!r}; "
        "from cost_models.calibration import main; sys.exit(main(sys.argv[1:]))"
    )
    words = [word for count in params.threads for word in ("--threads", str(count))]
    if params.within_s is not None:
        words += ["--budget-s", str(params.within_s)]
    return [sys.executable, "-P", "-c", program, "--out", str(path), *words]


async def _lines(task: Task, argv: Sequence[str]) -> AsyncIterator[Mapping[str, Any]]:
    """The lines of the process, until it ends, the client leaves or the service stops."""
    process = await asyncio.create_subprocess_exec(
        *argv, stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL, limit=LINE_BYTES_MAX
    )
    over = [asyncio.ensure_future(task.readable()), asyncio.ensure_future(task.stopping.wait())]
    try:
        async with asyncio.timeout(SLOWEST_S):
            while line := await _next(process, over):
                with suppress(ValueError):  # a library that prints
                    yield json.loads(line)
    except TimeoutError:
        yield {"error": f"it took longer than {SLOWEST_S:g} s"}
    finally:
        for each in over:
            each.cancel()
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _next(process: Process, over: "Sequence[asyncio.Future[Any]]") -> bytes:
    """The next line; empty when there is none, or nobody waits for it."""
    assert process.stdout is not None
    reading: asyncio.Future[bytes] = asyncio.ensure_future(process.stdout.readline())
    await asyncio.wait([reading, *over], return_when=asyncio.FIRST_COMPLETED)
    if reading.done():
        return reading.result()
    reading.cancel()
    await asyncio.wait([reading])
    return b""
