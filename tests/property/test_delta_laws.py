"""The laws of deltas (graphopt.delta): apply, compose, invert and difference, order labels, and
refusals that leave no trace.
"""

from contextlib import suppress
from random import Random

from hypothesis import given, settings

from graphopt.analysis.facts import analyse
from graphopt.analysis.naive import digest, index_faults
from graphopt.delta import (
    AddNode,
    Delta,
    Rewire,
    SetOutputs,
    apply,
    apply_fully,
    compose,
    difference,
    invert,
)
from graphopt.errors import GraphoptError
from graphopt.graph import Graph, Ref
from graphopt.nodes import make_node
from graphopt.order import GAP
from strategies import accepted, draw_delta, draw_graph, randoms, start

law = settings(max_examples=60, deadline=None, database=None, derandomize=True)


def drawn(random: Random, count: int) -> tuple[Graph, list[Delta]]:
    """A graph and `count` deltas that are each accepted by the graph the ones before make."""
    graph = first = draw_graph(random, 8)
    found: list[Delta] = []
    for _ in range(12):
        delta = draw_delta(random, graph, analyse(graph))
        after = accepted(graph, delta)
        if after is not None and len(found) < count:
            graph, found = after, [*found, delta]
    return first, found


def is_same(left: Graph, right: Graph) -> bool:
    """Equal in content and hash, however they came to be; labels apart."""
    return (
        left.hash == right.hash
        and left.nodes == right.nodes
        and left.constants == right.constants
        and left.aliases == right.aliases
        and (left.inputs, left.outputs, left.symbols)
        == (right.inputs, right.outputs, right.symbols)
        and left.users == right.users
        and left.const_users == right.const_users
    )


@law
@given(random=randoms)
def test_two_deltas_in_turn_are_one_composed(random: Random) -> None:
    graph, deltas = drawn(random, 2)
    if len(deltas) == 2:
        first, second = deltas
        assert is_same(apply(apply(graph, first), second), apply(graph, compose(first, second)))


@law
@given(random=randoms)
def test_composition_is_associative(random: Random) -> None:
    graph, deltas = drawn(random, 3)
    if len(deltas) == 3:
        a, b, c = deltas
        assert is_same(
            apply(graph, compose(compose(a, b), c)), apply(graph, compose(a, compose(b, c)))
        )


@law
@given(random=randoms)
def test_an_inverse_restores_the_graph_and_its_hash(random: Random) -> None:
    graph, deltas = drawn(random, 1)
    for delta in deltas:
        inverse = invert(delta, graph)
        after = apply(graph, delta)
        back = apply(after, inverse)
        assert is_same(back, graph)
        again = apply(back, invert(inverse, after))
        assert is_same(again, after)


@law
@given(random=randoms)
def test_the_difference_of_any_two_graphs_leads_from_one_to_the_other(random: Random) -> None:
    left, right = draw_graph(random, 8), draw_graph(random, 8)
    assert is_same(apply(left, difference(left, right)), right)
    assert difference(left, left).edits == ()


@law
@given(random=randoms)
def test_a_change_names_everything_that_differs_and_nothing_else(random: Random) -> None:
    graph, deltas = drawn(random, 1)
    for delta in deltas:
        applied = apply_fully(graph, delta)
        after, change = applied.graph, applied.change
        ids = set(graph.nodes) | set(after.nodes)
        assert change.nodes == {
            id for id in ids if id in after.nodes and after.nodes[id] != graph.nodes.get(id)
        }
        assert change.removed == set(graph.nodes) - set(after.nodes)
        owners = set(graph.users) | set(after.users)
        assert change.used == {id for id in owners if graph.users.get(id) != after.users.get(id)}
        assert change.relabelled == {
            id for id in after.nodes if graph.labels.get(id) != after.labels[id]
        }
        assert change.inputs == {n for n, _ in set(graph.inputs) ^ set(after.inputs)}
        names = {
            n
            for n in set(graph.constants) | set(after.constants)
            if graph.constants.get(n) != after.constants.get(n)
        }
        tied = {name for alias, name in set(graph.aliases.items()) ^ set(after.aliases.items())}
        assert change.constants == names | tied
        assert change.outputs == (graph.outputs != after.outputs)


@law
@given(random=randoms)
def test_every_graph_has_a_right_hash_users_and_labels(random: Random) -> None:
    graph, deltas = drawn(random, 3)
    for delta in deltas:
        graph = apply(graph, delta)
        assert list(index_faults(graph)) == []
        rebuilt = Graph.build(
            graph.name,
            graph.nodes.values(),
            graph.inputs,
            graph.outputs,
            graph.constants,
            graph.aliases,
            graph.symbols,
        )
        assert rebuilt.digest == graph.digest == digest(graph)


@law
@given(random=randoms)
def test_a_refused_delta_leaves_the_graph_as_it_was(random: Random) -> None:
    graph = draw_graph(random, 8)
    text, parts = (
        str(graph),
        (graph.nodes, graph.users, graph.const_users, graph.constants, graph.labels, graph.outputs),
    )
    for _ in range(5):
        delta = draw_delta(random, graph, analyse(graph))
        with suppress(GraphoptError):
            apply(graph, delta)
        assert str(graph) == text
        assert parts == (
            graph.nodes,
            graph.users,
            graph.const_users,
            graph.constants,
            graph.labels,
            graph.outputs,
        )


def test_a_thousand_insertions_at_one_place_keep_the_order() -> None:
    graph = apply(
        start(),
        Delta(
            [AddNode("end", "aten.relu.default", (Ref("first"),)), SetOutputs((("y", Ref("end")),))]
        ),
    )
    relabelled = 0
    for idx in range(1000):
        insert = Delta(
            [
                AddNode(f"n{idx}", "aten.neg.default", (Ref("first"),)),
                Rewire(Ref("first"), Ref(f"n{idx}")),
            ]
        )
        applied = apply_fully(graph, insert)
        graph = applied.graph
        relabelled += len(applied.change.relabelled) > 1
    order = [node.id for node in graph.iter_nodes()]
    assert order == ["first", *(f"n{idx}" for idx in reversed(range(1000))), "end"]
    assert relabelled <= 1000 // 150, "a new labelling comes once in about log2(GAP) insertions"
    assert GAP.bit_length() > 200


def test_the_same_node_written_twice_is_one_node() -> None:
    left = make_node("n", "aten.softmax.int", (Ref("x"), -1), {"dtype": None})
    right = make_node("n", "aten.softmax.int", (Ref("x"),), {"dim": -1})
    assert left == right
    assert left.digest == right.digest
