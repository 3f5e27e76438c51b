"""What a pass is: a pure function of a graph's facts and one region of it, to a delta.

A pass never changes what the region takes or hands out. Exits keep their names and types, so an
exit that a pass would have to rename is one that it declines. Values that are no longer needed may
stay behind: what no exit reads is not part of the region any more.

Deliberately absent: whether a rewrite pays; that is measured, and a pass that does not is left out
of `graphopt.rewrite.lowering.PASSES`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from graphopt.analysis.facts import Facts
from graphopt.analysis.regions import Region
from graphopt.delta import Delta, Edit
from graphopt.graph import Graph


@dataclass(frozen=True, slots=True)
class Declined:
    """A place where a pass looked and left things alone: the node, and why."""

    node: str
    reason: str


@dataclass(frozen=True, slots=True)
class Rewrite:
    """What one pass wants done to the lowered graph.

    Attributes:
        delta: of primitives only; empty when there is nothing to do.
        sources: for each node that is new or stands for something else now, the nodes of the graph
            before that it computes the values of.
        declined: places left alone, with reasons, for people who ask why.
    """

    delta: Delta
    sources: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    declined: tuple[Declined, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.delta.edits)


Pass = Callable[[Facts, Region], Rewrite]


class Sketch:
    """A rewrite in the making: edits in order, and where each node comes from."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._named: set[str] = set()
        self.edits: list[Edit] = []
        self.sources: dict[str, tuple[str, ...]] = {}
        self.declined: list[Declined] = []

    def name(self, base: str, mark: str) -> str:
        """A name that no node and no constant has: `base~mark`, numbered when that is taken."""
        name, number = f"{base}~{mark}", 1
        taken = (self._graph.nodes, self._graph.constants, self._graph.aliases, self._named)
        while any(name in names for names in taken):
            number += 1
            name = f"{base}~{mark}{number}"
        self._named.add(name)
        return name

    def edit(self, *edits: Edit) -> None:
        """Appends edits."""
        self.edits.extend(edits)

    def comes_from(self, id: str, sources: Iterable[str]) -> None:
        """Notes that node `id` computes what `sources` did."""
        self.sources[id] = tuple(dict.fromkeys(sources))

    def decline(self, node: str, reason: str) -> None:
        """Notes that the pass left `node` alone."""
        self.declined.append(Declined(node, reason))

    def rewrite(self) -> Rewrite:
        """The rewrite so far."""
        return Rewrite(Delta(self.edits), dict(self.sources), tuple(self.declined))
