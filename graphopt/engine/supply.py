"""Artifacts on their way into the serving process: from disk where they lie already, else from the
builder.

What is loaded stays on a shelf in memory while a plan uses it, and a while longer within a bound;
what was built stays on disk within another. Loading compiles nothing (law 5). Every method is called
on the background thread.
"""

import json
import shutil
from collections import deque
from collections.abc import Set
from pathlib import Path
from typing import NamedTuple

from graphopt.analysis.facts import Facts
from graphopt.builder.records import Answer
from graphopt.engine.artifact_entry import Verified, name_of
from graphopt.engine.artifacts import ArtifactCache
from graphopt.engine.assembly import Keyed, Piece, artifact_key
from graphopt.engine.builder_jobs import BuildJob
from graphopt.engine.fingerprint import host_fingerprint
from graphopt.engine.heap import Heap
from graphopt.engine.live import Clocks
from graphopt.engine.measured import Cost, CostKey, KnownPlan, Measured
from graphopt.engine.records import EngineSettings, ModelLimits
from graphopt.engine.shelf import Candidate, Shelf
from graphopt.errors import GraphoptError
from graphopt.executor.arrangement import ArtifactKey, Runs, is_adjacent
from graphopt.executor.backend import BackendMissingError, BuildError, backends, options_of
from graphopt.executor.runs import run_region

# Of loaded artifacts that no plan with a role runs: they lie on disk, 50 ms away, so hardly any.
UNUSED_BYTES_MAX = 16 << 20


class Recalled(NamedTuple):
    """What ran before, loaded. `is_whole`: for this very graph; else what of it still fits."""

    label: str
    keyed: Keyed
    is_whole: bool


