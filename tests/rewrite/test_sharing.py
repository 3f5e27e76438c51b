"""Sharing: which nodes become one, which stay two, and that no element changes."""

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rewrite_laws import assert_law, feeds_of, lowered_by, whole

from graphopt.analysis.facts import analyse
from graphopt.graph import Graph, Ref, Symbol
from graphopt.rewrite.cleaning import clean
from graphopt.rewrite.sharing import equal_nodes, share_equal
from graphopt.text import print_graph
from graphopt.types import TensorType
from helpers.golden import check_golden
from helpers.graphs import BATCH, Builder, reference, transformer

SIZES = {"batch": 3}
law = settings(max_examples=60, deadline=None, database=None, derandomize=True)


def graph_of(b: Builder, *outputs: Ref, aliases: dict[str, str] | None = None) -> Graph:
    """The graph of the builder's nodes over `x` and `y`, both (batch, 4, 4)."""
    type_ = TensorType("f32", (BATCH, 4, 4))
    named = [(f"y{idx}", ref) for idx, ref in enumerate(outputs)]
    symbols = [Symbol("batch", 2, 8)]
    inputs = [("x", type_), ("y", type_)]
    return Graph.build("small", b.nodes, inputs, named, b.constants, aliases, symbols)


def left_of(graph: Graph) -> list[str]:
    """The nodes that are left, by name, once the law is shown to hold."""
    lowered = assert_law(graph, SIZES, share=share_equal)
    assert set(lowered.graph.nodes) <= set(graph.nodes)
    return sorted(lowered.region.order)


def reasons(graph: Graph) -> dict[str, str]:
    """Why the pass leaves what alone."""
    return {each.node: each.reason for each in lowered_by(graph, s=share_equal).steps[0].declined}


def test_two_equal_nodes_become_one_and_so_do_their_equal_users() -> None:
    b = Builder()
    for side in ("a", "b"):
        b.node(f"{side}1", "neg.default", Ref("x"))
        b.node(f"{side}2", "exp.default", Ref(f"{side}1"))
    graph = graph_of(b, b.node("sum", "add.Tensor", Ref("a2"), Ref("b2")))
    assert left_of(graph) == ["a1", "a2", "sum"]
    lowered = lowered_by(graph, share=share_equal)
    assert lowered.sources == {"a1": ("a1", "b1"), "a2": ("a2", "b2")}


def test_literals_differ_by_type_and_by_sign() -> None:
    b = Builder()
    refs = [
        b.node(f"n{idx}", "mul.Tensor", Ref("x"), literal)
        for idx, literal in enumerate((2, 2.0, 0.0, -0.0, True, 1))
    ]
    total = refs[0]
    for idx, ref in enumerate(refs[1:]):
        total = b.node(f"sum{idx}", "add.Tensor", total, ref)
    graph = graph_of(b, total)
    assert equal_nodes(analyse(graph), whole(analyse(graph))) == []


def test_defaults_count_as_if_they_were_written() -> None:
    b = Builder()
    one = b.node("one", "add.Tensor", Ref("x"), Ref("y"))
    two = b.node("two", "add.Tensor", Ref("x"), Ref("y"), alpha=1)
    graph = graph_of(b, b.node("out", "mul.Tensor", one, two))
    assert left_of(graph) == ["one", "out"]


def test_the_order_of_operands_counts() -> None:
    b = Builder()
    one = b.node("one", "sub.Tensor", Ref("x"), Ref("y"))
    two = b.node("two", "sub.Tensor", Ref("y"), Ref("x"))
    assert len(left_of(graph_of(b, b.node("out", "mul.Tensor", one, two)))) == 3


def test_an_exit_is_the_one_that_stays() -> None:
    b = Builder()
    first = b.node("first", "neg.default", Ref("x"))
    out = b.node("out", "exp.default", first)
    handed = b.node("handed", "neg.default", Ref("x"))
    assert left_of(graph_of(b, out, handed)) == ["handed", "out"]


def test_two_exits_that_are_equal_both_stay_and_what_reads_them_is_shared() -> None:
    b = Builder()
    one, two = b.node("one", "neg.default", Ref("x")), b.node("two", "neg.default", Ref("x"))
    left, right = b.node("left", "exp.default", one), b.node("right", "exp.default", two)
    graph = graph_of(b, one, two, b.node("sum", "add.Tensor", left, right))
    assert left_of(graph) == ["left", "one", "sum", "two"]
    assert reasons(graph) == {"two": "it equals one, and both are handed out"}


def test_every_output_of_a_node_finds_its_own() -> None:
    b = Builder()
    for side in ("a", "b"):
        b.node(side, "split.Tensor", Ref("x"), 2, 1)
    low = b.node("low", "neg.default", Ref("b", 0))
    high = b.node("high", "exp.default", Ref("b", 1))
    other = b.node("other", "exp.default", Ref("a", 1))
    total = b.node("total", "add.Tensor", b.node("sum", "sub.Tensor", low, high), other)
    assert left_of(graph_of(b, total)) == ["b", "high", "low", "sum", "total"]


