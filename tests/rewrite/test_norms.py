"""Batch norms in weights: which are folded, which are left alone and why."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rewrite_laws import assert_law, lowered_by
from torch import nn

import graphopt
from graphopt.constants import constant_of
from graphopt.graph import Const, Graph, Ref, Symbol
from graphopt.rewrite import Lowered
from graphopt.rewrite.norms import fold_batch_norms
from graphopt.types import TensorType
from helpers.golden import check_golden
from helpers.graphs import BATCH, Builder

SIZES = {"batch": 2}
IMAGE = TensorType("f32", (BATCH, 2, 5, 6))
X = Ref("x")


def graph_of(b: Builder, *outputs: Ref, x: TensorType = IMAGE) -> Graph:
    named = [(f"y{i}", ref) for i, ref in enumerate(outputs)]
    symbols = [Symbol("batch", 1, 8)]
    return Graph.build("norms", b.nodes, [("x", x)], named, b.constants, None, symbols)


def folded(b: Builder, *outputs: Ref, x: TensorType = IMAGE) -> Lowered:
    return assert_law(graph_of(b, *outputs, x=x), SIZES, norms=fold_batch_norms)


def ops(lowered: Lowered) -> list[str]:
    return [lowered.graph.nodes[id].op.split(".")[1] for id in lowered.region.order]


def reasons(lowered: Lowered) -> dict[str, str]:
    return {d.node: d.reason for step in lowered.steps for d in step.declined}


def norm(b: Builder, id: str, x: Ref, channels: int, *, affine: bool = True, **given: Any) -> Ref:
    weight = b.weight(f"{id}.weight", channels) if affine else None
    bias = b.weight(f"{id}.bias", channels) if affine else None
    mean = b.weight(f"{id}.mean", channels, is_param=False)
    var = b.weight(f"{id}.var", channels, is_param=False)
    tensor = b.constants[f"{id}.var"].tensor
    b.constants[f"{id}.var"] = constant_of(tensor.abs() + 0.1)
    settings = {"training": False, "momentum": 0.1, "eps": 1e-5, "cudnn_enabled": True} | given
    return b.node(id, "batch_norm.default", x, weight, bias, mean, var, *settings.values())


def conv(b: Builder, id: str, x: Ref, n_in: int, n_out: int, *, bias: bool = True) -> Ref:
    weight = b.weight(f"{id}.weight", n_out, n_in, 3, 3)
    return b.node(id, "conv2d.default", x, weight, b.weight(f"{id}.bias", n_out) if bias else None)


# -- what is folded


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_a_norm_is_part_of_the_convolution_it_follows(bias: bool, affine: bool) -> None:
    b = Builder()
    lowered = folded(b, norm(b, "bn", conv(b, "conv", X, 2, 4, bias=bias), 4, affine=affine))
    assert ops(lowered) == ["conv2d"]
    assert lowered.sources["bn"] == ("conv", "bn")


def test_the_text_before_and_after() -> None:
    b = Builder()
    y = norm(b, "bn", conv(b, "conv", X, 2, 3), 3)
    graph = graph_of(b, b.node("act", "relu.default", y))
    after = assert_law(graph, SIZES, norms=fold_batch_norms).graph
    check_golden("norms.graph", f"{graph}\n---- folded\n\n{after}")


def test_stride_padding_and_groups_stay() -> None:
    b = Builder()
    weight = b.weight("w", 4, 1, 3, 3)
    y = b.node(
        "conv", "convolution.default", X, weight, None, (2, 1), (1, 0), (1, 1), False, (0, 0), 2
    )
    assert ops(folded(b, norm(b, "bn", y, 4))) == ["convolution"]


def test_norms_in_a_row_are_folded_at_once() -> None:
    b = Builder()
    y = norm(b, "first", conv(b, "conv", X, 2, 3), 3)
    lowered = folded(b, norm(b, "second", y, 3))
    assert ops(lowered) == ["conv2d"]
    assert lowered.sources["second"] == ("conv", "first", "second")


def test_a_norm_of_features_is_part_of_a_linear_of_rows() -> None:
    b = Builder()
    rows = TensorType("f32", (BATCH, 3))
    assert ops(folded(b, norm(b, "bn", b.linear("fc", X, 3, 5), 5), x=rows)) == ["linear"]


def test_a_network_of_torch_keeps_no_norm() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()]
    layers += [nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), nn.ReLU6()]
    layers += [nn.Flatten(), nn.Linear(48, 6), nn.BatchNorm1d(6), nn.Tanh()]
    model = nn.Sequential(*layers).eval().requires_grad_(False)
    for key, buffer in model.named_buffers():
        if key.endswith(("mean", "var")):
            buffer.uniform_(0.5, 1.5)
    feeds = {"input": torch.randn(2, 2, 5, 6)}
    graph = graphopt.from_torch(model, feeds, dynamic_shapes="batch", name="net")
    lowered = assert_law(graph, SIZES, norms=fold_batch_norms)
    assert "batch_norm" in ops(lowered_by(graph))
    assert "batch_norm" not in ops(lowered)


# -- what is not


def test_a_convolution_with_other_readers_keeps_its_norm() -> None:
    b = Builder()
    y = conv(b, "conv", X, 2, 3)
    lowered = folded(b, norm(b, "bn", y, 3), y)
    assert ops(lowered) == ["conv2d", "batch_norm"]
    assert reasons(lowered)["bn"] == "conv is read elsewhere too"


def test_a_norm_behind_something_else_says_what() -> None:
    b = Builder()
    y = b.node("act", "relu.default", conv(b, "conv", X, 2, 3))
    assert reasons(folded(b, norm(b, "bn", y, 3)))["bn"] == "it follows aten.relu.default"
    b = Builder()
    assert "outside the region" in reasons(folded(b, norm(b, "bn", X, 2)))["bn"]


def test_a_transposed_convolution_and_a_linear_of_many_rows_are_left_alone() -> None:
    b = Builder()
    y = b.node(
        "conv", "convolution.default", X, b.weight("w", 2, 2, 3, 3), None,
        (1, 1), (0, 0), (1, 1), True, (0, 0), 1,
    )  # fmt: skip
    assert "transposed" in reasons(folded(b, norm(b, "bn", y, 2)))["bn"]
    b = Builder()
    rows = TensorType("f32", (BATCH, 4, 3))
    lowered = folded(b, norm(b, "bn", b.linear("fc", X, 3, 5), 4), x=rows)
    assert reasons(lowered)["bn"] == "fc gives f32[batch, 4, 5]"


def test_a_norm_of_the_batch_s_own_statistics_stays() -> None:
    b = Builder()
    graph = graph_of(b, norm(b, "bn", conv(b, "conv", X, 2, 3), 3, training=True))
    assert "statistics of its batch" in reasons(lowered_by(graph, norms=fold_batch_norms))["bn"]


def test_computed_weights_and_parameters_stay() -> None:
    b = Builder()
    weight = b.node("weight", "neg.default", b.weight("w", 3, 2, 3, 3))
    y = b.node("conv", "conv2d.default", X, weight)
    assert "is computed" in reasons(folded(b, norm(b, "bn", y, 3)))["bn"]
    b = Builder()
    y = conv(b, "conv", X, 2, 3)
    gain = b.node("gain", "exp.default", b.weight("g", 3))
    mean, var = b.weight("m", 3), b.weight("v", 3)
    b.constants["v"] = constant_of(torch.ones(3))
    y = b.node("bn", "batch_norm.default", y, gain, None, mean, var, False, 0.1, 1e-5, True)
    assert "are computed" in reasons(folded(b, y))["bn"]


def test_a_variance_that_gives_no_number_is_left_to_the_executor() -> None:
    b = Builder()
    y = conv(b, "conv", X, 2, 3)
    mean = b.weight("m", 3)
    b.constants["v"] = constant_of(torch.tensor([1.0, -1.0, 2.0]))
    y = b.node("bn", "batch_norm.default", y, None, None, mean, Const("v"), False, 0.1, 0.0, True)
    assert reasons(folded(b, y))["bn"] == "its scale is not finite"


# -- random graphs


@st.composite
def convolutional_graphs(draw: st.DrawFn) -> Graph:
    """Convolutions, norms, activations and sums; every step reads one of the last values."""
    b = Builder(draw(st.integers(0, 99)))
    values: list[tuple[Ref, int]] = [(X, 2)]
    for step in range(draw(st.integers(2, 8))):
        x, channels = draw(st.sampled_from(values[-2:]))
        id, out = f"n{step}", draw(st.sampled_from((1, 2, 4)))
        match draw(st.sampled_from(("conv", "norm", "norm", "act", "sum"))):
            case "conv":
                weight = b.weight(f"{id}.w", out, channels, 1, 1)
                bias = b.weight(f"{id}.b", out) if draw(st.booleans()) else None
                y = b.node(id, "conv2d.default", x, weight, bias)
            case "norm":
                y, out = norm(b, id, x, channels, affine=draw(st.booleans())), channels
            case "sum":
                other = draw(st.sampled_from([ref for ref, c in values if c == channels]))
                y, out = b.node(id, "add.Tensor", x, other), channels
            case _:
                y, out = b.node(id, "relu.default", x), channels
        values.append((y, out))
    more = draw(st.lists(st.sampled_from([ref for ref, _ in values[1:]]), max_size=1))
    return graph_of(b, values[-1][0], *more)


@settings(max_examples=50, deadline=None)
@given(convolutional_graphs())
def test_random_graphs_keep_the_law(graph: Graph) -> None:
    assert_law(graph, SIZES, atol=1e-4, norms=fold_batch_norms)
