"""Functions that models write out as several nodes and runtimes have as one.

Found on the region's own nodes, so both runtimes get them. Nothing of what a pattern spans may be
read elsewhere.
"""

from dataclasses import dataclass
from typing import Any

from graphopt.analysis.facts import Facts
from graphopt.analysis.neighbours import Neighbours
from graphopt.analysis.regions import Region
from graphopt.dims import Dim
from graphopt.executor.fused_epilogues import match_gelu_new
from graphopt.graph import Const, Node, Ref
from graphopt.types import TensorType


@dataclass(frozen=True, slots=True)
class Pattern:
    """One function instead of several nodes.

    `kind` is of `target.KINDS`; `operands` are values and constants, `root` is the node whose value
    it yields, `absorbed` are the others.
    """

    kind: str
    root: str
    absorbed: frozenset[str]
    operands: tuple[Ref | Const, ...]
    attributes: tuple[tuple[str, Any], ...]


def find_patterns(facts: Facts, region: Region) -> dict[str, Pattern]:
    """The patterns of a region by root. O(nodes)."""
    near = Neighbours(facts, region)
    found: dict[str, Pattern] = {}
    taken: set[str] = set()
    for id in region.order:
        node = near.nodes[id]
        if node.op != "aten.pow.Tensor_Scalar" or not isinstance(node.args[0], Ref):
            continue
        pattern = _rms_norm(near, node) if node.args[1] == 2 else _gelu(near, node)
        if pattern is not None and not taken & {pattern.root, *pattern.absorbed}:
            found[pattern.root] = pattern
            taken |= {pattern.root, *pattern.absorbed}
    return found


def _gelu(near: Neighbours, node: Node) -> Pattern | None:
    x = node.args[0]
    gelu = match_gelu_new(near, x)
    if gelu is None or not _is_f32(near, x):
        return None
    return Pattern("gelu", gelu.root, gelu.absorbed, (x,), (("approximate", "tanh"),))


def _rms_norm(near: Neighbours, square: Node) -> Pattern | None:
    """`w * (x * rsqrt(mean(x ** 2, -1) + eps))`: Zhang and Sennrich, arXiv:1910.07467."""
    x = square.args[0]
    mean = near.only_user(Ref(square.id))
    if mean is None or mean.op != "aten.mean.dim" or not _is_f32(near, x):
        return None
    rank = len(_shape(near, x))
    if not rank or not isinstance(_shape(near, x)[-1], int):
        return None
    bound = mean.bound()
    if (
        bound["dim"] not in ((-1,), (rank - 1,))
        or not bound["keepdim"]
        or bound["dtype"] is not None
    ):
        return None
    added = near.only_user(Ref(mean.id))
    if added is None or added.op not in ("aten.add.Tensor", "aten.add.Scalar"):
        return None
    eps = added.args[1] if len(added.args) == 2 else None
    root = near.only_user(Ref(added.id))
    if not isinstance(eps, float) or root is None or root.op != "aten.rsqrt.default":
        return None
    scaled = near.only_user(Ref(root.id))
    if scaled is None or scaled.op != "aten.mul.Tensor" or set(scaled.args) != {x, Ref(root.id)}:
        return None
    inner = frozenset({square.id, mean.id, added.id, root.id})
    weight = _weight(near, near.only_user(Ref(scaled.id)), scaled, x)
    if weight is None:
        return Pattern("rms_norm", scaled.id, inner, (x,), (("eps", eps),))
    last, name = weight
    return Pattern("rms_norm", last, inner | {scaled.id}, (x, name), (("eps", eps),))


def _weight(near: Neighbours, node: Node | None, scaled: Node, x: Ref) -> tuple[str, Const] | None:
    """The node that multiplies with a constant weight of one dim, and that constant."""
    if node is None or node.op != "aten.mul.Tensor" or len(node.args) != 2:
        return None
    weights = [arg for arg in node.args if isinstance(arg, Const)]
    if len(weights) != 1 or Ref(scaled.id) not in node.args:
        return None
    shape = near.facts.graph.get_constant(weights[0].name).type.shape
    type_ = near.facts.type_of(x)
    assert isinstance(type_, TensorType)
    return (node.id, weights[0]) if shape == type_.shape[-1:] else None


def _is_f32(near: Neighbours, ref: Ref) -> bool:
    type_ = near.facts.type_of(ref)
    return isinstance(type_, TensorType) and type_.dtype == "f32"


def _shape(near: Neighbours, ref: Ref) -> tuple[Dim, ...]:
    type_ = near.facts.type_of(ref)
    return type_.shape if isinstance(type_, TensorType) else ()
