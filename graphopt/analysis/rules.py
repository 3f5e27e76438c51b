"""Type rules of common ops, by op name. A rule returns None where it is not sure; the op then runs
on the meta device.

Rules know shapes as symbolic dims, so `view`, strided windows and broadcasting stay exact for every
size. `view` means `reshape` in a graphopt graph: values are immutable, so whether memory is shared
cannot be seen, and a layout that forbids a view only costs a copy.
"""

from typing import Any

from graphopt.analysis import rules_shape
from graphopt.analysis.rule_base import (
    RULES,
    Bound,
    axis,
    broadcast_shapes,
    match,
    rule,
    same_dtype,
    show,
)
from graphopt.dims import Dim, floordiv
from graphopt.errors import TypeMismatchError
from graphopt.types import CONTIGUOUS, STRIDED, TensorType, ValueType

__all__ = ["RULES", "broadcast_shapes", "rules_shape"]  # the shape rules register when loaded


@rule(
    "relu.default",
    "gelu.default",
    "sigmoid.default",
    "tanh.default",
    "silu.default",
    "hardtanh.default",
    "hardswish.default",
    "hardsigmoid.default",
    "relu6.default",
    "neg.default",
    "exp.default",
    "sqrt.default",
    "rsqrt.default",
    "abs.default",
    "erf.default",
    "sin.default",
    "cos.default",
    "pow.Tensor_Scalar",
    "elu.default",
    "leaky_relu.default",
    "softplus.default",
    "mish.default",
    "log.default",
    "reciprocal.default",
    "clamp.default",
)
def _float_unary(a: Bound) -> tuple[ValueType, ...] | None:
    x = a["self"]
    if not isinstance(x, TensorType) or x.dtype not in ("f32", "f64") or x.layout == STRIDED:
        return None
    return (x,)


@rule("softmax.int", "_softmax.default")
def _softmax(a: Bound) -> tuple[ValueType, ...] | None:
    x = a["self"]
    if (
        x.dtype not in ("f32", "f64")
        or x.layout != CONTIGUOUS
        or a.get("dtype") not in (None, x.dtype)
        or a.get("half_to_float")
    ):
        return None
    axis(x, a["dim"])
    return (x,)


@rule(
    "add.Tensor",
    "sub.Tensor",
    "mul.Tensor",
    "div.Tensor",
    "add.Scalar",
    "sub.Scalar",
    "mul.Scalar",
    "div.Scalar",
)
def _arithmetic(a: Bound) -> tuple[ValueType, ...] | None:
    x, y = a["self"], a["other"]
    if not isinstance(x, TensorType) or x.dtype not in ("f32", "f64"):
        return None
    if isinstance(y, TensorType):
        if y.dtype != x.dtype:
            return None
    elif isinstance(y, complex | bool):
        return None
    if isinstance(a.get("alpha"), bool):
        return None
    return _broadcast(x, y, x.dtype)


@rule(
    "eq.Scalar", "ne.Scalar", "lt.Scalar", "le.Scalar", "gt.Scalar", "ge.Scalar",
    "eq.Tensor", "ne.Tensor", "lt.Tensor", "le.Tensor", "gt.Tensor", "ge.Tensor",
)  # fmt: skip
def _compare(a: Bound) -> tuple[ValueType, ...] | None:
    x = a["self"]
    return _broadcast(x, a["other"], "bool") if isinstance(x, TensorType) else None


def _broadcast(x: TensorType, y: Any, dtype: str) -> tuple[ValueType, ...] | None:
    if not isinstance(y, TensorType):
        return (TensorType(dtype, x.shape, x.layout),) if x.layout != STRIDED else None
    shape = broadcast_shapes(x.shape, y.shape)
    if x.layout == y.layout == CONTIGUOUS and shape in (x.shape, y.shape):
        return (TensorType(dtype, shape),)
    if x.layout == y.layout and x.shape == y.shape and x.layout != STRIDED:
        return (TensorType(dtype, shape, x.layout),)
    return None


@rule("where.self")
def _where(a: Bound) -> tuple[ValueType, ...] | None:
    condition, x, y = a["condition"], a["self"], a["other"]
    if (
        not all(isinstance(t, TensorType) and t.layout == CONTIGUOUS for t in (condition, x, y))
        or x.dtype != y.dtype
    ):
        return None
    shape = broadcast_shapes(broadcast_shapes(condition.shape, x.shape), y.shape)
    return (TensorType(x.dtype, shape),) if shape in (condition.shape, x.shape, y.shape) else None


