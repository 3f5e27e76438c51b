"""What each block costs on each way of running it, by the cost model; a structure is priced once.

A block of a plan is priced within the footprint of the plan, since the other blocks push it out of the
caches. That footprint changes a little with every delta; prices are made for classes of it, and stand
as long as its class does. Deliberately absent: measuring, and choosing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, log2

from graphopt.analysis.facts import Facts
from graphopt.analysis.regions import Region
from graphopt.costs.model import CostModel
from graphopt.costs.op_work import CONVOLUTION, DEPTHWISE, LINEAR
from graphopt.costs.plan_cost import Works
from graphopt.costs.work import Work
from graphopt.executor.backend import Backend, Options
from graphopt.kept import Kept
from graphopt.planner.block_table import Prices
from graphopt.planner.support import Support

PRICES_KEPT = 4_096  # structures, about 1 kB each
CLASSES_AN_OCTAVE = 4  # of footprint: bandwidth changes by a few percent from one to the next
EAGER, FUSED = "eager", "fused"
_FUSES = frozenset({LINEAR, CONVOLUTION, DEPTHWISE})


Priced = tuple[str, tuple[int, ...], int]  # structure, sizes of its symbols, class of footprint


@dataclass(frozen=True, slots=True)
class Way:
    """One way of running a region: a backend with options, sizes left open."""

    backend: Backend
    options: Options


class Pricing:
    """The prices of blocks under one cost model as it is now, at one set of sizes.

    What the model learns or reloads afterwards takes another Pricing.
    """

    def __init__(
        self, model: CostModel, ways: Sequence[Way], live: Options, sizes: Mapping[str, int]
    ) -> None:
        """Asks the model only what it costs to call.

        Args:
            model: asked for every structure once.
            ways: those that it knows nothing about are left out.
            live: how the live path's steps run.
            sizes: of the graph's symbols by name.
        """
        self.sizes = dict(sizes)
        self._model = model
        self._live = live
        self._works = Works()
        self._prices: Kept[Priced, Prices] = Kept(PRICES_KEPT)
        nothing = Work("", (), (), 1)
        self.ways = [
            way for way in ways if model.predict(nothing, way.backend.name, way.options) is not None
        ]
        self.is_possible = all(
            model.predict(nothing, tier, live) is not None for tier in (EAGER, FUSED)
        )

    def footprint(self, facts: Facts, region: Region) -> int:
        """Bytes that a run of a region goes through."""
        return self._works.of(facts, region, self.sizes, EAGER).footprint_bytes

    def of(self, facts: Facts, region: Region, class_: int) -> Prices:
        """The prices of a region in a plan whose footprint is of that class.

        Raises KeyError naming a symbol that `sizes` lacks.
        """
        key = self.priced(region, class_)
        found = self._prices.get(key)
        if found is None:
            found = self._prices[key] = self._price(facts, region, bytes_of(class_))
        return found

    def priced(self, region: Region, class_: int) -> Priced:
        """What a price is told by. A key says which dims are alike, not how large they are."""
        return (region.key, tuple([self.sizes[name] for name in region.symbols]), class_)

    def _price(self, facts: Facts, region: Region, within: int) -> Prices:
        own = self._works.of(facts, region, self.sizes, EAGER)
        tier = FUSED if _FUSES & own.by_class.keys() else EAGER
        live_call_s, live_s = self._seconds(own, tier, self._live, within)
        calls, bodies = [], []
        for way in self.ways:
            name = way.backend.name
            work = self._works.of(facts, region, self.sizes, name)
            call_s, body_s = self._seconds(work, name, way.options, within)
            is_able = Support(facts, way.backend.unsupported).takes(region)
            calls.append(call_s)
            bodies.append(body_s if is_able else inf)
        return Prices(live_call_s, live_s, tuple(calls), tuple(bodies), own.footprint_bytes)

    def _seconds(
        self, work: Work, backend: str, options: Options, within: int
    ) -> tuple[float, float]:
        """Of a call, and of the work beside it."""
        call = self._model.predict(Work("", (), (), within), backend, options)
        both = self._model.predict(work.within(within), backend, options)
        if call is None or both is None:
            raise ValueError(f"the cost model knows {backend} and does not predict it")
        return call.objective_s, max(0.0, both.objective_s - call.objective_s)


def class_of(footprint_bytes: int) -> int:
    """The class that a footprint is of."""
    return round(CLASSES_AN_OCTAVE * log2(max(1, footprint_bytes)))


def bytes_of(class_: int) -> int:
    """The footprint that stands for a class."""
    return int(2.0 ** (class_ / CLASSES_AN_OCTAVE))
