"""Cleaning: what goes, what becomes one node, what stays and why, and that no element changes."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rewrite_laws import assert_law, feeds_of, lowered_by

from graphopt.graph import Graph, Ref, Symbol
from graphopt.rewrite.cleaning import clean
from graphopt.text import print_graph
from graphopt.types import TensorType
from helpers.golden import check_golden
from helpers.graphs import BATCH, Builder, reference, transformer

SIZES = {"batch": 3}
law = settings(max_examples=60, deadline=None, database=None, derandomize=True)


def graph_of(b: Builder, *outputs: Ref, dtype: str = "f32", shape: tuple[Any, ...] = ()) -> Graph:
    """The graph of the builder's nodes over one input `x`, (batch, 4, 6) unless told."""
    inputs = [("x", TensorType(dtype, shape or (BATCH, 4, 6)))]
    named = [(f"y{idx}", ref) for idx, ref in enumerate(outputs)]
    return Graph.build("small", b.nodes, inputs, named, b.constants, None, [Symbol("batch", 2, 8)])


def ops_after(graph: Graph, sizes: dict[str, int] | None = None) -> list[str]:
    """The ops that are left, in order, once the law is shown to hold."""
    lowered = assert_law(graph, SIZES if sizes is None else sizes, clean=clean)
    nodes = (lowered.graph.nodes[id] for id in lowered.region.order)
    return [node.op.removeprefix("aten.").split(".")[0] for node in nodes]


def reasons(graph: Graph) -> dict[str, str]:
    """Why the pass leaves what alone."""
    return {each.node: each.reason for each in lowered_by(graph, clean=clean).steps[0].declined}


def between(op: str, *args: Any, dtype: str = "f32") -> Graph:
    """`neg`, the op of the neg, and the abs of that."""
    b = Builder()
    b.node("first", "neg.default", Ref("x"))
    b.node("middle", op, Ref("first"), *args)
    return graph_of(b, b.node("last", "abs.default", Ref("middle")), dtype=dtype)


@pytest.mark.parametrize(
    "node",
    [
        ("clone.default",), ("contiguous.default",), ("detach.default",), ("alias.default",),
        ("dropout.default", 0.5, False), ("native_dropout.default", 0.5, False),
        ("to.dtype", "f32"), ("view.default", (-1, 4, 6)), ("reshape.default", (-1, 4, 6)),
        ("_unsafe_view.default", (-1, 4, 6)), ("expand.default", (-1, 4, 6)),
        ("squeeze.dim", 1), ("permute.default", (0, 1, -1)), ("transpose.int", 1, -2),
        ("slice.Tensor", 1, 0, 2**63 - 1), ("slice.Tensor", 2, 0, 6),
        ("mul.Tensor", 1), ("mul.Tensor", 1.0), ("mul.Scalar", 1), ("div.Tensor", 1.0),
        ("div.Scalar", 1),
    ],
)  # fmt: skip
def test_a_node_that_computes_its_operand_goes(node: tuple[Any, ...]) -> None:
    assert ops_after(between(*node)) == ["neg", "abs"]


def test_a_slice_that_counts_from_the_end_and_takes_everything_goes() -> None:
    b = Builder()
    cut = b.node("cut", "slice.Tensor", b.node("first", "neg.default", Ref("x")), 1, -4)
    assert ops_after(graph_of(b, b.linear("last", cut, 6, 2))) == ["neg", "linear"]


@pytest.mark.parametrize("op", ["add.Tensor", "sub.Tensor", "add.Scalar", "sub.Scalar"])
def test_integers_lose_a_zero_that_is_added(op: str) -> None:
    assert ops_after(between(op, 0, dtype="i64")) == ["neg", "abs"]


def test_a_cast_to_the_same_dtype_goes_and_another_one_stays() -> None:
    b = Builder()
    same = b.node("same", "_to_copy.default", b.node("first", "neg.default", Ref("x")), dtype="f32")
    other = b.node("other", "_to_copy.default", same, dtype="f64")
    graph = graph_of(b, b.node("last", "abs.default", other))
    assert ops_after(graph) == ["neg", "_to_copy", "abs"]


@pytest.mark.parametrize(
    "node",
    [
        ("mul.Tensor", 2), ("div.Tensor", -1), ("add.Tensor", 1), ("slice.Tensor", 1, 1),
        ("slice.Tensor", 1, 0, 2**63 - 1, 2), ("view.default", (-1, 6, 4)),
        ("transpose.int", 1, 2), ("expand.default", (1, -1, 4, 6)),
    ],
)  # fmt: skip
def test_a_node_that_changes_something_stays(node: tuple[Any, ...]) -> None:
    graph = between(*node)
    assert len(ops_after(graph)) == 3
    assert reasons(graph) == {}