# -- matrix products


@rule("linear.default")
def _linear(a: Bound) -> tuple[ValueType, ...] | None:
    x, weight, bias = a["input"], a["weight"], a["bias"]
    if x.rank < 1 or weight.rank != 2:
        return None
    same_dtype(x, weight, *([bias] if bias else []))
    match(x.shape[-1], weight.shape[1], "the last dim of input", "in_features")
    if bias is not None:
        match(bias.shape, (weight.shape[0],), "bias", "out_features")
    return (TensorType(x.dtype, (*x.shape[:-1], weight.shape[0])),)


@rule("addmm.default")
def _addmm(a: Bound) -> tuple[ValueType, ...] | None:
    left, right = a["mat1"], a["mat2"]
    if left.rank != 2 or right.rank != 2:
        return None
    same_dtype(a["self"], left, right)
    match(left.shape[1], right.shape[0], "columns of mat1", "rows of mat2")
    shape = (left.shape[0], right.shape[1])
    match(broadcast_shapes(a["self"].shape, shape), shape, "self", "the product")
    return (TensorType(left.dtype, shape),)


@rule("matmul.default", "bmm.default", "mm.default")
def _matmul(a: Bound) -> tuple[ValueType, ...] | None:
    left, right = a["self"], a["mat2"] if "mat2" in a else a["other"]
    if left.rank < 2 or right.rank < 2 or left.layout != CONTIGUOUS or right.layout != CONTIGUOUS:
        return None
    same_dtype(left, right)
    match(
        left.shape[-1],
        right.shape[-2],
        "the last dim of the left",
        "the dim before the last of the right",
    )
    if left.rank == 2 < right.rank:
        return None  # torch folds this case transposed
    batch = broadcast_shapes(left.shape[:-2], right.shape[:-2])
    return (TensorType(left.dtype, (*batch, left.shape[-2], right.shape[-1])),)


@rule("embedding.default")
def _embedding(a: Bound) -> tuple[ValueType, ...] | None:
    weight, indices = a["weight"], a["indices"]
    if weight.rank != 2 or indices.dtype not in ("i64", "i32"):
        return None
    return (TensorType(weight.dtype, (*indices.shape, weight.shape[1])),)


def _check_norm_dtypes(x: TensorType, *params: TensorType | None) -> None:
    """What the CPU kernels demand and the meta device does not see: a float input, and parameters of
    its dtype or, where that is shorter, of f32.
    """
    if not x.is_float:
        raise TypeMismatchError(
            f"{x.dtype} cannot be normalized", remedy="convert with aten._to_copy.default"
        )
    given = [each for each in params if each is not None]
    for each in given:
        same_dtype(given[0], each)
        if not (x.dtype in ("bf16", "f16") and each.dtype == "f32"):
            same_dtype(x, each)


@rule("layer_norm.default")
def _layer_norm(a: Bound) -> tuple[ValueType, ...] | None:
    x, shape = a["input"], a["normalized_shape"]
    if x.layout != CONTIGUOUS:
        return None
    _check_norm_dtypes(x, a["weight"], a["bias"])
    match(x.shape[-len(shape) :], tuple(shape), "the last dims of input", "normalized_shape")
    for name in ("weight", "bias"):
        if a[name] is not None:
            match(a[name].shape, tuple(shape), name, "normalized_shape")
    return (x,)


@rule("batch_norm.default")
def _batch_norm(a: Bound) -> tuple[ValueType, ...] | None:
    x = a["input"]
    if a["training"] or x.layout == STRIDED or x.rank < 2:
        return None
    _check_norm_dtypes(x, a["weight"], a["bias"], a["running_mean"], a["running_var"])
    for name in ("weight", "bias", "running_mean", "running_var"):
        if a[name] is not None:
            match(a[name].shape, (x.shape[1],), name, "channels")
    return (x,)


