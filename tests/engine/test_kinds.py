"""A kind of region is what takes equally long: another factor is of it, another op or size is not."""

import pytest

from graphopt.analysis.facts import Facts, analyse
from graphopt.delta import AddNode, Delta, PutConstant, Rewire, SetAttr, apply
from graphopt.engine.kinds import kind_of
from graphopt.graph import Graph, Ref
from graphopt.planner.layout import layers
from helpers.graphs import transformer

AT = "layer.2/gelu"  # the place that is edited


@pytest.fixture(scope="module")
def graph() -> Graph:
    return transformer(4)


def kind(facts: Facts, node: str) -> str:
    """The kind of the layer that holds a node."""
    home = facts.home_of(node)
    (run,) = [run for run in layers(facts) if home in run]
    return kind_of(facts, run)


def scaled(graph: Graph, factor: float, op: str = "aten.mul.Tensor") -> Facts:
    """The graph with one node more in a layer."""
    node = AddNode("scaled", op, (Ref(AT), factor))
    readers = tuple(graph.users[AT])
    return analyse(apply(graph, Delta([node, Rewire(Ref(AT), Ref("scaled"), readers)])))


def test_layers_of_one_structure_are_of_one_kind(graph: Graph) -> None:
    facts = analyse(graph)
    by_key: dict[tuple[str, ...], set[str]] = {}
    for run in layers(facts):
        keys = tuple(facts.regions[block].key for block in run)
        by_key.setdefault(keys, set()).add(kind_of(facts, run))
    assert all(len(kinds) == 1 for kinds in by_key.values())
    assert len(by_key) == len(set.union(*by_key.values()))


def test_another_factor_is_of_the_same_kind(graph: Graph) -> None:
    one, other = scaled(graph, 1.25), scaled(graph, 1.5)
    assert one.regions[one.home_of(AT)].key != other.regions[other.home_of(AT)].key
    assert kind(one, AT) == kind(other, AT)


def test_another_power_is_another_kind(graph: Graph) -> None:
    """A square is a kernel of its own."""
    two, more = (scaled(graph, power, "aten.pow.Tensor_Scalar") for power in (2.0, 2.5))
    assert kind(two, AT) != kind(more, AT)


def test_other_values_of_a_weight_are_of_the_same_kind(graph: Graph) -> None:
    name = next(n for n, c in graph.constants.items() if "layer.2" in n and c.tensor.dim() == 2)
    doubled = analyse(apply(graph, Delta([PutConstant(name, graph.constants[name].tensor * 2)])))
    assert kind(doubled, AT) == kind(analyse(graph), AT)


def test_a_node_more_an_op_or_another_attribute_is_another_kind(graph: Graph) -> None:
    tanh = analyse(apply(graph, Delta([SetAttr(AT, "approximate", "tanh")])))
    facts = (analyse(graph), scaled(graph, 1.5), scaled(graph, 1.5, "aten.div.Tensor"), tanh)
    assert len({kind(each, AT) for each in facts}) == len(facts)


def test_another_width_is_another_kind() -> None:
    narrow, wide = (analyse(transformer(4, hidden=hidden)) for hidden in (16, 32))
    assert kind(narrow, AT) != kind(wide, AT)