def test_constants_are_equal_by_name_and_through_a_tie_and_never_by_content() -> None:
    b = Builder()
    weight = b.weight("w", 4, 4)
    b.constants["same"] = b.constants[weight.name]
    refs = [
        b.node(f"n{idx}", "linear.default", Ref("x"), type(weight)(name))
        for idx, name in enumerate(("w", "tied", "same"))
    ]
    total = b.node("s", "add.Tensor", b.node("t", "sub.Tensor", refs[0], refs[1]), refs[2])
    assert left_of(graph_of(b, total, aliases={"tied": "w"})) == ["n0", "n2", "s", "t"]


def test_sizes_are_equal_by_what_they_come_to() -> None:
    b = Builder()
    views = []
    for name in ("x", "y"):
        size = b.node(f"size.{name}", "sym_size.int", Ref(name), 0)
        views.append(b.node(f"view.{name}", "view.default", Ref("x"), (size, 16)))
    graph = graph_of(b, b.node("out", "mul.Tensor", *views))
    assert left_of(graph) == ["out", "view.x"]


def test_what_asks_for_the_size_of_a_shared_node_asks_the_one_that_stays() -> None:
    b = Builder()
    one, two = b.node("one", "neg.default", Ref("x")), b.node("two", "neg.default", Ref("x"))
    size = b.node("size", "sym_size.int", two, 0)
    view = b.node("view", "view.default", two, (size, 16))
    other = b.node("other", "view.default", one, (size, 16))
    lowered = assert_law(
        graph_of(b, b.node("out", "mul.Tensor", view, other)), SIZES, s=share_equal
    )
    assert sorted(lowered.graph.nodes) == ["out", "size", "two", "view"]


def test_an_encoder_written_with_a_mask_for_each_layer_shares_it() -> None:
    b = Builder()
    x = Ref("x")
    for idx in range(3):
        inverse = b.node(f"{idx}/inverse", "rsub.Scalar", Ref("y"), 1.0)
        mask = b.node(f"{idx}/mask", "mul.Tensor", inverse, -1e4)
        x = b.node(f"{idx}/add", "add.Tensor", b.linear(f"{idx}/linear", x, 4, 4), mask)
    graph = graph_of(b, x)
    lowered = assert_law(graph, SIZES, share=share_equal)
    check_golden("sharing.txt", f"{print_graph(graph)}\nbecomes\n\n{print_graph(lowered.graph)}")


def test_the_transformer_of_the_tests_has_nothing_to_share_but_through_its_sizes() -> None:
    assert_law(transformer(2), {"batch": 2, "seq": 3}, share=share_equal, clean=clean)


OPS: tuple[tuple[Any, ...], ...] = (
    ("neg.default", 1), ("relu.default", 1), ("add.Tensor", 2), ("sub.Tensor", 2),
    ("mul.Tensor", 1, 2.0), ("mul.Tensor", 1, -0.0), ("transpose.int", 1, 1, 2),
    ("split.Tensor", 1, 2, 1), ("matmul.default", 2),
)  # fmt: skip


@law
@given(
    st.lists(
        st.tuples(st.sampled_from(OPS), st.integers(0, 3), st.integers(0, 3)),
        min_size=3, max_size=12,
    ),
    st.sets(st.integers(0, 11), max_size=3),
)  # fmt: skip
def test_every_graph_keeps_the_law_and_is_left_with_no_equal_nodes_but_exits(
    steps: list[tuple[tuple[Any, ...], int, int]], outputs: set[int]
) -> None:
    b = Builder()
    values = [Ref("x"), Ref("y")]
    for idx, ((op, n_operands, *rest), one, other) in enumerate(steps):
        picked = [values[at % len(values)] for at in (one, other)][:n_operands]
        value = b.node(f"n{idx}", op, *picked, *rest)
        if op == "split.Tensor":  # back to the size of every other value
            value = b.node(f"n{idx}/cat", "cat.default", (Ref(value.id, 1), value), 1)
        values.append(value)
    made = values[2:]
    chosen = sorted({at % len(made) for at in outputs} | {len(made) - 1})
    graph = graph_of(b, *(made[at] for at in chosen))
    lowered = assert_law(graph, SIZES, share=share_equal)
    exits = {ref.id for ref in lowered.region.exits}
    for ids in equal_nodes(lowered.facts, lowered.region):
        assert set(ids) <= exits
    feeds = feeds_of(graph, SIZES, 1)
    before, after = reference(graph, feeds), reference(lowered.graph, feeds)
    assert all(
        torch.equal(before[name], after[name]) or before[name].isnan().any() for name in before
    )
