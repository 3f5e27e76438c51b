"""The builder's loop: takes lines in, keeps a bounded queue, works on one job at a time.

Three threads: one takes lines in while a job is at work, so that a delta cancels what it makes useless
at once and the pipe's end is noticed at any moment; one says once a second that a job is at work; the
first one works. A job at work keeps the revision it began with, an immutable value. A queued job whose
model moves on is done for the newer revision when its region is the same there, and cancelled when
it is not.
"""

import gc
import json
import os
import threading
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from graphopt.analysis.regions import Region
from graphopt.builder.models import ModelTable, UnknownRevisionError, Version
from graphopt.builder.records import (
    BUSY,
    CANCELLED,
    DONE,
    PROPOSE,
    RAN,
    UNKNOWN,
    Answer,
    encode_line,
)
from graphopt.builder.workshop import Workshop, is_same_region
from graphopt.executor.backends.trials import TRIALS, Trial
from graphopt.executor.threads import LoneThread

QUEUE_MAX = 64  # jobs waiting; the engine sends far fewer ahead
BEAT_S = 1.0
# After a job, before it looks ahead: what was built is compared and published meanwhile
CALM_S = 1.0
STARTS_KEPT = 64  # of a model: a region each for as many layers
_CHUNK_BYTES = 1 << 16

Message = Mapping[str, Any]


@dataclass(slots=True)
class _Job:
    """A job that waits, with the revision it is to be done for."""

    id: int
    op: str
    message: Message
    version: Version


