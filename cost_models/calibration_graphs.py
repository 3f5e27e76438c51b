"""The small graphs that a calibration runs: some for each op class by itself, some as networks have
them.

Sizes are drawn from a fixed seed over the ranges that networks lie in, so that two calibrations
measure the same and no network is measured on itself. Weights are random; what they are does not
change how long anything takes. Deliberately absent: dynamic sizes; a calibration is of sizes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import torch

from graphopt.analysis.facts import analyse
from graphopt.analysis.regions import build_region
from graphopt.constants import constant_of
from graphopt.costs.work import work_of
from graphopt.graph import Const, Constant, Graph, Node, Ref
from graphopt.nodes import make_node
from graphopt.types import TensorType

SEED = 20
OPS_MAX = 4e8  # of one graph: 10 ms on a slow core
DRAWS_MAX = 20


@dataclass(frozen=True, slots=True)
class Probe:
    """A graph to be measured, and the op class it is about, or `network`."""

    about: str
    graph: Graph


def probes() -> Iterator[Probe]:
    """All graphs, in an order that visits every class early; the same in every process."""
    rounds = list(_MAKERS.items())
    counts = {about: _COUNTS.get(about, 5) for about in _MAKERS}
    for turn in range(max(counts.values())):
        for about, make in rounds:
            if turn < counts[about]:
                yield Probe(about, _made(f"{about}{turn}", make))


class _Maker:
    """Nodes and constants of one graph; each method adds one node and returns its value."""

    def __init__(self, seed: str) -> None:
        self.random = Random(seed)
        self._generator = torch.Generator().manual_seed(SEED)
        self.nodes: list[Node] = []
        self.constants: dict[str, Constant] = {}
        self.inputs: list[tuple[str, TensorType]] = []

    def input(self, *shape: int, dtype: str = "f32") -> Ref:
        name = f"x{len(self.inputs)}"
        self.inputs.append((name, TensorType(dtype, shape)))
        return Ref(name)

    def weight(self, *shape: int) -> Const:
        name = f"w{len(self.constants)}"
        tensor = torch.randn(*shape, generator=self._generator) * 0.05
        self.constants[name] = constant_of(tensor, is_param=True)
        return Const(name)

    def op(self, name: str, *args: Any, **kwargs: Any) -> Ref:
        id = f"n{len(self.nodes)}"
        self.nodes.append(make_node(id, f"aten.{name}", args, kwargs))
        return Ref(id)

    def size(self, *choices: int) -> int:
        return self.random.choice(choices)

    def linear(self, x: Ref, n_in: int, n_out: int) -> Ref:
        return self.op("linear.default", x, self.weight(n_out, n_in), self.weight(n_out))

    def norm(self, x: Ref, n: int) -> Ref:
        return self.op("layer_norm.default", x, (n,), self.weight(n), self.weight(n))

    def conv(self, x: Ref, n_in: int, n_out: int, k: int, stride: int, groups: int = 1) -> Ref:
        pad = (k // 2, k // 2)
        y = self.op(
            "conv2d.default", x, self.weight(n_out, n_in // groups, k, k), None, (stride, stride),
            pad, (1, 1), groups,
        )  # fmt: skip
        mean, scale = self.weight(n_out), self.weight(n_out)
        variance = f"w{len(self.constants)}"
        self.constants[variance] = constant_of(torch.ones(n_out), is_param=False)
        return self.op(
            "batch_norm.default", y, scale, self.weight(n_out), mean, Const(variance), False, 0.1,
            1e-5, True,
        )  # fmt: skip


def _made(name: str, make: Callable[[_Maker], Ref]) -> Graph:
    """The graph `make` draws; another draw where it would take too long."""
    for draw in range(DRAWS_MAX):
        maker = _Maker(f"{SEED} {name} {draw}")
        out = make(maker)
        graph = Graph.build(name, maker.nodes, maker.inputs, [("y", out)], maker.constants)
        facts = analyse(graph)
        region = build_region(graph, facts.type_of, (out,), graph.nodes.__contains__)
        if work_of(facts, region, {}).flops <= OPS_MAX:
            break
    return graph


# -- one class each


def _linears(m: _Maker) -> Ref:
    rows, width = m.size(1, 4, 24, 48, 96, 160), m.size(128, 320, 448, 512, 640)
    inner = m.size(width, 2 * width, 4 * width)
    x = m.input(1, rows, width)
    for _ in range(m.size(1, 2)):
        # Two linears in a row would be folded into one
        middle = m.op("relu.default", m.linear(x, width, inner))
        x = m.op("relu.default", m.linear(middle, inner, width))
    return x


def _convolutions(m: _Maker) -> Ref:
    side, kernel, stride = m.size(8, 12, 20, 40, 60), m.size(1, 3, 3), m.size(1, 1, 2)
    n_in = m.size(24, 48, 96, 160, 320) if side < 40 else m.size(16, 24, 48, 80)
    x = m.input(1, n_in, side, side)
    y = m.conv(x, n_in, m.size(n_in, 2 * n_in), kernel, stride)
    return m.op("relu.default", y)


def _depthwise(m: _Maker) -> Ref:
    side = m.size(8, 12, 20, 40, 60, 100)
    channels = m.size(48, 120, 200, 480, 800) if side < 40 else m.size(24, 48, 120)
    x = m.input(1, channels, side, side)
    for _ in range(m.size(1, 2)):
        y = m.conv(x, channels, channels, 3, 1, channels)
        x = m.op("hardtanh.default", y, 0.0, 6.0)
    return x


def _attention(m: _Maker) -> Ref:
    heads, rows, width = m.size(2, 5, 8, 12), m.size(24, 48, 96, 160, 240), m.size(32, 48, 64)
    query, key, value = (m.input(1, heads, rows, width) for _ in range(3))
    return m.op("scaled_dot_product_attention.default", query, key, value)


def _normalisation(m: _Maker) -> Ref:
    rows, width = m.size(1, 16, 48, 160, 400), m.size(128, 320, 512, 768)
    x = m.input(1, rows, width)
    for _ in range(m.size(1, 3)):
        x = m.norm(x, width)
    return x


def _reduction(m: _Maker) -> Ref:
    kind = m.size(0, 1, 2)
    if kind == 0:
        return m.op("softmax.int", m.input(1, m.size(2, 8), m.size(40, 160), m.size(40, 160)), -1)
    if kind == 1:
        x = m.input(1, m.size(64, 160, 500), m.size(7, 14), m.size(7, 14))
        return m.op("adaptive_avg_pool2d.default", x, (1, 1))
    return m.op("mean.dim", m.input(1, m.size(16, 96, 320), m.size(128, 512)), (-1,), True)


def _pooling(m: _Maker) -> Ref:
    x = m.input(1, m.size(32, 64, 160), m.size(7, 28, 56, 96), m.size(28, 56))
    return m.op("max_pool2d.default", x, (3, 3), (2, 2), (1, 1))


def _elementwise(m: _Maker) -> Ref:
    shape = (1, m.size(1, 16, 64, 192, 400), m.size(64, 256, 768))
    x, y = m.input(*shape), m.input(*shape)
    for _ in range(m.size(1, 2, 4)):
        x = m.op(m.random.choice(("add.Tensor", "mul.Tensor", "sub.Tensor")), x, y)
    return x


def _epilogue(m: _Maker) -> Ref:
    x = m.input(1, m.size(1, 16, 64, 192, 400), m.size(64, 256, 768))
    for _ in range(m.size(2, 3, 4)):
        x = m.op(m.random.choice(("relu", "neg", "abs")) + ".default", x)
    return x


def _transcendental(m: _Maker) -> Ref:
    x = m.input(1, m.size(1, 16, 64, 192, 400), m.size(64, 256, 768))
    for _ in range(m.size(1, 2)):
        x = m.op(m.random.choice(("gelu", "silu", "tanh", "sigmoid")) + ".default", x)
    return x


def _moving(m: _Maker) -> Ref:
    if m.size(0, 1):
        x = m.input(1, m.size(16, 64, 144), m.size(8, 28, 56), 56)
        return m.op("constant_pad_nd.default", x, (1, 1, 1, 1), 0.0)
    rows, width = m.size(16, 64, 192, 400), m.size(32, 128, 384)
    return m.op("cat.default", (m.input(1, rows, width), m.input(1, rows, width)), -1)


def _view(m: _Maker) -> Ref:
    rows, heads, width = m.size(16, 48, 160, 240), m.size(2, 4, 8), m.size(32, 48, 64)
    x = m.input(1, rows, heads * width)
    for _ in range(m.size(1, 2)):
        y = m.op("transpose.int", m.op("view.default", x, (1, rows, heads, width)), 1, 2)
        back = m.op("transpose.int", m.op("mul.Tensor", y, 0.5), 1, 2)
        x = m.op("reshape.default", back, (1, rows, heads * width))
    return x


def _lookup(m: _Maker) -> Ref:
    width = m.size(128, 320, 768)
    ids = m.input(1, m.size(8, 48, 160, 400), dtype="i64")
    return m.op("embedding.default", m.weight(m.size(500, 5_000, 12_000), width), ids)


# -- as networks have them


def _encoder_layer(m: _Maker) -> Ref:
    rows, heads, width = m.size(24, 48, 96, 160), m.size(2, 5, 8), m.size(32, 48, 64)
    n, is_prenorm = heads * width, m.size(0, 1)
    x = m.input(1, rows, n)
    source = m.norm(x, n) if is_prenorm else x
    parts = []
    for _ in range(3):
        split = m.op("view.default", m.linear(source, n, n), (1, rows, heads, width))
        parts.append(m.op("transpose.int", split, 1, 2))
    mixed = m.op("scaled_dot_product_attention.default", *parts)
    back = m.op("reshape.default", m.op("transpose.int", mixed, 1, 2), (1, rows, n))
    x = m.op("add.Tensor", m.linear(back, n, n), x)
    source = m.norm(x, n)
    inner = m.op("gelu.default", m.linear(source, n, 4 * n))
    x = m.op("add.Tensor", m.linear(inner, 4 * n, n), x if is_prenorm else source)
    return x if is_prenorm else m.norm(x, n)


def _decoder_layer(m: _Maker) -> Ref:
    rows, heads, width = m.size(24, 48, 96, 160), m.size(2, 5, 8), m.size(32, 48, 64)
    n = heads * width
    x, cosine, sine = m.input(1, rows, n), m.input(1, 1, rows, width), m.input(1, 1, rows, width)
    source = _rms(m, x, n)
    parts = []
    for i in range(3):
        flat = m.op("linear.default", source, m.weight(n, n))
        split = m.op("view.default", flat, (1, rows, heads, width))
        part = m.op("transpose.int", split, 1, 2)
        parts.append(_rotated(m, part, cosine, sine, width) if i < 2 else part)
    mixed = m.op("scaled_dot_product_attention.default", *parts)
    back = m.op("reshape.default", m.op("transpose.int", mixed, 1, 2), (1, rows, n))
    x = m.op("add.Tensor", x, m.op("linear.default", back, m.weight(n, n)))
    source, inner = _rms(m, x, n), m.size(2 * n, 3 * n)
    gate = m.op("silu.default", m.op("linear.default", source, m.weight(inner, n)))
    up = m.op("mul.Tensor", gate, m.op("linear.default", source, m.weight(inner, n)))
    return m.op("add.Tensor", x, m.op("linear.default", up, m.weight(n, inner)))


def _rms(m: _Maker, x: Ref, n: int) -> Ref:
    mean = m.op("mean.dim", m.op("pow.Tensor_Scalar", x, 2), (-1,), True)
    root = m.op("rsqrt.default", m.op("add.Tensor", mean, 1e-6))
    return m.op("mul.Tensor", m.weight(n), m.op("mul.Tensor", x, root))


def _rotated(m: _Maker, x: Ref, cosine: Ref, sine: Ref, width: int) -> Ref:
    low = m.op("slice.Tensor", x, 3, 0, width // 2)
    high = m.op("slice.Tensor", x, 3, width // 2, width)
    turned = m.op("cat.default", (m.op("neg.default", high), low), -1)
    return m.op("add.Tensor", m.op("mul.Tensor", x, cosine), m.op("mul.Tensor", turned, sine))


def _residual_block(m: _Maker) -> Ref:
    side = m.size(8, 12, 20, 40)
    n_in, stride = m.size(24, 48, 96, 160) if side < 40 else m.size(24, 48, 80), m.size(1, 2)
    n = n_in * stride
    x = m.input(1, n_in, side, side)
    y = m.op("relu.default", m.conv(x, n_in, n, 3, stride))
    y = m.conv(y, n, n, 3, 1)
    past = x if stride == 1 else m.conv(x, n_in, n, 1, 2)
    return m.op("relu.default", m.op("add.Tensor", y, past))


def _inverted_residual(m: _Maker) -> Ref:
    side, stride = m.size(8, 12, 20, 40, 60), m.size(1, 1, 2)
    n, growth = (m.size(40, 80, 128) if side < 40 else m.size(16, 40)), m.size(3, 6)
    x, wide = m.input(1, n, side, side), n * growth
    y = m.op("hardtanh.default", m.conv(x, n, wide, 1, 1), 0.0, 6.0)
    y = m.op("hardtanh.default", m.conv(y, wide, wide, 3, stride, wide), 0.0, 6.0)
    y = m.conv(y, wide, n, 1, 1)
    return m.op("add.Tensor", x, y) if stride == 1 else y


def _perceptron(m: _Maker) -> Ref:
    rows, width = m.size(1, 8, 48, 96), m.size(128, 320, 640)
    x = m.input(1, rows, width)
    for _ in range(m.size(2, 4)):
        x = m.op("relu.default", m.linear(x, width, width))
    return x


_MAKERS: dict[str, Callable[[_Maker], Ref]] = {
    "linear": _linears, "convolution": _convolutions, "depthwise": _depthwise,
    "attention": _attention, "normalisation": _normalisation, "reduction": _reduction,
    "pooling": _pooling, "elementwise": _elementwise, "epilogue": _epilogue,
    "transcendental": _transcendental, "moving": _moving, "view": _view,
    "lookup": _lookup, "encoder": _encoder_layer, "decoder": _decoder_layer,
    "residual": _residual_block, "inverted": _inverted_residual, "perceptron": _perceptron,
}  # fmt: skip
_COUNTS = {"linear": 8, "convolution": 10, "depthwise": 6, "encoder": 7, "decoder": 5, "residual": 5,
           "inverted": 6, "lookup": 3, "elementwise": 4, "epilogue": 4}  # fmt: skip