@rule("scaled_dot_product_attention.default")
def _attention(a: Bound) -> tuple[ValueType, ...] | None:
    query, key, value, mask = a["query"], a["key"], a["value"], a["attn_mask"]
    if not query.rank == key.rank == value.rank == 4 or a["enable_gqa"]:
        return None
    same_dtype(query, key, value)
    match(query.shape[-1], key.shape[-1], "head size of query", "head size of key")
    match(key.shape[-2], value.shape[-2], "length of key", "length of value")
    batch = broadcast_shapes(broadcast_shapes(query.shape[:2], key.shape[:2]), value.shape[:2])
    if mask is not None:
        scores = (*batch, query.shape[-2], key.shape[-2])
        match(broadcast_shapes(mask.shape, scores), scores, "attn_mask", "the scores")
    shape = (*batch, query.shape[-2], value.shape[-1])
    return (
        TensorType(
            query.dtype, shape, query.layout if _is_flash(query, key, value, mask) else STRIDED
        ),
    )


def _is_flash(
    query: TensorType, key: TensorType, value: TensorType, mask: TensorType | None
) -> bool:
    """Whether torch surely takes its CPU kernel, whose result lies as the query does.

    The conditions are those of aten/src/ATen/native/transformers/sdp_utils_cpp.cpp. The plain path
    lays its result out otherwise.
    """
    if (
        not query.shape[:2] == key.shape[:2] == value.shape[:2]
        or not query.shape[-1] == key.shape[-1] == value.shape[-1]
    ):
        return False
    inner = all(
        t.layout == CONTIGUOUS or (t.layout != STRIDED and t.layout[-1] == 3)
        for t in (query, key, value)
    )
    if mask is None or not inner:
        return inner
    wanted = (*query.shape[:2], query.shape[-2], key.shape[-2])
    return mask.rank in (2, 4) and all(
        have in (1, want) for have, want in zip(mask.shape[::-1], wanted[::-1], strict=False)
    )


@rule("conv2d.default", "convolution.default")
def _convolution(a: Bound) -> tuple[ValueType, ...] | None:
    x, weight = a["input"], a["weight"]
    if x.rank != 4 or weight.rank != 4 or a.get("transposed"):
        return None
    if any(isinstance(dim, str) for dim in (a["padding"] or ())):
        return None
    if x.layout != CONTIGUOUS or weight.layout != CONTIGUOUS:
        return None
    same_dtype(x, weight)
    match(
        x.shape[1],
        weight.shape[1] * a["groups"],
        "channels of input",
        "channels of weight x groups",
    )
    shape = (x.shape[0], weight.shape[0], *_windows(x.shape[2:], weight.shape[2:], a))
    return (TensorType(x.dtype, shape),)


@rule("max_pool2d.default", "avg_pool2d.default")
def _pool(a: Bound) -> tuple[ValueType, ...] | None:
    x = a["self"]
    if x.rank != 4 or a["ceil_mode"] or x.layout == STRIDED:
        return None
    stride = a["stride"] or a["kernel_size"]
    settings = {"stride": stride, "padding": a["padding"], "dilation": a.get("dilation", (1,))}
    kernel = _pair(a["kernel_size"])
    if any(
        isinstance(pad, int) and isinstance(k, int) and 2 * pad > k
        for pad, k in zip(_pair(a["padding"]), kernel, strict=True)
    ):
        raise TypeMismatchError(
            f"padding {show(a['padding'])} is more than half of the window {show(kernel)}"
        )
    return (
        TensorType(x.dtype, (*x.shape[:2], *_windows(x.shape[2:], kernel, settings)), x.layout),
    )


def _windows(sizes: tuple[Dim, ...], kernel: tuple[Dim, ...], a: Bound) -> tuple[Dim, ...]:
    strides, paddings, dilations = _pair(a["stride"]), _pair(a["padding"]), _pair(a["dilation"])
    out = []
    for size, k, stride, padding, dilation in zip(
        sizes, kernel, strides, paddings, dilations, strict=True
    ):
        extent = size + 2 * padding - dilation * (k - 1) - 1
        if isinstance(extent, int) and extent < 0:
            raise TypeMismatchError(f"the window of {k} does not fit into {size}")
        out.append(floordiv(extent, stride) + 1)
    return tuple(out)


def _pair(value: Any) -> tuple[Any, ...]:
    items = value if isinstance(value, tuple) else (value,)
    return items * 2 if len(items) == 1 else items
