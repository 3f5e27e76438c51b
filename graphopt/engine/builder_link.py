"""The engine's side of the builder process: jobs in, futures out, and what to do when it dies.

Nothing here makes a caller wait: methods note what is wanted and wake one thread, which starts the
builder at the first job, tells it about models, watches what share of the host it gets, kills what
hangs, starts it again with a growing pause, and bans the candidate that brought it down.

Deliberately absent: what to build and when (the planner and the engine decide), loading in this
process, and any measurement of latency.
"""

import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from graphopt.builder.records import (
    BUSY,
    CANCELLED,
    CRASHED,
    HUNG,
    OFF,
    UNKNOWN,
    Answer,
    answer_of,
)
from graphopt.delta import Delta
from graphopt.engine.builder_files import ConstantFiles
from graphopt.engine.builder_jobs import (
    BuilderSettings,
    BuilderStatus,
    BuildJob,
    JobQueue,
    Pending,
    build_message,
)
from graphopt.engine.builder_process import BuilderProcess, exit_name, private_bytes, wait_for
from graphopt.engine.builder_quarantine import Quarantine, Quarantined, candidate_of, last_words
from graphopt.engine.builder_state import BuilderState
from graphopt.engine.builder_watch import TICK_S, BuilderWatch
from graphopt.engine.records import EventSink, ignore_event
from graphopt.errors import BuilderError
from graphopt.executor.threads import LoneThread
from graphopt.graph import Graph

__all__ = ["BuildJob", "BuilderLink", "BuilderSettings", "BuilderStatus"]

AHEAD_MAX = 8  # jobs sent ahead: enough to keep it busy, few enough to restart between them
RESENT_MAX = 2  # times a job goes again because the builder lacked its revision
DEATHS_MAX = 2  # builders killed from outside under one job before the job is to blame
PAUSE_FIRST_S, PAUSE_MOST_S = (
    0.1,
    60.0,
)  # before the next start, doubled by each death without an answer
FAILURES_MAX = 5  # deaths in a row without an answer, after which waiting jobs are answered
CLOSE_S = 1.0
_OUTSIDE = frozenset({signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT})


