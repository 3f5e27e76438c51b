"""Slice pushdown: what is narrowed, what is not, and that the exits keep their values."""

from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from rewrite_laws import assert_law, edits_of, lowered_by

from graphopt.analysis.facts import analyse
from graphopt.constants import constant_of
from graphopt.delta import AddNode, Delta, SetOutputs, apply
from graphopt.graph import Const, Graph, Ref, Symbol
from graphopt.planner.layout import layers
from graphopt.rewrite import Lowered
from graphopt.rewrite.rows import push_rows
from graphopt.text import print_graph
from graphopt.types import TensorType
from helpers.golden import check_golden
from helpers.graphs import BATCH, SEQ, Builder, transformer
from strategies import randoms

SIZES = {"batch": 3, "seq": 5}
LAST = "layer.1/"
HIDDEN = TensorType("f32", (BATCH, SEQ, 8))


def rows_of(lowered: Lowered, prefix: str = "") -> dict[str, str]:
    """How many rows the linears and attentions have after the pass."""
    found = {}
    for id in lowered.region.order:
        node = lowered.graph.nodes[id]
        if id.startswith(prefix) and ("linear" in node.op or "attention" in node.op):
            type_ = lowered.facts.type_of(Ref(id))
            assert isinstance(type_, TensorType)
            found[id.removeprefix(prefix).removesuffix("~rows")] = str(type_.shape[-2])
    return found


def small(*nodes: tuple[Any, ...], out: str, input_type: TensorType = HIDDEN) -> Graph:
    """A graph over `x`; `w` is a square weight and `few` an index."""
    b = Builder()
    b.weight("w", 8, 8)
    b.constants["few"] = constant_of(torch.tensor([0]))
    for id, op, *args in nodes:
        b.node(id, op, *args)
    used = {name: b.constants[name] for node in b.nodes for name in node.consts}
    symbols = [Symbol("batch", 1, 64), Symbol("seq", 2, 32)]
    return Graph.build(
        "small", b.nodes, [("x", input_type)], [("y", Ref(out))], used, None, symbols
    )


def linear(id: str, x: str) -> tuple[Any, ...]:
    return (id, "linear.default", Ref(x), Const("w"))


def test_a_classifier_that_reads_one_token_computes_one_row_of_its_last_layer():
    graph = transformer(2)
    lowered = assert_law(graph, SIZES, rows=push_rows)
    assert rows_of(lowered, LAST) == {
        "query": "1", "key": "seq", "value": "seq", "attention": "1",
        "out": "1", "up": "1", "down": "1",
    }  # fmt: skip
    assert set(rows_of(lowered, "layer.0/").values()) == {"seq"}
    assert lowered.sources["layer.1/up~rows"] == ("layer.1/up",)
    check_golden("rows_before.graph", print_graph(graph))
    check_golden("rows_after.graph", print_graph(lowered.graph))


def test_a_head_that_suddenly_reads_all_tokens_undoes_it():
    graph = transformer(5)
    assert len(layers(analyse(graph))) == 6  # the last layer and the head are one run
    mean = AddNode("mean", "aten.mean.dim", (Ref("layer.4/norm"), (1,)))
    reads_all = apply(
        graph, Delta([mean, SetOutputs((("logits", Ref("classifier")), ("mean", Ref("mean"))))],
                     allow_interface_change=True)
    )  # fmt: skip
    lowered = lowered_by(reads_all, rows=push_rows)
    assert edits_of(lowered) == 0
    assert len(layers(analyse(reads_all))) == 7
    assert edits_of(lowered_by(graph, rows=push_rows)) > 0, "the head that reads one token again"


def test_the_last_position_of_causal_attention_needs_no_mask():
    size = TensorType("f32", (BATCH, 2, SEQ, 8))
    graph = small(
        linear("q", "x"), linear("k", "x"), linear("v", "x"),
        ("mixed", "scaled_dot_product_attention.default", Ref("q"), Ref("k"), Ref("v"), None, 0.0, True),
        linear("out", "mixed"), ("last", "select.int", Ref("out"), 2, -1), out="last", input_type=size,
    )  # fmt: skip
    lowered = assert_law(graph, SIZES, rows=push_rows)
    assert rows_of(lowered) == {"q": "1", "k": "seq", "v": "seq", "mixed": "1", "out": "1"}
    assert lowered.graph.nodes["mixed~rows"].bound()["is_causal"] is False


def test_a_middle_position_of_causal_attention_is_left_alone():
    size = TensorType("f32", (BATCH, 2, SEQ, 8))
    graph = small(
        linear("q", "x"), linear("k", "x"), linear("v", "x"),
        ("mixed", "scaled_dot_product_attention.default", Ref("q"), Ref("k"), Ref("v"), None, 0.0, True),
        ("one", "select.int", Ref("mixed"), 2, 1), out="one", input_type=size,
    )  # fmt: skip
    lowered = lowered_by(graph, rows=push_rows)
    assert edits_of(lowered) == 0
    assert [(d.node, d.reason) for d in lowered.steps[0].declined] == [
        ("mixed", "aten.scaled_dot_product_attention.default mixes the rows of dim 2")
    ]


