"""Type rules of common ops, by op name. A rule returns None where it is not sure; the op then runs on the meta device.

Rules know shapes as symbolic dims, so `view`, strided windows and broadcasting stay exact for every size. `view` means `reshape` in a
graphopt graph: values are immutable, so whether memory is shared cannot be seen, and a layout that forbids a view only costs a copy.
"""

from collections.abc import Callable, Mapping
from typing import Any

from graphopt.dims import Dim, floordiv, maximum, minimum, product
from graphopt.errors import TypeMismatchError
from graphopt.types import CONTIGUOUS, STRIDED, Layout, SymIntType, TensorType, ValueType

Bound = Mapping[str, Any]
Rule = Callable[[Bound], "tuple[ValueType, ...] | None"]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers the decorated function as the rule of the ATen ops `names` (written without `aten.`)."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[f"aten.{name}"] = function
        return function

    return register


# -- elementwise


@rule(
    "relu.default", "gelu.default", "sigmoid.default", "tanh.default", "silu.default", "hardtanh.default", "hardswish.default",
    "hardsigmoid.default", "relu6.default", "neg.default", "exp.default", "sqrt.default", "rsqrt.default", "abs.default",
    "erf.default", "sin.default", "cos.default", "pow.Tensor_Scalar", "elu.default",
    "leaky_relu.default", "softplus.default", "mish.default", "log.default", "reciprocal.default", "clamp.default",
)  # fmt: skip
def _float_unary(a: Bound) -> tuple[ValueType, ...] | None:
    x = a["self"]
    if not isinstance(x, TensorType) or x.dtype not in ("f32", "f64") or x.layout == STRIDED:
        return None
    return (x,)


@rule("softmax.int", "_softmax.default")
def _softmax(a: Bound) -> tuple[ValueType, ...] | None:
    x = a["self"]
    if x.dtype not in ("f32", "f64") or x.layout != CONTIGUOUS or a.get("dtype") not in (None, x.dtype) or a.get("half_to_float"):
        return None
    _axis(x, a["dim"])
    return (x,)


@rule("add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor", "add.Scalar", "sub.Scalar", "mul.Scalar", "div.Scalar")
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