def test_integers_divided_by_1_become_floats_and_stay() -> None:
    assert len(ops_after(between("div.Tensor", 1, dtype="i64"))) == 3
    assert len(ops_after(between("mul.Tensor", 1.0, dtype="i64"))) == 3


def test_a_zero_added_to_a_float_stays_for_the_sake_of_its_sign() -> None:
    graph = between("add.Tensor", 0)
    assert len(ops_after(graph)) == 3
    assert reasons(graph) == {"middle": "adding 0 makes 0.0 of -0.0"}


def test_a_complex_number_times_1_stays_for_the_sake_of_infinities() -> None:
    b = Builder()
    halves = b.node("view", "complex.default", Ref("x"), Ref("x"))
    scaled = b.node("scaled", "mul.Tensor", halves, 1)
    graph = graph_of(b, b.node("last", "real.default", scaled))
    assert reasons(graph) == {"scaled": "1 times a complex infinity is nan"}


def test_what_is_handed_out_keeps_its_name() -> None:
    b = Builder()
    first = b.node("first", "neg.default", Ref("x"))
    graph = graph_of(b, b.node("copy", "clone.default", first), b.node("all", "abs.default", first))
    assert ops_after(graph) == ["neg", "clone", "abs"]
    assert reasons(graph) == {"copy": "its value is handed out"}


def test_a_copy_of_an_input_goes_from_within_and_stays_as_an_output() -> None:
    b = Builder()
    copy = b.node("copy", "clone.default", Ref("x"))
    assert ops_after(graph_of(b, b.node("last", "abs.default", copy))) == ["abs"]
    assert ops_after(graph_of(b, copy)) == ["clone"]


def test_a_copy_of_a_constant_goes() -> None:
    b = Builder()
    copy = b.node("copy", "clone.default", b.weight("w", 4, 6))
    graph = graph_of(b, b.node("sum", "add.Tensor", Ref("x"), copy))
    assert ops_after(graph) == ["add"]


def test_a_dropout_whose_mask_is_read_stays() -> None:
    b = Builder()
    first = b.node("first", "neg.default", Ref("x"))
    drop = b.node("drop", "native_dropout.default", first, 0.5, False)
    mask = b.node("mask", "logical_not.default", Ref("drop", 1))
    graph = graph_of(b, b.node("last", "abs.default", drop), mask)
    assert reasons(graph) == {"drop": "its mask is read"}


def test_a_chain_of_views_becomes_one_even_where_it_is_handed_out() -> None:
    b = Builder()
    flat = b.node("flat", "flatten.using_ints", b.node("first", "neg.default", Ref("x")), 1)
    wide = b.node("wide", "unsqueeze.default", b.node("v", "view.default", flat, (-1, 6, 4)), 1)
    graph = graph_of(b, b.node("last", "reshape.default", wide, (-1, 8, 3)))
    assert ops_after(graph) == ["neg", "reshape"]


def test_a_view_back_to_where_it_came_from_goes_with_what_it_undoes() -> None:
    b = Builder()
    first = b.node("first", "neg.default", Ref("x"))
    flat = b.node("flat", "view.default", first, (-1, 24))
    back = b.node("back", "view.default", flat, (-1, 4, 6))
    assert ops_after(graph_of(b, b.node("last", "abs.default", back))) == ["neg", "abs"]


def test_a_view_of_a_copy_that_others_read_stays() -> None:
    b = Builder()
    turned = b.node("turned", "transpose.int", b.node("first", "neg.default", Ref("x")), 1, 2)
    flat = b.node("flat", "reshape.default", turned, (-1, 24))
    graph = graph_of(b, flat, b.node("other", "view.default", flat, (-1, 8, 3)))
    assert ops_after(graph) == ["neg", "transpose", "reshape", "view"]
    assert reasons(graph) == {"other": "the view before it makes a copy that others read too"}


