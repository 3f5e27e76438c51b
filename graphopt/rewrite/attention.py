"""Attention written out becomes one op: `softmax(q k' * scale + mask) v`, with what stands between.

Runtimes have one kernel for it that never writes the scores down; the law is that it computes the
same. One thing differs: where a mask forbids a row everything with minus infinity, softmax gives
nan and `scaled_dot_product_attention` gives zeros (torch's CPU kernels, and so do the rules of
`graphopt.executor.backends`). A mask that is surely finite (`ranges`) needs no care; beside any
other the nan is kept: `where(amax(mask, -1) > -inf, attention, nan)`.

Deliberately absent: boolean masks and `masked_fill` of the scores, ranks other than 4, operands
whose batch broadcasts, several masks, and scores that somebody else reads.
"""

from dataclasses import dataclass
from math import inf, isfinite, nan

from graphopt.analysis.facts import Facts, update
from graphopt.analysis.neighbours import Neighbours
from graphopt.analysis.regions import Region
from graphopt.analysis.rule_base import broadcast_shapes
from graphopt.delta import AddNode, Delta, Edit, RemoveNode, apply_fully
from graphopt.errors import GraphoptError, TypeMismatchError
from graphopt.graph import Arg, Const, Node, Ref
from graphopt.rewrite.ranges import Ranges
from graphopt.rewrite.rewrite import Rewrite, Sketch
from graphopt.types import TensorType

ATTENTION = "aten.scaled_dot_product_attention.default"
MATMUL = "aten.matmul.default"
RANK = 4  # batch, heads, rows, features
SCALE_MAX = 1e30  # a scale beyond is no scale anyone trains with, and float32 has little room left
_SAME = frozenset(
    f"aten.{name}.default" for name in ("clone", "alias", "detach", "contiguous", "dropout", "_to_copy")
)  # fmt: skip
_SAFE_SOFTMAX = "aten._safe_softmax.default"
_SOFTMAX = frozenset({"aten.softmax.int", "aten._softmax.default", _SAFE_SOFTMAX})
_SCALES = frozenset(f"aten.{op}.{kind}" for op in ("mul", "div") for kind in ("Tensor", "Scalar"))


class _NoMatchError(Exception):
    """A softmax before a product that is no attention, and why."""


@dataclass(frozen=True, slots=True)
class _Found:
    """An attention written out: its operands, `keys` as the product reads them, [.., D, S]."""

    query: Arg
    keys: Ref
    value: Arg
    mask: Ref | Const | None
    scale: float
    is_safe: bool  # the softmax gives zeros for rows that are masked entirely
    ids: tuple[str, ...]


def recognise_attention(facts: Facts, region: Region) -> Rewrite:
    """The pass: writes every attention it recognises as one op, under the id of its last product."""
    near, sketch = Neighbours(facts, region), Sketch(facts.graph)
    ranges = Ranges(facts, near)
    matcher, writer = _Matcher(facts, near, ranges), _Writer(near, ranges, sketch)
    found: dict[str, list[Edit]] = {}
    for id in region.order:
        softmax = matcher.softmax_before(near.nodes[id])
        if softmax is None:
            continue
        try:
            found[id] = writer.write(id, matcher.match(near.nodes[id], softmax))
        except _NoMatchError as error:
            sketch.decline(id, str(error))
    return _kept(facts, region, sketch, found)


def _kept(facts: Facts, region: Region, sketch: Sketch, found: dict[str, list[Edit]]) -> Rewrite:
    """The edits that leave the types of the exits alone. The op lays its result out as its query
    lies, which the product did not, and views carry that on.
    """
    if found and not _keeps_exits(facts, region, found):
        for id in list(found):
            if not _keeps_exits(facts, region, {id: found[id]}):
                del found[id]
                sketch.decline(id, "an exit would be laid out otherwise")
        if not _keeps_exits(facts, region, found):
            for id in found:
                sketch.decline(id, "an exit would be laid out otherwise with the others")
            found.clear()
    for edits in found.values():
        sketch.edit(*edits)
    made = {edit.id for edit in sketch.edits if isinstance(edit, AddNode)}
    sketch.sources = {id: ids for id, ids in sketch.sources.items() if id in made}
    return sketch.rewrite()


