"""What single ops do to rows: the rules of `graphoptd.rows`, by op name.

A rule sees the arguments of a node (types in place of values), its first output and the name of the
batch symbol. Everything that bears rows is known to be `[batch * k, ...]` by then. It answers
whether the node keeps rows apart; where it is not sure, no.
"""

from collections.abc import Callable, Mapping
from typing import Any

from graphopt.dims import Dim, floordiv, symbol, symbols_of
from graphopt.types import SymIntType, TensorType, ValueType

Bound = Mapping[str, Any]
Rule = Callable[[Bound, ValueType, str], bool]


def is_rows(type_: ValueType, name: str, times: int | None = None) -> bool:
    """Whether the type is `[name * k, ...]` with the symbol nowhere else; k is `times` when given."""
    if not isinstance(type_, TensorType) or not type_.shape:
        return False
    if any(name in symbols_of(dim) for dim in type_.shape[1:]):
        return False
    first = type_.shape[0]
    if times is not None:
        return first == symbol(name) * times
    return name in symbols_of(first) and name not in symbols_of(floordiv(first, symbol(name)))


def bears(type_: ValueType | None, name: str) -> bool:
    """Whether the shape mentions the symbol."""
    return isinstance(type_, TensorType) and any(name in symbols_of(dim) for dim in type_.shape)


def pointwise(bound: Bound, made: ValueType, name: str) -> bool:
    """Broadcast against rows: an operand without rows must be the same for all of them."""
    assert isinstance(made, TensorType)
    for value in bound.values():
        if isinstance(value, SymIntType) and name in symbols_of(value.value):
            return False  # divided by the batch size, say
        if isinstance(value, TensorType) and value.rank == made.rank:
            if value.shape[0] not in (1, made.shape[0]):
                return False
        elif bears(value, name):
            return False  # its dim 0 would meet another dim
    return True


def _along(*keys: str) -> Rule:
    """An op along the dims that `keys` name, none of which is dim 0; missing or None means all."""

    def rule(bound: Bound, made: ValueType, name: str) -> bool:
        source = _first_tensor(bound)
        for key in keys:
            if key not in bound:
                continue
            dims = bound[key] if isinstance(bound[key], tuple) else (bound[key],)
            if not dims or any(not _is_inner(dim, source) for dim in dims):
                return False
        return _is_alone(bound, source, name)

    return rule


def _view(bound: Bound, made: ValueType, name: str) -> bool:
    """Row-major order stays, and both shapes are `[batch * k, ...]`: a row's elements stay together."""
    return True


def _permute(bound: Bound, made: ValueType, name: str) -> bool:
    source = _first_tensor(bound)
    if "dims" in bound:
        return bool(bound["dims"]) and bound["dims"][0] in (0, -source.rank)
    return _is_inner(bound.get("dim0", 0), source) and _is_inner(bound.get("dim1", 1), source)


def _expand(bound: Bound, made: ValueType, name: str) -> bool:
    source = _first_tensor(bound)
    assert isinstance(made, TensorType)
    return not bears(source, name) or source.rank == made.rank


def _first_only(bound: Bound, made: ValueType, name: str) -> bool:
    """Rows in the first operand, weights in the others."""
    return _is_alone(bound, _first_tensor(bound), name)


def _addmm(bound: Bound, made: ValueType, name: str) -> bool:
    bias = bound["self"]
    return (
        not bears(bias, name)
        and (bias.rank < 2 or bias.shape[0] == 1)
        and bears(bound["mat1"], name)
        and not bears(bound["mat2"], name)
    )


def _matmul(bound: Bound, made: ValueType, name: str) -> bool:
    """Rows times a weight, or row by row when dim 0 only counts matrices."""
    left, right = bound["self"], bound.get("other", bound.get("mat2"))
    if bears(left, name) and not bears(right, name):
        return bool(left.rank == 2 or right.rank <= 2 or _counts_matrices(right, left))
    if left.rank < 3 or right.rank < 3:
        return False
    return left.rank == right.rank and {left.shape[0], right.shape[0]} <= {1, _dim0(made)}


def _counts_matrices(other: TensorType, rows: TensorType) -> bool:
    return other.rank < rows.rank or (other.rank == rows.rank and other.shape[0] == 1)


def _attention(bound: Bound, made: ValueType, name: str) -> bool:
    tensors = [value for value in bound.values() if isinstance(value, TensorType)]
    query = bound["query"]
    return query.rank >= 3 and all(
        tensor.shape[0] in (1, _dim0(made))
        if tensor.rank == query.rank
        else tensor.rank < query.rank and not bears(tensor, name)
        for tensor in tensors
    )


def _embedding(bound: Bound, made: ValueType, name: str) -> bool:
    return not bears(bound["weight"], name)


def _normalised(bound: Bound, made: ValueType, name: str) -> bool:
    """Over the last dims, as many as `normalized_shape` has."""
    source = _first_tensor(bound)
    return len(bound["normalized_shape"]) < source.rank and _is_alone(bound, source, name)


def _spatial(dims: int) -> Rule:
    """Over the last `dims` dims of `[rows, channels, ...]`."""

    def rule(bound: Bound, made: ValueType, name: str) -> bool:
        source = _first_tensor(bound)
        return source.rank == dims + 2 and _is_alone(bound, source, name)

    return rule


