"""The text form: what is printed is read back as the same graph, and reads well."""

import sys

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from text_graphs import dims, graphs, names, small_model, tensor_types, texts

from graphopt.dims import symbol
from graphopt.graph import Graph, Ref, Symbol
from graphopt.nodes import make_node
from graphopt.text import (
    format_ref,
    format_value,
    parse_graph,
    parse_ref,
    parse_value,
    print_graph,
    print_node,
)
from graphopt.types import TensorType
from helpers.golden import check_golden


def chain(count: int, **changed: str) -> Graph:
    ops = {f"n{i}": changed.get(f"n{i}", "aten.relu.default") for i in range(count)}
    nodes = [
        make_node(id, op, [Ref(f"n{i - 1}" if i else "x")])
        for i, (id, op) in enumerate(ops.items())
    ]
    return Graph.build(
        "chain", nodes, [("x", TensorType("f32", (2,)))], [("y", Ref(f"n{count - 1}"))], {}
    )


@settings(max_examples=100, deadline=None)
@given(graphs())
def test_a_printed_graph_reads_back_equal_and_prints_the_same(graph):
    text = print_graph(graph)
    again = parse_graph(text)
    assert again == graph
    assert again.hash == graph.hash
    assert (again.name, again.inputs, again.outputs) == (graph.name, graph.inputs, graph.outputs)
    assert (again.symbols, again.aliases) == (graph.symbols, graph.aliases)
    assert again.nodes == graph.nodes
    assert again.constants == graph.constants
    assert print_graph(again) == text


@settings(max_examples=15, deadline=None)
@given(graphs(), st.data())
def test_printed_types_are_comments(graph, data):
    type_lists = st.lists(tensor_types(), min_size=1, max_size=2)
    types = {id: data.draw(type_lists) for id in graph.nodes}
    assert parse_graph(print_graph(graph, types)) == graph


@settings(max_examples=150, deadline=None)
@given(texts)
def test_every_text_stays_on_one_line_and_survives(text):
    written = format_value(text)
    assert written.isprintable()
    assert parse_value(written) == text


@given(names, st.integers(0, 999_999))
def test_every_reference_survives(name, idx):
    assert parse_ref(format_ref(Ref(name, idx))) == Ref(name, idx)


@settings(deadline=None)
@given(st.lists(dims(), max_size=3).filter(lambda s: len(str(s)) < 140))
def test_symbolic_dims_survive(shape):
    graph = Graph.build("g", [], [("x", TensorType("f32", tuple(shape)))], [], {})
    assert parse_graph(print_graph(graph)).inputs == graph.inputs


def test_the_written_form_is_as_golden():
    _, graph = small_model()
    batch, seq = symbol("batch"), symbol("seq")
    hidden = TensorType("f32", (batch, seq, 8))
    half = TensorType("f32", (batch, seq, 4), "strided")
    types = dict.fromkeys(graph.nodes, (hidden,)) | {
        "split": (half, half),
        "head": (TensorType("f32", (batch, seq, 32)),),
    }
    check_golden("small.graph", print_graph(graph, types))


def test_the_spelling_of_every_kind_of_literal_is_as_golden():
    nan, inf = float("nan"), float("inf")
    values = [
        None, True, False, 0, -7, 10**30, 0.0, -0.0, 1.0, 1e-5, 1e-38, 1e300, inf, -inf, nan,
        "f32", "sum", "", 'a "quote"',
        "two\nlines", "tab\t", "back\\slash", "$pooler", "@weight", "a  # b", "é 日本 😀",
        "\x00\u200b\ud800\U000e0001", (),
        (1,), ((1, 2), (None, (True,))), Ref("pooler"), Ref("split", 1), Ref("a:1"), Ref("#1"),
        Ref("encoder.layer.0/add_1"),
    ]  # fmt: skip
    check_golden("literals.txt", "".join(f"{format_value(value)}\n" for value in values))


def test_editing_one_node_changes_one_line():
    before = print_graph(chain(50)).splitlines()
    after = print_graph(chain(50, n20="aten.gelu.default")).splitlines()
    assert [(a, b) for a, b in zip(before, after, strict=True) if a != b] == [
        ("n20 = aten.relu.default($n19)", "n20 = aten.gelu.default($n19)")
    ]


def test_two_calls_print_the_same_whatever_the_order_of_construction():
    _, graph = small_model()
    shuffled = Graph.build(
        graph.name, graph.iter_nodes(), graph.inputs, graph.outputs,
        dict(sorted(graph.constants.items(), reverse=True)), graph.aliases, graph.symbols,
    )  # fmt: skip
    assert print_graph(shuffled) == print_graph(graph)


def test_names_are_in_natural_order():
    _, graph = small_model()
    constant = graph.constants["scale"]
    bound = {f"layer.{i}.weight": constant for i in (10, 9, 1, 0)}
    text = print_graph(Graph.build("g", [], [], [], bound))
    assert [line.split(":")[0] for line in text.splitlines() if line.startswith("const")] == [
        "const layer.0.weight", "const layer.1.weight", "const layer.9.weight", "const layer.10.weight",
    ]  # fmt: skip


def test_a_person_may_write_lines_in_any_order_with_comments_and_blanks():
    text = """# a head by hand

graph head format 1  # the version of the format
output y = $b
b = aten.relu.default($a)  # uses a, which stands below

a = aten.relu.default( $x )
input x: f32[batch, 4]\r
symbol batch in 1..64
"""
    x = TensorType("f32", (symbol("batch"), 4))
    nodes = [
        make_node("a", "aten.relu.default", [Ref("x")]),
        make_node("b", "aten.relu.default", [Ref("a")]),
    ]
    expected = Graph.build(
        "head", nodes, [("x", x)], [("y", Ref("b"))], {}, {}, [Symbol("batch", 1, 64)]
    )
    assert parse_graph(text) == expected
    assert [node.id for node in parse_graph(text).iter_nodes()] == ["a", "b"]


def test_canonical_reading_makes_what_make_node_makes():
    text = "graph g format 1\ninput x: f32[2]\ny = aten.add.Tensor($x, other=1, alpha=1)\n"
    node = make_node("y", "aten.add.Tensor", [Ref("x"), 1])
    assert parse_graph(text, canonical=True).nodes["y"] == node
    assert parse_graph(text).nodes["y"] != node


def test_constants_get_their_data_from_a_mapping_or_a_function():
    _, graph = small_model()
    data = {constant.digest: constant for constant in graph.constants.values()}
    for source in (data, data.get, data.__getitem__):
        again = parse_graph(print_graph(graph), source)
        for name, constant in again.constants.items():
            assert torch.equal(constant.tensor, graph.constants[name].tensor)
            assert constant.is_param == graph.constants[name].is_param


def test_print_node_is_the_line_of_the_graph():
    _, graph = small_model()
    lines = print_graph(graph).splitlines()
    assert all(print_node(node) in lines for node in graph.iter_nodes())


def test_reading_takes_one_step_a_token():
    # Work is counted, not timed: calls made while reading grow as the text does.
    assert 1.9 < _calls(2000) / _calls(1000) < 2.1


def _calls(count: int) -> int:
    text = print_graph(chain(count))
    parse_graph(text)  # fills the caches of ops
    total = 0

    def tick(frame: object, event: str, arg: object) -> None:
        nonlocal total
        total += event in ("call", "c_call")

    sys.setprofile(tick)
    try:
        parse_graph(text)
    finally:
        sys.setprofile(None)
    return total
