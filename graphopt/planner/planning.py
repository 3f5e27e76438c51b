"""The cheapest way to part a graph into regions and to place these, and its repair along a delta.

Every block has a table of what it costs by how its cuts are crossed; a tree of their (min, +) products
has the least time of the whole at its root, and which regions that takes. A delta makes the tables of
the blocks it touched anew, and the products above them: what is planned is what would be planned from
scratch, to the last bit, and costs the logarithm of the graph.

A plan stands for as long as the prices do: for one state of the cost model, one set of sizes, and one
class of the plan's footprint. Deliberately absent: cuts inside a block, concurrent branches, and what
several blocks in one region save beside the calls (rows that nobody reads, which `layout` sees to).
"""

from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from functools import cached_property
from math import inf

from graphopt.analysis.blocks import CONTEXT, END, START
from graphopt.analysis.facts import Facts, Update
from graphopt.executor.runs import joins
from graphopt.kept import Kept
from graphopt.planner.block_table import CUT, INSIDE, Prices, Table, table_of
from graphopt.planner.chain_tree import Before, Leaf, Tree, grown, with_leaf, without
from graphopt.planner.layout import Run, chain
from graphopt.planner.pricing import PRICES_KEPT, Priced, Pricing, Way, class_of


@dataclass(frozen=True, slots=True)
class PlannedRegion:
    """Adjacent blocks that run as one step; `way` None on the live path."""

    blocks: Run
    way: Way | None


@dataclass(frozen=True)
class Planned:
    """The plan of one revision.

    Attributes:
        facts: of the graph.
        restless: blocks that were kept out of regions because deltas keep editing them.
        seconds: what a request takes by it, as the prices say.
        whole: the way that runs everything, context values included, as one region; None for a plan
            of several regions, or without a runtime.
        footprint_class: that the prices are for.
    """

    facts: Facts
    restless: frozenset[str]
    seconds: float
    whole: Way | None
    footprint_class: int
    _ways: tuple[Way, ...]
    _tree: Tree | None
    _context: Prices | None

    @cached_property
    def regions(self) -> tuple[PlannedRegion, ...]:
        """What it is made of, in the order of the chain; context values beside them."""
        if self.whole is not None:
            return (PlannedRegion((CONTEXT, *chain(self.facts)), self.whole),)
        return tuple(self._parted())

    def _parted(self) -> Iterator[PlannedRegion]:
        following, block = self.facts.blocks.next, START
        for end, state in self._tree.chosen(CUT, CUT) if self._tree else ():
            blocks = []
            while block != end:
                block = following[block]
                blocks.append(block)
            way = self._ways[state - INSIDE] if state >= INSIDE else None
            yield PlannedRegion(tuple(blocks), way)


