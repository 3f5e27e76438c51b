"""The engine's models, as the data plane wants them: its `Served` and `Directory` on a `Host`."""

import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from graphopt.analysis.facts import Facts
from graphopt.bundle import load_bundle
from graphopt.engine import Host, LiveModel
from graphopt.errors import ModelNotFoundError, RequestError, nearest
from graphopt.executor.threads import keep_thread_count
from graphopt.types import TensorType
from graphoptd.data import IndexEntry, Result, Signature, TensorSpec, Timed, timed
from graphoptd.data.lanes import Lane
from graphoptd.rows import RowProof

DATATYPES = {  # short dtype of the engine -> name in the protocol; complex has none there
    "f32": "FP32", "f64": "FP64", "f16": "FP16", "bf16": "BF16", "i64": "INT64", "i32": "INT32",
    "i16": "INT16", "i8": "INT8", "u8": "UINT8", "bool": "BOOL",
}  # fmt: skip
_BUNDLE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+@-]*")
_YIELD_S = 0.0001  # between two looks at a model that is being published, which takes microseconds


class Hosted:
    """A live model of the host, served under its name; `queue_max` None leaves that to the plane."""

    def __init__(
        self, host: Host, model: LiveModel, proof: RowProof, queue_max: int | None = None
    ) -> None:
        self.name = model.name
        self.model = model
        self._host = host
        self._queue_max = queue_max
        self._proof = proof
        self._signature = self._describe(*self._current())

    def signature(self) -> Signature:
        """The interface of the current revision; the same object while the revision stays."""
        if self.model.revision != self._signature.revision:
            facts, revision = self._current()
            made = self._describe(facts, revision)
            same = (made.inputs, made.outputs) == (self._signature.inputs, self._signature.outputs)
            # Most deltas leave the interface alone; the parts compare equal then and are shared.
            kept = self._signature if same else made
            self._signature = Signature(kept.inputs, kept.outputs, revision)
        return self._signature

    def capacity(self) -> int:
        """Its requests at once at most; the CPUs for them it shares with all models."""
        return self.model.share.workers

    def queue_max(self) -> int | None:
        """As its configuration says."""
        return self._queue_max

    def plan_id(self) -> str:
        """The published plan."""
        return self.model.slot.plan.id

    def run(self, inputs: dict[str, torch.Tensor]) -> Result:
        """Do one run in this thread, with as many torch threads as an executor thread would use.

        The count is the calling thread's own, and it must be theirs: a sum over 300,000 elements,
        17 us, gives other last bits when it is split in two. What is too small to be split starts
        no threads whatever the count. RequestError when the inputs do not fit.
        """
        keep_thread_count(self.model.share.each)
        return self.model.run(inputs)

    def submit(self, inputs: dict[str, torch.Tensor]) -> "Future[Timed]":
        """Queue one run on an executor thread, and measure it there."""
        return self._host.threads.submit(lambda: timed(self.model.run, inputs), self.model.share)

    def _current(self) -> tuple[Facts, int]:
        """Facts and revision that belong together: a delta stores one, then the other."""
        while True:
            facts, plan = self.model.facts, self.model.slot.plan
            if facts.graph is plan.graph:
                return facts, plan.revision
            time.sleep(_YIELD_S)

    def _describe(self, facts: Facts, revision: int) -> Signature:
        batched = self._proof.batch_symbol(facts) is not None
        graph = facts.graph
        inputs = tuple(_spec(name, type_, batched) for name, type_ in graph.inputs)
        outputs = tuple(_spec(name, facts.type_of(ref), batched) for name, ref in graph.outputs)
        return Signature(inputs, outputs, revision)


