"""Constant folding: what becomes a constant, what does not and why, and that no element changes."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rewrite_laws import assert_law, feeds_of, lowered_by

from graphopt.constants import constant_of
from graphopt.graph import Const, Graph, Ref, Symbol
from graphopt.rewrite import Lowered
from graphopt.rewrite.folding import GROWTH_FREE_BYTES, RESULT_BYTES_MAX, fold_constants
from graphopt.text import print_graph
from graphopt.types import TensorType
from helpers.golden import check_golden
from helpers.graphs import BATCH, Builder, reference, transformer

SIZES = {"batch": 3}
law = settings(max_examples=60, deadline=None, database=None, derandomize=True)


def graph_of(b: Builder, *outputs: Ref) -> Graph:
    """The graph of the builder's nodes over `x`, (batch, 4, 6)."""
    named = [(f"y{idx}", ref) for idx, ref in enumerate(outputs)]
    inputs = [("x", TensorType("f32", (BATCH, 4, 6)))]
    return Graph.build("small", b.nodes, inputs, named, b.constants, None, [Symbol("batch", 2, 8)])


def folded(graph: Graph) -> Lowered:
    """The graph after the pass, once the law is shown to hold."""
    return assert_law(graph, SIZES, fold=fold_constants)


def reasons(graph: Graph) -> dict[str, str]:
    """Why the pass leaves what alone."""
    return {e.node: e.reason for e in lowered_by(graph, f=fold_constants).steps[0].declined}


def test_a_chain_of_constants_becomes_one_that_its_reader_reads() -> None:
    b = Builder()
    scaled = b.node("scaled", "mul.Tensor", b.weight("w", 4, 6), 2.0)
    shifted = b.node("shifted", "add.Tensor", scaled, b.weight("v", 6))
    lowered = folded(graph_of(b, b.node("out", "add.Tensor", Ref("x"), shifted)))
    assert list(lowered.graph.nodes) == ["out"]
    assert lowered.graph.nodes["out"].args == (Ref("x"), Const("shifted~folded"))
    assert lowered.region.made == ("shifted~folded",)
    w, v = b.constants["w"].tensor, b.constants["v"].tensor
    assert lowered.graph.get_constant("shifted~folded").tensor.equal(w * 2.0 + v)


@pytest.mark.parametrize("is_param", [True, False])
def test_what_parameters_reach_stays_a_parameter(is_param: bool) -> None:
    b = Builder()
    scaled = b.node("scaled", "mul.Tensor", b.weight("w", 4, 6, is_param=is_param), 2.0)
    lowered = folded(graph_of(b, b.node("out", "add.Tensor", Ref("x"), scaled)))
    assert lowered.graph.get_constant("scaled~folded").is_param is is_param


@pytest.mark.parametrize(
    "node",
    [
        ("arange.default", 6), ("full.default", (4, 6), 0.5), ("zeros.default", (6,)),
        ("scalar_tensor.default", 2.0), ("ones.default", (1, 1, 6)),
    ],
)  # fmt: skip
def test_what_literals_alone_make_becomes_a_constant(node: tuple[Any, ...]) -> None:
    b = Builder()
    made = b.node("made", *node)
    lowered = folded(graph_of(b, b.node("out", "mul.Tensor", Ref("x"), made)))
    assert list(lowered.graph.nodes) == ["out"]
    assert not lowered.graph.get_constant("made~folded").is_param


def test_a_causal_mask_of_a_fixed_size_is_made_once() -> None:
    b = Builder()
    places = b.node("places", "arange.default", 6)
    rows = b.node("rows", "unsqueeze.default", places, 1)
    seen = b.node("seen", "le.Tensor", places, rows)
    mask = b.node("mask", "where.ScalarOther", seen, b.node("zero", "zeros.default", ()), -1e4)
    scores = b.node(
        "scores", "matmul.default", b.node("t", "transpose.int", Ref("x"), 1, 2), Ref("x")
    )
    graph = graph_of(b, b.node("out", "add.Tensor", scores, mask))
    lowered = folded(graph)
    assert sorted(lowered.graph.nodes) == ["out", "scores", "t"]
    check_golden("folding.txt", f"{print_graph(graph)}\nbecomes\n\n{print_graph(lowered.graph)}")


