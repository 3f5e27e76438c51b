"""Bringing the artifacts of a plan into memory: from disk, else from the builder.

One of each structure is built before its twins, so that what cannot be built is asked for once. What
the builder found is told as events. Where they together may hold so much memory and no more, the one
that exceeds it is the last one loaded.
"""

from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from graphopt.analysis.facts import Facts
from graphopt.builder.records import UNDECIDED, Answer
from graphopt.engine.assembly import Keyed, Piece
from graphopt.engine.builder_jobs import BuildJob
from graphopt.engine.builder_link import BuilderLink
from graphopt.engine.live import LiveModel
from graphopt.engine.supply import Supply
from graphopt.executor.arrangement import ArtifactKey

REASONS_KEPT = 3  # of the failures of one plan, which are mostly one failure


@dataclass(slots=True)
class Gathering:
    """What it took.

    Attributes:
        bytes_max: of memory that the artifacts may hold beyond mapped files; None: no bound.
        build_s: wall time of all builds; None when everything was at hand.
        resident_bytes: memory that those hold that are loaded by now.
        is_decided: whether the builder had an answer to everything it was asked.
        reasons: what could not be built, loaded or proven, and why.
        asked: futures of the builder, to be cancelled when nobody waits any more.
        loaded: keys of what is in memory.
    """

    bytes_max: int | None = None
    build_s: float | None = None
    resident_bytes: int = 0
    is_decided: bool = True
    reasons: list[str] = field(default_factory=list)
    asked: "list[Future[Answer]]" = field(default_factory=list)
    loaded: set[ArtifactKey] = field(default_factory=set)

    @property
    def is_too_large(self) -> bool:
        """Whether what is loaded holds more than it may."""
        return self.bytes_max is not None and self.resident_bytes > self.bytes_max

    def take_back(self) -> None:
        """Nobody waits any more."""
        for future in self.asked:
            future.cancel()

    def count(self, supply: Supply, key: ArtifactKey) -> None:
        """Counts an artifact if it is in memory; twins may share one."""
        if key not in self.loaded and supply.loaded.find(key) is not None:
            self.loaded.add(key)
            self.resident_bytes += supply.held_bytes(key)


def gather(
    model: LiveModel,
    facts: Facts,
    link: BuilderLink,
    supply: Supply,
    keyed: Keyed,
    into: Gathering,
    meanwhile: Callable[[Keyed], None],
) -> "Generator[Future[Any], Any, None]":
    """A coroutine that waits for the builder and fills `into`; it ends early where that is too large.

    What lies on disk is loaded while the builder is at work, and `meanwhile` is called then, with what
    was asked of it. What has run in the builder is loaded while it is proven there, and runs here
    only when it was: a candidate may crash where it is proven, and must not crash here.
    """
    make_job = partial(supply.job, model.name, model.revision)  # of all waves
    missing = [entry for entry in keyed if not supply.is_at_hand(entry[1])]
    bad: set[tuple[str, str]] = set()  # structure and options: what failed once fails for twins
    first, twins = _waves(missing)
    asked = _ask(link, make_job, first, bad, into)
    if missing:
        meanwhile(missing)
    absent = {key for _, key in missing}
    lost = []  # on disk, where it did not load
    for entry in keyed:
        if entry[1] not in absent and not supply.fetch(facts, *entry):
            lost.append(entry)
        into.count(supply, entry[1])
        if into.is_too_large:
            into.take_back()
            return
    waves = [twins, *_waves(lost)]
    while asked or waves:
        for piece, key, job, future, ran in asked:
            early = supply.load_early(facts, piece, job) if (yield ran) else None
            answer: Answer = yield future
            if answer.stage in UNDECIDED:
                into.is_decided = False
            else:
                into.build_s = (into.build_s or 0.0) + (answer.build_s or 0.0)
                _tell(model, job.revision, piece, answer)
            stage, reason = answer.stage, answer.reason
            if answer.ok:
                stage, reason = "load", supply.take(facts, piece, key, job, answer, early)
            if reason:
                bad.add((key[0], key[-1]))
                into.reasons.append(f"{piece.about}: {stage}: {reason}")
            into.count(supply, key)
            if into.is_too_large:
                into.take_back()
                return
        asked = _ask(link, make_job, waves.pop(0), bad, into) if waves else []


_Asked = list[tuple[Piece, ArtifactKey, BuildJob, "Future[Answer]", "Future[bool]"]]


def _ask(
    link: BuilderLink,
    make_job: Callable[[Piece], BuildJob],
    wave: Keyed,
    bad: set[tuple[str, str]],
    into: Gathering,
) -> _Asked:
    """Has the builder build what did not fail before."""
    asked: _Asked = []
    for piece, key in wave:
        if (key[0], key[-1]) not in bad:
            job, ran = make_job(piece), Future[bool]()
            asked.append((piece, key, job, link.build(job, ran), ran))
    into.asked = [future for *_, future, _ in asked]
    return asked


def _tell(model: LiveModel, revision: int, piece: Piece, answer: Answer) -> None:
    about: dict[str, Any] = {"graph": model.name, "revision": revision, "block": piece.blocks[-1]}
    about["tier"] = piece.backend
    events = model.settings.events
    if answer.build_s is not None:
        fields = {
            "options": piece.options.label, "build_s": answer.build_s, "cpu_s": answer.cpu_s,
            "artifact_bytes": answer.artifact_bytes,
            "rewrites": _counted(answer.rewrites), "converted": _counted(answer.converted),
        }  # fmt: skip
        events("plan.built", {**about, **{k: v for k, v in fields.items() if v is not None}})
    proof = {**about, "max_error": answer.max_error, "allowed": answer.allowed}
    if answer.ok:
        events("plan.verified", proof)
    else:
        events("plan.refused", {**proof, "stage": answer.stage, "reason": answer.reason})


def _counted(pairs: tuple[tuple[str, int], ...]) -> str | None:
    return ", ".join(f"{name} {count}" for name, count in pairs) or None


def _waves(missing: Keyed) -> list[Keyed]:
    """One of each structure and options first, then their twins."""
    first: dict[tuple[str, str], tuple[Piece, ArtifactKey]] = {}
    for piece, key in missing:
        first.setdefault((key[0], key[-1]), (piece, key))
    chosen = {key for _, key in first.values()}
    return [list(first.values()), [entry for entry in missing if entry[1] not in chosen]]
