"""How large a float value of a region can be, where its nodes say so: additive masks are made of
zeros and one large number, and whoever adds one to scores wants to know that it is not minus infinity.

One interval for all entries of a value, by recursion over the few ops that masks are made with;
None where nothing is known. Ends are rounded to float32 as the values are: rounding is monotonic, so
they stay ends. Deliberately absent: values from outside the region, of which a pass
knows the type only.
"""

import struct
from math import isfinite
from typing import Any

from graphopt.analysis.facts import Facts
from graphopt.analysis.neighbours import Neighbours
from graphopt.graph import Arg, Const, Node, Ref
from graphopt.types import TensorType

Range = tuple[float, float]
DEPTH_MAX = 32  # nodes followed from a value upward
_WHOLE = {"bool": (0.0, 1.0), "u8": (0.0, 255.0)} | {
    f"i{bits}": (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1)) for bits in (8, 16, 32, 64)
}
_SAME = frozenset(
    f"aten.{name}" for name in (
        "alias.default", "clone.default", "contiguous.default", "detach.default", "expand.default",
        "permute.default", "reshape.default", "select.int", "slice.Tensor", "squeeze.default",
        "squeeze.dim", "transpose.int", "unsqueeze.default", "view.default",
    )
)  # fmt: skip
_FILLED = {
    f"{name}{like}": float(name == "ones") for name in ("zeros", "ones") for like in ("", "_like")
}
_FILLED |= {"new_zeros": 0.0, "new_ones": 1.0}
_FULL = frozenset({"full", "full_like", "new_full"})


class Ranges:
    """The ranges of the values of one region."""

    def __init__(self, facts: Facts, near: Neighbours) -> None:
        self._facts, self._near = facts, near
        self._found: dict[Ref, Range | None] = {}

    def is_finite(self, operand: Ref | Const) -> bool:
        """Whether every entry of a float32 value is surely a finite number."""
        return self._of(operand, 0) is not None

    def number(self, operand: Arg) -> float | None:
        """The number that a literal, or a value without dims, surely is; None where that is open.

        Numbers that are no literals come as float32 holds them.
        """
        if isinstance(operand, int | float) and not isinstance(operand, bool):
            return None if _rounded(operand, operand) is None else float(operand)
        if isinstance(operand, Const):
            rank = self._facts.graph.get_constant(operand.name).type.rank
        elif isinstance(operand, Ref):
            type_ = self._facts.type_of(operand)
            rank = type_.rank if isinstance(type_, TensorType) else 1
        else:
            return None
        found = self._of(operand, 0) if rank == 0 else None
        return found[0] if found is not None and found[0] == found[1] else None

    def _of(self, operand: Arg, depth: int) -> Range | None:
        if isinstance(operand, bool | int | float):
            return _rounded(operand, operand)
        if isinstance(operand, Const):
            return self._of_constant(operand)
        if not isinstance(operand, Ref):
            return None
        type_ = self._facts.type_of(operand)
        if not isinstance(type_, TensorType):
            return None
        if type_.dtype in _WHOLE:
            return _WHOLE[type_.dtype]
        if type_.dtype != "f32" or operand.id not in self._near.inside or depth > DEPTH_MAX:
            return None
        if operand not in self._found:
            self._found[operand] = self._of_node(self._near.nodes[operand.id], depth + 1)
        return self._found[operand]

    def _of_constant(self, const: Const) -> Range | None:
        constant = self._facts.graph.get_constant(const.name)
        if constant.type.dtype in _WHOLE:
            return _WHOLE[constant.type.dtype]
        if constant.type.dtype != "f32" or not constant.tensor.numel():
            return None
        least, most = constant.tensor.aminmax()  # both are nan when an entry is
        return _rounded(float(least), float(most))

    def _of_node(self, node: Node, depth: int) -> Range | None:
        name = node.op.split(".")[1]
        if node.op in _SAME or name == "_to_copy":
            return self._of(node.args[0], depth)
        if name in _FILLED:
            return _FILLED[name], _FILLED[name]
        bound = node.bound()
        if name in _FULL:
            return self._of(bound["fill_value"], depth)
        if name in ("where", "masked_fill"):
            given = (bound["self"], bound["other" if name == "where" else "value"])
            return _either(*(self._of(arg, depth) for arg in given))
        if name in ("add", "sub", "rsub"):
            return self._sum(name, bound, depth)
        if name in ("mul", "neg"):
            other = bound["other"] if name == "mul" else -1.0
            return _product(self._of(bound["self"], depth), self._of(other, depth))
        return None

    def _sum(self, name: str, bound: dict[str, Any], depth: int) -> Range | None:
        left, right = self._of(bound["self"], depth), self._of(bound["other"], depth)
        if name == "rsub":  # other - alpha * self
            left, right = right, left
        scaled = _product(right, self._of(bound["alpha"], depth))
        if name != "add":
            scaled = _product(scaled, (-1.0, -1.0))
        if left is None or scaled is None:
            return None
        return _rounded(left[0] + scaled[0], left[1] + scaled[1])


def _rounded(least: float, most: float) -> Range | None:
    """Both as float32; None where that is not finite. Sums and products of two float32 come here
    exact, or with so many bits more that rounding twice is rounding once.
    """
    try:
        ends: Range = struct.unpack("ff", struct.pack("ff", least, most))
    except OverflowError:
        return None
    return ends if all(map(isfinite, ends)) else None


def _either(left: Range | None, right: Range | None) -> Range | None:
    if left is None or right is None:
        return None
    return min(left[0], right[0]), max(left[1], right[1])


def _product(left: Range | None, right: Range | None) -> Range | None:
    if left is None or right is None:
        return None
    corners = [a * b for a in left for b in right]
    return _rounded(min(corners), max(corners))
