"""Calls as ONNX nodes, each in the form that ONNX Runtime's CPU provider runs best.

Weights are named and left outside: the description refers to them, the session is given their
memory. A linear is a Gemm over flattened rows, which takes the weight as torch holds it and its
bias for nothing. The package `onnx` is imported when a target is made. Deliberately absent: what
runs the result (`graphopt.executor.backends.onnxruntime`).
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch

from graphopt.types import TensorType

OPSET, IR_VERSION = 21, 10
CONTRIB = "com.microsoft"
# Placeholders of weights name this file, which never exists.
OUTSIDE = "outside"
Operands = list[str | None]
Attributes = Mapping[str, Any]

_TYPES = {"f32": 1, "i32": 6, "i64": 7, "bool": 9}  # onnx.TensorProto.DataType
_SIMPLE = {
    "abs": "Abs", "acos": "Acos", "acosh": "Acosh", "asin": "Asin", "asinh": "Asinh",
    "atan": "Atan", "atanh": "Atanh", "ceil": "Ceil", "cos": "Cos", "cosh": "Cosh", "erf": "Erf",
    "exp": "Exp", "floor": "Floor", "hardswish": "HardSwish", "log": "Log", "mish": "Mish",
    "neg": "Neg", "not": "Not", "relu": "Relu", "round": "Round", "selu": "Selu",
    "sigmoid": "Sigmoid", "sign": "Sign", "sin": "Sin", "sinh": "Sinh", "softplus": "Softplus",
    "sqrt": "Sqrt", "tan": "Tan", "tanh": "Tanh", "isnan": "IsNaN", "isinf": "IsInf",
    "add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "pow": "Pow", "max": "Max",
    "min": "Min", "mod": "Mod", "eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater",
    "ge": "GreaterOrEqual", "and": "And", "or": "Or", "xor": "Xor", "prelu": "PRelu",
    "where": "Where", "arange": "Range", "expand": "Expand", "reshape": "Reshape",
    "shape_of": "Shape", "gather_nd": "GatherND",
}  # fmt: skip
_WITH_AXIS = {
    "concat": "Concat", "gather": "Gather", "gather_elements": "GatherElements",
    "softmax": "Softmax", "log_softmax": "LogSoftmax",
}  # fmt: skip
_REDUCE = {
    "sum": "ReduceSum", "mean": "ReduceMean", "reduce_max": "ReduceMax",
    "reduce_min": "ReduceMin", "prod": "ReduceProd", "l2": "ReduceL2",
}  # fmt: skip


class OnnxTarget:
    """See `graphopt.executor.backends.target.Target`; handles are names of values."""

    def __init__(self) -> None:
        self._onnx: Any = import_module("onnx")
        self._helper: Any = import_module("onnx.helper")
        self.nodes: list[Any] = []
        self.inputs: list[Any] = []
        self.initializers: list[Any] = []
        self.weights: set[int] = set()  # positions of the constants that stay outside

    def model(self, exits: Sequence[str], types: Sequence[TensorType]) -> bytes:
        """The description as bytes; `exits` are the handles of the results `y0, y1 …`."""
        for position, name in enumerate(exits):
            self._node("Identity", [name], outputs=[f"y{position}"])
        outputs = [self._port(f"y{i}", type_) for i, type_ in enumerate(types)]
        graph = self._helper.make_graph(
            self.nodes, "region", self.inputs, outputs, self.initializers
        )
        opsets = [self._helper.make_opsetid("", OPSET), self._helper.make_opsetid(CONTRIB, 1)]
        model = self._helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
        data: bytes = model.SerializeToString()
        return data

    def parameter(self, index: int, type_: TensorType) -> str:
        """See `Target`."""
        self.inputs.append(self._port(f"x{index}", type_))
        return f"x{index}"

    def scalar_parameter(self, symbol: int) -> str:
        """See `Target`."""
        self.inputs.append(self._port(f"s{symbol}", TensorType("i64", (1,))))
        return f"s{symbol}"

    def constant(self, tensor: torch.Tensor, position: int | None) -> str:
        """See `Target`."""
        if position is None or tensor.numel() <= 1:
            return self._initializer(tensor.detach().numpy())
        name = f"w{position}"
        if position not in self.weights:
            self.weights.add(position)
            proto = self._onnx.TensorProto(name=name, data_type=_TYPES[_short(tensor)])
            proto.dims.extend(tensor.shape)
            proto.data_location = self._onnx.TensorProto.EXTERNAL
            entries = {"location": OUTSIDE, "offset": "0", "length": str(tensor.nbytes)}
            for key, value in entries.items():
                proto.external_data.add(key=key, value=value)
            self.initializers.append(proto)
        return name

    def take_apart(self, value: str, axis: int, sizes: list[int]) -> list[str]:
        """See `Target`."""
        first = len(self.nodes)
        names = [f"v{first}_{i}" for i in range(len(sizes))]
        self._node("Split", [value, self._ints(sizes)], outputs=names, axis=axis)
        return names

    def apply(self, kind: str, operands: Operands, attributes: Attributes) -> str:
        """See `Target`."""
        if kind in _SIMPLE:
            return self._node(_SIMPLE[kind], operands)
        if kind in _WITH_AXIS:
            return self._node(_WITH_AXIS[kind], operands, axis=attributes["axis"])
        if kind in _REDUCE:
            axes = self._ints(attributes["axes"])
            return self._node(_REDUCE[kind], [operands[0], axes], keepdims=int(attributes["keep"]))
        emitted: str = getattr(self, f"_{kind}")(operands, attributes)
        return emitted

    # -- writing

    def _node(
        self,
        op: str,
        operands: Sequence[str | None],
        domain: str = "",
        outputs: Sequence[str] | None = None,
        **attributes: Any,
    ) -> str:
        names = list(outputs or [f"v{len(self.nodes)}"])
        inputs = [name or "" for name in operands]
        while inputs and not inputs[-1]:
            inputs.pop()
        node = self._helper.make_node(op, inputs, names, domain=domain, **attributes)
        self.nodes.append(node)
        return names[0]

    def _port(self, name: str, type_: TensorType) -> Any:
        shape = [dim if isinstance(dim, int) else str(dim) for dim in type_.shape]
        return self._helper.make_tensor_value_info(name, _TYPES[type_.dtype], shape)

    def _initializer(self, array: "np.ndarray[Any, Any]") -> str:
        name = f"c{len(self.initializers)}"
        self.initializers.append(self._onnx.numpy_helper.from_array(np.asarray(array), name))
        return name

    def _ints(self, values: Sequence[int]) -> str:
        return self._initializer(np.array(values, np.int64))

    def _number(self, value: float) -> str:
        return self._initializer(np.array(value, np.float32))

    # -- elementwise

    def _ne(self, x: Operands, a: Attributes) -> str:
        return self._node("Not", [self._node("Equal", x)])

    def _cast(self, x: Operands, a: Attributes) -> str:
        return self._node("Cast", x, to=_TYPES[a["to"]])

    def _clamp(self, x: Operands, a: Attributes) -> str:
        low = self._number(a["low"]) if a["low"] > -np.inf else None
        high = self._number(a["high"]) if a["high"] < np.inf else None
        return self._node("Clip", [x[0], low, high])

    def _elu(self, x: Operands, a: Attributes) -> str:
        return self._node("Elu", x, alpha=a["alpha"])

    def _floordiv(self, x: Operands, a: Attributes) -> str:
        whole = self._node("Sub", [x[0], self._node("Mod", x)])
        return self._node("Div", [whole, x[1]])  # without a remainder there is nothing to round

    def _gelu(self, x: Operands, a: Attributes) -> str:
        if a["approximate"] == "tanh":
            return self._node("FastGelu", x, CONTRIB)  # the same formula in a faster kernel
        return self._node("Gelu", x)

    def _hardsigmoid(self, x: Operands, a: Attributes) -> str:
        return self._node("HardSigmoid", x, alpha=1 / 6, beta=0.5)

    def _leaky_relu(self, x: Operands, a: Attributes) -> str:
        return self._node("LeakyRelu", x, alpha=a["slope"])

    def _rsqrt(self, x: Operands, a: Attributes) -> str:
        return self._node("Reciprocal", [self._node("Sqrt", x)])

    def _silu(self, x: Operands, a: Attributes) -> str:
        return self._node("QuickGelu", x, CONTRIB, alpha=1.0)

    def _square(self, x: Operands, a: Attributes) -> str:
        return self._node("Mul", [x[0], x[0]])

    # -- rows

    def _argmax(self, x: Operands, a: Attributes) -> str:
        return self._node("ArgMax", x, axis=a["axis"], keepdims=int(a["keep"]))

    def _cumsum(self, x: Operands, a: Attributes) -> str:
        return self._node("CumSum", [x[0], self._initializer(np.array(a["axis"], np.int64))])

    def _batch_norm(self, x: Operands, a: Attributes) -> str:
        return self._node("BatchNormalization", x, epsilon=a["eps"])

    def _group_norm(self, x: Operands, a: Attributes) -> str:
        return self._node("GroupNormalization", x, num_groups=a["groups"], epsilon=a["eps"])

    def _layer_norm(self, x: Operands, a: Attributes) -> str:
        weight = x[1] or self._initializer(np.ones(a["sizes"], np.float32))
        settings = {"axis": -len(a["axes"]), "epsilon": a["eps"]}
        return self._node("LayerNormalization", [x[0], weight, x[2]], **settings)

    def _rms_norm(self, x: Operands, a: Attributes) -> str:
        weight = x[1] or self._initializer(np.ones(a["size"], np.float32))
        settings = {"axis": -1, "epsilon": a["eps"]}
        return self._node("SimplifiedLayerNormalization", [x[0], weight], **settings)

    # -- products and windows

    def _linear(self, x: Operands, a: Attributes) -> str:
        return self._node("Gemm", x, transB=int(not a["transposed"]))

    def _matmul(self, x: Operands, a: Attributes) -> str:
        if a["transpose_b"]:
            return self._node("FusedMatMul", x, CONTRIB, transB=1)
        return self._node("MatMul", x)

    def _attention(self, x: Operands, a: Attributes) -> str:
        query, key, value, mask = x
        settings = {"transB": 1, "alpha": a["scale"]}
        scores = self._node("FusedMatMul", [query, key], CONTRIB, **settings)
        if mask is not None:
            scores = self._node("Add", [scores, mask])
        return self._node("MatMul", [self._node("Softmax", [scores], axis=-1), value])

    def _conv(self, x: Operands, a: Attributes) -> str:
        return self._node("Conv", x, group=a["groups"], **self._windows(a))

    def _max_pool(self, x: Operands, a: Attributes) -> str:
        return self._node("MaxPool", x, kernel_shape=a["kernel"], **self._windows(a))

    def _avg_pool(self, x: Operands, a: Attributes) -> str:
        settings = self._windows(a) | {"count_include_pad": int(a["count_padding"])}
        return self._node("AveragePool", x, kernel_shape=a["kernel"], **settings)

    def _windows(self, a: Attributes) -> dict[str, Any]:
        settings = {"strides": a["stride"], "pads": (*a["begin"], *a["end"])}
        return settings | ({"dilations": a["dilation"]} if "dilation" in a else {})

    # -- moving

    def _flip(self, x: Operands, a: Attributes) -> str:
        back = self._ints([-1])
        least, axis = self._ints([-(2**63) + 1]), self._ints([a["axis"]])
        return self._node("Slice", [x[0], back, least, axis, back])

    def _pad(self, x: Operands, a: Attributes) -> str:
        sides = self._ints([*a["begin"], *a["end"]])
        return self._node("Pad", [x[0], sides, x[1]], mode=a["mode"])

    def _slice(self, x: Operands, a: Attributes) -> str:
        axis, step = self._ints([a["axis"]]), self._ints([a["step"]])
        return self._node("Slice", [x[0], x[1], x[2], axis, step])

    def _transpose(self, x: Operands, a: Attributes) -> str:
        return self._node("Transpose", x, perm=a["order"])


def _short(tensor: torch.Tensor) -> str:
    shorts = {torch.float32: "f32", torch.int64: "i64", torch.int32: "i32", torch.bool: "bool"}
    return shorts[tensor.dtype]
