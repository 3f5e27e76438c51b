"""Topological labels: valid after any insertion, whatever room is left, and moved only between the
ends of the new edge.
"""

from random import Random

import networkx as nx
import pytest
from hypothesis import given, settings

from graphopt.errors import CycleError
from graphopt.order import GAP, LabelsExhaustedError, place, repair, topological
from strategies import randoms

law = settings(max_examples=300, deadline=None, database=None, derandomize=True)


def dag(random: Random, count: int) -> nx.DiGraph:
    graph = nx.DiGraph()
    ids = [f"n{i}" for i in range(count)]
    random.shuffle(ids)
    graph.add_nodes_from(ids)
    graph.add_edges_from(
        (a, b) for i, a in enumerate(ids) for b in ids[i + 1 :] if random.randint(0, 3) == 0
    )
    return graph


def dense_labels(random: Random, graph: nx.DiGraph) -> dict[str, int]:
    """Labels as small as they can be and as equal as they may be, sometimes."""
    labels: dict[str, int] = {}
    for id in nx.topological_sort(graph):
        labels[id] = max((labels[op] for op in graph.predecessors(id)), default=0) + random.choice(
            (1, 1, 2, 5)
        )
    return labels


def is_valid(graph: nx.DiGraph, labels: dict[str, int]) -> bool:
    return all(labels[a] < labels[b] for a, b in graph.edges)


@law
@given(random=randoms)
def test_a_repair_makes_any_new_edge_valid_or_names_the_cycle(random: Random) -> None:
    graph = dag(random, random.randint(2, 12))
    labels = dense_labels(random, graph)
    source, target = random.sample(sorted(graph), 2)
    before = dict(labels)
    closes = nx.has_path(graph, target, source)
    low, high = labels[target], labels[source]
    graph.add_edge(source, target)
    try:
        moved = repair(labels, source, target, graph.predecessors, graph.successors)
    except CycleError:
        assert closes
        assert labels == before
    except LabelsExhaustedError:
        assert not closes
        assert labels == before
    else:
        assert not closes
        assert is_valid(graph, labels)
        assert {id for id in labels if labels[id] != before[id]} <= set(moved)
        assert all(low <= before[id] <= high for id in moved)


@law
@given(random=randoms)
def test_new_nodes_are_placed_between_their_neighbours_where_they_fit(random: Random) -> None:
    graph = dag(random, 10)
    labels = {id: label * GAP for label, id in enumerate(nx.topological_sort(graph), 1)}
    new = random.sample(sorted(graph), 4)
    for id in new:
        del labels[id]
    order = topological(sorted(new), graph.predecessors, graph.successors)
    place(labels, order, graph.predecessors, graph.successors)
    for a, b in graph.edges:
        assert labels[a] < labels[b] or (a in new and b not in new), (
            "only an old user may have to move"
        )


def test_a_cycle_is_named_node_by_node() -> None:
    operands = {"a": ["c"], "b": ["a"], "c": ["b"], "d": ["c"]}
    users = {"a": ["b"], "b": ["c"], "c": ["a", "d"], "d": []}
    with pytest.raises(CycleError, match=r"a <- c <- b <- a"):
        topological("abcd", operands.__getitem__, users.__getitem__)


def test_an_order_from_scratch_is_stable() -> None:
    operands = {"a": [], "b": [], "c": ["b"], "d": ["a"]}
    users = {"a": ["d"], "b": ["c"], "c": [], "d": []}
    assert topological("abcd", operands.__getitem__, users.__getitem__) == ["a", "d", "b", "c"]


@law
@given(random=randoms)
def test_an_order_does_not_depend_on_how_users_are_listed(random: Random) -> None:
    graph = dag(random, 10)
    ids = random.sample(sorted(graph), len(graph))

    def shuffled(id: str) -> list[str]:
        return random.sample(sorted(graph.successors(id)), graph.out_degree(id))

    orders = {tuple(topological(ids, graph.predecessors, shuffled)) for _ in range(4)}
    assert len(orders) == 1
