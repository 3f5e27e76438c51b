"""The facts of one graph as an immutable value, and what an update of them reports."""

from collections.abc import Callable
from dataclasses import dataclass, field

import immutables

from graphopt.analysis.blocks import BlockTable
from graphopt.analysis.regions import Region
from graphopt.graph import Graph, Ref
from graphopt.types import ValueType


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known about `graph`; see the module docstring for the queries."""

    graph: Graph
    types: "immutables.Map[str, tuple[ValueType, ...]]" = immutables.Map()
    traits: "immutables.Map[str, int]" = immutables.Map()
    live: "immutables.Map[str, bool]" = immutables.Map()
    blocks: BlockTable = field(default_factory=BlockTable)
    homes: "immutables.Map[str, str]" = immutables.Map()
    regions: "immutables.Map[str, Region]" = immutables.Map()  # by block exit, and CONTEXT
    readers: "immutables.Map[Ref, immutables.Map[str, int]]" = immutables.Map()
    last_readers: "immutables.Map[Ref, str]" = immutables.Map()

    def type_of(self, ref: Ref) -> ValueType:
        """The type of a value: a model input or an output of a node."""
        types = self.types.get(ref.id)
        if types is None:
            declared = self.graph.input_type(ref.id)
            assert declared is not None
            return declared
        return types[ref.idx]

    def home_of(self, id: str) -> str | None:
        """The block that computes node `id` (by exit, or CONTEXT), None for a node nothing needs."""
        return self.blocks.member.get(id) or self.homes.get(id)


@dataclass(frozen=True, slots=True)
class Update:
    """New facts and what it took: queries re-run by name, and the blocks whose region or weights
    differ.
    """

    facts: Facts
    reran: dict[str, list[str]]
    regions_changed: frozenset[str]  # blocks (and CONTEXT) that are new or compute something else
    regions_gone: frozenset[str]
    weights_changed: frozenset[str]  # blocks whose structure is the same and whose constants differ
    released: frozenset[str]  # other blocks after which other values can be let go
    # Blocks that are the same and stand in another order among each other
    moved: frozenset[str] = frozenset()
    rewired: frozenset[str] = frozenset()  # values that others read than before


class Trace:
    """Which queries an update ran, by name; `between` is called after each note of one."""

    def __init__(self, between: Callable[[], None]) -> None:
        self.reran: dict[str, list[str]] = {}
        self.between = between

    def __call__(self, query: str, key: str) -> None:
        """Notes that `query` is run for `key`."""
        self.reran.setdefault(query, []).append(key)
        self.between()