def _convolution(bound: Bound, made: ValueType, name: str) -> bool:
    source = _first_tensor(bound)
    weight = bound["weight"]
    return source.rank == weight.rank and _is_alone(bound, source, name)


def _batch_norm(bound: Bound, made: ValueType, name: str) -> bool:
    in_training = bound.get("training", bound.get("train", False))
    return not in_training and _is_alone(bound, _first_tensor(bound), name)


def _pad(bound: Bound, made: ValueType, name: str) -> bool:
    return len(bound["pad"]) // 2 < _first_tensor(bound).rank


def _join(bound: Bound, made: ValueType, name: str) -> bool:
    parts = bound["tensors"]
    return _is_inner(bound["dim"], made) and all(_dim0(part) == _dim0(made) for part in parts)


def _fill(bound: Bound, made: ValueType, name: str) -> bool:
    """One value everywhere; it may not be the batch size."""
    value = bound.get("fill_value")
    return not (isinstance(value, SymIntType) and name in symbols_of(value.value))


def _numbers(bound: Bound, made: ValueType, name: str) -> bool:
    """Rows that hold their numbers; who reads them is looked at where they are read."""
    end = bound["end"]
    starts = bound.get("start", 0) == 0 and bound.get("step", 1) == 1
    return starts and isinstance(end, SymIntType) and end.value == symbol(name)


def _gather(bound: Bound, made: ValueType, name: str) -> bool:
    index = bound["index"]
    return _is_inner(bound["dim"], bound["self"]) and _dim0(index) == _dim0(bound["self"])


def _first_tensor(bound: Bound) -> TensorType:
    return next(value for value in bound.values() if isinstance(value, TensorType))


def _is_alone(bound: Bound, source: TensorType, name: str) -> bool:
    """Whether only `source` bears rows, and no number holds the batch size."""
    return bears(source, name) and all(
        value is source or not _mentions(value, name) for value in bound.values()
    )


def _mentions(value: Any, name: str) -> bool:
    if isinstance(value, tuple):
        return any(_mentions(each, name) for each in value)
    if isinstance(value, SymIntType):
        return name in symbols_of(value.value)
    return bears(value, name)


def _is_inner(dim: Any, type_: ValueType) -> bool:
    """Whether `dim` names a dim other than 0."""
    assert isinstance(type_, TensorType)
    return isinstance(dim, int) and dim % max(type_.rank, 1) != 0


def _dim0(type_: Any) -> Dim | None:
    return type_.shape[0] if isinstance(type_, TensorType) and type_.shape else None


RULES: dict[str, Rule] = (
    dict.fromkeys(("view", "_unsafe_view", "reshape", "flatten", "unflatten"), _view)
    | dict.fromkeys(("clone", "contiguous", "_to_copy", "alias", "detach"), _first_only)
    | dict.fromkeys(("transpose", "permute"), _permute)
    | dict.fromkeys(("squeeze", "select", "slice", "narrow"), _along("dim"))
    | {"unsqueeze": lambda b, m, n: b["dim"] % (_first_tensor(b).rank + 1) != 0}
    | dict.fromkeys(("split", "chunk", "split_with_sizes", "unbind"), _along("dim"))
    | dict.fromkeys(("softmax", "_softmax", "log_softmax", "_log_softmax"), _along("dim"))
    | dict.fromkeys(
        ("sum", "mean", "amax", "amin", "prod", "var", "std", "any", "all"), _along("dim")
    )
    | dict.fromkeys(("max", "min", "argmax", "argmin", "topk", "sort", "argsort"), _along("dim"))
    | dict.fromkeys(("cumsum", "cumprod", "logsumexp", "linalg_vector_norm", "norm"), _along("dim"))
    | {"flip": _along("dims"), "roll": _along("dims"), "glu": _along("dim")}
    | dict.fromkeys(("__and__", "__or__", "__xor__"), pointwise)  # not tagged as such by torch
    | {"arange": _numbers, "expand": _expand, "cat": _join, "stack": _join, "gather": _gather}
    | dict.fromkeys(("full", "zeros", "ones", "full_like", "zeros_like", "ones_like"), _fill)
    | dict.fromkeys(("new_full", "new_zeros", "new_ones"), _fill)
    | {"linear": _first_only, "mm": _first_only, "addmm": _addmm}
    | dict.fromkeys(("bmm", "matmul"), _matmul)
    | {"scaled_dot_product_attention": _attention, "embedding": _embedding}
    | dict.fromkeys(("layer_norm", "native_layer_norm", "rms_norm"), _normalised)
    | dict.fromkeys(("convolution", "conv1d", "conv2d", "conv3d"), _convolution)
    | dict.fromkeys(("batch_norm", "_native_batch_norm_legit_no_training"), _batch_norm)
    | dict.fromkeys(("group_norm", "native_group_norm"), _first_only)
    | dict.fromkeys(("max_pool2d", "max_pool2d_with_indices", "avg_pool2d"), _spatial(2))
    | dict.fromkeys(
        ("adaptive_avg_pool2d", "_adaptive_avg_pool2d", "upsample_nearest2d"), _spatial(2)
    )
    | dict.fromkeys(("max_pool1d", "avg_pool1d", "adaptive_avg_pool1d"), _spatial(1))
    | dict.fromkeys(("pad", "constant_pad_nd"), _pad)
)
