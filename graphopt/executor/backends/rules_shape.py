"""What ops that move, cut, join and make elements mean: see `rule_table`.

`view` means `reshape`, copies mean nothing: values are immutable.
"""

from collections.abc import Sequence
from typing import Any

import torch

from graphopt.dims import Dim, Expr
from graphopt.executor.backends.rule_table import (
    RULES,
    Args,
    axes_of,
    axis_of,
    fixed,
    many_rule,
    number,
    operand,
    rule,
)
from graphopt.executor.backends.tape import Tape
from graphopt.executor.backends.target import DeclinedError, Value
from graphopt.types import TensorType

_END = 1 << 31  # a slice bound behind any tensor's end: some runtimes count in 32 bits
_RESHAPES = (
    "view.default", "reshape.default", "_unsafe_view.default", "flatten.using_ints",
    "unflatten.int", "unsqueeze.default", "squeeze.dim", "squeeze.dims", "squeeze.default",
)  # fmt: skip
_COPIES = (
    "clone.default", "contiguous.default", "alias.default", "detach.default", "lift_fresh_copy.default",
    "dropout.default", "lift.default",
)  # fmt: skip

RULES |= {f"aten.{name}": lambda t, a, out: t.reshape(a["self"], out.shape) for name in _RESHAPES}


def _copy(t: Tape, a: Args, out: TensorType) -> Value:
    x: Value = a["self"] if "self" in a else a["input"]
    return x


RULES |= {f"aten.{name}": _copy for name in _COPIES}


# -- the order of dims


@rule("permute.default")
def _permute(t: Tape, a: Args, out: TensorType) -> Value:
    x: Value = a["self"]
    return t.transpose(x, [axis_of(x, dim) for dim in a["dims"]])


@rule("transpose.int", "swapaxes.default")
def _transpose(t: Tape, a: Args, out: TensorType) -> Value:
    x: Value = a["self"]
    i, j = (axis_of(x, a[k]) for k in (("dim0", "dim1") if "dim0" in a else ("axis0", "axis1")))
    order = list(range(x.rank))
    if order:
        order[i], order[j] = order[j], order[i]
    return t.transpose(x, order)


@rule("t.default", "numpy_T.default")
def _t(t: Tape, a: Args, out: TensorType) -> Value:
    x: Value = a["self"]
    return t.transpose(x, range(x.rank)[::-1])