def test_operands_in_a_list_are_constants_too() -> None:
    b = Builder()
    first = b.node("first", "neg.default", b.weight("w", 1, 4, 6))
    both = b.node("both", "cat.default", (first, b.weight("v", 1, 4, 6)), 0)
    joined = b.node("joined", "cat.default", (Ref("x"), both, first), 0)
    lowered = folded(graph_of(b, joined))
    assert lowered.graph.nodes["joined"].args[0] == (
        Ref("x"), Const("both~folded"), Const("first~folded"),
    )  # fmt: skip


def test_every_output_becomes_its_own_constant_and_what_nobody_reads_none() -> None:
    b = Builder()
    b.node("parts", "split.Tensor", b.node("n", "neg.default", b.weight("w", 3, 6)), 1, 0)
    out = b.node("out", "add.Tensor", Ref("x"), Ref("parts", 2))
    lowered = folded(graph_of(b, b.node("last", "mul.Tensor", out, Ref("parts", 0))))
    assert set(lowered.graph.constants) == {"w", "parts~folded", "parts~folded2"}
    constant = lowered.graph.get_constant("parts~folded2").tensor
    assert constant.untyped_storage().nbytes() == 24, "the rest of the split is kept alive"


def test_sizes_that_are_known_fold_and_dynamic_ones_do_not() -> None:
    b = Builder()
    fixed = b.node("fixed", "sym_size.int", Ref("x"), 2)
    dynamic = b.node("dynamic", "sym_size.int", Ref("x"), 0)
    one = b.node("one", "full.default", (fixed,), 1.5)
    two = b.node("two", "full.default", (dynamic, 1, 1), 1.5)
    out = b.node("out", "mul.Tensor", b.node("sum", "add.Tensor", Ref("x"), one), two)
    graph = graph_of(b, out)
    assert sorted(folded(graph).region.order) == ["out", "sum", "two"]
    assert reasons(graph) == {"two": "its size is dynamic"}


def test_what_is_handed_out_stays_and_what_reads_it_folds() -> None:
    b = Builder()
    made = b.node("made", "neg.default", b.weight("w", 4, 6))
    graph = graph_of(
        b, made, b.node("out", "add.Tensor", Ref("x"), b.node("e", "exp.default", made))
    )
    assert sorted(folded(graph).graph.nodes) == ["made", "out"]
    assert reasons(graph) == {"made": "its value is handed out"}


def test_what_grows_far_beyond_its_operands_stays() -> None:
    b = Builder()
    wide = GROWTH_FREE_BYTES // 4 // 24 + 1
    row = b.weight("w", 1, 1, 4, 6)
    grown = b.node("grown", "expand.default", row, (wide, 1, 4, 6))
    graph = graph_of(b, b.node("out", "add.Tensor", Ref("x"), grown))
    assert sorted(folded(graph).graph.nodes) == ["grown", "out"]
    size = wide * 96
    assert reasons(graph) == {"grown": f"its {size} bytes are more than 2 times its operands' 96"}


def test_what_is_larger_than_the_bound_is_not_computed() -> None:
    b = Builder()
    count = RESULT_BYTES_MAX // 4 + 1
    made = b.node("made", "full.default", (count,), 1.0)
    picked = b.node("picked", "slice.Tensor", made, 0, 0, 6)
    graph = graph_of(b, b.node("out", "add.Tensor", Ref("x"), picked))
    assert sorted(folded(graph).graph.nodes) == ["made", "out", "picked"]
    assert reasons(graph) == {"made": f"its {count * 4} bytes are more than {RESULT_BYTES_MAX}"}


def test_a_transposed_weight_is_not_copied_and_what_is_computed_from_it_is_kept() -> None:
    b = Builder()
    rows = GROWTH_FREE_BYTES // 24 + 1
    turned = b.node("turned", "t.default", b.weight("w", rows, 6))
    product = b.node("product", "matmul.default", Ref("x"), turned)
    graph = graph_of(b, product)
    assert sorted(folded(graph).graph.nodes) == ["product", "turned"]
    why = "it is a view of a constant, and a constant would be a copy"
    assert reasons(graph) == {"turned": why}
    twice = b.node("twice", "mul.Tensor", turned, 2.0)
    graph = graph_of(b, b.node("again", "matmul.default", Ref("x"), twice))
    assert folded(graph).region.order == ("again",)


