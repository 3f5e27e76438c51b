"""The hand with which rules write: typed calls on a target, each value with its dtype and shape.

Shapes are kept as expressions, so most shape arguments come out as plain numbers, `0` (the dim as
it is) or one `-1`; only what is left is computed by the runtime, from the shapes of the reads.
Content that is known, such as constants, is emitted when first used. An expanded value is kept
unexpanded for operands that broadcast it anyway.

Deliberately absent: what any ATen op means; see `rules_math.py` and its neighbours.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch

from graphopt.analysis.rule_base import broadcast_shapes
from graphopt.constants import SHORT_DTYPES, TORCH_DTYPES
from graphopt.dims import Call, Dim, Expr, product
from graphopt.errors import TypeMismatchError
from graphopt.executor.backends.target import (
    BINARY,
    COMPARE,
    LOGIC,
    Capabilities,
    DeclinedError,
    InexactError,
    Target,
    Value,
)

Shape = tuple[Dim, ...]
# Kinds that move elements and do not compute with them: any dtype may pass.
_MOVES = frozenset(
    {
        "arange", "cast", "concat", "expand", "flip", "gather", "gather_elements", "gather_nd",
        "pad", "reshape", "shape_of", "slice", "transpose", "where",
    }
)  # fmt: skip
_INTEGERS = frozenset({"i64", "i32", "i16", "i8", "u8"})


class Tape:
    """Writes calls on `target` for one region.

    Args:
        target: receives the calls.
        capabilities: of the runtime; what it cannot do exactly is declined.
        size_of: the i64 vector of one element that holds a symbol's value.
    """

    def __init__(
        self, target: Target, capabilities: Capabilities, size_of: Callable[[str], Value]
    ) -> None:
        self.target, self.capabilities, self._size_of = target, capabilities, size_of
        self._handles: dict[int, tuple[Value, Any]] = {}  # values kept: an id is theirs while here
        self._dims: dict[Dim, Value] = {}
        self._scalars: dict[tuple[str, str], Value] = {}
        self._positions: dict[int, int] = {}
        self.remembered: dict[Any, Value] = {}  # of rules: values that several nodes share

    # -- values

    def handle(self, value: Value) -> Any:
        """The target's handle, emitting known content or an expansion at its first use."""
        if value.handle is not None:
            return value.handle
        known = self._handles.get(id(value))
        if known is None:
            if value.data is not None:
                position = self._positions.get(id(value.data))
                handle = self.target.constant(value.data, position)
                if value.data.numel() <= 1:
                    return handle  # one a use: OpenVINO's code generator asks for it
            else:
                assert value.lean is not None
                operands = [self.handle(value.lean), self._expansion(value.lean.shape, value.shape)]
                handle = self.target.apply("expand", operands, {})
            known = self._handles[id(value)] = (value, handle)
        return known[1]

    def region_constant(self, tensor: torch.Tensor, position: int, dtype: str) -> Value:
        """The constant at `position` of the region."""
        self._positions[id(tensor)] = position
        return Value(None, dtype, tuple(tensor.shape), tensor)

    def constant(self, tensor: torch.Tensor) -> Value:
        """A derived constant."""
        return Value(None, SHORT_DTYPES[tensor.dtype], tuple(tensor.shape), tensor)

    def scalar(self, number: float, dtype: str) -> Value:
        """A number of rank 0, as torch rounds it to `dtype`."""
        key = (repr(number), dtype)
        if key not in self._scalars:
            self._scalars[key] = self.constant(torch.tensor(number, dtype=TORCH_DTYPES[dtype]))
        return self._scalars[key]

    def call(
        self,
        kind: str,
        operands: Sequence[Value | None],
        dtype: str,
        shape: Shape,
        **attributes: Any,
    ) -> Value:
        """One call of the target; DeclinedError when the runtime has no exact kernel for it."""
        known = self.capabilities
        if kind in known.absent:
            raise InexactError(f"no exact kernel for {kind}")
        for value in operands:
            if value is None:
                continue
            if value.dtype not in known.dtypes:
                raise InexactError(f"{value.dtype} is not exact on this runtime")
            if (
                value.dtype != "f32"
                and kind not in _MOVES
                and not (value.dtype == "bool" and (kind in LOGIC or kind == "not"))
                and (value.dtype not in _INTEGERS or kind not in known.integers)
            ):
                raise InexactError(f"no exact kernel for {kind} of {value.dtype}")
        if dtype not in known.dtypes:
            raise InexactError(f"{dtype} is not exact on this runtime")
        handles = [None if value is None else self.handle(value) for value in operands]
        return Value(self.target.apply(kind, handles, attributes), dtype, shape)

    # -- sizes

    def dim(self, dim: Dim) -> Value:
        """A size as an i64 vector of one element."""
        found = self._dims.get(dim)
        if found is None:
            found = self._dims[dim] = self._dim(dim)
        return found

    def _dim(self, dim: Dim) -> Value:
        if not isinstance(dim, Expr):
            return self.constant(torch.tensor([dim]))
        total: Value | None = None
        for monomial, coefficient in dim.terms:
            parts: list[Value] = []
            if coefficient != 1 or not monomial:
                parts.append(self.dim(coefficient))
            for atom in monomial:
                if isinstance(atom, Call):
                    kind = {"floordiv": "floordiv", "mod": "mod", "max": "max", "min": "min"}
                    parts.append(
                        self._whole(kind[atom.op], self.dim(atom.left), self.dim(atom.right))
                    )
                else:
                    parts.append(self._size_of(atom))
            term = parts[0]
            for part in parts[1:]:
                term = self._whole("mul", term, part)
            total = term if total is None else self._whole("add", total, term)
        assert total is not None
        return total

    def _whole(self, kind: str, a: Value, b: Value) -> Value:
        handle = self.target.apply(kind, [self.handle(a), self.handle(b)], {"integer": True})
        return Value(handle, "i64", (1,))

    def vector(self, dims: Iterable[Dim]) -> Any:
        """The handle of a shape as an i64 vector."""
        parts = list(dims)
        if all(isinstance(dim, int) for dim in parts):
            return self.handle(self.constant(torch.tensor(parts, dtype=torch.int64)))
        handles = [self.handle(self.dim(dim)) for dim in parts]
        return self.target.apply("concat", handles, {"axis": 0}) if len(handles) > 1 else handles[0]

    # -- moving elements

    def reshape(self, x: Value, shape: Shape) -> Value:
        """`x` with other dims, of as many elements."""
        if shape == x.shape:
            return x
        if x.data is not None and all(isinstance(dim, int) for dim in shape):
            return self.constant(x.data.reshape([int(str(dim)) for dim in shape]))
        pattern: list[Dim] = []
        for position, dim in enumerate(shape):
            kept = position < x.rank and x.shape[position] == dim and isinstance(dim, Expr)
            pattern.append(0 if kept else dim)
        open_dims = [i for i, dim in enumerate(pattern) if isinstance(dim, Expr)]
        if len(open_dims) == 1:
            pattern[open_dims[0]] = -1
        elif open_dims:
            pattern = list(shape)
        return self._moved("reshape", x, shape, [self.vector(pattern)])

    def expand(self, x: Value, shape: Shape) -> Value:
        """`x` broadcast to `shape`, written only where something needs it whole."""
        if x.rank < len(shape):
            x = self.reshape(x, (1,) * (len(shape) - x.rank) + x.shape)
        return x if x.shape == shape else Value(None, x.dtype, shape, None, x.lean or x)

    def _expansion(self, given: Shape, wanted: Shape) -> Any:
        return self.vector(1 if a == b else b for a, b in zip(given, wanted, strict=True))

    def transpose(self, x: Value, order: Sequence[int]) -> Value:
        """`x` with its dims in another order."""
        if tuple(order) == tuple(range(x.rank)):
            return x
        shape = tuple(x.shape[axis] for axis in order)
        return self._moved("transpose", x, shape, [], order=tuple(order))

    def slice(self, x: Value, axis: int, start: Dim, stop: Dim, size: Dim, step: int = 1) -> Value:
        """Every `step`-th row from `start` to before `stop`, which come to `size`."""
        shape = (*x.shape[:axis], size, *x.shape[axis + 1 :])
        if size == x.shape[axis] and step == 1:
            return x
        bounds = [self.handle(self.dim(start)), self.handle(self.dim(stop))]
        return self._moved("slice", x, shape, bounds, axis=axis, step=step)

    def take(self, x: Value, index: Value, axis: int) -> Value:
        """Rows of `x` along `axis`, chosen by `index` of any rank."""
        shape = x.shape[:axis] + index.shape + x.shape[axis + 1 :]
        return self._moved("gather", x, shape, [self.handle(index)], axis=axis)

    def concat(self, values: Sequence[Value], axis: int) -> Value:
        """`values`, which agree in all other dims, joined along `axis`."""
        if len(values) == 1:
            return values[0]
        total: Dim = 0
        for value in values:
            total = total + value.shape[axis]
        first = values[0]
        shape = (*first.shape[:axis], total, *first.shape[axis + 1 :])
        return self.call("concat", values, first.dtype, shape, axis=axis)

    def apart(self, x: Value, axis: int, shapes: Sequence[Shape]) -> list[Value]:
        """Adjacent pieces of `x` along `axis`, whose sizes there are numbers."""
        sizes = [shape[axis] for shape in shapes]
        numbers = [size for size in sizes if isinstance(size, int)]
        if len(numbers) < len(sizes):
            raise DeclinedError("it splits a dynamic dim")
        if len(sizes) == 1:
            return [x]
        handles = self.target.take_apart(self.handle(x), axis, numbers)
        return [Value(h, x.dtype, s) for h, s in zip(handles, shapes, strict=True)]

    def _moved(
        self, kind: str, x: Value, shape: Shape, more: list[Any], **attributes: Any
    ) -> Value:
        if x.dtype not in self.capabilities.dtypes:
            raise InexactError(f"{x.dtype} is not exact on this runtime")
        handle = self.target.apply(kind, [self.handle(x), *more], attributes)
        return Value(handle, x.dtype, shape)

    # -- computing

    def cast(self, x: Value, dtype: str) -> Value:
        """`x` as `dtype`: floats lose their fraction towards zero, whatever is not zero is true."""
        if x.dtype == dtype:
            return x
        if x.data is not None and x.data.numel() <= 1:
            return self.constant(x.data.to(TORCH_DTYPES[dtype]))
        if dtype == "bool":
            return self.compare("ne", x, self.scalar(0, x.dtype))
        if x.lean is not None:
            return self.expand(self.cast(x.lean, dtype), x.shape)
        return self.call("cast", [x], dtype, x.shape, to=dtype)

    def unary(self, kind: str, x: Value, **attributes: Any) -> Value:
        """A function of each element."""
        return self.call(kind, [x], "bool" if kind in _TESTS else x.dtype, x.shape, **attributes)

    def binary(self, kind: str, a: Value, b: Value) -> Value:
        """A function of two values of one dtype, broadcast."""
        assert kind in BINARY | COMPARE | LOGIC
        shape = broadcast(a, b)
        dtype = "bool" if kind in COMPARE else a.dtype
        return self.call(kind, self._unexpanded(shape, a, b), dtype, shape)

    def compare(self, kind: str, a: Value, b: Value) -> Value:
        """Where a relation holds."""
        if a.dtype == "bool":  # runtimes order and equal numbers only
            a, b = self.cast(a, "f32"), self.cast(b, "f32")
        return self.binary(kind, a, b)

    def where(self, condition: Value, x: Value, y: Value) -> Value:
        """`x` where the condition holds, else `y`."""
        shape = broadcast(condition, x, y)
        return self.call("where", self._unexpanded(shape, condition, x, y), x.dtype, shape)

    def add(self, a: Value, b: Value) -> Value:
        """The sum."""
        return self.binary("add", a, b)

    def mul(self, a: Value, b: Value) -> Value:
        """The product."""
        return self.binary("mul", a, b)

    def scaled(self, x: Value, factor: float) -> Value:
        """`x` times a number."""
        return x if factor == 1 else self.mul(x, self.scalar(factor, x.dtype))

    def reduce(self, kind: str, x: Value, axes: Sequence[int], *, keep: bool) -> Value:
        """A reduction over `axes`."""
        shape: Shape = tuple(
            1 if i in axes else dim for i, dim in enumerate(x.shape) if keep or i not in axes
        )
        if not axes:
            return x
        return self.call(kind, [x], x.dtype, shape, axes=tuple(sorted(axes)), keep=keep)

    def matmul(self, a: Value, b: Value, *, transpose_b: bool = False) -> Value:
        """The product of matrices, batch dims broadcast."""
        columns = b.shape[-2 if transpose_b else -1]
        batch = broadcast_or_decline(a.shape[:-2], b.shape[:-2])
        shape = (*batch, a.shape[-2], columns)
        return self.call("matmul", [a, b], a.dtype, shape, transpose_b=transpose_b)

    def linear(
        self, x: Value, weight: Value, bias: Value | None, shape: Shape, **how: bool
    ) -> Value:
        """A product with a matrix, `transposed` where it is [in, out], and its bias."""
        if not self.capabilities.flat_linear or x.rank == 2:
            return self.call("linear", [x, weight, bias], x.dtype, shape, **how)
        rows = elements(x.shape[:-1])
        flat = self.reshape(x, (rows, x.shape[-1]))
        out = self.call("linear", [flat, weight, bias], x.dtype, (rows, shape[-1]), **how)
        return self.reshape(out, shape)

    def _unexpanded(self, shape: Shape, *values: Value) -> tuple[Value, ...]:
        """The operands before they were expanded, where they still broadcast to `shape`."""
        if all(value.lean is None for value in values):
            return values
        lean = tuple(value.lean or value for value in values)
        if broadcast(*lean) == shape:
            return lean
        whole = list(values)  # try them one by one: the first may stand for all
        for i, value in enumerate(values):
            if value.lean is None:
                continue
            tried = [*whole[:i], value.lean, *whole[i + 1 :]]
            if broadcast(*tried) == shape:
                whole = tried
        return tuple(whole)


