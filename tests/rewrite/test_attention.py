"""Attention recognised: which spellings, what is left alone and why, and rows that see nothing."""

from math import inf, nan
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from rewrite_laws import assert_law, feeds_of, lowered_by

import graphopt
from graphopt.analysis.facts import analyse
from graphopt.constants import constant_of
from graphopt.graph import Const, Graph, Ref, Symbol
from graphopt.rewrite import Lowered, lower
from graphopt.rewrite.attention import recognise_attention
from graphopt.types import TensorType
from helpers.golden import check_golden
from helpers.graphs import BATCH, SEQ, Builder, reference

SIZES = {"batch": 2, "seq": 5}
HEADS, HEAD = 2, 4
SPLIT = TensorType("f32", (BATCH, HEADS, SEQ, HEAD))
MASK = TensorType("f32", (BATCH, 1, 1, SEQ))
Q, K, V, M = Ref("q"), Ref("k"), Ref("v"), Ref("m")


def graph_of(b: Builder, *outputs: Ref, mask: TensorType = MASK, qkv: TensorType = SPLIT) -> Graph:
    named = [(f"y{i}", ref) for i, ref in enumerate(outputs)]
    inputs = [("q", qkv), ("k", qkv), ("v", qkv), ("m", mask)]
    symbols = [Symbol("batch", 1, 8), Symbol("seq", 2, 32)]
    return Graph.build("attention", b.nodes, inputs, named, b.constants, None, symbols)


def recognised(b: Builder, *outputs: Ref, **types: TensorType) -> Lowered:
    return assert_law(graph_of(b, *outputs, **types), SIZES, attention=recognise_attention)


def ops(lowered: Lowered) -> list[str]:
    return [lowered.graph.nodes[id].op.split(".")[1] for id in lowered.region.order]


def reasons(lowered: Lowered) -> dict[str, str]:
    return {d.node: d.reason for step in lowered.steps for d in step.declined}


def scores(b: Builder, k: Ref = K, **given: Any) -> Ref:
    turned = b.node("turned", "transpose.int", k, -2, -1)
    product = b.node("scores", "matmul.default", Q, turned)
    return b.node("scaled", given.get("op", "mul.Tensor"), product, given.get("scale", 0.5))


def mixed(b: Builder, s: Ref, v: Ref = V, **given: Any) -> Ref:
    weights = b.node("softmax", "softmax.int", s, given.get("dim", -1))
    return b.node("out", "matmul.default", weights, v)


SPELLED = "scaled_dot_product_attention"
GUARDED = ["amax", "gt", SPELLED, "where"]

# -- what is recognised


def test_the_plain_form_is_one_op_under_the_id_of_the_last_product() -> None:
    b = Builder()
    lowered = recognised(b, mixed(b, scores(b)))
    assert ops(lowered) == [SPELLED]
    node = lowered.graph.nodes["out"]
    assert node.args == (Q, K, V)
    assert dict(node.kwargs) == {"scale": 0.5}
    assert set(lowered.sources["out"]) == {"scores", "scaled", "softmax", "out"}


def test_the_text_before_and_after() -> None:
    b = Builder()
    s = b.node("masked", "add.Tensor", scores(b, op="div.Tensor", scale=2.0), M)
    graph = graph_of(b, b.node("act", "relu.default", mixed(b, s)))
    after = assert_law(graph, SIZES, attention=recognise_attention).graph
    check_golden("attention.graph", f"{graph}\n---- recognised\n\n{after}")


@pytest.mark.parametrize("order", ["scores first", "mask first"])
def test_a_mask_is_added_from_either_side(order: str) -> None:
    b = Builder()
    s = scores(b)
    operands = (s, M) if order == "scores first" else (M, s)
    assert (
        sorted(ops(recognised(b, mixed(b, b.node("masked", "add.Tensor", *operands))))) == GUARDED
    )


def test_copies_dropout_that_does_nothing_and_softmax_in_f32_do_not_stand_between() -> None:
    b = Builder()
    s = b.node("copied", "_to_copy.default", scores(b), dtype="f32")
    weights = b.node("softmax", "softmax.int", s, 3, "f32")
    weights = b.node("drop", "dropout.default", weights, 0.1, False)
    weights = b.node("again", "_to_copy.default", weights, dtype="f32")
    assert ops(recognised(b, b.node("out", "matmul.default", weights, V))) == [SPELLED]