def test_a_view_of_a_constant_shares_its_memory() -> None:
    b = Builder()
    view = b.node("view", "view.default", b.weight("w", 24), (4, 6))
    lowered = folded(graph_of(b, b.node("out", "add.Tensor", Ref("x"), view)))
    made = lowered.graph.get_constant("view~folded").tensor
    assert made.data_ptr() == b.constants["w"].tensor.data_ptr()


def test_an_exit_that_would_lie_otherwise_in_memory_keeps_what_it_reads() -> None:
    b = Builder()
    turned = b.node("turned", "neg.default", b.node("t", "t.default", b.weight("w", 6, 4)))
    graph = graph_of(b, b.node("out", "mul.Tensor", turned, b.node("sum", "sum.default", Ref("x"))))
    assert sorted(folded(graph).region.order) == ["out", "sum", "t", "turned"]
    why = "out is handed out and would lie otherwise in memory"
    assert reasons(graph)["turned"] == why


def test_what_torch_does_not_compute_is_left_to_fail_where_it_did() -> None:
    b = Builder()
    b.constants["at"] = constant_of(torch.tensor([9]), is_param=False)
    picked = b.node("picked", "index_select.default", b.weight("w", 4, 6), 0, Const("at"))
    lowered = lowered_by(
        graph_of(b, b.node("out", "add.Tensor", Ref("x"), picked)), f=fold_constants
    )
    assert lowered.steps[0].edits == 0
    assert lowered.steps[0].declined[0].reason.startswith("torch does not compute it: ")


def test_nan_and_infinity_fold_as_they_are() -> None:
    b = Builder()
    b.constants["w"] = constant_of(torch.tensor([0.0, -1.0, 1.0, 2.0, -0.0, 3.0]), is_param=True)
    log = b.node("log", "log.default", Const("w"))
    graph = graph_of(
        b, b.node("out", "where.self", b.node("c", "gt.Scalar", Ref("x"), 0), log, Ref("x"))
    )
    folded(graph)


def test_a_transformer_keeps_the_law() -> None:
    assert_law(transformer(1), {"batch": 2, "seq": 3}, fold=fold_constants)


UNARY = ("neg.default", "exp.default", "relu.default", "clone.default")


@law
@given(
    st.lists(
        st.tuples(st.sampled_from(("unary", "add", "scale", "turn", "cat", "made")),
                  st.integers(0, 5), st.integers(0, 5)),
        min_size=2, max_size=10,
    ),
    st.sets(st.integers(0, 9), max_size=2),
)  # fmt: skip
def test_every_graph_of_constants_and_inputs_keeps_the_law(
    steps: list[tuple[str, int, int]], outputs: set[int]
) -> None:
    b = Builder()
    values: list[Ref | Const] = [Ref("x"), b.weight("w", 4, 6), b.weight("v", 1, 4, 6)]
    for idx, (step, one, other) in enumerate(steps):
        x, y, id = values[one % len(values)], values[other % len(values)], f"n{idx}"
        match step:
            case "unary":
                values.append(b.node(id, UNARY[other % 4], x))
            case "add":
                values.append(b.node(id, "add.Tensor", x, y))
            case "scale":
                values.append(b.node(id, "mul.Tensor", x, 0.5))
            case "turn":
                turned = b.node(f"{id}/t", "transpose.int", x, -1, -2)
                values.append(
                    b.node(id, "transpose.int", b.node(f"{id}/n", UNARY[other % 4], turned), -1, -2)
                )
            case "cat":
                part = b.node(f"{id}/part", "slice.Tensor", x, -1, 0, 3)
                values.append(b.node(id, "cat.default", (part, part), -1))
            case _:
                values.append(b.node(id, "full.default", (4, 6), 0.25 * one))
    chosen = {at % len(steps) for at in outputs} | {len(steps) - 1}
    refs = [b.node(f"out{at}", "add.Tensor", values[3 + at], Ref("x")) for at in sorted(chosen)]
    graph = graph_of(b, *refs, *(values[3 + at] for at in sorted(chosen)[1:]))
    lowered = folded(graph)
    feeds = feeds_of(graph, SIZES, 1)
    before, after = reference(graph, feeds), reference(lowered.graph, feeds)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=0, equal_nan=True)
