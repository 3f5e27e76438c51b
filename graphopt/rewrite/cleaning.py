"""Cleaning: nodes that compute what they read go, and chains that move dims become one node.

Exporters write copies that only matter to who writes into them, casts to the dtype that a value has
already, dropouts that are off, views to the same shape and slices of everything. None of them
changes a value, and values are all that a graph means: how they lie in memory does not count, except
at exits, whose types stay.

The law: bit for bit the same elements, so a float plus 0 stays where it is (it makes 0.0 of -0.0),
and so does a complex number times 1 (it makes nan of inf). Deliberately absent: arithmetic beyond
neutral literals, and constants that hold ones or zeros, whose values a delta may change.
"""

from graphopt.analysis.facts import Facts
from graphopt.analysis.neighbours import Neighbours
from graphopt.analysis.regions import Region
from graphopt.graph import Arg, Const, Node, Ref
from graphopt.nodes import make_node
from graphopt.rewrite.rewrite import Rewrite, Sketch
from graphopt.rewrite.settling import Change, Operand, Settled, settle
from graphopt.types import CONTIGUOUS, TensorType

_TO_THE_END = 1 << 62  # exporters write the largest integer


def _names(*names: str) -> frozenset[str]:
    return frozenset(f"aten.{name}" for name in names)


COPIES = _names(
    "alias.default", "alias_copy.default", "clone.default", "contiguous.default",
    "detach.default", "detach_copy.default", "lift_fresh_copy.default",
)  # fmt: skip
CASTS = _names("_to_copy.default", "to.dtype", "to.dtype_layout", "to.other", "type_as.default")
DROPOUTS = _names(
    "dropout.default", "alpha_dropout.default", "feature_dropout.default", "native_dropout.default"
)
VIEWS = _names("view.default", "reshape.default", "_unsafe_view.default")
# What keeps the elements in row-major order; a view of it is a view of what it reads
RESHAPES = VIEWS | _names(
    "flatten.using_ints", "squeeze.default", "squeeze.dim", "squeeze.dims", "unflatten.int",
    "unsqueeze.default",
)  # fmt: skip
# What computes its operand whenever the shape is the same afterwards
TO_SHAPES = RESHAPES | _names("expand.default", "narrow.default", "slice.Tensor")
MOVES = _names("permute.default", "transpose.int", "t.default")
SCALES = _names("mul.Tensor", "mul.Scalar", "div.Tensor", "div.Scalar")
SHIFTS = _names("add.Tensor", "add.Scalar", "sub.Tensor", "sub.Scalar")
SLICE = "aten.slice.Tensor"


def clean(facts: Facts, region: Region) -> Rewrite:
    """The pass: drops and joins what changes no element."""
    cleaning = _Cleaning(facts, region)
    settled, barred = settle(facts, region, cleaning.simpler)
    sketch = Sketch(facts.graph)
    settled.write(sketch)
    for id, reason in {**cleaning.declined, **barred}.items():
        sketch.decline(id, reason)
    return sketch.rewrite()