def test_two_transposes_that_undo_each_other_go_and_others_become_a_permute() -> None:
    b = Builder()
    first = b.node("first", "neg.default", Ref("x"))
    there = b.node("there", "transpose.int", first, 1, 2)
    back = b.node("back", "permute.default", there, (0, 2, 1))
    graph = graph_of(b, b.node("last", "abs.default", back))
    assert ops_after(graph) == ["neg", "abs"]
    on = b.node("on", "transpose.int", there, 0, 1)
    graph = graph_of(b, on)
    lowered = assert_law(graph, SIZES, clean=clean)
    assert lowered.graph.nodes["on"].op == "aten.permute.default"
    assert lowered.graph.nodes["on"].args == (Ref("first"), (2, 0, 1))


def test_moving_a_dim_of_size_1_changes_nothing_where_the_shape_says_so() -> None:
    b = Builder()
    one = b.node("one", "neg.default", Ref("x"))
    turned = b.node("turned", "transpose.int", one, 1, 2)
    graph = graph_of(b, b.node("last", "linear.default", turned, b.weight("w", 2, 6)),
                     shape=(BATCH, 1, 1, 6))  # fmt: skip
    assert ops_after(graph) == ["neg", "linear"]


def test_slices_of_one_dim_become_one_and_those_of_two_dims_stay() -> None:
    b = Builder()
    outer = b.node("outer", "slice.Tensor", b.node("first", "neg.default", Ref("x")), 2, 1, 5)
    inner = b.node("inner", "slice.Tensor", outer, -1, 1, 2**63 - 1)
    lowered = assert_law(graph_of(b, inner), SIZES, clean=clean)
    assert lowered.graph.nodes["inner"].args == (Ref("first"), 2, 2, 5)
    other = b.node("other", "slice.Tensor", outer, 1, 1, 2)
    assert ops_after(graph_of(b, other)) == ["neg", "slice", "slice"]
    negative = b.node("negative", "slice.Tensor", outer, 2, -2)
    assert ops_after(graph_of(b, negative)) == ["neg", "slice", "slice"]


def test_an_exit_that_would_lie_otherwise_in_memory_keeps_the_copy() -> None:
    b = Builder()
    turned = b.node("turned", "transpose.int", Ref("x"), 1, 2)
    copy = b.node("copy", "clone.default", turned, memory_format="contiguous_format")
    graph = graph_of(b, b.node("last", "abs.default", copy))
    assert ops_after(graph) == ["transpose", "clone", "abs"]
    assert reasons(graph) == {"copy": "last is handed out and would lie otherwise in memory"}


def test_a_copy_goes_where_nothing_of_it_is_seen_outside() -> None:
    b = Builder()
    turned = b.node("turned", "transpose.int", Ref("x"), 1, 2)
    copy = b.node("copy", "clone.default", turned, memory_format="contiguous_format")
    flat = b.node("flat", "view.default", copy, (-1, 24))
    graph = graph_of(b, b.linear("last", flat, 24, 2))
    assert ops_after(graph) == ["transpose", "view", "linear"]


def test_a_copy_that_several_nodes_read_stays() -> None:
    b = Builder()
    turned = b.node("turned", "transpose.int", Ref("x"), 1, 2)
    copy = b.node("copy", "clone.default", turned, memory_format="contiguous_format")
    graph = graph_of(b, b.linear("one", copy, 4, 2), b.linear("two", copy, 4, 2))
    assert len(ops_after(graph)) == 4
    why = "several nodes read the copy, which would be made for each of them"
    assert reasons(graph) == {"copy": why}


def test_nothing_moves_where_an_op_reads_memory() -> None:
    b = Builder()
    copy = b.node("copy", "clone.default", b.node("first", "neg.default", Ref("x")))
    graph = graph_of(b, b.node("last", "as_strided.default", copy, (2, 2), (1, 2)), shape=(4, 6))
    assert ops_after(graph, {}) == ["neg", "clone", "as_strided"]
    assert reasons(graph) == {"last": "aten.as_strided.default reads how values lie in memory"}


def test_nan_infinity_and_the_sign_of_zero_stay_what_they_are() -> None:
    graph = between("mul.Tensor", 1)
    lowered = assert_law(graph, SIZES, clean=clean)
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0]).repeat(6)
    feeds = {"x": x.reshape(1, 4, 6)}
    before, after = reference(graph, feeds)["y0"], reference(lowered.graph, feeds)["y0"]
    assert before.view(torch.int32).equal(after.view(torch.int32))


