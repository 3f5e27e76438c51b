"""Calls as OpenVINO nodes, each in the form that its CPU plugin optimises best.

A norm is written as MVN with scale and shift, an RMS norm as the chain that its pass recognises, a
linear as MatMul with a transposed constant; all of them take their weights where the tensors lie.
The library is imported when a target is made. Deliberately absent: what runs the result
(`graphopt.executor.backends.openvino`).
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch

from graphopt.types import TensorType

TYPES = {"f32": "f32", "i64": "i64", "i32": "i32", "bool": "boolean"}  # as the library writes them
EXACT = {  # of the plugin: float32 throughout
    "INFERENCE_PRECISION_HINT": "f32",
    "EXECUTION_MODE_HINT": "ACCURACY",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
}
Node = Any
Operands = list[Any]
Attributes = Mapping[str, Any]

_SIMPLE = {  # kinds that are one node without settings
    "abs": "abs", "acos": "acos", "acosh": "acosh", "asin": "asin", "asinh": "asinh",
    "atan": "atan", "atanh": "atanh", "ceil": "ceiling", "cos": "cos", "cosh": "cosh",
    "erf": "erf", "exp": "exp", "floor": "floor", "hardsigmoid": "hsigmoid",
    "hardswish": "hswish", "log": "log", "mish": "mish", "neg": "negative",
    "not": "logical_not", "relu": "relu", "sigmoid": "sigmoid", "sign": "sign",
    "silu": "swish", "sin": "sin", "sinh": "sinh", "softplus": "softplus", "sqrt": "sqrt",
    "tan": "tan", "tanh": "tanh", "isnan": "is_nan", "isinf": "is_inf",
    "add": "add", "sub": "subtract", "mul": "multiply", "div": "divide", "pow": "power",
    "max": "maximum", "min": "minimum", "mod": "floor_mod",
    "eq": "equal", "ne": "not_equal", "lt": "less", "le": "less_equal", "gt": "greater",
    "ge": "greater_equal", "and": "logical_and", "or": "logical_or", "xor": "logical_xor",
    "prelu": "prelu", "where": "select",
}  # fmt: skip
_REDUCE = {
    "sum": "reduce_sum", "mean": "reduce_mean", "reduce_max": "reduce_max",
    "reduce_min": "reduce_min", "prod": "reduce_prod", "l2": "reduce_l2",
}  # fmt: skip
_SELU_ALPHA, _SELU_SCALE = (
    1.6732632423543772,
    1.0507009873554805,
)  # Klambauer et al., arXiv:1706.02515


def output_of(handle: Node) -> Any:
    """A handle as an output: that of a node is its first."""
    return handle.output(0) if hasattr(handle, "outputs") else handle


class OpenVinoTarget:
    """See `graphopt.executor.backends.target.Target`; handles are nodes or outputs of nodes.

    `attention_in_parts` writes attention as two products and a softmax, not as one node.
    """

    def __init__(self, *, attention_in_parts: bool = False) -> None:
        self._library: Any = import_module("openvino")
        self._ops: Any = import_module("openvino.opset15")
        self._attention_in_parts = attention_in_parts
        self.parameters: list[Node] = []
        self.kept: list[torch.Tensor] = []  # their memory is the model's

    def model(self, exits: Sequence[Node]) -> Any:
        """The description; `exits` are the handles of its results."""
        results = [self._ops.result(node) for node in exits]
        return self._library.Model(results, self.parameters, "region")

    def parameter(self, index: int, type_: TensorType) -> Node:
        """See `Target`."""
        shape = [dim if isinstance(dim, int) else -1 for dim in type_.shape]
        return self._parameter(shape, type_.dtype, f"x{index}")

    def scalar_parameter(self, symbol: int) -> Node:
        """See `Target`."""
        return self._parameter([1], "i64", f"s{symbol}")

    def _parameter(self, shape: list[int], dtype: str, name: str) -> Node:
        partial = self._library.PartialShape(shape)
        node = self._ops.parameter(partial, self._type(dtype), name)
        self.parameters.append(node)
        return node

    def constant(self, tensor: torch.Tensor, position: int | None) -> Node:
        """See `Target`."""
        array = tensor.detach().contiguous()
        if tensor.numel() <= 1:
            return self._ops.constant(array.numpy())
        self.kept.append(array)
        return self._ops.constant(array.numpy(), shared_memory=True)

    def take_apart(self, value: Node, axis: int, sizes: list[int]) -> list[Node]:
        """See `Target`."""
        at = np.int64(axis)
        if len(set(sizes)) == 1:
            return list(self._ops.split(value, at, len(sizes)).outputs())
        return list(self._ops.variadic_split(value, at, np.array(sizes, np.int64)).outputs())

    def apply(self, kind: str, operands: Operands, attributes: Attributes) -> Node:
        """See `Target`."""
        simple = _SIMPLE.get(kind)
        if simple is not None:
            return getattr(self._ops, simple)(*operands)
        if kind in _REDUCE:
            axes = np.array(attributes["axes"], np.int64)
            return getattr(self._ops, _REDUCE[kind])(operands[0], axes, attributes["keep"])
        return getattr(self, f"_{kind}")(operands, attributes)

    def _type(self, dtype: str) -> Any:
        return getattr(self._library.Type, TYPES[dtype])

    def _number(self, value: float) -> Node:
        return self._ops.constant(np.float32(value))

    # -- elementwise

    def _cast(self, x: Operands, a: Attributes) -> Node:
        return self._ops.convert(x[0], TYPES[a["to"]])

    def _clamp(self, x: Operands, a: Attributes) -> Node:
        low, high = a["low"], a["high"]
        if low > -np.inf and high < np.inf:
            return self._ops.clamp(x[0], low, high)
        out = x[0]
        out = self._ops.maximum(out, self._number(low)) if low > -np.inf else out
        return self._ops.minimum(out, self._number(high)) if high < np.inf else out

    def _elu(self, x: Operands, a: Attributes) -> Node:
        return self._ops.elu(x[0], a["alpha"])

    def _floordiv(self, x: Operands, a: Attributes) -> Node:
        whole = self._ops.subtract(x[0], self._ops.floor_mod(x[0], x[1]))
        return self._ops.divide(whole, x[1])  # without a remainder there is nothing to round

    def _gelu(self, x: Operands, a: Attributes) -> Node:
        return self._ops.gelu(x[0], "ERF" if a["approximate"] == "none" else "TANH")

    def _leaky_relu(self, x: Operands, a: Attributes) -> Node:
        return self._ops.prelu(x[0], self._number(a["slope"]))

    def _round(self, x: Operands, a: Attributes) -> Node:
        return self._ops.round(x[0], "half_to_even")

    def _rsqrt(self, x: Operands, a: Attributes) -> Node:
        return self._ops.divide(self._number(1.0), self._ops.sqrt(x[0]))

    def _selu(self, x: Operands, a: Attributes) -> Node:
        return self._ops.selu(x[0], self._number(_SELU_ALPHA), self._number(_SELU_SCALE))

    def _square(self, x: Operands, a: Attributes) -> Node:
        return self._ops.power(x[0], self._number(2.0))

    # -- rows

    def _argmax(self, x: Operands, a: Attributes) -> Node:
        return self._best(x[0], a, "max")

    def _argmin(self, x: Operands, a: Attributes) -> Node:
        return self._best(x[0], a, "min")

    def _best(self, x: Node, a: Attributes, mode: str) -> Node:
        found = self._ops.topk(x, np.int64(1), a["axis"], mode, "value", "i64", stable=True)
        place = found.output(1)
        return place if a["keep"] else self._ops.squeeze(place, np.array([a["axis"]], np.int64))

    def _cumsum(self, x: Operands, a: Attributes) -> Node:
        return self._ops.cum_sum(x[0], np.int64(a["axis"]))

    def _log_softmax(self, x: Operands, a: Attributes) -> Node:
        return self._ops.log_softmax(x[0], a["axis"])

    def _softmax(self, x: Operands, a: Attributes) -> Node:
        return self._ops.softmax(x[0], a["axis"])

    def _group_norm(self, x: Operands, a: Attributes) -> Node:
        return self._ops.group_normalization(x[0], x[1], x[2], a["groups"], a["eps"])

    def _batch_norm(self, x: Operands, a: Attributes) -> Node:
        return self._ops.batch_norm_inference(*x, a["eps"])

    def _layer_norm(self, x: Operands, a: Attributes) -> Node:
        axes = np.array(a["axes"], np.int64)
        out = self._ops.mvn(x[0], axes, True, a["eps"], "inside_sqrt")
        out = out if x[1] is None else self._ops.multiply(out, x[1])
        return out if x[2] is None else self._ops.add(out, x[2])

    def _rms_norm(self, x: Operands, a: Attributes) -> Node:
        mean = self._ops.reduce_mean(self._square(x, a), np.array([-1], np.int64), True)
        root = self._ops.sqrt(self._ops.add(mean, self._number(a["eps"])))
        out = self._ops.multiply(x[0], self._ops.divide(self._number(1.0), root))
        return out if x[1] is None else self._ops.multiply(out, x[1])

    # -- products and windows

    def _linear(self, x: Operands, a: Attributes) -> Node:
        out = self._ops.matmul(x[0], x[1], False, not a["transposed"])
        return out if x[2] is None else self._ops.add(out, x[2])

    def _matmul(self, x: Operands, a: Attributes) -> Node:
        return self._ops.matmul(x[0], x[1], False, a["transpose_b"])

    def _attention(self, x: Operands, a: Attributes) -> Node:
        query, key, value, mask = x
        scale = self._number(a["scale"])
        whole = self._ops.scaled_dot_product_attention
        if a["causal"]:
            return whole(query, key, value, scale=scale, causal=True)
        if not self._attention_in_parts:
            return whole(query, key, value, self._number(0.0) if mask is None else mask, scale)
        scores = self._ops.multiply(self._ops.matmul(query, key, False, True), scale)
        scores = scores if mask is None else self._ops.add(scores, mask)
        return self._ops.matmul(self._ops.softmax(scores, -1), value, False, False)

    def _conv(self, x: Operands, a: Attributes) -> Node:
        data, weight, bias = x
        windows = [list(a[name]) for name in ("stride", "begin", "end", "dilation")]
        groups = a["groups"]
        if groups == 1:
            out = self._ops.convolution(data, weight, *windows)
        else:
            shape = list(weight.get_output_partial_shape(0).to_shape())
            grouped = np.array([groups, shape[0] // groups, *shape[1:]], np.int64)
            weight = self._ops.reshape(weight, grouped, False)
            out = self._ops.group_convolution(data, weight, *windows)
        if bias is None:
            return out
        wide = np.array([1, -1, *[1] * len(a["stride"])], np.int64)
        return self._ops.add(out, self._ops.reshape(bias, wide, False))

    def _max_pool(self, x: Operands, a: Attributes) -> Node:
        windows = [list(a[name]) for name in ("stride", "dilation", "begin", "end", "kernel")]
        return self._ops.max_pool(x[0], *windows, "floor", "explicit").output(0)

    def _avg_pool(self, x: Operands, a: Attributes) -> Node:
        windows = [list(a[name]) for name in ("stride", "begin", "end", "kernel")]
        return self._ops.avg_pool(x[0], *windows, not a["count_padding"], "floor", "explicit")

    # -- moving

    def _arange(self, x: Operands, a: Attributes) -> Node:
        return self._ops.range(x[0], x[1], x[2], "i64")

    def _concat(self, x: Operands, a: Attributes) -> Node:
        return self._ops.concat(x, a["axis"])

    def _expand(self, x: Operands, a: Attributes) -> Node:
        return self._ops.broadcast(x[0], x[1], broadcast_spec="BIDIRECTIONAL")

    def _flip(self, x: Operands, a: Attributes) -> Node:
        back, axis = np.array([-1], np.int64), np.array([a["axis"]], np.int64)
        return self._ops.slice(x[0], back, np.array([-(2**31) + 1], np.int64), back, axis)

    def _gather(self, x: Operands, a: Attributes) -> Node:
        return self._ops.gather(x[0], x[1], np.int64(a["axis"]))

    def _gather_elements(self, x: Operands, a: Attributes) -> Node:
        return self._ops.gather_elements(x[0], x[1], a["axis"])

    def _gather_nd(self, x: Operands, a: Attributes) -> Node:
        return self._ops.gather_nd(x[0], x[1])

    def _pad(self, x: Operands, a: Attributes) -> Node:
        sides = [np.array(a[name], np.int64) for name in ("begin", "end")]
        return self._ops.pad(x[0], *sides, a["mode"], x[1])

    def _reshape(self, x: Operands, a: Attributes) -> Node:
        return self._ops.reshape(x[0], x[1], True)

    def _shape_of(self, x: Operands, a: Attributes) -> Node:
        return self._ops.shape_of(x[0], "i64")

    def _slice(self, x: Operands, a: Attributes) -> Node:
        step, axis = np.array([a["step"]], np.int64), np.array([a["axis"]], np.int64)
        return self._ops.slice(x[0], x[1], x[2], step, axis)

    def _transpose(self, x: Operands, a: Attributes) -> Node:
        return self._ops.transpose(x[0], np.array(a["order"], np.int64))
