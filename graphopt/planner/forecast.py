"""What the ways of running a graph would take, as a cost model says that was sent with the request.

The cheapest plan is kept with the prices it was made by, and repaired along the deltas that came since
as long as the prices stand: for the same coefficients and sizes, and until more than a quarter of the
steps that run were measured to take something else than what the prices were corrected by.
Deliberately absent: what is proposed because of it.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from math import inf
from typing import Any

from graphopt.analysis.blocks import CONTEXT, START
from graphopt.analysis.facts import Facts, Update
from graphopt.costs.model import CostModel, default_model
from graphopt.costs.plan_cost import as_given
from graphopt.executor.backend import Backend, Options, options_of
from graphopt.executor.runs import joins, run_region
from graphopt.planner.block_table import Prices
from graphopt.planner.layout import Run
from graphopt.planner.planning import Planned, Planner
from graphopt.planner.pricing import Pricing, Way, bytes_of, class_of

SAME_COST = 1.05  # times as long as before, or the inverse: an older measurement still stands
# Of the steps that run. A delta makes one step new, and a noisy host moves another; either would have
# every price made anew for nothing, while somebody waits for the proposal.
SAME_SHARE = 0.75

Document = Mapping[str, Any]
Samples = dict[tuple[str, str, str], float]
Placed = tuple[Run, str, int]  # on a backend, with so many threads


@dataclass(frozen=True)
class Forecast:
    """The cheapest plan of one graph, and the prices for any other.

    Attributes:
        planner: with the prices.
        planned: the cheapest plan.
        basis: the coefficients, sizes and ways that it is made by.
        samples: seconds that were measured, by structure, backend and options.
    """

    planner: Planner
    planned: Planned
    basis: object = field(repr=False)
    samples: Samples = field(repr=False)

    def seconds(self, placed: Iterable[Placed]) -> float | None:
        """What a request takes with these runs where they are placed, and the rest on the live path.

        None where the model knows nothing about a place, or one cannot run its run.
        """
        facts, prices, total, covered = self.planned.facts, self._prices, 0.0, set[str]()
        for run, backend, threads in placed:
            k = self._places.get((backend, threads))
            if k is None:
                return None
            covered.update(run)
            parts = [prices[block] for block in run]
            total += parts[0].call_s[k] + sum([part.body_s[k] for part in parts])
        if len(covered) < len(prices):
            for block, price in prices.items():
                if block not in covered:
                    entry = facts.blocks.blocks[block].entry if block != CONTEXT else START
                    is_joined = entry != START and joins(facts, entry)
                    total += price.live_s + (0.0 if is_joined else price.live_call_s)
        return total if total < inf else None

    @cached_property
    def _prices(self) -> dict[str, Prices]:
        """Of each block."""
        of, class_ = self.planner.pricing.of, self.planned.footprint_class
        facts = self.planned.facts
        return {block: of(facts, region, class_) for block, region in facts.regions.items()}

    @cached_property
    def _places(self) -> dict[tuple[str, int], int]:
        ways = self.planner.pricing.ways
        return {(way.backend.name, way.options.threads): k for k, way in enumerate(ways)}


def make_forecast(
    facts: Facts,
    document: Document,
    ways: Sequence[tuple[Backend, int]],
    before: Forecast | None = None,
    changes: Sequence[Update] = (),
) -> Forecast | None:
    """The forecast of a graph; None where no model knows what the live path costs.

    Args:
        facts: of the graph.
        document: as `propose` takes it; `costs` has `coefficients` by name, `sizes` of the graph's
            symbols, and `samples`, each `[blocks, backend, options, seconds]` of a step that runs.
        ways: backends and thread counts to be considered.
        before: of an earlier revision, to be repaired where it still stands.
        changes: what led from there to here.
    """
    costs = document.get("costs")
    if not costs:
        return None
    basis = _basis(document, ways)
    restless = frozenset(block for block in document["restless"] if block in facts.regions)
    samples = _samples(facts, costs)
    if before is not None and before.basis == basis and _stand(before.samples, samples):
        planned = before.planned
        for change in changes:
            planned = before.planner.after(planned, change)
        if planned.restless != restless:
            planned = before.planner.around(planned, restless)
        return Forecast(before.planner, planned, basis, before.samples)
    model = default_model(None)
    if model is None:
        return None
    model.assume(costs["coefficients"])
    listed = [Way(backend, Options(threads, document["streams"])) for backend, threads in ways]
    live = Options(document["threads"], document["streams"])
    pricing = Pricing(model, listed, live, costs["sizes"])
    if not pricing.is_possible:  # a host that was never calibrated
        return None
    _teach(model, facts, costs)  # before anything is priced
    planner = Planner(pricing)
    return Forecast(planner, planner.plan(facts, restless), basis, samples)


def _basis(document: Document, ways: Sequence[tuple[Backend, int]]) -> object:
    costs = document["costs"]
    return (
        dict(costs["coefficients"]), dict(costs["sizes"]), document["threads"], document["streams"],
        [(backend.name, threads) for backend, threads in ways],
    )  # fmt: skip


def _samples(facts: Facts, costs: Document) -> Samples:
    found: Samples = {}
    for blocks, backend, options, seconds in costs["samples"]:
        with suppress(KeyError):  # of a step that a delta has replaced
            region = run_region(facts, tuple(blocks))
            found[region.key, backend, options_of(options).label] = seconds
    return found


def _stand(before: Samples, now: Samples) -> bool:
    """Whether what was measured since says nothing new."""
    same = [
        1 / SAME_COST <= seconds / before.get(key, inf) <= SAME_COST for key, seconds in now.items()
    ]
    return same.count(True) >= SAME_SHARE * len(same)


def _teach(model: CostModel, facts: Facts, costs: Document) -> None:
    """What was measured, each within the footprint of all of it."""
    works = []
    for blocks, backend, options, seconds in costs["samples"]:
        with suppress(KeyError):
            region = run_region(facts, tuple(blocks))
            work = as_given(facts, region, costs["sizes"], backend)
            works.append((work, backend, options_of(options), seconds))
    within = bytes_of(class_of(sum(work.footprint_bytes for work, *_ in works)))
    for work, backend, options, seconds in works:
        model.observe(work.within(within), backend, options, seconds)