def test_keys_that_come_turned_are_turned_back() -> None:
    b = Builder()
    first = b.node("first", "permute.default", K, (0, 1, 3, 2))
    y = mixed(b, b.node("scores", "matmul.default", Q, first))
    assert ops(recognised(b, y)) == [SPELLED]
    b = Builder()
    rows = b.node("rows", "permute.default", K, (0, 2, 1, 3))
    turned = b.node("turned", "permute.default", rows, (0, 2, 3, 1))
    y = mixed(b, b.node("scores", "matmul.default", Q, turned))
    assert ops(recognised(b, y)) == ["permute", "permute", "transpose", SPELLED]


def test_a_scale_of_the_query_stays_where_it_is() -> None:
    b = Builder()
    q = b.node("query", "mul.Tensor", Q, 0.3)
    turned = b.node("turned", "transpose.int", K, 2, 3)
    lowered = recognised(b, mixed(b, b.node("scores", "matmul.default", q, turned)))
    assert ops(lowered) == ["mul", SPELLED]
    assert dict(lowered.graph.nodes["out"].kwargs) == {"scale": 1.0}


def test_a_scale_that_is_computed_from_a_literal_is_known() -> None:
    b = Builder()
    root = b.node("root", "full.default", (), 2.0, dtype="f32")
    assert ops(recognised(b, mixed(b, scores(b, op="div.Tensor", scale=root)))) == [SPELLED]


# -- rows that see nothing


def all_but_row(value: float) -> torch.Tensor:
    mask = torch.zeros(2, 1, 5, 5)
    mask[:, :, 2] = value
    return mask


@pytest.mark.parametrize("value", [-inf, torch.finfo(torch.float32).min, inf, nan])
def test_a_row_that_is_masked_entirely_gives_what_softmax_gave(value: float) -> None:
    b = Builder()
    square = TensorType("f32", (BATCH, 1, SEQ, SEQ))
    graph = graph_of(b, mixed(b, b.node("masked", "add.Tensor", scores(b), M)), mask=square)
    lowered = assert_law(graph, SIZES, attention=recognise_attention)
    feeds = feeds_of(graph, SIZES) | {"m": all_but_row(value)}
    before, after = reference(graph, feeds)["y0"], reference(lowered.graph, feeds)["y0"]
    assert bool(before[:, :, 2].isnan().all()) == (value != torch.finfo(torch.float32).min)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_torch_gives_zeros_for_such_a_row_which_is_why_there_is_a_guard() -> None:
    q = torch.randn(2, 1, 5, 4)
    plain = torch.nn.functional.scaled_dot_product_attention(q, q, q, all_but_row(-inf))
    assert bool((plain[:, :, 2] == 0).all())


def masked_by(b: Builder, low: float, kind: str) -> Ref:
    flags = b.node("flags", "gt.Scalar", M, 0.0)
    match kind:
        case "where":
            zero = b.node("zero", "zeros.default", (), dtype="f32")
            return b.node("mask", "where.ScalarOther", flags, zero, low)
        case "inverse":
            floats = b.node("floats", "_to_copy.default", flags, dtype="f32")
            inverse = b.node("inverse", "rsub.Scalar", floats, 1.0)
            return b.node("mask", "mul.Tensor", inverse, low)
        case "fill":
            zero = b.node("zero", "mul.Tensor", b.node("f", "zeros_like.default", M), 1.0)
            return b.node("mask", "masked_fill.Scalar", zero, flags, low)
        case _:
            b.constants["c"] = constant_of(torch.tensor([0.0, low]).repeat(16)[None, None, None])
            return b.node(
                "mask", "slice.Tensor", Const("c"), -1, 0, b.node("s", "sym_size.int", Q, 2)
            )


@pytest.mark.parametrize("kind", ["where", "inverse", "fill", "constant"])
@pytest.mark.parametrize("low", [torch.finfo(torch.float32).min, -1e4, -inf])
def test_a_mask_that_is_surely_finite_needs_no_guard(kind: str, low: float) -> None:
    b = Builder()
    mask = masked_by(b, low, kind)
    y = mixed(b, b.node("masked", "add.Tensor", scores(b), mask))
    graph = graph_of(b, b.linear("after", y, HEAD, 3))
    lowered = lowered_by(graph, attention=recognise_attention)
    assert ops(lowered).count(SPELLED) == 1
    assert ("amax" in ops(lowered)) == (low == -inf)


