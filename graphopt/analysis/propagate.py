"""The worklist all per-node facts share: recompute a fact in topological order, stop where it comes
out the same.

Forward facts (types, traits) flow from operands to users, backward ones (liveness, homes) from
users to operands. A node is recomputed at most once a pass, after everything it depends on; where
the new value equals the old one the wave ends there (early cut-off).
"""

import heapq
from collections.abc import Callable, Iterable
from typing import Any

import immutables

from graphopt.draft import OUTPUT_PREFIX
from graphopt.graph import Graph

Trace = Callable[[str, str], None]


def propagate(
    query: str,
    facts: "immutables.MapMutation[str, Any]",
    seeds: Iterable[str],
    compute: Callable[[str], Any],
    key: Callable[[str], Any],
    dependents: Callable[[str], Iterable[str]],
    trace: Trace,
) -> set[str]:
    """Recomputes `facts` from `seeds` on; returns the ids whose fact changed.

    `key` orders ids so that a fact's dependencies come first; `dependents` are the ids that read
    the fact of an id.
    """
    changed: set[str] = set()
    queued = set(seeds)
    heap = [(key(id), id) for id in queued]
    heapq.heapify(heap)
    while heap:
        _, id = heapq.heappop(heap)
        queued.discard(id)
        trace(query, id)
        value = compute(id)
        if id in facts and facts[id] == value:
            continue
        facts[id] = value
        changed.add(id)
        for dependent in dependents(id):
            if dependent not in queued:
                queued.add(dependent)
                heapq.heappush(heap, (key(dependent), dependent))
    return changed


def backward_key(graph: Graph) -> Callable[[str], Any]:
    """A key that puts users before operands."""
    labels = graph.labels
    return lambda id: (-labels.get(id, -1), id)


def user_nodes(graph: Graph, id: str) -> list[str]:
    """The nodes that use any output of `id`; graph outputs are left out."""
    return [user for user in graph.users.get(id, ()) if not user.startswith(OUTPUT_PREFIX)]


def operand_nodes(graph: Graph, id: str) -> set[str]:
    """The nodes that `id` reads; model inputs are left out."""
    return {ref.id for ref in graph.nodes[id].refs if ref.id in graph.nodes}
