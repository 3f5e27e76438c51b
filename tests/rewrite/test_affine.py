"""Affine folding: what becomes one linear, what is left alone and why, and real adapters."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rewrite_laws import assert_law, edits_of, lowered_by

import graphopt
from adapters.families import build, save_adapter
from graphopt.constants import constant_of
from graphopt.delta import Delta, apply
from graphopt.graph import Const, Graph, Ref, Symbol
from graphopt.macros import AttachAdapter, DetachAdapter
from graphopt.rewrite import Lowered
from graphopt.rewrite.affine import fold_affine
from graphopt.types import TensorType
from helpers.golden import check_golden
from helpers.graphs import BATCH, Builder

SIZES = {"batch": 3}


def graph_of(b: Builder, *outputs: Ref, width: int = 4) -> Graph:
    named = [(f"y{i}", ref) for i, ref in enumerate(outputs)]
    x = TensorType("f32", (BATCH, width))
    return Graph.build(
        "affine", b.nodes, [("x", x)], named, b.constants, None, [Symbol("batch", 1, 8)]
    )


def folded(b: Builder, *outputs: Ref, width: int = 4) -> Lowered:
    return assert_law(graph_of(b, *outputs, width=width), SIZES, affine=fold_affine)


def ops(lowered: Lowered) -> list[str]:
    return [lowered.graph.nodes[id].op.split(".")[1] for id in lowered.region.order]


def reasons(lowered: Lowered) -> dict[str, str]:
    return {d.node: d.reason for step in lowered.steps for d in step.declined}


def adapted(b: Builder, x: Ref, rank: int = 1, scale: float = 2.0) -> Ref:
    base = b.linear("base", x, 4, 6)
    down = b.node("down", "linear.default", x, b.weight("a", rank, 4))
    up = b.node("up", "linear.default", down, b.weight("b", 6, rank))
    return b.node("out", "add.Tensor", base, up, alpha=scale)


# -- what is folded


def test_an_adapter_beside_a_linear_is_one_linear() -> None:
    b = Builder()
    lowered = folded(b, adapted(b, Ref("x")))
    assert ops(lowered) == ["linear"]
    assert set(lowered.sources["out"]) == {"base", "down", "up", "out"}


def test_the_text_before_and_after() -> None:
    b = Builder()
    graph = graph_of(b, b.node("act", "relu.default", adapted(b, Ref("x"))))
    after = assert_law(graph, SIZES, affine=fold_affine).graph
    check_golden("affine.graph", f"{graph}\n---- folded\n\n{after}")


def test_two_adapters_and_a_scale_of_their_own_are_one_linear() -> None:
    b = Builder()
    first = adapted(b, Ref("x"))
    down = b.node("down2", "linear.default", Ref("x"), b.weight("a2", 2, 4))
    up = b.node("up2", "linear.default", down, b.weight("b2", 6, 2))
    scaled = b.node("scaled", "div.Tensor", b.node("times", "mul.Tensor", up, 3), 0.5)
    assert ops(folded(b, b.node("both", "sub.Tensor", first, scaled))) == ["linear"]


def test_linears_with_no_activation_between_are_one_where_that_is_cheaper() -> None:
    b = Builder()
    y = b.linear("wide", Ref("x"), 4, 9)
    assert ops(folded(b, b.linear("narrow", y, 9, 3))) == ["linear"]


def test_a_bottleneck_stays_two_linears() -> None:
    b = Builder()
    lowered = folded(b, b.linear("up", b.linear("down", Ref("x"), 4, 1), 1, 4))
    assert ops(lowered) == ["linear", "linear"]
    assert "8 multiply-adds more for each row than 8" in reasons(lowered)["up"]


def test_of_three_linears_the_two_that_save_most_are_folded() -> None:
    b = Builder()
    narrow = b.linear("first", Ref("x"), 4, 1)
    last = b.linear("third", b.linear("second", narrow, 1, 7), 7, 6)
    lowered = folded(b, last)
    assert lowered.region.order == ("first", "third")


def test_constants_before_a_linear_and_scales_and_constants_behind_it_are_part_of_it() -> None:
    b = Builder()
    x = b.node("shift", "add.Tensor", Ref("x"), b.weight("c", 1, 4))
    y = b.node("product", "mm.default", x, b.weight("w", 4, 5))
    y = b.node("layer_scale", "mul.Tensor", b.weight("gamma", 5), y)
    y = b.node("less", "sub.Tensor", b.node("neg", "neg.default", y), 1.5, alpha=2)
    assert ops(folded(b, b.node("bias", "add.Tensor", b.weight("d", 5), y))) == ["linear"]


def test_an_added_constant_takes_the_weight_as_it_is() -> None:
    b = Builder()
    y = b.linear("layer", Ref("x"), 4, 5)
    lowered = folded(b, b.node("more", "add.Tensor", y, b.weight("row", 5)))
    assert lowered.graph.nodes["more"].args[1] == Const("layer.weight")
    assert list(lowered.region.made) == ["more~bias"]


@pytest.mark.parametrize("product", ["addmm", "matmul"])
def test_a_transposed_weight_takes_part_and_alone_stays(product: str) -> None:
    b = Builder()
    w, x = b.weight("w", 4, 5), Ref("x")
    args = (b.weight("c", 5), x, w) if product == "addmm" else (x, w)
    alone = b.node("alone", f"{product}.default", *args)
    assert ops(folded(b, alone)) == [product]
    assert ops(folded(b, b.node("twice", "mul.Tensor", alone, 2.0))) == ["linear"]


def test_copies_and_dropout_that_does_nothing_do_not_stand_between() -> None:
    b = Builder()
    y = b.node("copy", "clone.default", b.linear("one", Ref("x"), 4, 4))
    y = b.node("drop", "dropout.default", y, 0.5, False)
    assert ops(folded(b, b.linear("two", y, 4, 4))) == ["linear"]


def test_a_tied_weight_is_found_by_either_name() -> None:
    b = Builder()
    b.weight("w", 4, 4)
    y = b.node("one", "linear.default", Ref("x"), Const("w"))
    y = b.node("two", "linear.default", y, Const("tied"))
    x = TensorType("f32", (BATCH, 4))
    graph = Graph.build(
        "tied", b.nodes, [("x", x)], [("y", y)], b.constants, {"tied": "w"},
        [Symbol("batch", 1, 8)],
    )  # fmt: skip
    assert ops(assert_law(graph, SIZES, affine=fold_affine)) == ["linear"]


# -- what is not


def test_a_gain_in_front_of_a_linear_costs_less_than_a_copy_of_its_weight() -> None:
    b = Builder()
    y = b.linear("head", b.node("gain", "mul.Tensor", Ref("x"), b.weight("g", 4)), 4, 4)
    assert ops(folded(b, y)) == ["mul", "linear"]


def test_a_value_that_is_read_elsewhere_or_handed_out_is_not_folded_away() -> None:
    b = Builder()
    y = b.linear("one", Ref("x"), 4, 4)
    lowered = folded(b, b.linear("two", y, 4, 4), y)
    assert ops(lowered) == ["linear", "linear"]
    assert reasons(lowered)["two"] == "one is read elsewhere too"
    b = Builder()
    y = b.linear("one", Ref("x"), 4, 4)
    both = b.node("both", "mul.Tensor", b.linear("two", y, 4, 4), b.node("act", "relu.default", y))
    assert ops(folded(b, both)).count("linear") == 2


def test_a_weight_of_another_dtype_is_named() -> None:
    b = Builder()
    b.constants["w"] = constant_of(torch.randn(4, 4, dtype=torch.float64))
    wide = b.node("wide", "_to_copy.default", Ref("x"), dtype="f64")
    y = b.node("layer", "linear.default", wide, Const("w"))
    lowered = folded(b, b.node("twice", "mul.Tensor", y, 2.0))
    assert ops(lowered) == ["_to_copy", "linear", "mul"]


def test_a_computed_weight_and_a_residual_and_a_row_that_widens_are_left_alone() -> None:
    b = Builder()
    weight = b.node("weight", "neg.default", b.weight("w", 4, 4))
    y = b.node("layer", "linear.default", Ref("x"), weight)
    assert ops(folded(b, b.node("twice", "mul.Tensor", y, 2.0))) == ["neg", "linear", "mul"]
    b = Builder()
    y = b.linear("layer", Ref("x"), 4, 4)
    assert ops(folded(b, b.node("out", "add.Tensor", y, Ref("x")))) == ["linear", "add"]
    b = Builder()
    y = b.linear("layer", Ref("x"), 4, 1)
    assert ops(folded(b, b.node("out", "add.Tensor", y, b.weight("row", 3)))) == ["linear", "add"]


def test_a_fold_that_would_not_be_finite_is_not_made() -> None:
    b = Builder()
    b.constants["w"] = constant_of(torch.full((4, 4), 1e30))
    y = b.node("layer", "linear.default", Ref("x"), Const("w"))
    y = b.node("small", "mul.Tensor", y, 1e-30)
    y = b.node("large", "mul.Tensor", y, 1e30)
    lowered = lowered_by(graph_of(b, b.node("larger", "mul.Tensor", y, 1e30)), affine=fold_affine)
    assert reasons(lowered)["larger"] == "its folded weight is not finite"
    assert edits_of(lowered) > 0, "what lies below it folds still"


def test_division_by_zero_and_boolean_factors_are_left_to_the_executor() -> None:
    b = Builder()
    y = b.linear("layer", Ref("x"), 4, 4)
    lowered = lowered_by(graph_of(b, b.node("out", "div.Tensor", y, 0.0)), affine=fold_affine)
    assert ops(lowered) == ["linear", "div"]


# -- adapters of peft, through the public macro


def imported(family: str) -> tuple[Any, Graph, dict[str, torch.Tensor]]:
    model = build(family)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False  # type: ignore[assignment]
    ids = torch.tensor([[3, 5, 7, 9, 2], [4, 4, 8, 1, 6]])
    feeds = {"input_ids": ids}
    if family == "bert_classifier":
        feeds["attention_mask"] = torch.ones_like(ids)
    graph = graphopt.from_torch(model, feeds, dynamic_shapes="batch", name="model")
    return model, graph, feeds


@pytest.mark.parametrize(
    ("family", "targets"), [("bert_classifier", ["query", "value", "dense"]), ("gpt2", ["c_attn"])]
)
def test_attached_adapters_fold_into_the_layers_they_adapt(
    family: str, targets: list[str], tmp_path: Path
) -> None:
    model, graph, _ = imported(family)
    transposed = {"fan_in_fan_out": True} if family == "gpt2" else {}
    for seed, name in enumerate(("one", "two")):
        config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=targets, **transposed)
        save_adapter(model, config, tmp_path / name, seed=seed)
    attach = [AttachAdapter(name, tmp_path / name, scale=0.5) for name in ("one", "two")]
    with_both = apply(graph, Delta(attach))
    assert sum("/adapter." in id for id in with_both.nodes) > 0
    lowered = assert_law(with_both, SIZES, affine=fold_affine)
    parts = [id for id in lowered.region.order if id.endswith((".a", ".b"))]
    assert parts == []
    outs = [id for id in lowered.region.order if "/adapter." in id]
    assert outs
    assert {lowered.graph.nodes[id].op for id in outs} == {"aten.linear.default"}
    plain = apply(with_both, Delta([DetachAdapter("one"), DetachAdapter("two")]))
    assert plain.hash == graph.hash
    assert edits_of(lowered_by(plain, affine=fold_affine)) == 0


# -- random graphs

WIDTHS = (1, 2, 3, 5)


@st.composite
def affine_graphs(draw: st.DrawFn) -> Graph:
    """Values of a few widths; every step reads values that are there, so some have many readers."""
    b = Builder(draw(st.integers(0, 99)))
    values: list[tuple[Ref, int]] = [(Ref("x"), 3)]
    for step in range(draw(st.integers(1, 9))):
        x, width = draw(st.sampled_from(values[-3:]))
        kind = draw(
            st.sampled_from(("linear", "linear", "addmm", "mm", "scale", "row", "sum", "act"))
        )
        id, number = f"n{step}", draw(st.sampled_from((-2.0, 0.0, 0.5, 3)))
        out = draw(st.sampled_from(WIDTHS))
        match kind:
            case "linear":
                y = b.linear(id, x, width, out)
            case "addmm":
                bias = b.weight(f"{id}.c", draw(st.sampled_from((out, 1))))
                y = b.node(id, "addmm.default", bias, x, b.weight(f"{id}.w", width, out))
            case "mm":
                y = b.node(id, "mm.default", x, b.weight(f"{id}.w", width, out))
            case "scale":
                op = draw(st.sampled_from(("mul.Tensor", "mul.Scalar")))
                y, out = b.node(id, op, x, number), width
            case "row":
                op = draw(st.sampled_from(("add.Tensor", "sub.Tensor", "mul.Tensor")))
                y, out = b.node(id, op, x, b.weight(f"{id}.row", width)), width
            case "sum":
                other = draw(st.sampled_from([ref for ref, w in values if w == width]))
                op = draw(st.sampled_from(("add.Tensor", "sub.Tensor")))
                y, out = b.node(id, op, x, other, alpha=number), width
            case _:
                y, out = b.node(id, "tanh.default", x), width
        values.append((y, out))
    exits = [
        values[-1][0],
        *draw(st.lists(st.sampled_from([v for v, _ in values[1:]]), max_size=2)),
    ]
    return graph_of(b, *exits, width=3)


@settings(max_examples=60, deadline=None)
@given(affine_graphs())
def test_random_graphs_keep_the_law(graph: Graph) -> None:
    lowered = assert_law(graph, SIZES, atol=1e-4, affine=fold_affine)
    assert len(lowered.region.order) <= len(lowered_by(graph).region.order)
