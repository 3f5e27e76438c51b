"""What type rules are made of: the table they register in, and the checks they share."""

from collections.abc import Callable, Mapping
from typing import Any

from graphopt.dims import Dim
from graphopt.errors import TypeMismatchError
from graphopt.types import TensorType, ValueType

Bound = Mapping[str, Any]
Rule = Callable[[Bound], "tuple[ValueType, ...] | None"]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers the decorated function as the rule of the ATen ops `names` (written without
    `aten.`).
    """

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[f"aten.{name}"] = function
        return function

    return register


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


def axis(x: TensorType, dim: Any) -> int:
    """The dim as a position, TypeMismatchError when there is none. A scalar has one, as in torch."""
    if not isinstance(dim, int) or not -max(x.rank, 1) <= dim < max(x.rank, 1):
        raise TypeMismatchError(f"dim {dim} is outside a tensor of rank {x.rank}")
    return dim % x.rank if x.rank else 0


def axis_of(x: TensorType, dim: Any) -> int:
    """The dim of a tensor that must have one."""
    if x.rank == 0:
        raise TypeMismatchError("a tensor of rank 0 has no dims")
    return axis(x, dim)


def check_index(index: Any, size: Dim) -> None:
    """TypeMismatchError when a known index lies outside a known size."""
    if isinstance(index, int) and isinstance(size, int) and not -size <= index < size:
        raise TypeMismatchError(f"index {index} is outside a dim of size {size}")


def match(left: Any, right: Any, what: str, of: str) -> None:
    """TypeMismatchError when two sizes or shapes differ."""
    if left != right:
        raise TypeMismatchError(f"{what} is {show(left)}, {of} is {show(right)}")


def same_dtype(*tensors: TensorType) -> None:
    """TypeMismatchError when dtypes differ."""
    if len({t.dtype for t in tensors}) > 1:
        raise TypeMismatchError(
            f"dtypes differ: {', '.join(t.dtype for t in tensors)}",
            remedy="convert with aten._to_copy.default",
        )


def show(value: Any) -> str:
    """A size or a shape as messages write it."""
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)