def test_integers_times_the_lowest_number_are_not_surely_finite() -> None:
    b = Builder()
    ids = TensorType("i64", (BATCH, 1, 1, SEQ))
    floats = b.node("floats", "_to_copy.default", M, dtype="f32")
    inverse = b.node("inverse", "rsub.Scalar", floats, 1.0)
    mask = b.node("mask", "mul.Tensor", inverse, torch.finfo(torch.float32).min)
    y = mixed(b, b.node("masked", "add.Tensor", scores(b), mask))
    assert "amax" in ops(lowered_by(graph_of(b, y, mask=ids), attention=recognise_attention))


def test_a_softmax_that_gives_zeros_itself_needs_no_guard() -> None:
    b = Builder()
    s = b.node("masked", "add.Tensor", scores(b), M)
    weights = b.node("softmax", "_safe_softmax.default", s, -1)
    assert ops(recognised(b, b.node("out", "matmul.default", weights, V))) == [SPELLED]


# -- what is not


def declined(b: Builder, *outputs: Ref, **types: TensorType) -> str:
    lowered = recognised(b, *outputs, **types)
    assert SPELLED not in ops(lowered)
    return reasons(lowered)[outputs[0].id]


def test_scores_that_somebody_else_reads_are_kept() -> None:
    for name in ("scores", "scaled", "softmax"):
        b = Builder()
        assert declined(b, mixed(b, scores(b)), Ref(name)) == f"{name} is read elsewhere too"


def test_a_softmax_along_another_dim_is_none() -> None:
    b = Builder()
    assert declined(b, mixed(b, scores(b), dim=2)) == "its softmax is not along the last dim"


def test_filled_scores_and_scales_that_are_not_known_or_not_positive_are_left_alone() -> None:
    b = Builder()
    flags = b.node("flags", "gt.Scalar", M, 0.0)
    filled = b.node("filled", "masked_fill.Scalar", scores(b), flags, -1e4)
    assert declined(b, mixed(b, filled)) == "its scores come from aten.masked_fill.Scalar"
    b = Builder()
    assert declined(b, mixed(b, scores(b, scale=-0.5))) == "its scale is -0.5"
    b = Builder()
    assert "not a number" in declined(b, mixed(b, scores(b, scale=b.node("s", "relu.default", M))))
    b = Builder()
    assert "not a number" in declined(b, mixed(b, scores(b, scale=0.0)))


def test_masks_that_are_scaled_or_of_another_rank_or_dtype_are_left_alone() -> None:
    b = Builder()
    assert "added as" in declined(
        b, mixed(b, b.node("masked", "add.Tensor", scores(b), M, alpha=2))
    )
    for mask in (TensorType("f32", (SEQ,)), TensorType("i64", (BATCH, 1, 1, SEQ))):
        b = Builder()
        y = mixed(b, b.node("masked", "add.Tensor", scores(b), M))
        assert declined(b, y, mask=mask) == f"its mask is {mask}"


def test_other_ranks_and_batches_that_broadcast_are_left_alone() -> None:
    b = Builder()
    flat = TensorType("f32", (BATCH, SEQ, HEAD))
    assert declined(b, mixed(b, scores(b)), qkv=flat) == "its scores are of rank 3"
    b = Builder()
    one = b.node("one", "slice.Tensor", K, 1, 0, 1)
    y = mixed(b, scores(b, k=one))
    assert declined(b, y) == "its operands broadcast their batch"


def test_an_exit_that_would_be_laid_out_otherwise_is_left_alone() -> None:
    b = Builder()
    lying = TensorType("f32", (BATCH, SEQ, HEADS, HEAD))
    q, k, v = (b.node(f"{x}t", "transpose.int", Ref(x), 1, 2) for x in "qkv")
    turned = b.node("turned", "transpose.int", k, -2, -1)
    y = mixed(b, b.node("scores", "matmul.default", q, turned), v=v)
    graph = graph_of(b, y, qkv=lying)
    assert reasons(lowered_by(graph, attention=recognise_attention)) == {
        "out": "an exit would be laid out otherwise"
    }
    b.node("act", "linear.default", y, b.weight("w", 3, HEAD))
    assert SPELLED in ops(recognised(b, Ref("act"), qkv=lying))


