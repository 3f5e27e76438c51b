"""The quickest Python entry to each ATen op.

torch reaches one kernel by several roads. The generated bindings (`torch.relu`,
`torch._C._nn.linear`) parse arguments in C++ and cost about 1 us; a call through `torch.ops` costs
two to three times that, which on small models is most of the time. Ops of which the binding takes
exactly the schema's arguments are named here; all others go through their overload object, which is
always right.
"""

from collections.abc import Callable
from typing import Any

import torch

from graphopt.ops import get_overload

# torch.<name>, positional arguments in schema order and keyword-only ones by name.
_FUNCTIONS = (
    "relu", "sigmoid", "tanh", "neg", "exp", "sqrt", "rsqrt", "abs", "erf", "sin", "cos", "add",
    "sub", "mul", "div", "matmul", "bmm", "mm", "addmm", "layer_norm", "batch_norm", "softmax",
    "embedding", "conv1d", "conv2d", "conv3d", "convolution", "max_pool2d", "permute",
    "unsqueeze", "where", "cat", "clone", "eq", "ne", "lt", "le", "gt", "ge", "logical_and",
    "logical_or", "logical_not", "bitwise_and", "bitwise_or", "bitwise_not", "pow", "clamp",
    "cumsum", "stack", "rsub", "masked_fill", "group_norm", "flatten", "transpose", "t",
)  # fmt: skip
# torch._C._nn.<name>, likewise.
_NN_FUNCTIONS = (
    "linear", "gelu", "silu", "hardtanh", "hardswish", "hardsigmoid", "leaky_relu", "elu",
    "softplus", "mish", "relu6", "scaled_dot_product_attention", "adaptive_avg_pool2d",
    "avg_pool2d",
)  # fmt: skip
# Methods of Tensor; `view` is `reshape` in a graphopt graph (see graphopt.analysis.rules).
_METHODS = {
    "view": "reshape", "_unsafe_view": "reshape", "reshape": "reshape", "expand": "expand",
    "contiguous": "contiguous",
}  # fmt: skip


def kernel_of(op: str) -> Callable[..., Any]:
    """A callable that takes the op's arguments as its schema lists them.

    UnknownOpError for an op torch does not have.
    """
    namespace, name, _ = op.split(".")
    if namespace == "aten":
        if name in _METHODS:
            method: Callable[..., Any] = getattr(torch.Tensor, _METHODS[name])
            return method
        if name in _FUNCTIONS:
            function: Callable[..., Any] = getattr(torch, name)
            return function
        if name in _NN_FUNCTIONS and hasattr(torch._C._nn, name):
            binding: Callable[..., Any] = getattr(torch._C._nn, name)
            return binding
    return get_overload(op)._op  # type: ignore[no-any-return]
