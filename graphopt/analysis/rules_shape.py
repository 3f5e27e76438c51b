"""Type rules of ops that move, cut, join and reduce dims: see `graphopt.analysis.rules`."""

from graphopt.analysis.rule_base import Bound, axis, axis_of, check_index, match, rule, show
from graphopt.dims import Dim, floordiv, maximum, minimum, product
from graphopt.errors import TypeMismatchError
from graphopt.types import CONTIGUOUS, STRIDED, Layout, SymIntType, TensorType, ValueType


@rule("sym_size.int")
def _sym_size(a: Bound) -> tuple[ValueType, ...] | None:
    return (SymIntType(a["self"].shape[axis_of(a["self"], a["dim"])]),)


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
            raise TypeMismatchError(f"{total} elements do not divide into {show(size)}")
        size = (*size[: holes[0]], missing, *size[holes[0] + 1 :])
    elif known != total:
        raise TypeMismatchError(
            f"{show(x.shape)} holds {total} elements, {show(size)} takes {known}"
        )
    return (TensorType(x.dtype, size, CONTIGUOUS if x.layout == CONTIGUOUS else STRIDED),)


@rule("permute.default")
def _permute(a: Bound) -> tuple[ValueType, ...] | None:
    x = a["self"]
    dims = tuple(axis(x, dim) for dim in a["dims"])
    if sorted(dims) != list(range(x.rank)):
        raise TypeMismatchError(f"{show(dims)} is no permutation of {x.rank} dims")
    return (_permuted(x, dims),)


@rule("transpose.int", "t.default")
def _transpose(a: Bound) -> tuple[ValueType, ...] | None:
    x = a["self"]
    if "dim0" not in a:
        if x.rank != 2:
            return None
        return (_permuted(x, (1, 0)),)
    i, j = axis(x, a["dim0"]), axis(x, a["dim1"])
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
        raise TypeMismatchError(f"{show(size)} has fewer dims than {show(x.shape)}")
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
    at = axis_of(x, a["dim"])
    check_index(a["index"], x.shape[at])
    layout = CONTIGUOUS if at == 0 and x.layout == CONTIGUOUS else STRIDED
    return (TensorType(x.dtype, x.shape[:at] + x.shape[at + 1 :], layout),)


@rule("slice.Tensor")
def _slice(a: Bound) -> tuple[ValueType, ...] | None:
    x = a["self"]
    at = axis_of(x, a["dim"])
    size, start, end, step = x.shape[at], a["start"], a["end"], a["step"]
    if step != 1:
        return None
    if start in (None, 0) and (
        end is None or end == size or (isinstance(end, int) and end >= 1 << 62)
    ):
        return (x,)
    low = _bound(0 if start is None else start, size)
    high = _bound((1 << 63) - 1 if end is None else end, size)
    shape = (*x.shape[:at], maximum(high - low, 0), *x.shape[at + 1 :])
    return (
        TensorType(x.dtype, shape, CONTIGUOUS if at == 0 and x.layout == CONTIGUOUS else STRIDED),
    )


def _bound(end: Dim, size: Dim) -> Dim:
    """Where a slice bound lies: negative ones count from the end, ones behind it are the end.
    Dynamic ones are taken to be positive.
    """
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
    at = axis(first, a["dim"])
    if first.rank == 0 or any(
        t.rank != first.rank or t.dtype != first.dtype or t.layout != CONTIGUOUS for t in tensors
    ):
        return None
    total: Dim = 0
    for t in tensors:
        match(
            t.shape[:at] + t.shape[at + 1 :],
            first.shape[:at] + first.shape[at + 1 :],
            "a tensor",
            "the first, outside dim",
        )
        total = total + t.shape[at]
    return (TensorType(first.dtype, (*first.shape[:at], total, *first.shape[at + 1 :])),)


@rule("mean.dim", "sum.dim_IntList", "amax.default", "amin.default")
def _reduce(a: Bound) -> tuple[ValueType, ...] | None:
    x, dims = a["self"], a["dim"]
    if (
        not dims
        or x.dtype not in ("f32", "f64")
        or a.get("dtype") not in (None, x.dtype)
        or x.layout != CONTIGUOUS
    ):
        return None
    axes = {axis(x, dim) for dim in dims}
    if len(axes) < len(dims):
        raise TypeMismatchError(f"{show(dims)} names a dim twice")
    if a["keepdim"]:
        return (
            TensorType(x.dtype, tuple(1 if i in axes else dim for i, dim in enumerate(x.shape))),
        )
    return (TensorType(x.dtype, tuple(dim for i, dim in enumerate(x.shape) if i not in axes)),)


@rule("clone.default", "contiguous.default")
def _clone(a: Bound) -> tuple[ValueType, ...] | None:
    x = a["self"]
    if a["memory_format"] == "contiguous_format":
        return (TensorType(x.dtype, x.shape),)
    return (
        (x,) if x.layout == CONTIGUOUS and a["memory_format"] in (None, "preserve_format") else None
    )


@rule("_to_copy.default", "to.dtype")
def _to_copy(a: Bound) -> tuple[ValueType, ...] | None:
    x = a["self"]
    if a.get("memory_format") not in (None, "preserve_format") or x.layout == STRIDED:
        return None
    return (TensorType(a["dtype"] or x.dtype, x.shape, x.layout),)