_TESTS = frozenset({"isnan", "isinf"})


def broadcast(*values: Value) -> Shape:
    """The shape that values broadcast to."""
    shape: Shape = ()
    for value in values:
        shape = broadcast_or_decline(shape, value.shape)
    return shape


def broadcast_or_decline(a: Shape, b: Shape) -> Shape:
    """The shape that two shapes broadcast to; DeclinedError where that is not known."""
    try:
        return broadcast_shapes(a, b)
    except TypeMismatchError as error:
        raise DeclinedError(str(error)) from error


def elements(shape: Shape) -> Dim:
    """The number of elements."""
    return product(shape)


def promote(*operands: Value | bool | int | float) -> str:
    """The dtype in which torch computes with these operands."""
    return _promote(
        tuple(
            (v.dtype, v.rank == 0) if isinstance(v, Value) else type(v).__name__ for v in operands
        )
    )


@cache
def _promote(kinds: tuple[Any, ...]) -> str:
    numbers: Mapping[str, Any] = {"bool": True, "int": 1, "float": 1.0}
    items = [
        numbers[kind]
        if isinstance(kind, str)
        else torch.ones(() if kind[1] else (1,), dtype=TORCH_DTYPES[kind[0]])
        for kind in kinds
    ]
    result = items[0]
    for item in items[1:]:
        dtype = torch.result_type(result, item)
        is_vector = any(isinstance(i, torch.Tensor) and i.dim() for i in (result, item))
        result = torch.ones((1,) if is_vector else (), dtype=dtype)
    return SHORT_DTYPES[result.dtype if isinstance(result, torch.Tensor) else torch.float32]