class Server:
    """Serves one engine over a pair of descriptors until the engine is gone."""

    def __init__(self, commands: int, answers: int, workshop: Workshop) -> None:
        self._commands, self._answers = commands, answers
        self._workshop = workshop
        self._models = ModelTable()
        self._queue: deque[_Job] = deque()
        self._wake = threading.Condition()  # guards queue and models
        self._writing = threading.Lock()
        self._beating = threading.Condition()
        self._at_work: tuple[int, str] | None = None  # job and stage
        # By model: the first blocks of what was built
        self._starts: dict[str, OrderedDict[str, None]] = {}
        self._takers: dict[str, Callable[[Message], None]] = {
            "model": self._take_state,
            "delta": self._take_state,
            "samples": lambda m: self._models.set_samples(m["model"], m["files"]),
            "forget": self._forget,
            "quarantine": lambda m: self._workshop.quarantined.update(m["keys"]),
            "build": self._take_job,
            "verify_fused": self._take_job,
            "propose": self._take_job,
            "cancel": self._cancel,
        }
        TRIALS.announce, TRIALS.evidence = self._say_trial, workshop.evidence

    def run(self) -> None:
        """Never returns: the process ends when the engine closes its end of the pipe, or dies."""
        LoneThread("graphopt-builder-reader", self._read)
        LoneThread("graphopt-builder-beat", self._beat)
        self.say({"say": "ready", "torch": torch.__version__})
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._queue)
                job = self._next()
            self._work(job)
            self._look_ahead(job)

    def say(self, message: Message) -> None:
        """Writes one line to the engine."""
        line = memoryview(encode_line(message))
        with self._writing:
            while line:
                line = line[os.write(self._answers, line) :]

    # -- taking in

    def _read(self) -> None:
        torch.set_num_threads(1)
        rest = b""
        try:
            while chunk := os.read(self._commands, _CHUNK_BYTES):
                *lines, rest = (rest + chunk).split(b"\n")
                for message in map(json.loads, lines):
                    with self._wake:
                        self._takers[message["op"]](message)
                        self._wake.notify()
        except BaseException:
            traceback.print_exc()
            os._exit(1)  # deaf: the engine is to start another one
        os._exit(0)  # the engine is gone; a job may be deep in native code

    def _take_state(self, message: Message) -> None:
        name, revision = message["model"], message["revision"]
        try:
            if message["op"] == "model":
                self._models.load(name, revision, message["text"], message["files"])
            else:
                self._models.revise(
                    name, message["since"], revision, message["delta"], message["files"]
                )
        except UnknownRevisionError as error:
            self.say({"say": "unknown", "model": name, "revision": revision, "reason": str(error)})
            return
        self.say({"say": "synced", "model": name, "revision": revision})
        version = self._models.current(name)
        assert version is not None
        for job in [job for job in self._queue if job.message["model"] == name]:
            self._move_on(job, version)

    def _take_job(self, message: Message) -> None:
        id, name, revision = message["job"], message["model"], message["revision"]
        if len(self._queue) >= QUEUE_MAX:
            self._answer(id, Answer(False, BUSY, f"{QUEUE_MAX} jobs wait already"))
            return
        version, current = self._models.at(name, revision), self._models.current(name)
        if version is None or current is None:
            is_old = current is not None and current.revision > revision
            stage, reason = (CANCELLED, "is gone") if is_old else (UNKNOWN, "is not here")
            self._answer(id, Answer(False, stage, f"revision {revision} of {name} {reason}"))
            return
        job = _Job(id, message["op"], message, version)
        self._queue.append(job)
        if current is not version:
            self._move_on(job, current)

    def _move_on(self, job: _Job, version: Version) -> None:
        """Brings a queued job to a newer revision, or cancels it."""
        is_same = job.op != "propose" and is_same_region(
            job.version.facts, version.facts, tuple(job.message["blocks"])
        )
        if is_same:
            job.version = version
            return
        self._queue.remove(job)
        reason = f"revision {version.revision} has made it useless"
        self._answer(job.id, Answer(False, CANCELLED, reason))

    def _cancel(self, message: Message) -> None:
        for job in [job for job in self._queue if job.id == message["job"]]:
            self._queue.remove(job)
            self._answer(job.id, Answer(False, CANCELLED, "taken back"))

    def _forget(self, message: Message) -> None:
        self._models.forget(message["model"])
        self._starts.pop(message["model"], None)
        for job in [job for job in self._queue if job.message["model"] == message["model"]]:
            self._queue.remove(job)
            self._answer(job.id, Answer(False, CANCELLED, "the model was unloaded"))

    # -- working

    def _next(self) -> _Job:
        """The next job: a proposal first, because it decides what is worth building."""
        job = next((job for job in self._queue if job.op == "propose"), self._queue[0])
        self._queue.remove(job)
        return job

    def _work(self, job: _Job) -> None:
        def watch(stage: str) -> None:
            if stage == RAN:
                self.say({"say": RAN, "job": job.id})
            with self._beating:
                self._at_work = (job.id, stage)
                self._beating.notify()

        def announce(region: Region, weights: str, version: str) -> None:
            keys = {"region": region.key, "weights": weights, "version": version}
            self.say({"say": "started", "job": job.id, **keys})

        watch(job.op)
        try:
            if job.op == "propose":
                self._propose(job)
                return
            do = self._workshop.build if job.op == "build" else self._workshop.verify_fused
            files = job.message.get("samples")
            paths = self._models.samples(job.message["model"])
            chosen = paths if files is None else tuple(map(Path, files))
            self._answer(job.id, do(job.version, job.message, chosen, announce, watch))
            # After the answer, which somebody waits for. A loaded artifact may hang in cycles of its
            # runtime's wrappers; what has been there from the start need not be looked through.
            gc.collect()
        finally:
            with self._beating:
                self._at_work = None

    def _look_ahead(self, job: _Job) -> None:
        """While nothing is to be done: what the next job will be proven on, wherever the edit is."""
        if job.op != "build":
            return
        name = job.message["model"]
        starts = self._starts.setdefault(name, OrderedDict())
        starts[job.message["blocks"][0]] = None
        starts.move_to_end(job.message["blocks"][0])
        if len(starts) > STARTS_KEPT:
            starts.popitem(last=False)
        with self._wake:
            has_job = self._wake.wait_for(lambda: self._queue, CALM_S)
            version, files = self._models.current(name), self._models.samples(name)
            if version is None:
                self._starts.pop(name, None)  # unloaded meanwhile
        if version is not None and not has_job:
            self._workshop.boundaries.look_ahead(version, starts, files, lambda: not self._queue)

    def _say_trial(self, trial: Trial | None) -> None:
        assert self._at_work is not None
        line: dict[str, Any] = {"say": "trying", "job": self._at_work[0], "trial": None}
        self.say(line if trial is None else line | {"trial": asdict(trial)})

    def _propose(self, job: _Job) -> None:
        self.say({"say": "started", "job": job.id, "region": "", "weights": "", "version": ""})
        try:
            proposal = self._workshop.propose(job.version, job.message["facts"])
        except Exception as error:  # a planner's fault must not cost the builder its models
            reason = f"{type(error).__name__}: {error}"
            self._answer(job.id, Answer(False, PROPOSE, reason))
            return
        self._answer(job.id, Answer(True, DONE, revision=job.version.revision), dict(proposal))

    def _answer(self, job: int, answer: Answer, proposal: Message | None = None) -> None:
        line: dict[str, Any] = {"say": "answer", "job": job, "answer": answer.document()}
        self.say(line if proposal is None else line | {"proposal": proposal})

    def _beat(self) -> None:
        while True:
            with self._beating:
                self._beating.wait_for(lambda: self._at_work is not None)
                self._beating.wait(BEAT_S)
                at_work = self._at_work
            if at_work is not None:
                self.say({"say": "beat", "job": at_work[0], "stage": at_work[1]})