def _keeps_exits(facts: Facts, region: Region, found: dict[str, list[Edit]]) -> bool:
    delta = Delta([edit for edits in found.values() for edit in edits])
    try:
        applied = apply_fully(facts.graph, delta)
        after = update(facts, applied.graph, applied.change).facts
    except GraphoptError:
        return False
    return all(after.type_of(ref) == facts.type_of(ref) for ref in region.exits)


class _Matcher:
    """Reads an attention upward from its last product."""

    def __init__(self, facts: Facts, near: Neighbours, ranges: Ranges) -> None:
        self.facts, self.near, self.ranges = facts, near, ranges

    def softmax_before(self, product: Node) -> list[Node] | None:
        """What leads from the softmax to `product`, the softmax first; None when there is none."""
        if product.op != MATMUL and product.op != "aten.bmm.default":
            return None
        path: list[Node] = []
        ref = product.args[0]
        while isinstance(ref, Ref) and ref.id in self.near.inside:
            node = self.near.nodes[ref.id]
            path.append(node)
            if node.op in _SOFTMAX:
                return path[::-1]
            if node.op not in _SAME:
                return None
            ref = node.args[0]
        return None

    def match(self, product: Node, path: list[Node]) -> _Found:
        """The attention of `product`; _NoMatchError says why it is none."""
        softmax = path[0]
        value = product.args[1]
        scores = self._type(softmax.args[0])
        if product.op != MATMUL or scores.rank != RANK:
            raise _NoMatchError(f"its scores are of rank {scores.rank}")
        if softmax.bound()["dim"] not in (-1, RANK - 1):
            raise _NoMatchError("its softmax is not along the last dim")
        for node in path:
            self._check(node, scores)
            if self.near.only_user(Ref(node.id)) is None:
                raise _NoMatchError(f"{node.id} is read elsewhere too")
        ids = [node.id for node in path]
        ref, mask = self._without_mask(softmax.args[0], scores, ids)
        ref, scale = self._without_scale(ref, scores, ids)
        inner = self._private(ref, ids)
        if inner.op != MATMUL or not isinstance(inner.args[1], Ref):
            raise _NoMatchError(f"its scores come from {inner.op}")
        query, keys = inner.args
        self._check_operands(query, keys, value)
        is_safe = softmax.op == _SAFE_SOFTMAX
        return _Found(query, keys, value, mask, scale, is_safe, (*ids[::-1], product.id))

    def _without_mask(
        self, ref: Arg, scores: TensorType, ids: list[str]
    ) -> tuple[Arg, Ref | Const | None]:
        node = self._private(ref, ids, take=False)
        if node.op != "aten.add.Tensor":
            return ref, None
        bound = node.bound()
        operands = [bound["self"], bound["other"]]
        if bound["alpha"] != 1 or not all(isinstance(arg, Ref | Const) for arg in operands):
            raise _NoMatchError("its mask is not added as it is")
        self._check(node, scores)
        ids.append(node.id)
        first, mask = operands if self._leads_to_product(operands[0]) else operands[::-1]
        type_ = self._type(mask)
        if type_.dtype != "f32" or type_.rank not in (2, RANK):
            raise _NoMatchError(f"its mask is {type_}")
        if not self._broadcasts(type_, scores):
            raise _NoMatchError(f"its mask is {type_}, its scores are {scores}")
        return first, mask

    def _leads_to_product(self, ref: Arg) -> bool:
        while isinstance(ref, Ref) and ref.id in self.near.inside:
            node = self.near.nodes[ref.id]
            if node.op == MATMUL:
                return True
            if node.op not in _SCALES | _SAME:
                return False
            ref = node.args[0]
        return False

    def _without_scale(self, ref: Arg, scores: TensorType, ids: list[str]) -> tuple[Arg, float]:
        scale = 1.0
        node = self._private(ref, ids, take=False)
        while node.op in _SCALES or node.op in _SAME:
            factor = self.ranges.number(node.bound()["other"]) if node.op in _SCALES else 1.0
            if not factor:
                raise _NoMatchError("its scale is not a number that is known")
            scale = scale / factor if ".div." in node.op else scale * factor
            self._check(node, scores)
            ids.append(node.id)
            ref = node.args[0]
            node = self._private(ref, ids, take=False)
        if not isfinite(scale) or not 1 / SCALE_MAX < scale < SCALE_MAX:
            raise _NoMatchError(f"its scale is {scale}")
        return ref, scale

    def _private(self, ref: Arg, ids: list[str], take: bool = True) -> Node:
        """The node of the region that computes `ref`, which nobody else reads."""
        if not isinstance(ref, Ref) or ref.id not in self.near.inside:
            raise _NoMatchError("its scores are read from outside")
        if self.near.only_user(ref) is None:
            raise _NoMatchError(f"{ref.id} is read elsewhere too")
        if take:
            ids.append(ref.id)
        return self.near.nodes[ref.id]

    def _check(self, node: Node, scores: TensorType) -> None:
        """The value stays float32 and keeps its shape all the way."""
        type_ = self._type(Ref(node.id))
        if (type_.dtype, type_.shape) != ("f32", scores.shape) or scores.dtype != "f32":
            raise _NoMatchError(f"{node.id} is {type_}")

    def _check_operands(self, query: Arg, keys: Arg, value: Arg) -> None:
        types = [self._type(arg) for arg in (query, keys, value)]
        if any(type_.rank != RANK or type_.dtype != "f32" for type_ in types):
            raise _NoMatchError("its operands are not float32 of rank 4")
        q, k, v = (type_.shape for type_ in types)
        if not q[:2] == k[:2] == v[:2]:
            raise _NoMatchError("its operands broadcast their batch")
        if not isinstance(q[3], int) or q[3] != k[2] or k[3] != v[2]:
            raise _NoMatchError("the size of its heads is dynamic")

    def _broadcasts(self, mask: TensorType, scores: TensorType) -> bool:
        try:
            return broadcast_shapes(mask.shape, scores.shape) == scores.shape
        except TypeMismatchError:
            return False

    def _type(self, operand: Arg) -> TensorType:
        if isinstance(operand, Const):
            return self.facts.graph.get_constant(operand.name).type
        type_ = self.facts.type_of(operand)
        assert isinstance(type_, TensorType)
        return type_


