"""What a plan costs: the sum over its steps, measured where there is a figure, else predicted.

Deliberately absent: where measured figures are kept, and which steps a plan has.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from graphopt.analysis.facts import Facts
from graphopt.analysis.regions import Region
from graphopt.costs.model import CostModel, Prediction
from graphopt.costs.work import Sizes, Work, work_of
from graphopt.executor.backend import Options, backends, passes_of
from graphopt.rewrite import lower

MEASURED_BAND = 0.1  # a median of the same step, on another day
WORKS_KEPT = 4_096
_ROWS = "rows"  # the one rewrite that changes how much work there is


@dataclass(frozen=True, slots=True)
class StepCost:
    """What one step takes; what is not known is None."""

    predicted: Prediction | None
    measured_s: float | None


@dataclass(frozen=True, slots=True)
class PlanCost:
    """Seconds of one request, and the band in which nine of ten lie.

    Attributes:
        measured_steps: how many of the steps are measured; the others are predicted.
    """

    seconds: float
    low_s: float
    high_s: float
    steps: int
    measured_steps: int


@dataclass(frozen=True, slots=True)
class Piece:
    """One step to be priced: its work, and where and how it runs."""

    work: Work
    backend: str
    options: Options
    measured_s: float | None


def price(model: CostModel | None, pieces: Iterable[Piece]) -> list[StepCost]:
    """The steps of a plan, each within the footprint of all of them."""
    listed = list(pieces)
    footprint = sum(piece.work.footprint_bytes for piece in listed)
    found = []
    for piece in listed:
        work = piece.work.within(footprint)
        predicted = model.predict(work, piece.backend, piece.options) if model else None
        found.append(StepCost(predicted, piece.measured_s))
    return found


def total(costs: Iterable[StepCost]) -> PlanCost | None:
    """The sum; None as soon as one step is neither measured nor predictable."""
    seconds = low = high = 0.0
    steps = measured = 0
    for cost in costs:
        steps += 1
        if cost.measured_s is not None:
            measured += 1
            seconds += cost.measured_s
            low += cost.measured_s * (1 - MEASURED_BAND)
            high += cost.measured_s * (1 + MEASURED_BAND)
        elif cost.predicted is not None:
            seconds += cost.predicted.seconds
            low += cost.predicted.low_s
            high += cost.predicted.high_s
        else:
            return None
    return PlanCost(seconds, low, high, steps, measured)


class Works:
    """Works by region, sizes and backend; the least recently asked for given up first."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, tuple[int, ...], str], Work] = OrderedDict()

    def of(self, facts: Facts, region: Region, sizes: Sizes, backend: str) -> Work:
        """The work of `region` as `backend` is given it. Raises KeyError for a size it lacks."""
        key = (region.key, tuple(sizes[name] for name in region.symbols), backend)
        found = self._kept.pop(key, None)
        if found is None:
            found = as_given(facts, region, sizes, backend)
        self._kept[key] = found
        while len(self._kept) > WORKS_KEPT:
            self._kept.popitem(last=False)
        return found


def as_given(facts: Facts, region: Region, sizes: Sizes, backend: str) -> Work:
    """The work of a region after the rewrites that change how much there is, under its own key."""
    runtime = backends().get(backend)
    passes = passes_of(runtime) if runtime is not None else {}
    if _ROWS not in passes:
        return work_of(facts, region, sizes)
    lowered = lower(facts, region, {_ROWS: passes[_ROWS]})
    found = work_of(lowered.facts, lowered.region, sizes)
    return Work(region.key, found.sizes, found.kernels, found.footprint_bytes)