# -- whole models


class Logits(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids, attention_mask=attention_mask)["logits"]
        return logits


@pytest.fixture(scope="module")
def bert() -> Graph:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=16, num_attention_heads=2, intermediate_size=32, num_hidden_layers=3,
        vocab_size=50, max_position_embeddings=32, attn_implementation="eager",
    )  # fmt: skip
    model = Logits(transformers.BertForSequenceClassification(config)).eval().requires_grad_(False)
    ids = torch.randint(0, 50, (2, 7))
    dims = {0: "batch", 1: "seq"}
    dynamic = {"input_ids": dims, "attention_mask": dims}
    feeds = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return graphopt.from_torch(model, feeds, dynamic, "bert")


def test_every_layer_of_an_eager_bert_is_recognised_and_its_mask_is_seen_to_be_finite(
    bert: Graph,
) -> None:
    lowered = assert_law(bert, {"batch": 2, "seq": 6}, attention=recognise_attention)
    assert ops(lowered).count(SPELLED) == 3
    assert not {"softmax", "matmul", "amax"} & set(ops(lowered))


def test_every_block_of_an_eager_bert_is_recognised_by_itself(bert: Graph) -> None:
    facts = analyse(bert)
    regions = [region for region in facts.regions.values() if len(region.order) > 10]
    passes = {"attention": recognise_attention}
    found = [ops(lower(facts, region, passes)).count(SPELLED) for region in regions]
    assert sum(found) == 3


# -- random spellings


@st.composite
def spellings(draw: st.DrawFn) -> Graph:
    b = Builder(draw(st.integers(0, 99)))
    lies = draw(st.booleans())
    q, k, v = Q, K, V
    if lies:
        q, k, v = (b.node(f"{x}t", "transpose.int", Ref(x), 1, 2) for x in "qkv")
    if draw(st.booleans()):
        turned = b.node("turned", "transpose.int", k, *draw(st.sampled_from(((2, 3), (-1, -2)))))
    else:
        turned = b.node("turned", "permute.default", k, (0, 1, 3, -2))
    s = b.node("scores", "matmul.default", q, turned)
    for step in range(draw(st.integers(0, 2))):
        op = draw(st.sampled_from(("mul.Tensor", "div.Tensor", "mul.Scalar", "div.Scalar")))
        s = b.node(f"scaled{step}", op, s, draw(st.sampled_from((0.5, 2, -1.0, 0.0))))
    shape = draw(
        st.sampled_from([(BATCH, 1, 1, SEQ), (1, HEADS, SEQ, 1), (SEQ, SEQ), (1, SEQ), (SEQ,)])
    )
    if draw(st.booleans()):
        operands = draw(st.permutations((s, M)))
        s = b.node("masked", "add.Tensor", *operands, alpha=draw(st.sampled_from((1, 1, 1, 2))))
    if draw(st.booleans()):
        s = b.node("late", "mul.Tensor", s, 0.5)
    weights = b.node("softmax", "softmax.int", s, draw(st.sampled_from((-1, 3, 3, 2))))
    if draw(st.booleans()):
        weights = b.node("copy", "clone.default", weights)
    y = b.node("out", "matmul.default", weights, v)
    if draw(st.booleans()):
        y = b.node("back", "transpose.int", y, 1, 2)
        y = b.node("rows", "reshape.default", y, (-1, HEADS * HEAD))
    if draw(st.booleans()):
        y = b.node("act", "relu.default", y)
    qkv = TensorType("f32", (BATCH, SEQ, HEADS, HEAD)) if lies else SPLIT
    more = draw(st.sampled_from(((), (), (), (s,), (weights,))))
    return graph_of(b, y, *more, mask=TensorType("f32", shape), qkv=qkv)


@settings(max_examples=60, deadline=None)
@given(spellings())
def test_random_spellings_keep_the_law(graph: Graph) -> None:
    assert_law(graph, SIZES, attention=recognise_attention)
