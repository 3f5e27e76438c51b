"""What differs between two graphs, by id: the hand-over from deltas to incremental analysis."""

from dataclasses import dataclass

OUTPUT_PREFIX = "output:"  # the user `output:logits` is the graph output called logits


@dataclass(frozen=True, slots=True)
class Change:
    """What differs between two graphs, by id. Derived facts outside what these reach are the same
    in both.
    """

    nodes: frozenset[str] = frozenset()  # added, or with another op or arguments
    removed: frozenset[str] = frozenset()
    used: frozenset[str] = frozenset()  # values (nodes and inputs) whose set of users differs
    relabelled: frozenset[str] = frozenset()  # nodes whose topological label differs
    constants: frozenset[str] = frozenset()  # put, replaced, dropped, or with other tied names
    inputs: frozenset[str] = frozenset()  # added, dropped or of another type
    outputs: bool = False
