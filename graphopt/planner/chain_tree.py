"""The blocks of a chain in a balanced tree of (min, +) products: an edit costs the path to its block.

A treap whose priorities are hashes of the blocks' names (Seidel and Aragon, "Randomized search trees",
1996): its shape is a function of the blocks and their order, not of how they came, so a tree that was
edited and one built at once hold the same products to the last bit. Nodes are immutable and shared
between revisions; products and choices are made when first asked for, and kept with the node.

Deliberately absent: what the tables mean (`block_table`), and where the order comes from.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from operator import add
from typing import NamedTuple
from zlib import crc32

import numpy as np

from graphopt.planner.block_table import CUT, Table, product, unit

Before = Callable[[str], bool]
"""Whether the block of that name lies before the place that is looked for."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """One block of a chain.

    Attributes:
        block: its name.
        table: see `block_table`.
        alone: the state it is in if both its cuts are crossed in CUT.
        body_s: seconds inside a region, by way, as in `Prices`.
        footprint_bytes: what a run of it goes through.
    """

    block: str
    table: Table
    alone: int
    body_s: tuple[float, ...]
    footprint_bytes: int


class RegionEnd(NamedTuple):
    """A region ends with this block; `state` is that of the way it runs on (JOINED: the live path)."""

    block: str
    state: int


class Tree:
    """A part of a chain: what lies before the block at its root, that block, and what lies behind.

    `body_s` and `footprint_bytes` are the sums over its blocks.
    """

    __slots__ = (
        "_chosen", "_product", "_upto", "before", "behind", "body_s", "footprint_bytes", "leaf", "rank",
    )  # fmt: skip

    def __init__(self, leaf: Leaf, before: "Tree | None", behind: "Tree | None") -> None:
        self.leaf, self.before, self.behind = leaf, before, behind
        self.rank = _rank(leaf.block)
        parts = [part for part in (before, behind) if part is not None]
        self.footprint_bytes: int = leaf.footprint_bytes + sum(p.footprint_bytes for p in parts)
        self.body_s: tuple[float, ...] = leaf.body_s
        for part in parts:
            self.body_s = tuple(map(add, self.body_s, part.body_s))
        self._product: Table | None = None
        self._upto: Table | None = None
        self._chosen: dict[tuple[int, int], tuple[RegionEnd, ...]] = {}

    @property
    def product(self) -> Table:
        """Least times of the whole part, by the states at its two ends."""
        if self._product is None:
            found = self._up_to_block()
            self._product = product(found, self.behind.product) if self.behind else found
        return self._product

    def chosen(self, first: int, last: int) -> tuple[RegionEnd, ...]:
        """The regions of the least time from state `first` to state `last`, by where they end; of
        equals the one whose cuts come earliest in the order of states.
        """
        found = self._chosen.get((first, last))
        if found is None:
            found = self._chosen[first, last] = self._choose(first, last)
        return found

    def __iter__(self) -> Iterator[Leaf]:
        if self.before:
            yield from self.before
        yield self.leaf
        if self.behind:
            yield from self.behind

    def _up_to_block(self) -> Table:
        if self._upto is None:
            table = self.leaf.table
            self._upto = product(self.before.product, table) if self.before else table
        return self._upto

    def _choose(self, first: int, last: int) -> tuple[RegionEnd, ...]:
        upto = self._up_to_block()
        behind = self.behind.product if self.behind else unit(len(upto))
        out = int(np.argmin(upto[first] + behind[:, last]))
        before = self.before.product if self.before else unit(len(upto))
        into = int(np.argmin(before[first] + self.leaf.table[:, out]))
        own: tuple[RegionEnd, ...] = ()
        if out == CUT:
            own = (RegionEnd(self.leaf.block, self.leaf.alone if into == CUT else into),)
        return (
            *(self.before.chosen(first, into) if self.before else ()),
            *own,
            *(self.behind.chosen(out, last) if self.behind else ()),
        )


def grown(leaves: Iterable[Leaf]) -> Tree | None:
    """The tree of leaves in the order of the chain; O(leaves)."""
    # The right spine, from the root down: what comes next hangs below the first of greater rank, and
    # takes everything of lesser rank below it as its own first part.
    spine: list[tuple[Leaf, Tree | None]] = []

    def fold(below: tuple[int, str] | None) -> Tree | None:
        part: Tree | None = None
        while spine and (below is None or _rank(spine[-1][0].block) < below):
            leaf, before = spine.pop()
            part = Tree(leaf, before, part)
        return part

    for leaf in leaves:
        before = fold(_rank(leaf.block))
        spine.append((leaf, before))
    return fold(None)


def without(tree: Tree | None, block: str, is_before: Before) -> Tree | None:
    """The tree less one block, if it is there; O(log of the blocks). `is_before` is of that block."""
    if tree is None:
        return None
    if tree.leaf.block == block:
        return _joined(tree.before, tree.behind)
    if is_before(tree.leaf.block):
        behind = without(tree.behind, block, is_before)
        return tree if behind is tree.behind else Tree(tree.leaf, tree.before, behind)
    before = without(tree.before, block, is_before)
    return tree if before is tree.before else Tree(tree.leaf, before, tree.behind)


def with_leaf(tree: Tree | None, leaf: Leaf, is_before: Before) -> Tree:
    """The tree with one block more, or with another leaf for it; O(log of the blocks)."""
    if tree is None:
        return Tree(leaf, None, None)
    if tree.leaf.block == leaf.block:
        return Tree(leaf, tree.before, tree.behind)
    if tree.rank < _rank(leaf.block):
        return Tree(leaf, *_parted(tree, is_before))
    if is_before(tree.leaf.block):
        return Tree(tree.leaf, tree.before, with_leaf(tree.behind, leaf, is_before))
    return Tree(tree.leaf, with_leaf(tree.before, leaf, is_before), tree.behind)


def _joined(first: Tree | None, second: Tree | None) -> Tree | None:
    if first is None or second is None:
        return first or second
    if second.rank < first.rank:
        return Tree(first.leaf, first.before, _joined(first.behind, second))
    return Tree(second.leaf, _joined(first, second.before), second.behind)


def _parted(tree: Tree | None, is_before: Before) -> tuple[Tree | None, Tree | None]:
    if tree is None:
        return None, None
    if is_before(tree.leaf.block):
        near, far = _parted(tree.behind, is_before)
        return Tree(tree.leaf, tree.before, near), far
    near, far = _parted(tree.before, is_before)
    return near, Tree(tree.leaf, far, tree.behind)


def _rank(block: str) -> tuple[int, str]:
    return crc32(block.encode()), block
