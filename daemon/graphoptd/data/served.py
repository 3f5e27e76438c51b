"""What the data plane needs from the engine, and nothing more.

The engine implements `Served` and `Directory`; tests implement them by hand. Every method but
`Directory.load` and `Directory.unload` is called on the event loop, and must return at once but for
`Served.run`.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from time import perf_counter_ns, thread_time_ns
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """An input or output of a model.

    Attributes:
        name: as the client writes it.
        datatype: the protocol's name, a key of `datatypes.DATATYPES`.
        shape: -1 where the dim is variable.
        batch_dim: dim 0 counts independent rows: requests may be concatenated along it, and rows of
            the result belong to the rows of the inputs in order.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    batch_dim: bool = False


@dataclass(frozen=True, slots=True)
class Signature:
    """The interface of one revision of a model."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    revision: int


class Result(Protocol):
    """What one run returned: its outputs, and which revision and plan they come from."""

    @property
    def outputs(self) -> Mapping[str, torch.Tensor]:
        """Tensors by output name. They belong to the caller: the engine writes to them no more."""
        ...

    @property
    def revision(self) -> int:
        """The revision that ran."""
        ...

    @property
    def plan_id(self) -> str:
        """The plan that ran."""
        ...


@dataclass(slots=True)  # not frozen: one is made for each run, and freezing triples the cost
class Timed:
    """A result, and what its run took on the thread that did it.

    Attributes:
        result: what it returned.
        cpu_ns: CPU time of that thread.
        wall_ns: from its start to its end; waiting for a thread is not in it.
    """

    result: Result
    cpu_ns: int
    wall_ns: int


def timed(
    run: Callable[[dict[str, torch.Tensor]], Result], inputs: dict[str, torch.Tensor]
) -> Timed:
    """Runs `run(inputs)` in this thread and measures it."""
    started_ns, started_cpu_ns = perf_counter_ns(), thread_time_ns()
    result = run(inputs)
    return Timed(result, thread_time_ns() - started_cpu_ns, perf_counter_ns() - started_ns)


class Served(Protocol):
    """One live model."""

    @property
    def name(self) -> str:
        """Its name in URLs."""
        ...

    def signature(self) -> Signature:
        """The interface of the current revision.

        The same object while the revision stays: it is indexed once.
        """
        ...

    def capacity(self) -> int:
        """How many submitted runs execute at the same time at most, at least 1."""
        ...

    def queue_max(self) -> int | None:
        """How many requests may wait for it; None: as many as `DataSettings` says. Asked once."""
        ...

    def plan_id(self) -> str:
        """The published plan: what a run that begins now uses."""
        ...

    def run(self, inputs: dict[str, torch.Tensor]) -> Result:
        """Do one run on the current revision, here and now; bit for bit what `submit` would give.

        The only method that takes its time: it is called for runs known to be quick (`inline`).

        Raises:
            GraphoptError: the inputs do not fit.
        """
        ...

    def submit(self, inputs: dict[str, torch.Tensor]) -> Future[Timed]:
        """Queue one run on the current revision; never blocks. The future may be done already.

        The future is never cancelled by the data plane. The inputs belong to the engine from here
        on; they may alias each other's storage and must not be written to.

        Raises:
            GraphoptError: the run cannot be accepted (`BusyError`, `RequestError`,
                `ModelNotFoundError`).
        """
        ...


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One row of the repository index.

    Attributes:
        name: the model.
        revision: the current one, None when nothing is loaded.
        state: READY, LOADING, UNLOADING or UNAVAILABLE.
        reason: why it is not READY, else empty.
    """

    name: str
    revision: int | None
    state: str
    reason: str = ""


class Directory(Protocol):
    """All models."""

    def find(self, name: str) -> Served | None:
        """The live model of that name; the same object until it is unloaded or replaced."""
        ...

    def index(self) -> Sequence[IndexEntry]:
        """Every model known, loaded or loadable."""
        ...

    def ready(self) -> bool:
        """True when the journal is recovered and every loaded model serves."""
        ...

    def load(self, name: str, bundle: str) -> None:
        """Load `bundle` (one name inside `repository:`, never a path) as `name`. Blocks; called off the loop.

        Raises:
            GraphoptError: `ModelNotFoundError` when there is no such bundle, and whatever loading
                may raise.
        """
        ...

    def unload(self, name: str) -> None:
        """Unload `name`; a name that is not loaded is no error. Blocks; called off the loop.

        Raises:
            GraphoptError: the model cannot be unloaded.
        """
        ...