@rule("pixel_shuffle.default")
def _pixel_shuffle(t: Tape, a: Args, out: TensorType) -> Value:
    x, r = a["self"], a["upscale_factor"]
    n = x.rank - 3
    channels, height, width = x.shape[n:]
    split = t.reshape(x, (*x.shape[:n], channels // (r * r), r, r, height, width))
    order = [*range(n), n, n + 3, n + 1, n + 4, n + 2]
    return t.reshape(t.transpose(split, order), out.shape)


# -- repeating


@rule("expand.default", "expand_as.default", "broadcast_to.default")
def _expand(t: Tape, a: Args, out: TensorType) -> Value:
    return t.expand(a["self"], out.shape)


@rule("repeat.default")
def _repeat(t: Tape, a: Args, out: TensorType) -> Value:
    x: Value = a["self"]
    x = t.reshape(x, (1,) * (len(out.shape) - x.rank) + x.shape)
    inner, wide = [], []
    for size, times in zip(x.shape, a["repeats"], strict=True):
        inner += [1, size]
        wide += [times, size]
    return t.reshape(t.expand(t.reshape(x, tuple(inner)), tuple(wide)), out.shape)


@rule("repeat_interleave.self_int")
def _repeat_interleave(t: Tape, a: Args, out: TensorType) -> Value:
    x: Value = a["self"]
    if a["dim"] is None:
        axis = 0
        if x.rank != 1:
            raise DeclinedError("it repeats elements of a flattened tensor")
    else:
        axis = axis_of(x, a["dim"])
    shape = (*x.shape[: axis + 1], 1, *x.shape[axis + 1 :])
    wide = (*x.shape[: axis + 1], a["repeats"], *x.shape[axis + 1 :])
    return t.reshape(t.expand(t.reshape(x, shape), wide), out.shape)


# -- cutting


@rule("select.int")
def _select(t: Tape, a: Args, out: TensorType) -> Value:
    x: Value = a["self"]
    axis, index = axis_of(x, a["dim"]), a["index"]
    if isinstance(index, int):
        size = x.shape[axis]
        start: Dim = index + size if index < 0 else index
    else:
        start = index
    return t.take(x, t.reshape(t.dim(start), ()), axis)


@rule("slice.Tensor")
def _slice(t: Tape, a: Args, out: TensorType) -> Value:
    x: Value = a["self"]
    axis = axis_of(x, a["dim"])
    start = 0 if a["start"] is None else a["start"]
    end = _END if a["end"] is None else a["end"]
    if isinstance(start, int) and start >= _END:
        raise DeclinedError("an empty slice")
    end = min(end, _END - 1) if isinstance(end, int) else end
    return t.slice(x, axis, start, end, out.shape[axis], a["step"])


@rule("narrow.default")
def _narrow(t: Tape, a: Args, out: TensorType) -> Value:
    x: Value = a["self"]
    axis, start = axis_of(x, a["dim"]), a["start"]
    if isinstance(start, int) and start < 0:
        start = x.shape[axis] + start
    return t.slice(x, axis, start, start + a["length"], out.shape[axis])


@many_rule("split.Tensor", "split_with_sizes.default", "chunk.default")
def _split(t: Tape, a: Args, outs: Sequence[TensorType]) -> list[Value]:
    x: Value = a["self"]
    return t.apart(x, axis_of(x, a["dim"]), [out.shape for out in outs])


@many_rule("unbind.int")
def _unbind(t: Tape, a: Args, outs: Sequence[TensorType]) -> list[Value]:
    x: Value = a["self"]
    axis = axis_of(x, a["dim"])
    shape = (*x.shape[:axis], 1, *x.shape[axis + 1 :])
    pieces = t.apart(x, axis, [shape] * len(outs))
    return [t.reshape(piece, out.shape) for piece, out in zip(pieces, outs, strict=True)]


# -- joining


@rule("cat.default")
def _cat(t: Tape, a: Args, out: TensorType) -> Value:
    parts = [t.cast(x, out.dtype) for x in a["tensors"]]
    if any(x.rank != len(out.shape) for x in parts):
        raise DeclinedError("it joins an empty vector to tensors of another rank")
    return _typed(t.concat(parts, axis_of(parts[0], a["dim"])), out)


@rule("stack.default")
def _stack(t: Tape, a: Args, out: TensorType) -> Value:
    axis = a["dim"] % len(out.shape)
    parts = [t.cast(x, out.dtype) for x in a["tensors"]]
    shape = (*out.shape[:axis], 1, *out.shape[axis + 1 :])
    return _typed(t.concat([t.reshape(x, shape) for x in parts], axis), out)


def _typed(x: Value, out: TensorType) -> Value:
    """`x` with its shape as the graph writes it."""
    return Value(x.handle, x.dtype, out.shape, x.data, x.lean) if x.shape != out.shape else x


@rule("constant_pad_nd.default")
def _constant_pad(t: Tape, a: Args, out: TensorType) -> Value:
    return _padded(t, a["self"], a["pad"], "constant", a["value"], out)


@rule("pad.default")
def _pad(t: Tape, a: Args, out: TensorType) -> Value:
    mode = {"replicate": "edge", "reflect": "reflect", "constant": "constant"}.get(a["mode"])
    if mode is None:
        raise DeclinedError(f"padding of mode {a['mode']}")
    return _padded(t, a["self"], a["pad"], mode, a["value"] or 0.0, out)


@rule("reflection_pad1d.default", "reflection_pad2d.default")
def _reflection_pad(t: Tape, a: Args, out: TensorType) -> Value:
    return _padded(t, a["self"], a["padding"], "reflect", 0.0, out)


@rule("replication_pad1d.default", "replication_pad2d.default")
def _replication_pad(t: Tape, a: Args, out: TensorType) -> Value:
    return _padded(t, a["self"], a["padding"], "edge", 0.0, out)


def _padded(
    t: Tape, x: Value, widths: tuple[Dim, ...], mode: str, value: Any, out: TensorType
) -> Value:
    sides = fixed(widths, "a padding")
    if not any(sides):
        return x
    if min(sides) < 0:
        raise DeclinedError("a negative padding cuts")
    begin, end = [0] * x.rank, [0] * x.rank
    for i in range(len(sides) // 2):
        begin[x.rank - 1 - i], end[x.rank - 1 - i] = sides[2 * i], sides[2 * i + 1]
    fill = operand(t, value, x.dtype) if mode == "constant" else None
    settings = {"begin": tuple(begin), "end": tuple(end), "mode": mode}
    return t.call("pad", [x, fill], x.dtype, out.shape, **settings)


@rule("flip.default")
def _flip(t: Tape, a: Args, out: TensorType) -> Value:
    x: Value = a["self"]
    for axis in axes_of(x, a["dims"]) if a["dims"] else ():
        x = t.call("flip", [x], x.dtype, x.shape, axis=axis)
    return x


@rule("roll.default")
def _roll(t: Tape, a: Args, out: TensorType) -> Value:
    x: Value = a["self"]
    if not a["dims"]:
        raise DeclinedError("it rolls a flattened tensor")
    for shift, axis in zip(a["shifts"], axes_of(x, a["dims"]), strict=True):
        (size,) = fixed((x.shape[axis],), "the dim it rolls")
        at = -shift % size if isinstance(shift, int) else 0
        if not isinstance(shift, int):
            raise DeclinedError("a dynamic shift")
        if at:
            tail = t.slice(x, axis, at, size, size - at)
            x = t.concat([tail, t.slice(x, axis, 0, at, at)], axis)
    return x


@rule("diff.default")
def _diff(t: Tape, a: Args, out: TensorType) -> Value:
    x: Value = a["self"]
    if a["n"] != 1 or x.dtype == "bool":
        raise DeclinedError("differences of flags or of higher order")
    axis = axis_of(x, a["dim"])
    ends = [end for end in (a["prepend"], x, a["append"]) if end is not None]
    x = t.concat([t.cast(end, x.dtype) for end in ends], axis)
    size, stop = out.shape[axis], x.shape[axis]
    late, early = t.slice(x, axis, 1, stop, size), t.slice(x, axis, 0, size, size)
    return _typed(t.binary("sub", late, early), out)


# -- looking up


@rule("embedding.default")
def _embedding(t: Tape, a: Args, out: TensorType) -> Value:
    return t.take(a["weight"], a["indices"], 0)


@rule("index_select.default")
def _index_select(t: Tape, a: Args, out: TensorType) -> Value:
    x: Value = a["self"]
    if x.rank == 0 or a["index"].rank != 1:
        raise DeclinedError("it selects from one number")
    return t.take(x, a["index"], axis_of(x, a["dim"]))


@rule("gather.default")
def _gather(t: Tape, a: Args, out: TensorType) -> Value:
    x, index = a["self"], a["index"]
    if x.rank == 0 or index.rank != x.rank:
        raise DeclinedError("it gathers from one number")
    axis = axis_of(x, a["dim"])
    for i, (have, want) in enumerate(zip(x.shape, index.shape, strict=True)):
        if i != axis and have != want:
            x = t.slice(x, i, 0, want, want)
    return t.call("gather_elements", [x, index], x.dtype, out.shape, axis=axis)


@rule("_unsafe_index.Tensor")
def _index(t: Tape, a: Args, out: TensorType) -> Value:
    x: Value = a["self"]
    given = [(i, index) for i, index in enumerate(a["indices"]) if index is not None]
    if any(index.dtype not in ("i64", "i32") for _, index in given):
        raise DeclinedError("an index of flags")
    if len(given) == 1:
        return t.take(x, given[0][1], given[0][0])
    if [i for i, _ in given] != list(range(len(given))):
        raise DeclinedError("indices of dims that are not the first ones")
    shape = out.shape[: len(out.shape) - (x.rank - len(given))]
    columns = []
    for i, index in given:
        if x.shape[i] == 1:
            whole = t.expand(t.scalar(0, "i64"), shape)
        else:
            below = t.compare("lt", index, t.scalar(0, index.dtype))
            turned = t.add(index, operand(t, x.shape[i], index.dtype))
            whole = t.expand(t.cast(t.where(below, turned, index), "i64"), shape)
        columns.append(t.reshape(whole, (*shape, 1)))
    indices = t.concat(columns, len(shape))
    return t.call("gather_nd", [x, indices], x.dtype, out.shape)


# -- making


@rule("arange.default", "arange.start", "arange.start_step")
def _arange(t: Tape, a: Args, out: TensorType) -> Value:
    start, end, step = a.get("start", 0), a["end"], a.get("step", 1)
    if any(isinstance(part, float) for part in (start, end, step)) or step == 0:
        raise DeclinedError("a range of floats")
    parts = [t.reshape(t.dim(part), ()) for part in (start, end, step)]
    return t.cast(t.call("arange", parts, "i64", out.shape), out.dtype)


_FILLS = {
    "ones": 1, "zeros": 0, "new_ones": 1, "new_zeros": 0, "ones_like": 1, "zeros_like": 0,
    "full": None, "full_like": None, "new_full": None, "scalar_tensor": None,
}  # fmt: skip


def _fill(value: Any) -> Any:
    def apply(t: Tape, a: Args, out: TensorType) -> Value:
        fill = value if value is not None else a["fill_value" if "fill_value" in a else "s"]
        return t.expand(operand(t, fill, out.dtype), out.shape)

    return apply


RULES |= {f"aten.{name}.default": _fill(value) for name, value in _FILLS.items()}


@rule("tril.default")
def _tril(t: Tape, a: Args, out: TensorType) -> Value:
    return _triangle(t, a, "le")


@rule("triu.default")
def _triu(t: Tape, a: Args, out: TensorType) -> Value:
    return _triangle(t, a, "ge")


def _triangle(t: Tape, a: Args, kind: str) -> Value:
    x: Value = a["self"]
    diagonal = int(number(a["diagonal"], "the diagonal"))
    kept = _beside_diagonal(t, x.shape[-2], x.shape[-1], diagonal, kind)
    if x.dtype == "bool":
        return t.binary("and", x, kept)
    return t.where(kept, x, t.scalar(0, x.dtype))


def lower_triangle(t: Tape, rows: Dim, columns: Dim) -> Value:
    """Flags of a matrix that are true up to the diagonal; one a size, for several layers."""
    key = ("triangle", rows, columns)
    if key not in t.remembered:
        t.remembered[key] = _beside_diagonal(t, rows, columns, 0, "le")
    return t.remembered[key]


def _beside_diagonal(t: Tape, rows: Dim, columns: Dim, diagonal: int, kind: str) -> Value:
    if isinstance(rows, int) and isinstance(columns, int):
        ones = torch.ones(rows, columns, dtype=torch.bool)
        return t.constant(ones.tril(diagonal) if kind == "le" else ones.triu(diagonal))
    limit = t.add(_positions(t, rows), t.scalar(diagonal, "i64"))
    return t.compare(kind, _positions(t, columns), t.reshape(limit, (rows, 1)))


def _positions(t: Tape, size: Dim) -> Value:
    if not isinstance(size, Expr):
        return t.constant(torch.arange(size))
    parts = [t.reshape(t.dim(part), ()) for part in (0, size, 1)]
    return t.call("arange", parts, "i64", (size,))
