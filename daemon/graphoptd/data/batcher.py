"""The queue of one model: who runs next, and which requests run as one.

    request -> [queue, bounded] -> batch -> Served.submit -> split -> one answer each
            -> Served.run, when nothing waits or runs and the run is known to be quick (`inline`)

An idle executor never waits: a request that finds one free is handed over at once, alone. While all
are busy, requests of equal shapes gather; a batch goes when an executor comes free. So that an
executor need not wait for this loop between two runs, one batch for each may be handed over early,
once it is full or has waited `batch_delay_us`. Groups of different shapes take turns, so none
starves.

A batch is one `submit`, so it runs on one revision. Requests were checked before they came here; if
a batch fails all the same, its members run once more, each alone, and only the culprit fails. An
expired or abandoned request leaves the queue at once and never runs; a run on the loop is over
before anything else can happen, so only its deadline is left to be checked. Everything here happens on the
event loop; the engine's threads only wake it.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence, Sized
from concurrent.futures import Future
from dataclasses import dataclass
from math import inf
from time import perf_counter_ns
from typing import Any

import torch

from graphopt.errors import BusyError, DeadlineError
from graphoptd.data.inline import InlineGate
from graphoptd.data.served import Served, Timed
from graphoptd.data.settings import DataSettings
from graphoptd.data.statistics import ModelStatistics


@dataclass(slots=True)
class Outcome:
    """The rows of one request, out of a run that may have held others.

    Attributes:
        outputs: by name; views of the batch's outputs.
        revision: the revision that ran.
        plan_id: the plan that ran.
        queue_ns: waiting here.
        input_ns: concatenating.
        infer_ns: from the hand-over to the engine to its answer.
    """

    outputs: Mapping[str, torch.Tensor]
    revision: int
    plan_id: str
    queue_ns: int
    input_ns: int
    infer_ns: int


class Work:
    """One request while it is queued or runs."""

    __slots__ = (
        "arrived_ns",
        "deadline_s",
        "future",
        "inputs",
        "key",
        "queued",
        "rows",
        "size_bytes",
    )

    def __init__(
        self,
        inputs: dict[str, torch.Tensor],
        rows: int,
        key: tuple[Any, ...] | None,
        size_bytes: int,
    ) -> None:
        self.inputs = inputs
        self.rows = rows
        self.key = key
        self.size_bytes = size_bytes
        self.queued = False
        self.arrived_ns = perf_counter_ns()
        self.future: asyncio.Future[Outcome]
        self.deadline_s: float

    def shape(self, rows: int) -> Hashable:
        """What its run takes depends on: the shapes of a batch of `rows` rows like it."""
        if self.key is not None:
            return self.key, rows
        return tuple([(name, tensor.shape) for name, tensor in self.inputs.items()])


@dataclass(slots=True)
class _Run:
    works: Sequence[Work]
    rows: int
    submitted_ns: int
    input_ns: int


_TICK_S = 0.001  # uvloop's timers count milliseconds; less than one would spin


class Batcher:
    """Queue, deadlines and batching of one live model."""

    def __init__(
        self,
        served: Served,
        settings: DataSettings,
        statistics: ModelStatistics,
        loop: asyncio.AbstractEventLoop,
        under_way: Sized = (),
    ) -> None:
        """`under_way` holds every request that is being answered, for this model or another."""
        self._served = served
        self._settings = settings
        self._statistics = statistics
        self._loop = loop
        self._under_way = under_way
        own = served.queue_max()
        self._queue_max = settings.queue_max if own is None else own
        self._gate = InlineGate() if settings.inline == "auto" else None
        self._groups: dict[tuple[Any, ...] | None, deque[Work]] = {}
        self._alone: deque[Work] = deque()  # members of a failed batch, to be run singly
        self.n_queued = 0
        self._n_running = 0
        self._delay_ns = settings.batch_delay_us * 1000
        self._wake: asyncio.TimerHandle | None = None
        self._waiting: set[Work] = set()  # unanswered, queued or running
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_s = inf

    def enqueue(self, work: Work, deadline_s: float) -> asyncio.Future[Outcome]:
        """Queue or start one checked request; cancelling the future withdraws it.

        The future raises DeadlineError when `deadline_s` seconds pass first, or what the engine
        raised.

        Raises:
            BusyError: the queue is full.
        """
        if self.n_queued >= self._queue_max:
            raise BusyError(
                f"{self.n_queued} requests wait",
                where=f"model {self._served.name}",
                remedy="retry later",
            )
        loop = self._loop
        future = work.future = loop.create_future()
        if self._gate is not None and self.n_queued == 0 and self._n_running == 0:
            shape = work.shape(work.rows)
            if self._gate.admits(self._served.plan_id(), shape, len(self._under_way) <= 1):
                self._run_here(work, self._gate, shape, deadline_s)
                return future
        self._watch(work, deadline_s)
        if self.n_queued == 0 and self._n_running < self._served.capacity():
            self._start((work,))
            return future
        self._groups.setdefault(work.key, deque()).append(work)
        work.queued = True
        self.n_queued += 1
        future.add_done_callback(lambda _: self._forget(work))
        self._pump()
        return future

    def is_idle(self) -> bool:
        """True when nothing waits or runs."""
        return self.n_queued == 0 and self._n_running == 0

    # -- choosing

    def _pump(self) -> None:
        """Hand over what may go now, and set the alarm for what may go later."""
        while self.n_queued and self._n_running < 2 * self._served.capacity():
            ahead = self._n_running >= self._served.capacity()
            works = self._next_batch(ahead)
            if works is None:
                break
            if works:
                self._start(works)

    def _next_batch(self, ahead: bool) -> list[Work] | None:
        """The next requests to run together; None when all may gather.

        Empty when those taken have left by now.
        """
        if self._alone:
            return self._take(self._alone, 1)
        now_ns = perf_counter_ns()
        soonest_ns = None
        for key, group in self._groups.items():
            due_ns = group[0].arrived_ns + self._delay_ns
            if not ahead or due_ns <= now_ns or self._is_full(key, group):
                works = self._take(group, 1 if key is None else self._settings.batch_max)
                del self._groups[key]
                if group:
                    self._groups[key] = group  # at the end: the other groups come first now
                return works
            soonest_ns = due_ns if soonest_ns is None else min(soonest_ns, due_ns)
        if soonest_ns is not None and self._wake is None:
            delay_s = max((soonest_ns - now_ns) / 1e9, _TICK_S)
            self._wake = self._loop.call_later(delay_s, self._on_wake)
        return None

    def _is_full(self, key: tuple[Any, ...] | None, group: deque[Work]) -> bool:
        if key is None:
            return True
        if len(group) >= self._settings.batch_max:
            return True
        rows = size_bytes = 0
        for work in group:
            rows += work.rows
            size_bytes += work.size_bytes
        return rows >= self._settings.batch_max or size_bytes >= self._settings.batch_bytes_max

    def _take(self, group: deque[Work], rows_max: int) -> list[Work]:
        """The first request of the group, and as many of the next as fit."""
        works: list[Work] = []
        rows = size_bytes = 0
        while group:
            work = group[0]
            if work.future.done():  # left a moment ago; its callback has not run yet
                group.popleft()
                self._dequeued(work)
                continue
            rows += work.rows
            size_bytes += work.size_bytes
            if works and (rows > rows_max or size_bytes > self._settings.batch_bytes_max):
                break
            group.popleft()
            self._dequeued(work)
            works.append(work)
        return works

    def _dequeued(self, work: Work) -> None:
        work.queued = False
        self.n_queued -= 1

    def _on_wake(self) -> None:
        self._wake = None
        self._pump()

    # -- running

    def _run_here(self, work: Work, gate: InlineGate, shape: Hashable, deadline_s: float) -> None:
        """Run one request on the event loop; its future is done afterwards."""
        started_ns = perf_counter_ns()
        try:
            result = self._served.run(work.inputs)
        except Exception as error:
            gate.add_here(shape, perf_counter_ns() - started_ns)
            work.future.set_exception(error)
            return
        done_ns = perf_counter_ns()
        infer_ns = done_ns - started_ns
        gate.add_here(shape, infer_ns, result.plan_id)
        self._statistics.add_execution(work.rows, 0, infer_ns, 0)
        # As generous as the alarm of those that run elsewhere.
        if done_ns - work.arrived_ns > (deadline_s + _TICK_S) * 1e9:
            work.future.set_exception(self._expired())
            return
        work.future.set_result(
            Outcome(
                result.outputs,
                result.revision,
                result.plan_id,
                started_ns - work.arrived_ns,
                0,
                infer_ns,
            )
        )

    def _start(self, works: Sequence[Work]) -> None:
        started_ns = perf_counter_ns()
        rows = works[0].rows
        try:
            if len(works) == 1:
                inputs = works[0].inputs
            else:
                rows = sum([work.rows for work in works])
                inputs = {
                    name: torch.cat([work.inputs[name] for work in works])
                    for name in works[0].inputs
                }
            submitted_ns = perf_counter_ns()
            running = self._served.submit(inputs)
        except Exception as error:
            self._fail(works, error)
            return
        run = _Run(works, rows, submitted_ns, submitted_ns - started_ns)
        self._n_running += 1
        if running.done():
            self._finish(run, running)
        else:
            running.add_done_callback(_Waker(self._loop, self._on_done, run))

    def _on_done(self, run: _Run, running: Future[Timed]) -> None:
        self._finish(run, running)
        self._pump()

    def _finish(self, run: _Run, running: Future[Timed]) -> None:
        done_ns = perf_counter_ns()
        infer_ns = done_ns - run.submitted_ns
        self._n_running -= 1
        try:
            took = running.result()
            result = took.result
            if self._gate is not None:
                shape = run.works[0].shape(run.rows)
                self._gate.add_elsewhere(result.plan_id, shape, took.cpu_ns, took.wall_ns)
            parts = (
                [result.outputs]
                if len(run.works) == 1
                else _split(result.outputs, run.works, run.rows)
            )
        except Exception as error:
            self._fail(run.works, error)
            return
        for work, outputs in zip(run.works, parts, strict=True):
            self._waiting.discard(work)
            if not work.future.done():
                queue_ns = run.submitted_ns - run.input_ns - work.arrived_ns
                outcome = Outcome(
                    outputs, result.revision, result.plan_id, queue_ns, run.input_ns, infer_ns
                )
                work.future.set_result(outcome)
        self._statistics.add_execution(
            run.rows, run.input_ns, infer_ns, perf_counter_ns() - done_ns
        )

    def _fail(self, works: Sequence[Work], error: Exception) -> None:
        live = [work for work in works if not work.future.done()]
        if len(works) > 1 and not isinstance(error, BusyError):
            self._statistics.batches_retried += 1
            for work in live:
                work.queued = True
            self._alone.extend(live)
            self.n_queued += len(live)
            self._loop.call_soon(self._pump)
            return
        self._waiting.difference_update(works)
        for work in live:
            work.future.set_exception(error)

    # -- leaving early

    def _watch(self, work: Work, deadline_s: float) -> None:
        """Keep an eye on a deadline.

        One alarm, set to the earliest, serves all requests: a timer for each costs more than
        decoding it, and nearly all requests are answered long before.
        """
        work.deadline_s = self._loop.time() + deadline_s
        self._waiting.add(work)
        if work.deadline_s < self._alarm_s:
            self._set_alarm(work.deadline_s)

    def _set_alarm(self, at_s: float) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm_s = at_s
        self._alarm = self._loop.call_at(at_s + _TICK_S, self._on_alarm) if at_s < inf else None

    def _on_alarm(self) -> None:
        now_s = self._loop.time()
        for work in [work for work in self._waiting if work.deadline_s <= now_s]:
            self._waiting.discard(work)
            if not work.future.done():
                work.future.set_exception(self._expired())
        self._set_alarm(min((work.deadline_s for work in self._waiting), default=inf))

    def _expired(self) -> DeadlineError:
        return DeadlineError(
            "no answer within the deadline",
            where=f"model {self._served.name}",
            remedy="retry, or send a larger `timeout`",
        )

    def _forget(self, work: Work) -> None:
        """Take an expired or cancelled request out of the queue."""
        self._waiting.discard(work)
        if not work.queued:
            return
        group = self._groups.get(work.key)
        if work in self._alone:
            self._alone.remove(work)
        elif group is not None:
            group.remove(work)
            if not group:
                del self._groups[work.key]
        self._dequeued(work)


class _Waker:
    """Carries a finished run from an engine thread to the event loop."""

    __slots__ = ("_loop", "_on_done", "_run")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        on_done: Callable[[_Run, Future[Timed]], None],
        run: _Run,
    ) -> None:
        self._loop = loop
        self._on_done = on_done
        self._run = run

    def __call__(self, running: Future[Timed]) -> None:
        try:
            self._loop.call_soon_threadsafe(self._on_done, self._run, running)
        except RuntimeError:
            # The loop was closed while the engine ran: the drain's deadline passed and nobody waits
            # for the answer.
            if not self._loop.is_closed():
                raise


def _split(
    outputs: Mapping[str, torch.Tensor], works: Sequence[Work], rows: int
) -> list[dict[str, torch.Tensor]]:
    """The outputs of each request, as views."""
    sizes = [work.rows for work in works]
    for name, tensor in outputs.items():
        if tensor.ndim == 0 or tensor.shape[0] != rows:
            raise ValueError(
                f"output {name!r} has shape {list(tensor.shape)} for a batch of {rows} rows"
            )
    pieces = {name: torch.split(tensor, sizes) for name, tensor in outputs.items()}
    return [
        {name: piece[position] for name, piece in pieces.items()} for position in range(len(works))
    ]
