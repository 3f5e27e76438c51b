"""What rules are made of: the table they register in, and how arguments are read.

A rule says what one ATen op means as calls on a tape. It is given the op's arguments by name,
values as `Value`, sizes as dims, and the type of the result as the graph's facts have it; it
raises DeclinedError rather than come near.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from graphopt.dims import Dim, Expr
from graphopt.executor.backends.tape import Tape
from graphopt.executor.backends.target import DeclinedError, Value
from graphopt.types import TensorType

Args = Mapping[str, Any]
Rule = Callable[[Tape, Args, TensorType], Value]
ManyRule = Callable[[Tape, Args, Sequence[TensorType]], list[Value]]
RULES: dict[str, Rule] = {}
MANY_RULES: dict[str, ManyRule] = {}  # of ops that return several tensors


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers the decorated function for the ATen ops `names`, written without `aten.`."""

    def register(function: Rule) -> Rule:
        for name in names:
            assert f"aten.{name}" not in RULES, name
            RULES[f"aten.{name}"] = function
        return function

    return register


def many_rule(*names: str) -> Callable[[ManyRule], ManyRule]:
    """As `rule`, for ops that return several tensors."""

    def register(function: ManyRule) -> ManyRule:
        for name in names:
            MANY_RULES[f"aten.{name}"] = function
        return function

    return register


def operand(t: Tape, value: Any, dtype: str) -> Value:
    """A tensor, number or size as a value of `dtype`."""
    if isinstance(value, Value):
        return t.cast(value, dtype)
    if isinstance(value, Expr):
        return t.cast(t.reshape(t.dim(value), ()), dtype)
    if isinstance(value, bool | int | float):
        return t.scalar(value, dtype)
    raise DeclinedError(f"an operand is {value!r}")


def number(value: Any, what: str) -> float:
    """A number that is known now."""
    if isinstance(value, bool | int | float):
        return float(value)
    raise DeclinedError(f"{what} is no plain number")


def axis_of(x: Value, dim: Any) -> int:
    """A dim as a position."""
    if not isinstance(dim, int):
        raise DeclinedError("a dim is no plain number")
    return dim % x.rank if x.rank else 0


def axes_of(x: Value, dims: Any) -> tuple[int, ...]:
    """Dims as positions; all where none are given."""
    if dims is None or dims == ():
        return tuple(range(x.rank))
    items = dims if isinstance(dims, tuple) else (dims,)
    return tuple(axis_of(x, dim) for dim in items) if x.rank else ()


def fixed(dims: Sequence[Dim], what: str) -> tuple[int, ...]:
    """Sizes that must be numbers."""
    numbers = tuple(dim for dim in dims if isinstance(dim, int))
    if len(numbers) < len(dims):
        raise DeclinedError(f"{what} is dynamic")
    return numbers


def pair(value: Any, rank: int = 2) -> tuple[int, ...]:
    """A window setting for each dim."""
    items = value if isinstance(value, tuple) else (value,)
    return fixed(items * rank if len(items) == 1 else items, "a window")
