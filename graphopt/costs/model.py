"""What the engine asks of a cost model, and where it finds one.

A model predicts how long a region takes on a backend, learns from what was measured, and says where
its figures come from. What it cannot predict is None, never zero. Models register under the entry
point group `graphopt.cost_models`; the one called `default` is used where none is given.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Protocol, cast

from graphopt.costs.work import Work
from graphopt.executor.backend import Options

ENTRY_POINTS = "graphopt.cost_models"
DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds of one call, as expected, and the band in which nine of ten lie.

    `objective_s` is what choices are compared by: seconds, and what compute and memory bandwidth
    are worth beside them (the weights alpha and beta).
    """

    seconds: float
    low_s: float
    high_s: float
    objective_s: float


@dataclass(frozen=True, slots=True)
class Effective:
    """One coefficient in force: its value, unit and range, and the file that says so."""

    name: str
    value: float
    unit: str
    low: float
    high: float
    origin: str


class CostModel(Protocol):
    """Predicts and learns; called from any thread."""

    def predict(self, work: Work, backend: str, options: Options) -> Prediction | None:
        """Seconds of one call; None where nothing is known about the backend."""

    def observe(self, work: Work, backend: str, options: Options, seconds: float) -> None:
        """A median that was measured for this work; it replaces an older one of the same work."""

    def reload(self) -> Sequence[str]:
        """Reads the files again, whole or not at all; names of coefficients that changed.

        Raises DocumentError; what was in force stays so.
        """

    def effective(self) -> Sequence[Effective]:
        """Every coefficient in force, in a fixed order."""

    def assume(self, values: Mapping[str, float]) -> None:
        """Takes these coefficients, by the names of `effective`, in place of all files, and forgets
        what was observed: the builder predicts by what the engine sends it.
        """


Make = Callable[[Path | None], CostModel]


def default_model(state: Path | None) -> CostModel | None:
    """The registered default, with what was calibrated in the state folder; None where none is
    installed. Raises DocumentError when a file of it is wrong.
    """
    for entry in entry_points(group=ENTRY_POINTS, name=DEFAULT):
        return cast("Make", entry.load())(state)
    return None