class _Cleaning:
    """What each node may become; `declined` says why some may not."""

    def __init__(self, facts: Facts, region: Region) -> None:
        self.near = Neighbours(facts, region)
        self.exits = set(region.exits)
        self.declined: dict[str, str] = {}

    def simpler(self, node: Node, settled: Settled) -> Change | None:
        """The simpler form of a node, or what its users may read instead; None to leave it."""
        operand = _operand(node)
        before = settled.tensor(operand)
        after = settled.facts.type_of(Ref(node.id))
        if operand is None or before is None or not isinstance(after, TensorType):
            return None
        if self._is_operand(node, before, after):
            reason = self._why_keep(node, before, after)
            if not reason:
                return {Ref(node.id): operand}
            self.declined[node.id] = reason
        producer = settled.nodes.get(operand.id) if isinstance(operand, Ref) else None
        base = None if producer is None else _operand(producer)
        inner = settled.tensor(base)
        if producer is None or base is None or inner is None:
            return None
        if node.op in VIEWS and producer.op in RESHAPES:
            return self._view(node, operand, base, inner, after)
        if node.op in MOVES and producer.op in MOVES:
            return self._move(node, producer, base, inner)
        if node.op == producer.op == SLICE:
            return _slice(node, producer, base, inner)
        return None

    def _is_operand(self, node: Node, before: TensorType, after: TensorType) -> bool:
        """Whether the node computes its first operand."""
        if (before.dtype, before.shape) != (after.dtype, after.shape):
            return False
        if node.op in COPIES or node.op in CASTS or node.op in TO_SHAPES:
            return True
        if node.op in DROPOUTS:
            bound = node.bound()
            return bound["train"] is False or bound["p"] == 0.0
        if node.op in MOVES:
            return _is_still(_dims(node, before.rank), before)
        if node.op in SCALES or node.op in SHIFTS:
            return _is_number(node.bound()["other"], 1 if node.op in SCALES else 0)
        return False

    def _why_keep(self, node: Node, before: TensorType, after: TensorType) -> str:
        """Why a node that computes its operand, or nearly, stays all the same; empty to drop it."""
        if node.op in SHIFTS and before.is_float:
            return "adding 0 makes 0.0 of -0.0"
        if node.op in SCALES and before.dtype.startswith("c"):
            return "1 times a complex infinity is nan"
        mask = Ref(node.id, 1)
        if mask in self.exits or self.near.users(mask):
            return "its mask is read"
        if Ref(node.id) in self.exits:
            return "its value is handed out"
        is_copy = node.op in COPIES and before.layout != after.layout
        if is_copy and len(self.near.users(Ref(node.id))) > 1:
            return "several nodes read the copy, which would be made for each of them"
        return ""

    def _view(
        self, node: Node, operand: Operand, base: Operand, inner: TensorType, after: TensorType
    ) -> Change | None:
        """A view of a view is one of what that one reads: the elements keep their order."""
        is_shared = isinstance(operand, Ref) and self.near.only_user(operand) is None
        if inner.layout != CONTIGUOUS and is_shared:
            self.declined[node.id] = "the view before it makes a copy that others read too"
            return None
        if inner.shape == after.shape and Ref(node.id) not in self.exits:
            return {Ref(node.id): base}
        return Node(node.id, node.op, (base, *node.args[1:]), node.kwargs)

    def _move(self, node: Node, producer: Node, base: Operand, inner: TensorType) -> Change | None:
        first, second = _dims(producer, inner.rank), _dims(node, inner.rank)
        dims = tuple(first[dim] for dim in second)
        is_same = tuple(inner.shape[dim] for dim in dims) == inner.shape
        if not (is_same and _is_still(dims, inner)):
            return make_node(node.id, "aten.permute.default", (base, dims))
        if Ref(node.id) in self.exits:
            self.declined[node.id] = "its value is handed out"
            return None
        return {Ref(node.id): base}


def _operand(node: Node) -> Operand | None:
    """The value that a node may turn out to compute: its first operand."""
    first = node.args[0] if node.args else None
    return first if isinstance(first, Ref | Const) else None


def _is_number(value: Arg, number: int) -> bool:
    is_literal = isinstance(value, int | float) and not isinstance(value, bool)
    return is_literal and value == number


def _dims(node: Node, rank: int) -> tuple[int, ...]:
    """Which dim of its operand each dim of the node is."""
    bound, dims = node.bound(), list(range(rank))
    if node.op == "aten.t.default":
        dims.reverse()
    elif node.op == "aten.permute.default":
        dims = [dim % rank for dim in bound["dims"]]
    elif rank:
        one, other = bound["dim0"] % rank, bound["dim1"] % rank
        dims[one], dims[other] = other, one
    return tuple(dims)


def _is_still(dims: tuple[int, ...], type_: TensorType) -> bool:
    """Whether the dims keep their order, but for those of size 1, which have none."""
    order = [dim for dim in dims if type_.shape[dim] != 1]
    return order == sorted(order)


def _slice(node: Node, producer: Node, base: Operand, inner: TensorType) -> Node | None:
    """A slice of a slice of the same dim, where both bounds of both are known."""
    cuts = [each.bound() for each in (producer, node)]
    if len({cut["dim"] % inner.rank for cut in cuts}) > 1 or any(cut["step"] != 1 for cut in cuts):
        return None
    starts = [0 if cut["start"] is None else cut["start"] for cut in cuts]
    ends = [_TO_THE_END if cut["end"] is None else cut["end"] for cut in cuts]
    if not all(isinstance(at, int) and at >= 0 for at in (*starts, *ends)):
        return None
    start = sum(starts)
    end = min(ends[0], starts[0] + ends[1])
    is_open = end >= _TO_THE_END
    return make_node(node.id, SLICE, (base, cuts[0]["dim"], start, None if is_open else end))
