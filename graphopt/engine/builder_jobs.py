"""Jobs on their way to the builder, and what the link is set to and says about itself."""

import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graphopt.builder.records import Answer
from graphopt.errors import BuilderError
from graphopt.executor.backend import Options


@dataclass(frozen=True, slots=True)
class BuildJob:
    """One candidate to build.

    Attributes:
        model: name of a model that the link follows.
        revision: of it.
        blocks: adjacent blocks, in order: a run (`graphopt.executor.runs`).
        backend: name of a registered backend.
        options: how the candidate is to run; part of its identity.
        folder: fresh, the caller's to keep when the answer is ok; gone when it is not.
        samples: files with real inputs to verify on; None: those of `BuilderLink.set_requests`.
    """

    model: str
    revision: int
    blocks: tuple[str, ...]
    backend: str
    options: Options
    folder: Path
    samples: tuple[Path, ...] | None = None


@dataclass(frozen=True, slots=True)
class BuilderSettings:
    """How the builder is run.

    Attributes:
        floor_pct: of one core that a job gets even when all cores are busy.
        job_s: that a job may take, without the time it waits for a core.
        silence_s: that a job may go without a sign of life, counted the same way. A library that
            holds the GIL while it compiles is silent.
        start_s: that loading torch may take, counted the same way.
        private_bytes_max: memory beyond mapped files; above it the builder starts afresh between jobs.
        queue_max: jobs that wait for an answer; more are answered `busy`.
        idle_s: without a job, after which the builder is let go; its memory is worth more than the
            seconds of its next start.
        backends: extra ones as `module:Class`, to try one before it is packaged.
        path: folders to find those in.
    """

    floor_pct: float = 10.0
    job_s: float = 300.0
    silence_s: float = 120.0
    start_s: float = 120.0
    private_bytes_max: int = 4 << 30
    queue_max: int = 256
    idle_s: float = 60.0
    backends: tuple[str, ...] = ()
    path: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BuilderStatus:
    """What the builder is at.

    Attributes:
        state: `disabled` (by the settings), `off` (no job yet, let go, or closed), `starting`,
            `idle`, `building`, `starved` (a job gets less than the floor although it was lifted as
            far as the host allows), `restarting` (waiting before the next try).
        queued: jobs without an answer, the one at work included.
        job: id of the one at work.
        share_pct: of one core that the process got in the last observation.
        restarts: starts after the first.
        pid: of the process.
        rss_bytes: its memory, mapped files left out, at the last answer.
        policy: `idle`, `autogroup` or `nice`: see `graphopt.builder.pace`.
        quarantined: candidates that are not tried again.
    """

    state: str = "off"
    queued: int = 0
    job: int | None = None
    share_pct: float | None = None
    restarts: int = 0
    pid: int | None = None
    rss_bytes: int | None = None
    policy: str | None = None
    quarantined: int = 0


@dataclass(slots=True)
class Pending:
    """A job without an answer. `future` holds an `Answer`, or a proposal."""

    id: int
    model: str
    revision: int
    message: Mapping[str, Any]
    future: "Future[Any]"
    is_sent: bool = False
    resent: int = 0  # because the builder lacked the revision
    deaths: int = 0  # of builders that somebody killed while it was at work
    started: Mapping[str, Any] = field(default_factory=dict)  # region, weights, version
    trial: Mapping[str, Any] | None = None  # subject, backend, version of what is being tried
    ran: "Future[bool]" = field(default_factory=Future)  # whether it has run where it is proven

    @property
    def has_run(self) -> bool:
        """Whether its artifact may be in use, although it is not proven yet."""
        return self.ran.done() and self.ran.result()

    def note_ran(self, *, has_run: bool) -> None:
        """Tells whoever waits; the first word stands."""
        with suppress(InvalidStateError):
            self.ran.set_result(has_run)

    def clear_folder(self) -> None:
        """Removes what a builder wrote for it. Only for one that had begun: it found the folder empty."""
        folder = self.message.get("folder")
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


class JobQueue:
    """Jobs without an answer, by id, in the order they came. Any thread may call it."""

    def __init__(self, count_max: int) -> None:
        self._count_max = count_max
        self._lock = threading.Lock()
        self._pending: dict[int, Pending] = {}
        self._withdrawn: list[int] = []
        self._last_id = 0

    def __len__(self) -> int:
        return len(self._pending)

    def add(
        self,
        model: str,
        revision: int,
        make: Callable[[int], Mapping[str, Any]],
        ran: "Future[bool] | None" = None,
    ) -> tuple[Pending, bool]:
        """A new job, whose line `make` writes for its id; False when the queue is full."""
        with self._lock:
            self._last_id += 1
            pending = Pending(self._last_id, model, revision, make(self._last_id), Future())
            pending.ran = ran or pending.ran
            has_room = len(self._pending) < self._count_max
            if has_room:
                self._pending[pending.id] = pending
            return pending, has_room

    def find(self, id: int) -> Pending | None:
        """The job of that id, None once it is answered."""
        with self._lock:
            return self._pending.get(id)

    def note_ran(self, id: int) -> None:
        """Its artifact has run."""
        pending = self.find(id)
        if pending is not None:
            pending.note_ran(has_run=True)

    def waiting(self) -> list[Pending]:
        """All of them."""
        with self._lock:
            return list(self._pending.values())

    def withdraw(self, id: int) -> None:
        """Notes that the caller does not want an answer any more."""
        with self._lock:
            self._withdrawn.append(id)

    def take_withdrawn(self) -> list[Pending]:
        """Jobs withdrawn since the last call."""
        with self._lock:
            ids, self._withdrawn = self._withdrawn, []
            return [self._pending[id] for id in ids if id in self._pending]

    def resolve(self, pending: Pending, answer: Answer, proposal: Any = None) -> None:
        """Answers a job once; an artifact that nobody will take is removed."""
        with self._lock:
            self._pending.pop(pending.id, None)
        pending.note_ran(has_run=False)
        future = pending.future
        is_taken = not answer.ok  # then the builder has left nothing
        with suppress(InvalidStateError):
            if future.set_running_or_notify_cancel():
                is_taken = True
                if pending.message["op"] != "propose":
                    future.set_result(answer)
                elif answer.ok:
                    future.set_result(proposal)
                else:
                    future.set_exception(BuilderError(answer.reason, where=pending.model))
        if not is_taken:
            pending.clear_folder()


def build_message(id: int, job: BuildJob) -> dict[str, Any]:
    """The line that asks for a build."""
    samples = None if job.samples is None else [str(path) for path in job.samples]
    return {
        "op": "build", "job": id, "model": job.model, "revision": job.revision,
        "blocks": list(job.blocks), "backend": job.backend, "options": job.options.document(),
        "folder": str(job.folder), "samples": samples,
    }  # fmt: skip
