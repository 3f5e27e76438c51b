"""Who uses what inside a region: the question every pattern and every rewrite begins with."""

from graphopt.analysis.facts import Facts
from graphopt.analysis.regions import Region
from graphopt.graph import Node, Ref


class Neighbours:
    """The uses of every value of one region. Shape queries are none: they read no element."""

    def __init__(self, facts: Facts, region: Region) -> None:
        self.facts = facts
        self.nodes = facts.graph.nodes
        self.inside = set(region.order)
        self._exits = set(region.exits)
        self._uses: dict[Ref, list[Node]] = {}
        for id in region.order:
            for ref in self.nodes[id].refs:
                self._uses.setdefault(ref, []).append(self.nodes[id])

    def sole_users(self, ref: Ref) -> list[Node]:
        """Every use of `ref`, or nothing when it is handed out of the region."""
        return [] if ref in self._exits else self._uses.get(ref, [])

    def users(self, ref: Ref) -> list[Node]:
        """Every use of `ref` inside the region."""
        return self._uses.get(ref, [])

    def only_user(self, ref: Ref) -> Node | None:
        """The one node that reads `ref`, which nobody else does."""
        users = self.sole_users(ref)
        return users[0] if len(users) == 1 else None