class _Writer:
    """The nodes of the op."""

    def __init__(self, near: Neighbours, ranges: Ranges, sketch: Sketch) -> None:
        self.near, self.ranges, self.sketch = near, ranges, sketch

    def write(self, id: str, found: _Found) -> list[Edit]:
        """The edits that put the op in the place of node `id`."""
        edits: list[Edit] = [RemoveNode(id)]
        keys = self._keys(id, found.keys, edits)
        mask = found.mask
        is_plain = mask is None or found.is_safe or self.ranges.is_finite(mask)
        name = id if is_plain else self._named(id, "attention", found.ids)
        scale = (("scale", found.scale),)
        args = (found.query, keys, found.value, mask)
        edits.append(AddNode(name, ATTENTION, args, scale))
        if not is_plain:
            most, seen = self._named(id, "most", ()), self._named(id, "seen", ())
            edits += [
                AddNode(most, "aten.amax.default", (mask, (-1,), True)),
                AddNode(seen, "aten.gt.Scalar", (Ref(most), -inf)),
                AddNode(id, "aten.where.ScalarOther", (Ref(seen), Ref(name), nan)),
            ]
        self.sketch.comes_from(id, found.ids)
        return edits

    def _named(self, id: str, mark: str, sources: tuple[str, ...]) -> str:
        name = self.sketch.name(id, mark)
        self.sketch.comes_from(name, sources)
        return name

    def _keys(self, id: str, transposed: Ref, edits: list[Edit]) -> Ref | Const:
        """The keys as the op wants them, [.., S, D]: what was transposed, or that transposed."""
        node = self.near.nodes[transposed.id] if transposed.id in self.near.inside else None
        if node is not None and node.op == "aten.transpose.int":
            dims = {dim % RANK for dim in node.args[1:]}
            if dims == {2, 3}:
                return node.args[0]  # type: ignore[no-any-return]
        if node is not None and node.op == "aten.permute.default":
            order = [dim % RANK for dim in node.args[1]]
            if order == [0, 1, 3, 2]:
                return node.args[0]  # type: ignore[no-any-return]
        name = self._named(id, "keys", (transposed.id,) if node is not None else ())
        edits.append(AddNode(name, "aten.transpose.int", (transposed, -2, -1)))
        return Ref(name)
