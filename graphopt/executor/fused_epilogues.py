"""Activations that oneDNN applies to a result before it leaves the registers, and how a graph may spell them.

Deliberately absent: elu, mish and softplus, which torch's oneDNN ops do not take.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from graphopt.graph import Node, Ref

_SQRT_2_OVER_PI = 0.7978845608028654
_CUBE = 0.044715  # both of the tanh form of GELU: Hendrycks and Gimpel, arXiv:1606.08415


@dataclass(frozen=True, slots=True)
class Unary:
    """An activation as oneDNN ops name it, and the ordinary kernel with its further arguments."""

    attr: str
    scalars: tuple[float, ...]
    algorithm: str
    kernel: Callable[..., Any]
    arguments: tuple[str, ...] = ()

    @property
    def pack_arguments(self) -> str:
        """The three arguments `attr, scalars, algorithm` as source."""
        return f"{self.attr!r}, {list(self.scalars)!r}, {self.algorithm!r}"


@dataclass(frozen=True, slots=True)
class WrittenOut:
    """An activation written as several nodes."""

    root: str
    absorbed: frozenset[str]
    unary: Unary


class Neighbourhood(Protocol):
    """What a matcher may ask of a region."""

    nodes: Any
    inside: set[str]

    def sole_users(self, ref: Ref) -> list[Node]:
        """Every use of `ref`, or nothing when it is handed out of the region."""
        ...


_nn = torch._C._nn
_GELU_TANH = Unary("gelu", (), "tanh", _nn.gelu, ("approximate='tanh'",))
_SIMPLE = {
    "aten.relu.default": Unary("relu", (), "", torch.relu),
    "aten.silu.default": Unary("swish", (), "", _nn.silu),
    "aten.sigmoid.default": Unary("sigmoid", (), "", torch.sigmoid),
    "aten.tanh.default": Unary("tanh", (), "", torch.tanh),
    "aten.hardswish.default": Unary("hardswish", (), "", _nn.hardswish),
    "aten.hardsigmoid.default": Unary("hardsigmoid", (), "", _nn.hardsigmoid),
}


def unary_of(node: Node) -> Unary | None:
    """The activation that `node` is, or None."""
    simple = _SIMPLE.get(node.op)
    if simple is not None:
        return simple
    bound = node.bound()
    match node.op:
        case "aten.gelu.default":
            if bound["approximate"] == "tanh":
                return _GELU_TANH
            return Unary("gelu", (), "none", _nn.gelu)
        case "aten.leaky_relu.default":
            return _scalars("leaky_relu", _nn.leaky_relu, bound["negative_slope"])
        case "aten.relu6.default":
            return _scalars("hardtanh", _nn.hardtanh, 0.0, 6.0)
        case "aten.hardtanh.default":
            return _scalars("hardtanh", _nn.hardtanh, bound["min_val"], bound["max_val"])
        case "aten.clamp.default":
            return _scalars("hardtanh", torch.clamp, bound["min"], bound["max"])
    return None


def match_gelu_new(region: Neighbourhood, x: Ref) -> WrittenOut | None:
    """The tanh form of GELU as transformers writes it, nothing of which is read elsewhere.

    `0.5 * x * (1 + tanh(sqrt(2/pi) * (x + 0.044715 * x**3)))`
    """
    users = region.sole_users(x)
    if len(users) != 3:
        return None
    half, cube, inner = (
        next((u for u in users if u.op == op and test(u)), None)
        for op, test in (
            ("aten.mul.Tensor", lambda u: _factor(u, x) == 0.5),
            ("aten.pow.Tensor_Scalar", lambda u: u.args[0] == x and u.args[1] == 3),
            ("aten.add.Tensor", lambda u: u.bound()["self"] == x and u.bound()["alpha"] == 1),
        )
    )
    if half is None or cube is None or inner is None:
        return None
    chain = [cube]
    for op, value in (
        ("mul", _CUBE),
        ("add", None),
        ("mul", _SQRT_2_OVER_PI),
        ("tanh", None),
        ("add", 1.0),
    ):
        after = region.sole_users(Ref(chain[-1].id))
        if len(after) != 1 or after[0].op.split(".")[1] != op:
            return None
        if value is not None and _factor(after[0], Ref(chain[-1].id)) != value:
            return None
        chain.append(after[0])
    last = region.sole_users(Ref(chain[-1].id))
    if chain[2].id != inner.id or len(last) != 1 or last[0].op != "aten.mul.Tensor":
        return None
    if {Ref(half.id), Ref(chain[-1].id)} != set(last[0].args[:2]) or len(
        region.sole_users(Ref(half.id))
    ) != 1:
        return None
    return WrittenOut(last[0].id, frozenset({half.id, *(node.id for node in chain)}), _GELU_TANH)


def _factor(node: Node, operand: Ref) -> float | None:
    """The number that a `mul` or `add` without alpha joins to `operand`."""
    bound = node.bound()
    if bound.get("alpha", 1) != 1 or bound["self"] != operand:
        return None
    other = bound["other"]
    return float(other) if isinstance(other, int | float) else None


def _scalars(attr: str, kernel: Callable[..., Any], *values: Any) -> Unary | None:
    if any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
        return None  # a clamp with one bound, or with tensors
    numbers = tuple(float(v) for v in values)
    return Unary(attr, numbers, "", kernel, tuple(map(repr, numbers)))