class Supply:
    """The artifacts of one process."""

    def __init__(self, folder: Path, settings: EngineSettings, clocks: Clocks) -> None:
        self.loaded = Shelf(UNUSED_BYTES_MAX)
        self.heap = Heap(clocks.monotonic_s)
        self._settings = settings
        self._versions: dict[str, str] | None = None
        self._pinned: set[ArtifactKey] = set()
        self._unstored: deque[tuple[ArtifactKey, Path, Verified]] = deque()
        host = host_fingerprint()
        self._measured = Measured(
            folder, host, clocks.wall_s, lambda reason: self._dropped("measured", reason)
        )
        self._cache = ArtifactCache(
            folder, host, bytes_max=settings.artifacts_bytes_max, on_drop=self._dropped,
            is_wanted=lambda name: name in map(name_of, self._measured.wanted()),
        )  # fmt: skip

    def versions(self) -> dict[str, str]:
        """The backends that are there, with their versions; a missing one is said once."""
        if self._versions is None:
            self._versions = {}
            allowed = self._settings.backends
            for name, backend in backends().items():
                if allowed is not None and name not in allowed:
                    continue
                try:
                    self._versions[name] = backend.version()
                except BackendMissingError as missing:
                    self._settings.events(
                        "backend.missing", {"backend": name, "reason": str(missing)}
                    )
        return self._versions

    def offered(self) -> tuple[str, ...]:
        """Names of the backends that may be used, whether or not their library is there."""
        allowed = self._settings.backends
        return tuple(name for name in backends() if allowed is None or name in allowed)

    def job(self, model: str, revision: int, piece: Piece) -> BuildJob:
        """The job that makes an artifact, in a fresh folder."""
        folder = self._cache.new_folder()
        return BuildJob(model, revision, piece.blocks, piece.backend, piece.options, folder)

    def is_at_hand(self, key: ArtifactKey) -> bool:
        """Whether the artifact need not be built: it is loaded, or lies on disk."""
        return self.loaded.find(key) is not None or key in self._cache

    def fetch(self, facts: Facts, piece: Piece, key: ArtifactKey) -> bool:
        """Whether the artifact is in memory now: it was, or it was loaded from disk."""
        if self.loaded.find(key) is not None:
            return True
        found = self._cache.find(key)
        if found is None:
            return False
        try:
            self._shelve(key, _loaded(facts, piece, found.folder))
        except GraphoptError as error:
            self._cache.drop(key, f"it does not load: {error}")
            return False
        return True

    def load_early(self, facts: Facts, piece: Piece, job: BuildJob) -> Candidate | None:
        """What the builder made and is at proving, for `take`; nobody else sees it before. None where
        it does not load, which `take` will say.
        """
        try:
            return _loaded(facts, piece, job.folder)
        except GraphoptError:
            return None

    def take(
        self,
        facts: Facts,
        piece: Piece,
        key: ArtifactKey,
        job: BuildJob,
        answer: Answer,
        early: Candidate | None = None,
    ) -> str:
        """Loads what the builder made and proved; the reason when that cannot be done.

        `store` keeps it on disk: a plan need not wait until it is synced. `early` is what was loaded
        before it was proven.
        """
        try:
            self._shelve(key, early or _loaded(facts, piece, job.folder))
        except GraphoptError as error:
            shutil.rmtree(job.folder, ignore_errors=True)
            return str(error)
        verified = Verified(answer.max_error, answer.allowed, answer.n_samples)
        self._unstored.append((key, job.folder, verified))
        return ""

    def store(self) -> None:
        """Keeps on disk what was taken and remembered since the last call; an artifact that does not
        fit is told, and runs.
        """
        while self._unstored:
            key, folder, verified = self._unstored.popleft()
            try:
                self._cache.put(key, folder, verified)
            except GraphoptError as error:
                self._dropped(name_of(key), str(error))
        self._measured.save()

    def recall(
        self, model: str, facts: Facts, limits: ModelLimits, *, resumes: bool
    ) -> Recalled | None:
        """What ran for this very graph, loaded; None when it is not known, not at hand, or made for
        other limits.

        `resumes`: this process has not run the model yet. Where nothing is known of the graph, it is
        what ran last but for what no longer fits: a delta changed it in the moment before the end.
        """
        known = self._measured.recall(model, facts.graph.hash)
        is_whole = known is not None
        if known is None and resumes:
            known = self._measured.latest(model)
        if known is None:
            return None
        keyed: Keyed = []
        held: dict[ArtifactKey, int] = {}
        for blocks, key in known.steps:
            piece = Piece(blocks, key[2], options_of(json.loads(key[4])))
            is_there = self.versions().get(piece.backend) == key[3]
            if not is_there or not _is_built_for(limits, piece):
                return None
            if not _is_of(facts, piece, key) or not self.fetch(facts, piece, key):
                if is_whole:
                    return None
                continue
            keyed.append((piece, key))
            held[key] = self.held_bytes(key)
            if limits.memory_bytes_max is not None and sum(held.values()) > limits.memory_bytes_max:
                return None
        return Recalled(known.label, keyed, is_whole)

    def remember(self, model: str, facts: Facts, label: str, runs: Runs) -> None:
        """Notes what runs for this graph, for `recall` in this process and, once `store` has written
        it, in a later one.
        """
        self._measured.remember(model, facts.graph.hash, KnownPlan(label, runs))

    def forget(self, model: str, label: str, family: str) -> None:
        """A way of running a model was taken back (see `Measured.forget`), and with it what is known of
        its family.
        """
        self._measured.forget(model, label)
        self._measured.disprove(family)
        self._measured.save()

    def proven(self, label: str) -> frozenset[str]:
        """Kinds of regions that a way of running was chosen with on this host."""
        return self._measured.proven(label)

    def prove(self, label: str, kinds: frozenset[str]) -> None:
        """That way of running was chosen with regions of these kinds."""
        self._measured.prove(label, kinds)

    def cost(self, key: CostKey) -> Cost | None:
        """What was measured for a region on this host; any thread may ask."""
        return self._measured.cost(key)

    def note_cost(self, key: CostKey, median_s: float, runs: int) -> None:
        """Keeps a measured cost; `close` and `store` write it."""
        self._measured.note_cost(key, median_s, runs)

    def held_bytes(self, key: ArtifactKey) -> int:
        """Memory that an artifact holds beyond mapped files; 0 while it is not loaded."""
        found = self.loaded.find(key)
        return found.size_bytes if found is not None else 0

    def release(self, key: ArtifactKey) -> None:
        """Lets go of an artifact that no plan runs; it stays on disk."""
        self.heap.freed(self.held_bytes(key))
        self.loaded.drop(key)
        self._unpin_gone()

    def trim(self, used: Set[ArtifactKey]) -> bool:
        """Lets go of one artifact that no plan with a role runs; False when there is none to spare.

        One at a time: a runtime holds the GIL while it is torn down, 30 ms for a large region.
        """
        gone = self.loaded.trim(used.__contains__, 1)
        if not gone:
            return False
        self.heap.freed(sum(gone))
        self._unpin_gone()
        return True

    def close(self) -> None:
        """Writes what was built and learned."""
        self.store()
        self._measured.save()

    def _shelve(self, key: ArtifactKey, candidate: Candidate) -> None:
        self.loaded.put(key, candidate)
        if key not in self._pinned:
            self._pinned.add(key)
            self._cache.pin(key)

    def _unpin_gone(self) -> None:
        for key in self._pinned - self.loaded.keys():
            self._pinned.discard(key)
            self._cache.unpin(key)

    def _dropped(self, name: str, reason: str) -> None:
        self._settings.events("artifact.dropped", {"artifact": name, "reason": reason})


def _loaded(facts: Facts, piece: Piece, folder: Path) -> Candidate:
    """The artifact in `folder`. Raises GraphoptError."""
    region = run_region(facts, piece.blocks)
    constants = [facts.graph.constants[name].tensor for name in region.consts]
    try:
        loaded = backends()[piece.backend].load(folder, constants, piece.options)
    except GraphoptError:
        raise
    except Exception as error:  # of a runtime, whose own errors a backend may not know all of
        raise BuildError(f"{type(error).__name__}: {error}", where=piece.about) from error
    return Candidate(piece.backend, loaded.function, (), loaded.resident_bytes)


def _is_of(facts: Facts, piece: Piece, key: ArtifactKey) -> bool:
    """Whether the artifact computes what the blocks of the piece compute in this graph, as one run."""
    if any(block not in facts.regions for block in piece.blocks):
        return False
    return is_adjacent(facts, piece.blocks) and artifact_key(facts, piece, key[3]) == key


def _is_built_for(limits: ModelLimits, piece: Piece) -> bool:
    """Whether an artifact expects as many threads and calls at once as a model may have."""
    options, budget = piece.options, limits.budget
    return options.threads <= budget.each and options.streams == budget.workers