def broadcast_shapes(x: tuple[Dim, ...], y: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """The shape that two shapes broadcast to; TypeMismatchError when they do not."""
    rank = max(len(x), len(y))
    padded_x, padded_y = (1,) * (rank - len(x)) + x, (1,) * (rank - len(y)) + y
    out: list[Dim] = []
    for dx, dy in zip(padded_x, padded_y, strict=True):
        if dx == dy or dy == 1:
            out.append(dx)
        elif dx == 1:
            out.append(dy)
        else:
            raise TypeMismatchError(f"sizes {dx} and {dy} do not broadcast")
    return tuple(out)


@rule("where.self")
def _where(a: Bound) -> tuple[ValueType, ...] | None:
    condition, x, y = a["condition"], a["self"], a["other"]
    if not all(isinstance(t, TensorType) and t.layout == CONTIGUOUS for t in (condition, x, y)) or x.dtype != y.dtype:
        return None
    shape = broadcast_shapes(broadcast_shapes(condition.shape, x.shape), y.shape)
    return (TensorType(x.dtype, shape),) if shape in (condition.shape, x.shape, y.shape) else None


# -- matrix products


@rule("linear.default")
def _linear(a: Bound) -> tuple[ValueType, ...] | None:
    x, weight, bias = a["input"], a["weight"], a["bias"]
    if x.rank < 1 or weight.rank != 2:
        return None
    _same_dtype(x, weight, *([bias] if bias else []))
    _match(x.shape[-1], weight.shape[1], "the last dim of input", "in_features")
    if bias is not None:
        _match(bias.shape, (weight.shape[0],), "bias", "out_features")
    return (TensorType(x.dtype, (*x.shape[:-1], weight.shape[0])),)


@rule("addmm.default")
def _addmm(a: Bound) -> tuple[ValueType, ...] | None:
    left, right = a["mat1"], a["mat2"]
    if left.rank != 2 or right.rank != 2:
        return None
    _same_dtype(a["self"], left, right)
    _match(left.shape[1], right.shape[0], "columns of mat1", "rows of mat2")
    shape = (left.shape[0], right.shape[1])
    _match(broadcast_shapes(a["self"].shape, shape), shape, "self", "the product")
    return (TensorType(left.dtype, shape),)


@rule("matmul.default", "bmm.default", "mm.default")
def _matmul(a: Bound) -> tuple[ValueType, ...] | None:
    left, right = a["self"], a["mat2"] if "mat2" in a else a["other"]
    if left.rank < 2 or right.rank < 2 or left.layout != CONTIGUOUS or right.layout != CONTIGUOUS:
        return None
    _same_dtype(left, right)
    _match(left.shape[-1], right.shape[-2], "the last dim of the left", "the dim before the last of the right")
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


@rule("layer_norm.default")
def _layer_norm(a: Bound) -> tuple[ValueType, ...] | None:
    x, shape = a["input"], a["normalized_shape"]
    if x.layout != CONTIGUOUS:
        return None
    _match(x.shape[-len(shape) :], tuple(shape), "the last dims of input", "normalized_shape")
    for name in ("weight", "bias"):
        if a[name] is not None:
            _match(a[name].shape, tuple(shape), name, "normalized_shape")
    return (x,)


@rule("batch_norm.default")
def _batch_norm(a: Bound) -> tuple[ValueType, ...] | None:
    x = a["input"]
    if a["training"] or x.layout == STRIDED or x.rank < 2:
        return None
    for name in ("weight", "bias", "running_mean", "running_var"):
        if a[name] is not None:
            _match(a[name].shape, (x.shape[1],), name, "channels")
    return (x,)


@rule("scaled_dot_product_attention.default")
def _attention(a: Bound) -> tuple[ValueType, ...] | None:
    query, key, value, mask = a["query"], a["key"], a["value"], a["attn_mask"]
    if not query.rank == key.rank == value.rank == 4 or a["enable_gqa"]:
        return None
    _same_dtype(query, key, value)
    _match(query.shape[-1], key.shape[-1], "head size of query", "head size of key")
    _match(key.shape[-2], value.shape[-2], "length of key", "length of value")
    batch = broadcast_shapes(broadcast_shapes(query.shape[:2], key.shape[:2]), value.shape[:2])
    if mask is not None:
        scores = (*batch, query.shape[-2], key.shape[-2])
        _match(broadcast_shapes(mask.shape, scores), scores, "attn_mask", "the scores")
    shape = (*batch, query.shape[-2], value.shape[-1])
    return (TensorType(query.dtype, shape, query.layout if _is_flash(query, key, value, mask) else STRIDED),)


def _is_flash(query: TensorType, key: TensorType, value: TensorType, mask: TensorType | None) -> bool:
    """Whether torch surely takes its CPU kernel, whose result lies as the query does.

    The conditions are those of aten/src/ATen/native/transformers/sdp_utils_cpp.cpp. The plain path lays its result out otherwise.
    """
    if not query.shape[:2] == key.shape[:2] == value.shape[:2] or not query.shape[-1] == key.shape[-1] == value.shape[-1]:
        return False
    inner = all(t.layout == CONTIGUOUS or (t.layout != STRIDED and t.layout[-1] == 3) for t in (query, key, value))
    if mask is None or not inner:
        return inner
    wanted = (*query.shape[:2], query.shape[-2], key.shape[-2])
    return mask.rank in (2, 4) and all(have in (1, want) for have, want in zip(mask.shape[::-1], wanted[::-1], strict=False))


@rule("conv2d.default", "convolution.default")
def _convolution(a: Bound) -> tuple[ValueType, ...] | None:
    x, weight = a["input"], a["weight"]
    if x.rank != 4 or weight.rank != 4 or a.get("transposed"):
        return None
    if any(isinstance(dim, str) for dim in (a["padding"] or ())):
        return None
    if x.layout != CONTIGUOUS or weight.layout != CONTIGUOUS:
        return None
    _same_dtype(x, weight)
    _match(x.shape[1], weight.shape[1] * a["groups"], "channels of input", "channels of weight x groups")
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
    if any(isinstance(pad, int) and isinstance(k, int) and 2 * pad > k for pad, k in zip(_pair(a["padding"]), kernel, strict=True)):
        raise TypeMismatchError(f"padding {_show(a['padding'])} is more than half of the window {_show(kernel)}")
    return (TensorType(x.dtype, (*x.shape[:2], *_windows(x.shape[2:], kernel, settings)), x.layout),)


def _windows(sizes: tuple[Dim, ...], kernel: tuple[Dim, ...], a: Bound) -> tuple[Dim, ...]:
    strides, paddings, dilations = _pair(a["stride"]), _pair(a["padding"]), _pair(a["dilation"])
    out = []
    for size, k, stride, padding, dilation in zip(sizes, kernel, strides, paddings, dilations, strict=True):
        extent = size + 2 * padding - dilation * (k - 1) - 1
        if isinstance(extent, int) and extent < 0:
            raise TypeMismatchError(f"the window of {k} does not fit into {size}")
        out.append(floordiv(extent, stride) + 1)
    return tuple(out)


def _pair(value: Any) -> tuple[Any, ...]:
    items = value if isinstance(value, tuple) else (value,)
    return items * 2 if len(items) == 1 else items


# -- shapes


@rule("sym_size.int")
def _sym_size(a: Bound) -> tuple[ValueType, ...] | None:
    return (SymIntType(a["self"].shape[_axis_of(a["self"], a["dim"])]),)


@rule("view.default", "reshape.default", "_unsafe_view.default")
def _view(a: Bound) -> tuple[ValueType, ...] | None:
    x = a["self"]
    size = tuple(a["size"] if "size" in a else a["shape"])
    total = product(x.shape)
    holes = [i for i, dim in enumerate(size) if dim == -1]
    known = product(dim for dim in size if dim != -1)
    if len(holes) > 1:
        raise TypeMismatchError("only one size may be -1")
    if holes:
        missing = floordiv(total, known) if known != 0 else 0
        if missing * known != total:
            raise TypeMismatchError(f"{total} elements do not divide into {_show(size)}")
        size = (*size[: holes[0]], missing, *size[holes[0] + 1 :])
    elif known != total:
        raise TypeMismatchError(f"{_show(x.shape)} holds {total} elements, {_show(size)} takes {known}")
    return (TensorType(x.dtype, size, CONTIGUOUS if x.layout == CONTIGUOUS else STRIDED),)


@rule("permute.default")
def _permute(a: Bound) -> tuple[ValueType, ...] | None:
    x = a["self"]
    dims = tuple(_axis(x, dim) for dim in a["dims"])
    if sorted(dims) != list(range(x.rank)):
        raise TypeMismatchError(f"{_show(dims)} is no permutation of {x.rank} dims")
    return (_permuted(x, dims),)


@rule("transpose.int", "t.default")
def _transpose(a: Bound) -> tuple[ValueType, ...] | None:
    x = a["self"]
    if "dim0" not in a:
        if x.rank != 2:
            return None
        return (_permuted(x, (1, 0)),)
    i, j = _axis(x, a["dim0"]), _axis(x, a["dim1"])
    if x.rank == 0:
        return (x,)
    dims = list(range(x.rank))
    dims[i], dims[j] = dims[j], dims[i]
    return (_permuted(x, tuple(dims)),)


def _permuted(x: TensorType, dims: tuple[int, ...]) -> TensorType:
    shape = tuple(x.shape[d] for d in dims)
    if x.layout == STRIDED or any(dim == 1 for dim in x.shape):
        return TensorType(x.dtype, shape, STRIDED if dims != tuple(range(x.rank)) else x.layout)
    order = x.layout if isinstance(x.layout, tuple) else tuple(range(x.rank))
    moved: Layout = tuple(dims.index(d) for d in order)
    return TensorType(x.dtype, shape, CONTIGUOUS if moved == tuple(range(x.rank)) else moved)


@rule("unsqueeze.default")
def _unsqueeze(a: Bound) -> tuple[ValueType, ...] | None:
    x, dim = a["self"], a["dim"]
    at = dim + x.rank + 1 if dim < 0 else dim
    if not 0 <= at <= x.rank:
        raise TypeMismatchError(f"dim {dim} is outside a tensor of rank {x.rank}")
    layout = CONTIGUOUS if x.layout == CONTIGUOUS else STRIDED
    return (TensorType(x.dtype, (*x.shape[:at], 1, *x.shape[at:]), layout),)


@rule("expand.default")
def _expand(a: Bound) -> tuple[ValueType, ...] | None:
    x, size = a["self"], tuple(a["size"])
    if len(size) < x.rank:
        raise TypeMismatchError(f"{_show(size)} has fewer dims than {_show(x.shape)}")
    lead = len(size) - x.rank
    shape: list[Dim] = []
    for idx, wanted in enumerate(size):
        have = x.shape[idx - lead] if idx >= lead else 1
        if wanted == -1 and idx >= lead:
            shape.append(have)
        elif have in (1, wanted):
            shape.append(wanted)
        else:
            raise TypeMismatchError(f"size {have} does not expand to {wanted}")
    same = tuple(shape) == x.shape
    return (TensorType(x.dtype, tuple(shape), x.layout if same else STRIDED),)


@rule("select.int")
def _select(a: Bound) -> tuple[ValueType, ...] | None:
    x = a["self"]
    at = _axis_of(x, a["dim"])
    _check_index(a["index"], x.shape[at])
    layout = CONTIGUOUS if at == 0 and x.layout == CONTIGUOUS else STRIDED
    return (TensorType(x.dtype, x.shape[:at] + x.shape[at + 1 :], layout),)


@rule("slice.Tensor")
def _slice(a: Bound) -> tuple[ValueType, ...] | None:
    x = a["self"]
    at = _axis_of(x, a["dim"])
    size, start, end, step = x.shape[at], a["start"], a["end"], a["step"]
    if step != 1:
        return None
    if start in (None, 0) and (end is None or end == size or (isinstance(end, int) and end >= 1 << 62)):
        return (x,)
    low = _bound(0 if start is None else start, size)
    high = _bound((1 << 63) - 1 if end is None else end, size)
    shape = (*x.shape[:at], maximum(high - low, 0), *x.shape[at + 1 :])
    return (TensorType(x.dtype, shape, CONTIGUOUS if at == 0 and x.layout == CONTIGUOUS else STRIDED),)


def _bound(end: Dim, size: Dim) -> Dim:
    """Where a slice bound lies: negative ones count from the end, ones behind it are the end. Dynamic ones are taken to be positive."""
    if isinstance(end, int):
        if end >= 1 << 62:
            return size
        if end < 0:
            return maximum(size + end, 0)
    return minimum(end, size) if end != 0 else 0


@rule("cat.default")
def _cat(a: Bound) -> tuple[ValueType, ...] | None:
    tensors = a["tensors"]
    first = tensors[0]
    at = _axis(first, a["dim"])
    if first.rank == 0 or any(t.rank != first.rank or t.dtype != first.dtype or t.layout != CONTIGUOUS for t in tensors):
        return None
    total: Dim = 0
    for t in tensors:
        _match(t.shape[:at] + t.shape[at + 1 :], first.shape[:at] + first.shape[at + 1 :], "a tensor", "the first, outside dim")
        total = total + t.shape[at]
    return (TensorType(first.dtype, (*first.shape[:at], total, *first.shape[at + 1 :])),)


@rule("mean.dim", "sum.dim_IntList", "amax.default", "amin.default")
def _reduce(a: Bound) -> tuple[ValueType, ...] | None:
    x, dims = a["self"], a["dim"]
    if not dims or x.dtype not in ("f32", "f64") or a.get("dtype") not in (None, x.dtype) or x.layout != CONTIGUOUS:
        return None
    axes = {_axis(x, dim) for dim in dims}
    if len(axes) < len(dims):
        raise TypeMismatchError(f"{_show(dims)} names a dim twice")
    if a["keepdim"]:
        return (TensorType(x.dtype, tuple(1 if i in axes else dim for i, dim in enumerate(x.shape))),)
    return (TensorType(x.dtype, tuple(dim for i, dim in enumerate(x.shape) if i not in axes)),)


@rule("clone.default", "contiguous.default")
def _clone(a: Bound) -> tuple[ValueType, ...] | None:
    x = a["self"]
    if a["memory_format"] == "contiguous_format":
        return (TensorType(x.dtype, x.shape),)
    return (x,) if x.layout == CONTIGUOUS and a["memory_format"] in (None, "preserve_format") else None


@rule("_to_copy.default", "to.dtype")
def _to_copy(a: Bound) -> tuple[ValueType, ...] | None:
    x = a["self"]
    if a.get("memory_format") not in (None, "preserve_format") or x.layout == STRIDED:
        return None
    return (TensorType(a["dtype"] or x.dtype, x.shape, x.layout),)


# -- checks


def _axis(x: TensorType, dim: Any) -> int:
    if not isinstance(dim, int) or not -max(x.rank, 1) <= dim < max(x.rank, 1):
        raise TypeMismatchError(f"dim {dim} is outside a tensor of rank {x.rank}")
    return dim % x.rank if x.rank else 0


def _axis_of(x: TensorType, dim: Any) -> int:
    """The dim of a tensor that must have one."""
    if x.rank == 0:
        raise TypeMismatchError("a tensor of rank 0 has no dims")
    return _axis(x, dim)


def _check_index(index: Any, size: Dim) -> None:
    if isinstance(index, int) and isinstance(size, int) and not -size <= index < size:
        raise TypeMismatchError(f"index {index} is outside a dim of size {size}")


def _match(left: Any, right: Any, what: str, of: str) -> None:
    if left != right:
        raise TypeMismatchError(f"{what} is {_show(left)}, {of} is {_show(right)}")


def _same_dtype(*tensors: TensorType) -> None:
    if len({t.dtype for t in tensors}) > 1:
        raise TypeMismatchError(f"dtypes differ: {', '.join(t.dtype for t in tensors)}", remedy="convert with aten._to_copy.default")


def _show(value: Any) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)