class Planner:
    """Plans by one set of prices."""

    def __init__(self, pricing: Pricing) -> None:
        """Raises ValueError where the prices cannot tell what the live path costs."""
        if not pricing.is_possible:
            raise ValueError("the cost model knows nothing of the live path: run calibrate")
        self.pricing = pricing
        self._tables: Kept[tuple[Priced, bool, bool], tuple[Prices, Table, int]] = Kept(PRICES_KEPT)

    def plan(self, facts: Facts, restless: Set[str] = frozenset()) -> Planned:
        """The plan of a graph, from scratch. Raises KeyError for a symbol without a size."""
        regions = facts.regions
        total = sum(self.pricing.footprint(facts, region) for region in regions.values())
        class_ = class_of(total)
        tree = grown(self._leaf(facts, block, class_, restless) for block in chain(facts))
        return self._planned(facts, restless, tree, self._context(facts, class_), class_)

    def after(self, planned: Planned, update: Update) -> Planned:
        """The plan of the graph that `update` leads to from that of `planned`."""
        facts, tree, context = update.facts, planned._tree, planned._context
        restless = planned.restless
        gone, come, stale = _touched(planned.facts, update)
        for block in gone:
            tree = without(tree, block, _before(planned.facts, block))
        tree = self._priced(tree, facts, come | stale, planned.footprint_class, restless)
        if CONTEXT in update.regions_changed | update.regions_gone:
            context = self._context(facts, planned.footprint_class)
        if class_of(_footprint(tree, context)) != planned.footprint_class:
            return self.plan(facts, restless)
        return self._planned(facts, restless, tree, context, planned.footprint_class)

    def around(self, planned: Planned, restless: Set[str]) -> Planned:
        """The plan of the same graph with these blocks, and no others, kept out of regions."""
        facts, class_ = planned.facts, planned.footprint_class
        other = {block for block in planned.restless ^ restless if block in facts.blocks.blocks}
        tree = self._priced(planned._tree, facts, other, class_, restless)
        return self._planned(facts, restless, tree, planned._context, class_)

    def _priced(
        self,
        tree: Tree | None,
        facts: Facts,
        blocks: Iterable[str],
        class_: int,
        restless: Set[str],
    ) -> Tree | None:
        """The tree with leaves made anew for these blocks."""
        for block in blocks:
            leaf = self._leaf(facts, block, class_, restless)
            tree = with_leaf(tree, leaf, _before(facts, block))
        return tree

    def _planned(
        self,
        facts: Facts,
        restless: Set[str],
        tree: Tree | None,
        context: Prices | None,
        class_: int,
    ) -> Planned:
        parted_s = float(tree.product[CUT, CUT]) if tree is not None else 0.0
        if context is not None:
            parted_s += context.live_call_s + context.live_s
        whole_s, whole = inf, None
        if tree is not None and context is not None and not restless:
            for way, call_s, body_s, chain_s in zip(
                self.pricing.ways, context.call_s, context.body_s, tree.body_s, strict=True
            ):
                if call_s + body_s + chain_s < whole_s:
                    whole_s, whole = call_s + body_s + chain_s, way
        if parted_s <= whole_s:
            whole = None
        return Planned(
            facts, frozenset(restless), min(parted_s, whole_s), whole, class_,
            tuple(self.pricing.ways), tree, context,
        )  # fmt: skip

    def _context(self, facts: Facts, class_: int) -> Prices | None:
        region = facts.regions.get(CONTEXT)
        return self.pricing.of(facts, region, class_) if region is not None else None

    def _leaf(self, facts: Facts, block: str, class_: int, restless: Set[str]) -> Leaf:
        region, entry = facts.regions[block], facts.blocks.blocks[block].entry
        is_joined, is_apart = entry != START and joins(facts, entry), block in restless
        key = (self.pricing.priced(region, class_), is_joined, is_apart)
        known = self._tables.get(key)
        if known is None:
            prices = self.pricing.of(facts, region, class_)
            table, alone = table_of(prices, is_joined=is_joined, is_apart=is_apart)
            known = self._tables[key] = (prices, table, alone)
        prices, table, alone = known
        return Leaf(block, table, alone, prices.body_s, prices.footprint_bytes)


def _footprint(tree: Tree | None, context: Prices | None) -> int:
    return (tree.footprint_bytes if tree else 0) + (context.footprint_bytes if context else 0)


def _touched(old: Facts, update: Update) -> tuple[set[str], set[str], set[str]]:
    """The blocks to be taken out, those to be put in, and those to be priced anew where they are."""
    before, after = old.blocks, update.facts.blocks
    changed = update.regions_changed | update.regions_gone | update.moved
    # What was cut anew is another object, even where it is equal, and may stand elsewhere
    gone = {
        block for block in changed
        if block in before.blocks and before.blocks[block] is not after.blocks.get(block)
    }  # fmt: skip
    come = {block for block in gone | changed if block in after.blocks}
    # Who reads the value at a cut decides whether the blocks on its two sides are joined
    stale = {after.next[value] for value in update.rewired if value in after.next}
    return gone, come, stale


def _before(facts: Facts, block: str) -> Before:
    place = _place(facts, block)
    return lambda other: _place(facts, other) < place


def _place(facts: Facts, block: str) -> tuple[int, int, str]:
    """Where a block stands in the chain; the one without an exit of its own is the last."""
    return (1, 0, "") if block == END else (0, *facts.graph.order_key(block))