@pytest.mark.parametrize(
    ("cut", "rows"),
    [
        (("slice.Tensor", 1, 0, 2), "2"),
        (("slice.Tensor", 1, -2, 2**63 - 1), "2"),
        (("slice.Tensor", 1, -2, -1), "1"),
        (("select.int", 1, 1), "1"),
        (("select.int", 1, -1), "1"),
        (("index_select.default", 1, Const("few")), "1"),
        (("slice.Tensor", 1, 0, 3), None),  # seq may be 2
        (("slice.Tensor", 1, 0, -1), None),  # how many these are depends on seq
        (("slice.Tensor", 1, 1, 2**63 - 1), None),
        (("slice.Tensor", 1, 0, 2, 2), None),
        (("slice.Tensor", 2, 0, 4), None),  # features
    ],
)
def test_what_is_cut_out(cut: tuple[Any, ...], rows: str | None):
    op, *args = cut
    graph = small(linear("a", "x"), ("cut", op, Ref("a"), *args), out="cut")
    lowered = assert_law(graph, SIZES, rows=push_rows)
    assert (edits_of(lowered) > 0) == (rows is not None)
    assert rows is None or rows_of(lowered)["a"] == rows


def test_two_different_rows_of_a_value_leave_it_whole():
    graph = small(
        linear("a", "x"), ("first", "select.int", Ref("a"), 1, 0),
        ("last", "select.int", Ref("a"), 1, -1), ("sum", "add.Tensor", Ref("first"), Ref("last")),
        out="sum",
    )  # fmt: skip
    assert edits_of(lowered_by(graph, rows=push_rows)) == 0


def test_a_cheap_chain_is_not_worth_a_slice():
    graph = small(("a", "relu.default", Ref("x")), ("y", "select.int", Ref("a"), 1, 0), out="y")
    lowered = lowered_by(graph, rows=push_rows)
    assert edits_of(lowered) == 0
    assert lowered.steps[0].declined[0].reason == "nothing heavier than a slice would be saved"


def test_an_operand_that_broadcasts_is_read_whole_and_another_one_sliced():
    graph = small(
        linear("a", "x"),
        ("row", "slice.Tensor", Ref("a"), 1, 0, 1),
        ("wide", "add.Tensor", Ref("a"), Ref("x")),
        linear("b", "wide"),
        ("both", "select.int", Ref("b"), 1, 0),
        ("y", "add.Tensor", Ref("both"), Ref("both")),
        out="y",
    )
    lowered = assert_law(graph, SIZES, rows=push_rows)
    assert rows_of(lowered) == {"a": "1", "b": "1"}
    assert lowered.graph.nodes["x~slice"].op == "aten.slice.Tensor"


UNARY = ("relu.default", "gelu.default", "tanh.default", "neg.default", "clone.default")


def draw_rows(draw: Random) -> Graph:
    """A chain of ops that keep rows apart, or mix them, of which some rows are read."""
    nodes: list[tuple[Any, ...]] = []
    known = ["x"]
    for i in range(draw.randint(1, 7)):
        x, other, id = draw.choice(known), draw.choice(known), f"n{i}"
        kind = draw.randint(0, 7)
        if kind < 3:
            nodes.append(linear(id, x))
        elif kind == 3:
            nodes.append((id, draw.choice(UNARY), Ref(x)))
        elif kind == 4:
            nodes.append((id, "add.Tensor", Ref(x), Ref(other)))
        elif kind == 5:
            nodes.append((id, "softmax.int", Ref(x), draw.choice((1, 2, -1))))
        elif kind == 6:
            nodes.append((id, "layer_norm.default", Ref(x), (8,)))
        else:
            nodes.append((f"{id}t", "transpose.int", Ref(x), 1, 2))
            nodes.append((f"{id}m", "matmul.default", Ref(other), Ref(f"{id}t")))
            nodes.append((id, "matmul.default", Ref(f"{id}m"), Ref(other)))
        known.append(id)
    end = 2**63 - 1
    cuts = (("slice.Tensor", 1, 0, 1), ("select.int", 1, -1), ("slice.Tensor", 1, -2, end))
    op, *args = draw.choice(cuts)
    nodes.append(("y", op, Ref(known[-1]), *args))
    return small(*nodes, out="y")


@settings(max_examples=60, deadline=None)
@given(randoms)
def test_any_chain_keeps_its_value(draw: Random):
    assert_law(draw_rows(draw), SIZES, atol=1e-3, rows=push_rows)