class BuilderLink:
    """Starts, feeds and watches one builder process. Any thread may call it."""

    def __init__(
        self,
        folder: Path,
        constants: ConstantFiles,
        clock: Callable[[], float],
        settings: BuilderSettings | None = None,
        events: EventSink = ignore_event,
    ) -> None:
        """Starts nothing.

        Args:
            folder: for texts, captured inputs and the quarantine's file; made when needed.
            constants: where constants lie as files; closed with the link.
            clock: monotonic seconds.
            settings: bounds and extra backends.
            events: receives `builder.*` on the link's thread.
        """
        self.settings = settings or BuilderSettings()
        self._folder = folder
        self._constants = constants
        self._clock = clock
        self._events = events
        self._closing = threading.Event()
        self._jobs = JobQueue(self.settings.queue_max)
        self._lock = threading.Lock()  # guards the next three
        self._thread: LoneThread | None = None
        self._bell: int | None = None
        self._status = BuilderStatus()
        self._state = BuilderState(folder, constants, self._closing)
        # The link's thread alone touches what follows.
        self._quarantine: Quarantine | None = None
        self._process: BuilderProcess | None = None
        self._watch: BuilderWatch | None = None
        self._is_ready = False
        self._working: int | None = None  # the job at work, and what is pending of it
        self._at_work: Pending | None = None
        self._starts = self._failures = 0
        self._spawned_s = self._not_before_s = self._idle_since_s = 0.0

    # -- what the engine tells

    def revise(
        self, model: str, revision: int, graph: Graph, expansion: Delta | None = None
    ) -> None:
        """Notes the current graph of a model; with the primitives that led to it, a delta is sent.

        Costs a microsecond: right for the live path.
        """
        self._state.revise(model, revision, graph, expansion)
        if len(self._jobs):  # with no job the builder need not know yet
            self._ring()

    def forget(self, model: str) -> None:
        """The model is unloaded: its jobs are answered `cancelled`."""
        self._state.forget(model)
        for pending in self._jobs.waiting():
            if pending.model == model and not pending.is_sent:
                self._jobs.resolve(pending, Answer(False, CANCELLED, "the model was unloaded"))
        self._ring()

    def set_requests(self, model: str, requests: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Replaces the real inputs that candidates are verified on, the most telling first.

        The first four that fit a candidate's shape are used. The tensors must not be written to.
        """
        self._state.set_requests(model, requests)

    # -- jobs

    def build(self, job: BuildJob, ran: "Future[bool] | None" = None) -> "Future[Answer]":
        """Has a candidate built, loaded and verified. The future never raises: see `Answer.stage`.

        Cancelling it takes the job back; one at work is finished and thrown away. `ran` becomes True
        when the artifact was loaded and has run in the builder, and may be loaded elsewhere while it is
        proven; False when it never will.
        """
        return self._submit(job.model, job.revision, lambda id: build_message(id, job), ran)

    def verify_fused(self, model: str, revision: int, blocks: tuple[str, ...]) -> "Future[Answer]":
        """Has the `fused` step of a run verified; the answer is the verdict for its two keys."""
        message = {"op": "verify_fused", "model": model, "revision": revision}
        return self._submit(
            model, revision, lambda id: {**message, "job": id, "blocks": list(blocks)}
        )

    def propose(
        self, model: str, revision: int, facts: Mapping[str, Any]
    ) -> "Future[Mapping[str, Any]]":
        """Has `graphopt.planner.propose` run on a revision with a document of facts.

        The future raises BuilderError when there is no proposal; its message says why.
        """
        message = {"op": "propose", "model": model, "revision": revision, "facts": dict(facts)}
        return self._submit(model, revision, lambda id: {**message, "job": id})

    def status(self) -> BuilderStatus:
        """What the builder is at, as of the link's last look."""
        with self._lock:
            return replace(self._status, queued=len(self._jobs))

    def quarantined(self) -> tuple[Quarantined, ...]:
        """Candidates that are not tried again, with evidence."""
        return (self._quarantine or Quarantine(self._folder)).entries()

    def close(self) -> None:
        """Ends the builder and answers every job `off`; takes a second at most."""
        self._closing.set()
        self._ring()
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join(CLOSE_S)
        else:
            self._constants.close()

    # -- queue

    def _submit(
        self,
        model: str,
        revision: int,
        make: Callable[[int], Mapping[str, Any]],
        ran: "Future[bool] | None" = None,
    ) -> "Future[Any]":
        pending, has_room = self._jobs.add(model, revision, make, ran)
        with self._lock:
            is_open = not self._closing.is_set()
            if is_open and has_room and self._thread is None:
                self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
                self._thread = LoneThread("graphopt-builder-link", self._run)
        if not is_open:
            self._jobs.resolve(pending, Answer(False, OFF, "the builder was closed"))
        elif not has_room:
            reason = f"{self.settings.queue_max} jobs wait already"
            self._jobs.resolve(pending, Answer(False, BUSY, reason))
        else:
            pending.future.add_done_callback(partial(self._withdraw, pending.id))
            self._ring()
        return pending.future

    def _withdraw(self, id: int, future: "Future[Any]") -> None:
        if future.cancelled():
            self._jobs.withdraw(id)
            self._ring()

    def _ring(self) -> None:
        with self._lock:
            if self._bell is not None:
                with suppress(BlockingIOError):
                    os.eventfd_write(self._bell, 1)

    # -- the link's thread

    def _run(self) -> None:
        torch.set_num_threads(1)
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._quarantine = Quarantine(self._folder)
            while not self._closing.is_set():
                self._turn()
        except Exception as error:  # a bug, or a full disk: the engine serves on without a builder
            fields = {"job": "builder link", "message": f"{type(error).__name__}: {error}"}
            self._events("builder.failed", fields)
            self._closing.set()
        finally:
            self._end("closed")
            for pending in self._jobs.waiting():
                self._jobs.resolve(pending, Answer(False, OFF, "the builder was closed"))
            with self._lock:
                bell, self._bell = self._bell, None
                self._status = BuilderStatus(restarts=max(0, self._starts - 1))
            assert bell is not None
            os.close(bell)
            self._constants.close()

    def _turn(self) -> None:
        self._withdraw_all()
        waiting = self._jobs.waiting()
        if self._process is None and waiting and self._clock() >= self._not_before_s:
            self._start()
        if self._process is not None:
            self._feed(waiting)
            self._process.flush()
        self._show()
        self._wait(bool(waiting))
        if self._process is not None:
            self._listen()
        if self._process is not None:
            self._look()

    def _wait(self, has_jobs: bool) -> None:
        """Until something happens: a call, a line, room in the pipe, or the next look."""
        assert self._bell is not None
        timeout_s: float | None = None
        if self._process is not None:
            timeout_s = TICK_S if has_jobs or not self._is_ready else self.settings.idle_s
        elif has_jobs:
            timeout_s = max(0.0, self._not_before_s - self._clock())
        wait_for(self._bell, self._process, timeout_s)

    def _withdraw_all(self) -> None:
        for pending in self._jobs.take_withdrawn():
            if pending.is_sent and self._process is not None:
                self._process.send({"op": "cancel", "job": pending.id})
            else:
                self._jobs.resolve(pending, Answer(False, CANCELLED, "taken back"))

    def _start(self) -> None:
        self._starts += 1
        self._process = BuilderProcess(self.settings.backends, self.settings.path)
        self._spawned_s = self._idle_since_s = self._clock()
        self._is_ready, self._working, self._at_work = False, None, None
        self._watch = BuilderWatch(self._process.pid, self._clock, self.settings, self._events)
        self._state.restart()
        with self._lock:
            self._status = replace(self._status, rss_bytes=None)
        assert self._quarantine is not None
        keys = self._quarantine.reasons()
        if keys:
            self._process.send({"op": "quarantine", "keys": keys})

    def _feed(self, waiting: Sequence[Pending]) -> None:
        """Tells the builder about models that have jobs, and sends the next jobs."""
        assert self._process is not None
        for message in self._state.forgotten():
            self._process.send(message)
        for model in dict.fromkeys(pending.model for pending in waiting):
            newest = self._state.revision(model)
            if newest is None:
                continue
            try:
                for message in self._state.news(model):
                    self._process.send(message)
            except BuilderError as error:
                for pending in waiting:
                    if pending.model == model and not pending.is_sent:
                        self._jobs.resolve(pending, Answer(False, UNKNOWN, str(error)))
        room = 0 if self._is_large() else AHEAD_MAX - sum(pending.is_sent for pending in waiting)
        for pending in waiting:
            newest = self._state.revision(pending.model)
            if pending.is_sent or self._jobs.find(pending.id) is None:
                continue
            if newest is None or newest < pending.revision:
                reason = f"the engine never told of revision {pending.revision} of {pending.model}"
                self._jobs.resolve(pending, Answer(False, UNKNOWN, reason))
            elif room > 0 and self._state.is_sent(pending.model):
                self._process.send(pending.message)
                pending.is_sent = True
                room -= 1

    # -- what the builder says

    def _listen(self) -> None:
        assert self._process is not None
        assert self._watch is not None
        self._process.read_errors()
        lines = self._process.read()
        if lines is None:
            self._end("ended by itself")
            return
        for line in lines:
            match line["say"]:
                case "answer":
                    self._take_answer(line)
                case "started":
                    self._take_start(line)
                case "trying":
                    self._take_trial(line)
                case "ran":
                    self._jobs.note_ran(line["job"])
                case "beat":
                    self._watch.mark("silence")
                case "synced" | "unknown":
                    self._state.acknowledge(line["model"], is_known=line["say"] == "synced")
                case "ready":
                    self._take_ready()
                case "policy":
                    self._watch.settle(line["policy"])

    def _take_ready(self) -> None:
        assert self._process is not None
        assert self._watch is not None
        self._is_ready = True
        share = self._watch.first_share_pct()
        fields = {
            "pid": self._process.pid, "policy": self._watch.policy,
            "share_pct": None if share is None else round(share, 1),
            "startup_s": round(self._clock() - self._spawned_s, 3), "attempt": self._starts,
        }  # fmt: skip
        self._events("builder.started", fields)

    def _take_start(self, line: Mapping[str, Any]) -> None:
        self._begin(line["job"])
        if self._at_work is not None:
            self._at_work.started, self._at_work.trial = line, None

    def _take_trial(self, line: Mapping[str, Any]) -> None:
        if line["job"] != self._working:  # a backend is asked what it can run before a job starts
            self._begin(line["job"])
        if self._at_work is not None:
            self._at_work.trial = line["trial"]

    def _begin(self, job: int) -> None:
        self._working, self._at_work = job, self._jobs.find(job)
        assert self._watch is not None
        self._watch.begin("job", "silence")

    def _take_answer(self, line: Mapping[str, Any]) -> None:
        assert self._process is not None
        assert self._watch is not None
        self._failures = 0
        if line["job"] == self._working:  # others are answered while they wait: `cancelled`
            self._watch.begin()
            self._working, self._at_work = None, None
        self._idle_since_s = self._clock()
        pending = self._jobs.find(line["job"])
        answer = answer_of(line["answer"])
        if pending is not None and answer.stage == UNKNOWN and pending.resent < RESENT_MAX:
            self._state.mistrust(pending.model)
            pending.is_sent, pending.resent = False, pending.resent + 1
        elif pending is not None:
            self._jobs.resolve(pending, answer, line.get("proposal"))
        rss_bytes = private_bytes(self._process.pid)
        with self._lock:
            self._status = replace(self._status, rss_bytes=rss_bytes)

    # -- watching

    def _is_large(self) -> bool:
        return (self._status.rss_bytes or 0) > self.settings.private_bytes_max

    def _look(self) -> None:
        """Paces the builder and ends it when it hangs, has grown too large, or is not needed."""
        assert self._process is not None
        assert self._watch is not None
        waiting = self._jobs.waiting()
        if self._is_ready and self._is_large() and not any(pending.is_sent for pending in waiting):
            self._end("memory")
        elif self._is_ready and not waiting:
            self._watch.pause()
            if self._clock() - self._idle_since_s >= self.settings.idle_s:
                self._end("idle")
        else:
            over = self._watch.look(self._at_work.id if self._at_work else None)
            if over is not None:
                self._end(over, getattr(self.settings, f"{over}_s"))

    # -- ends

    def _end(self, why: str, bound_s: float = 0.0) -> None:
        """Takes the process away and settles what it leaves; jobs it had not begun go to the next one."""
        process, self._process = self._process, None
        if process is None:
            return
        code = process.end()
        job, self._at_work = self._at_work, None
        if job is not None:
            job.clear_folder()
        number = -code if code < 0 else 0
        is_ours = why != "ended by itself"
        reason = why if is_ours else f"it ended with {exit_name(code)}"
        if why in ("job", "silence", "start"):
            what = "no sign of life" if why == "silence" else "no result"
            reason = f"{what} in {bound_s:g} s"
        words = last_words(process.last_words)
        fields = {
            "pid": process.pid, "reason": reason, "exit_code": code,
            "job": job.id if job else None, "last_words": words,
        }  # fmt: skip
        self._events("builder.exited", fields)
        for pending in self._jobs.waiting():
            pending.is_sent = False
        if why in ("idle", "memory", "closed"):
            return
        self._failures += 1
        self._not_before_s = self._clock() + min(
            PAUSE_MOST_S, PAUSE_FIRST_S * 2 ** (self._failures - 1)
        )
        if job is not None:
            job.deaths += 1
            if not (number in _OUTSIDE and not is_ours and job.deaths < DEATHS_MAX):
                self._blame(
                    job, HUNG if is_ours else CRASHED, reason, 0 if is_ours else number, words
                )
            if job.has_run:  # not to be built anew under whoever has loaded it
                self._jobs.resolve(job, Answer(False, CANCELLED, "its builder died"))
        if self._failures >= FAILURES_MAX:
            for pending in self._jobs.waiting():
                text = f"the builder died {self._failures} times in a row: {reason}; {words[-200:]}"
                self._jobs.resolve(pending, Answer(False, OFF, text))

    def _blame(self, job: Pending, stage: str, reason: str, number: int, words: str) -> None:
        """Bans what brought a builder down, and answers its job; but for one that only tried something
        on its way, which the next builder does without.
        """
        assert self._quarantine is not None
        entry = candidate_of(job, reason, number, words)
        if entry is not None:
            self._quarantine.add(entry)
            self._events("builder.quarantined", asdict(entry))
        if job.trial is not None:
            job.trial = None
            return
        keys = job.started
        answer = Answer(
            False, stage, reason, keys["region"], keys["weights"], keys["version"],
            revision=job.revision,
        )  # fmt: skip
        self._jobs.resolve(job, answer)

    def _show(self) -> None:
        """Publishes the status of this turn."""
        process, at_work = self._process, self._at_work
        has_jobs = bool(self._jobs.waiting())
        if process is None:
            state = "restarting" if has_jobs else "off"
        elif self._watch is not None and self._watch.is_starved:
            state = "starved"
        elif not self._is_ready:
            state = "starting"
        else:
            state = "building" if has_jobs else "idle"
        with self._lock:
            self._status = replace(
                self._status, state=state, job=at_work.id if at_work else None,
                share_pct=self._watch.share_pct if process and self._watch else None,
                restarts=max(0, self._starts - 1), pid=process.pid if process else None,
                rss_bytes=self._status.rss_bytes if process else None,
                policy=self._watch.policy if process and self._watch else None,
                quarantined=len(self._quarantine.entries()) if self._quarantine else 0,
            )  # fmt: skip