def test_an_encoder_before_and_after() -> None:
    graph = transformer(1)
    lowered = assert_law(graph, {"batch": 2, "seq": 3}, clean=clean)
    assert len(lowered.graph) <= len(graph)
    b = Builder()
    x = b.node("dropout", "dropout.default", b.linear("in", Ref("x"), 6, 6), 0.1, False)
    turned = b.node("turned", "transpose.int", x, 1, 2)
    flat = b.node("flat", "view.default", b.node("copy", "clone.default", turned), (-1, 24))
    split = b.node("split", "view.default", flat, (-1, 6, 2, 2))
    moved = b.node("moved", "permute.default", split, (0, 2, 3, 1))
    moved = b.node("again", "transpose.int", moved, 1, 2)
    cut = b.node("cut", "slice.Tensor", b.node("all", "slice.Tensor", moved, 3, 0, 5), 3, 1)
    graph = graph_of(b, b.node("out", "mul.Tensor", b.node("as", "to.dtype", cut, "f32"), 2.0))
    lowered = assert_law(graph, SIZES, clean=clean)
    check_golden("cleaning.txt", f"{print_graph(graph)}\nbecomes\n\n{print_graph(lowered.graph)}")


STEPS = (
    "clone", "contiguous", "detach", "dropout", "cast", "one", "zero", "relu", "flat", "split",
    "whole", "turn", "swap", "t2", "expand", "cut", "cut_front", "unsqueeze", "squeeze",
)  # fmt: skip


def grow(b: Builder, id: str, step: str, x: Ref, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Adds one step on a value of this shape after the batch, and returns the next shape."""
    rank = len(shape) + 1
    whole = (-1, *shape)
    last = shape[-1]
    table: dict[str, tuple[tuple[Any, ...], tuple[int, ...]]] = {
        "clone": (("clone.default", x), shape),
        "contiguous": (("contiguous.default", x), shape),
        "detach": (("detach.default", x), shape),
        "dropout": (("dropout.default", x, 0.3, False), shape),
        "cast": (("to.dtype", x, "f32"), shape),
        "one": (("mul.Tensor", x, 1), shape),
        "zero": (("add.Tensor", x, 0), shape),
        "relu": (("relu.default", x), shape),
        "flat": (("reshape.default", x, (-1, torch.Size(shape).numel())),
                 (torch.Size(shape).numel(),)),
        "split": (("view.default", x, (-1, *shape[:-1], 2, last // 2)),
                  (*shape[:-1], 2, last // 2)),
        "whole": (("view.default", x, whole), shape),
        "turn": (("permute.default", x, (0, *range(rank - 1, 0, -1))), shape[::-1]),
        "swap": (("transpose.int", x, 1, rank - 1), (last, *shape[1:-1], shape[0])
                 if rank > 2 else shape),
        "t2": (("transpose.int", x, -1, -1), shape),
        "expand": (("expand.default", x, whole), shape),
        "cut": (("slice.Tensor", x, -1, 0, max(1, last - 1)), (*shape[:-1], max(1, last - 1))),
        "cut_front": (("slice.Tensor", x, rank - 1, 1), (*shape[:-1], last - 1)),
        "unsqueeze": (("unsqueeze.default", x, 1), (1, *shape)),
        "squeeze": (("squeeze.dim", x, 1), shape[1:] if shape[0] == 1 and rank > 2 else shape),
    }  # fmt: skip
    blocked = (step == "split" and last % 2) or (step == "cut_front" and last < 2)
    blocked = blocked or (step == "squeeze" and rank == 2)
    args, after = table["relu" if blocked or (rank > 5 and step == "split") else step]
    b.node(id, *args)
    return after


@law
@given(
    st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 2)), min_size=2, max_size=9),
    st.sets(st.integers(0, 8), max_size=2),
)
def test_every_graph_of_such_steps_keeps_the_law(
    steps: list[tuple[str, int]], outputs: set[int]
) -> None:
    b = Builder()
    values: list[tuple[Ref, tuple[int, ...]]] = [(Ref("x"), (4, 6))]
    for idx, (step, back) in enumerate(steps):
        x, shape = values[max(0, len(values) - 1 - back)]
        values.append((Ref(f"n{idx}"), grow(b, f"n{idx}", step, x, shape)))
    chosen = {at % len(steps) for at in outputs} | {len(steps) - 1}
    graph = graph_of(b, *(Ref(f"n{at}") for at in sorted(chosen)))
    lowered = assert_law(graph, SIZES, clean=clean)
    feeds = feeds_of(graph, SIZES, 1)
    before, after = reference(graph, feeds), reference(lowered.graph, feeds)
    assert all(before[name].equal(after[name]) for name in before), "not bit for bit"
