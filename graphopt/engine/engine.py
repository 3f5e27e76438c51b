"""The engine as a library: one graph, live in this process."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from graphopt.costs.model import CostModel
from graphopt.delta import Delta
from graphopt.delta_document import decode_delta
from graphopt.documents import from_value, load_json, load_yaml
from graphopt.engine.drawing import draw
from graphopt.engine.explain import Explanation, explain
from graphopt.engine.files import FolderResources
from graphopt.engine.host import Host
from graphopt.engine.records import Applied, DryRun, EngineSettings, Result, RevisionInfo
from graphopt.errors import DocumentError, ModelNotFoundError
from graphopt.executor.publish import Answer
from graphopt.executor.seats import Seats
from graphopt.graph import Graph
from graphopt.signature import Signature, signature_of

DeltaLike = Delta | Mapping[str, Any] | str | os.PathLike[str]


class Engine:
    """A live graph: call it like the module it came from, edit it while it runs.

    `graph` None takes up what `state_dir` holds. With both, a state folder that has the model
    already wins: its deltas are not lost by starting the same program again. `cost_model` None takes
    the installed default. A context manager.
    Raises StateError subclasses and TypeMismatchError.
    """

    def __init__(
        self,
        graph: Graph | None = None,
        settings: EngineSettings | None = None,
        cost_model: CostModel | None = None,
        state_dir: str | Path | None = None,
    ) -> None:
        self.host = Host(settings, state_dir, cost_model=cost_model)
        self._signature: tuple[Graph | None, Signature | None] = (None, None)
        try:
            loaded = self.host.models()
            if graph is not None and graph.name not in loaded:
                self.model = self.host.load(graph)
            elif graph is not None:
                self.model = loaded[graph.name]
            elif len(loaded) == 1:
                self.model = next(iter(loaded.values()))
            else:
                raise ModelNotFoundError(
                    f"{len(loaded)} models in the state folder",
                    where=str(state_dir),
                    remedy="give a graph",
                )
        except BaseException:
            self.host.close()
            raise
        self._intra_op = self.model.share.each
        self._seats = Seats(self.model.share.workers, self.host.clocks.monotonic_s)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model in this thread, with the calling convention of the module it was imported
        from.

        At most `settings.threads` callers run at once, each with `settings.intra_op` torch threads, or
        as `settings.models` says of this model; the caller's own count is given back.
        """
        graph, signature = self._signature
        if graph is not self.model.graph or signature is None:
            signature = signature_of(self.model.graph)
            self._signature = (self.model.graph, signature)
        if kwargs or not signature.is_plain or len(args) != len(signature.inputs):
            inputs = signature.bind(args, kwargs)
        else:  # the common call
            inputs = dict(zip(signature.inputs, args, strict=True))
        return signature.rebuild(self._answer(inputs)[0])

    def run(self, inputs: Mapping[str, torch.Tensor]) -> Result:
        """Runs the model on inputs by name, in this thread, as a call does.

        Raises RequestError when they do not fit.
        """
        outputs, plan = self._answer(inputs)
        return Result(outputs, plan.revision, plan.id)

    def _answer(self, inputs: Mapping[str, torch.Tensor]) -> Answer:
        seats = self._seats
        seats.take()
        try:
            intra_op, own = self._intra_op, torch.get_num_threads()
            if own == intra_op:
                return self.model.answer(inputs)
            torch.set_num_threads(intra_op)
            try:
                return self.model.answer(inputs)
            finally:
                torch.set_num_threads(own)
        finally:
            seats.give()

    def apply(self, delta: DeltaLike) -> Applied:
        """Applies a delta: a `Delta`, a mapping, or the path of a YAML or JSON file.

        Live when it returns.
        """
        return self.model.apply(read_delta(delta))

    def dry_run(self, delta: DeltaLike) -> DryRun:
        """What `apply` would do, without doing it."""
        return self.model.dry_run(read_delta(delta))

    def rollback(self, revision: int) -> Applied:
        """A new revision whose graph equals that of `revision`."""
        return self.model.rollback(revision)

    def settle(self, timeout_s: float | None = None) -> bool:
        """Waits until the background has nothing better to offer; False when the time passed first."""
        return self.host.settle(timeout_s)

    def explain(self) -> Explanation:
        """The plan as it is: a record that prints as a table."""
        return explain(self.host, self.model)

    def draw(self) -> str:
        """The graph with the regions of its plan, in Graphviz's DOT language."""
        return draw(self.host, self.model)

    def history(self) -> list[RevisionInfo]:
        """The last revisions, oldest first."""
        return self.model.past.lines()

    @property
    def graph(self) -> Graph:
        """The current graph."""
        return self.model.graph

    @property
    def revision(self) -> int:
        """The current revision."""
        return self.model.revision

    def close(self) -> None:
        """Stops the engine; what was acknowledged stays in the state folder."""
        self.host.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_delta(delta: DeltaLike) -> Delta:
    """The delta that `delta` is or names; files it names are looked for beside it.

    Raises DocumentError.
    """
    if isinstance(delta, Delta):
        return delta
    if isinstance(delta, Mapping):
        return decode_delta(from_value(dict(delta), source="delta"), FolderResources(Path.cwd()))
    path = Path(delta)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DocumentError(
            f"cannot read the delta: {error.strerror}", where=str(path), remedy="check the path"
        ) from None
    load = load_json if path.suffix == ".json" else load_yaml
    return decode_delta(load(content, source=str(path)), FolderResources(path.absolute().parent))