class HostDirectory:
    """Every model of a host.

    Args:
        host: the models.
        repository: the folder that `load` takes bundles from, or None; asked at every load because
            a reload may change it.
        queue_max: requests that may wait for the model of that name; None where nobody has said.
    """

    def __init__(
        self,
        host: Host,
        repository: Callable[[], Path | None],
        queue_max: Callable[[str], int | None] = lambda _: None,
    ) -> None:
        self._host = host
        self._repository = repository
        self._queue_max = queue_max
        self._proof = RowProof()
        self._hosted: dict[str, Hosted] = {}
        self._lock = threading.Lock()
        self._opened = False

    def open(self) -> None:
        """From here on `ready` may be true: the journal is recovered and the models have run."""
        self._opened = True

    def find(self, name: str) -> Hosted | None:
        """The live model of that name; the same object until it is unloaded or replaced."""
        model = self._host.models().get(name)
        hosted = self._hosted.get(name)
        if model is None:
            self._hosted.pop(name, None)
            return None
        if hosted is None or hosted.model is not model:
            try:
                queue_max = self._queue_max(name)
                hosted = self._hosted[name] = Hosted(self._host, model, self._proof, queue_max)
            except RequestError:
                return None  # `index` says why
        return hosted

    def index(self) -> Sequence[IndexEntry]:
        """Every live model, then the bundles of the repository that are not loaded."""
        live = self._host.models()
        return [_entry(live[name]) for name in sorted(live)] + [
            IndexEntry(name, None, "UNAVAILABLE", "not loaded")
            for name in _bundles(self._repository())
            if name not in live
        ]

    def ready(self) -> bool:
        """True once `open` was called: models are served from the moment they are loaded."""
        return self._opened

    def load(self, name: str, bundle: str) -> None:
        """Load a bundle of the repository as `name`; a name that is live stays as it is, edits and all.

        Raises:
            ModelNotFoundError: there is no repository, or no such bundle in it.
            BundleError: the bundle cannot be loaded.
        """
        with self._lock:
            if name in self._host.models():
                return
            self._host.load(load_bundle(self._bundle_path(bundle)), name)

    def unload(self, name: str) -> None:
        """Unload `name`; nothing when it is not loaded."""
        with self._lock:
            if name in self._host.models():
                self._host.unload(name)

    def _bundle_path(self, bundle: str) -> Path:
        repository = self._repository()
        if repository is None:
            raise ModelNotFoundError(
                "no folder of bundles is configured", where=bundle, remedy="set repository"
            )
        path = repository / bundle
        if not _BUNDLE_NAME.fullmatch(bundle) or not path.is_dir() or path.is_symlink():
            names = _bundles(repository)
            raise ModelNotFoundError(
                "no bundle of that name in the repository",
                where=bundle,
                remedy=nearest(bundle, names) or f"there are {', '.join(names[:8]) or 'none'}",
            )
        return path


def figures_of(lane: Lane) -> dict[str, Any]:
    """A model's requests since the start, for people; means are absent before the first answer."""
    found = lane.statistics
    figures: dict[str, Any] = {
        "answered": found.answered,
        "failed": found.failed,
        "waiting": lane.batcher.n_queued,
    }
    if found.answered:
        figures["mean_ms"] = round(found.total_ns / found.answered / 1e6, 3)
        figures["mean_queue_ms"] = round(found.queue_ns / found.answered / 1e6, 3)
    if found.executions:
        figures["rows_a_run"] = round(found.rows / found.executions, 2)
    return figures


def _bundles(repository: Path | None) -> list[str]:
    try:
        entries = sorted(repository.iterdir()) if repository is not None else []
    except OSError:
        return []
    return [e.name for e in entries if _BUNDLE_NAME.fullmatch(e.name) and e.is_dir()]


def _entry(model: LiveModel) -> IndexEntry:
    try:
        for name, type_ in model.graph.inputs:
            _spec(name, type_, False)
        for name, ref in model.graph.outputs:
            _spec(name, model.facts.type_of(ref), False)
    except RequestError as error:
        return IndexEntry(model.name, model.revision, "UNAVAILABLE", str(error))
    return IndexEntry(model.name, model.revision, "READY")


def _spec(name: str, type_: object, batched: bool) -> TensorSpec:
    assert isinstance(type_, TensorType)
    datatype = DATATYPES.get(type_.dtype)
    if datatype is None:
        raise RequestError(
            f"the protocol has no type for {type_.dtype}", where=name, remedy="use graphopt.Engine"
        )
    shape = tuple(dim if isinstance(dim, int) else -1 for dim in type_.shape)
    return TensorSpec(name, datatype, shape, batched)
