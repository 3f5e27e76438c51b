"""How much of its operands an op needs for some rows of its value: one rule for each kind of op.

`needs(node, facts, rows)` answers for a node of which only `rows` are read. A rule returns None
where the op mixes the rows of that dim, and the whole value is computed then.

Deliberately absent: ops with several outputs, and rows that differ from one batch entry to the next.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from graphopt.analysis.facts import Facts
from graphopt.dims import Dim, product
from graphopt.graph import Arg, Const, Node, Ref
from graphopt.types import TensorType

Operand = Ref | Const


@dataclass(frozen=True, slots=True)
class Rows:
    """Entries `start` to `start + length` along `dim`; a negative start counts from the end.

    With `index`, a 1-d value of integers, it is these entries instead, `length` of them.
    """

    dim: int
    start: int
    length: int
    index: Operand | None = None

    def along(self, dim: int) -> "Rows":
        """The same entries of another dim."""
        return replace(self, dim=dim)


@dataclass(frozen=True, slots=True)
class Needs:
    """What a narrowed node reads: rows by operand (those not named are read whole), and arguments
    that change with them.
    """

    rows: Mapping[Operand, Rows]
    arguments: Mapping[str, Arg] = field(default_factory=dict)


Rule = Callable[[Node, "Types", Rows], Needs | None]
_RULES: dict[str, Rule] = {}


class Types:
    """Shapes of operands."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts

    def shape(self, operand: Arg) -> tuple[Dim, ...]:
        """The shape of a value or constant; that of a symbolic integer is `()`."""
        if isinstance(operand, Const):
            return tuple(self._facts.graph.get_constant(operand.name).type.shape)
        type_ = self._facts.type_of(operand)
        return type_.shape if isinstance(type_, TensorType) else ()


def needs(node: Node, facts: Facts, rows: Rows) -> Needs | None:
    """What `node` reads when only `rows` of its value are; None when it needs everything."""
    rule = _RULES.get(node.op)
    return None if rule is None else rule(node, Types(facts), rows)


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        _RULES.update({f"aten.{name}": function for name in names})
        return function

    return register


def _aligned(operand: Operand, rank: int, types: Types, rows: Rows) -> Rows | None:
    """The rows of an operand that broadcasts to `rank` dims; None when it has one for all of them."""
    shape = types.shape(operand)
    dim = rows.dim - (rank - len(shape))
    return None if dim < 0 or shape[dim] == 1 else rows.along(dim)


def _of_all(operands: list[Any], rank: int, types: Types, rows: Rows) -> Needs:
    found = {}
    for operand in operands:
        if isinstance(operand, Ref | Const):
            part = _aligned(operand, rank, types, rows)
            if part is not None:
                found[operand] = part
    return Needs(found)


@_rule(
    "abs.default", "add.Scalar", "add.Tensor", "alias.default", "clamp.default", "clamp.Tensor",
    "clamp_max.default", "clamp_min.default", "clone.default", "contiguous.default", "cos.default",
    "detach.default", "div.Scalar", "div.Tensor", "elu.default", "eq.Scalar", "eq.Tensor",
    "erf.default", "exp.default", "ge.Scalar", "ge.Tensor", "gelu.default", "gt.Scalar",
    "gt.Tensor", "hardsigmoid.default", "hardswish.default", "hardtanh.default", "le.Scalar",
    "le.Tensor", "leaky_relu.default", "log.default", "lt.Scalar", "lt.Tensor",
    "masked_fill.Scalar", "maximum.default", "minimum.default", "mul.Scalar", "mul.Tensor",
    "ne.Scalar", "ne.Tensor", "neg.default", "pow.Tensor_Scalar", "reciprocal.default",
    "relu.default", "rsqrt.default", "rsub.Scalar", "sigmoid.default", "silu.default",
    "sin.default", "softplus.default", "sqrt.default", "sub.Scalar", "sub.Tensor", "tanh.default",
    "_to_copy.default", "where.ScalarOther", "where.ScalarSelf", "where.self",
)  # fmt: skip
def _elementwise(node: Node, types: Types, rows: Rows) -> Needs:
    operands = [value for value in node.bound().values() if isinstance(value, Ref | Const)]
    rank = max(len(types.shape(operand)) for operand in operands)
    return _of_all(operands, rank, types, rows)


@_rule("linear.default")
def _linear(node: Node, types: Types, rows: Rows) -> Needs | None:
    bound = node.bound()
    is_feature = rows.dim == len(types.shape(bound["input"])) - 1
    return None if is_feature else Needs({bound["input"]: rows})


@_rule("addmm.default")
def _addmm(node: Node, types: Types, rows: Rows) -> Needs | None:
    bound = node.bound()
    if rows.dim != 0 or len(types.shape(bound["self"])) > 1:
        return None
    return Needs({bound["mat1"]: rows})


@_rule("mm.default", "bmm.default", "matmul.default")
def _product(node: Node, types: Types, rows: Rows) -> Needs | None:
    left, right = node.args[0], node.args[1]
    left_shape, right_shape = types.shape(left), types.shape(right)
    rank = max(len(left_shape), len(right_shape))
    if left == right or min(len(left_shape), len(right_shape)) < 2:
        return None
    if rows.dim == rank - 2:
        return Needs({left: rows.along(len(left_shape) - 2)})
    if rows.dim == rank - 1:
        return Needs({right: rows.along(len(right_shape) - 1)})
    return _of_all([left, right], rank, types, rows)


@_rule("scaled_dot_product_attention.default")
def _attention(node: Node, types: Types, rows: Rows) -> Needs | None:
    bound = node.bound()
    query, key, value, mask = (bound[name] for name in ("query", "key", "value", "attn_mask"))
    rank = len(types.shape(query))
    if len({query, key, value}) < 3 or (bound["enable_gqa"] and rows.dim < rank - 2):
        return None
    if rows.dim == rank - 1:
        return Needs({value: rows})
    if rows.dim < rank - 2:
        if bound["is_causal"] and mask is not None:
            return None
        return _of_all([query, key, value, mask], rank, types, rows)
    if not bound["is_causal"]:
        found = {query: rows}
        if mask is not None and (part := _aligned(mask, rank, types, rows)) is not None:
            found[mask] = part
        return Needs(found)
    # Causal: the last row of as many queries as keys sees every key, and needs no mask
    total = types.shape(query)[-2]
    is_last = rows.length == 1 and rows.index is None
    is_last = is_last and (rows.start == -1 or total == rows.start + 1)
    if not is_last or total != types.shape(key)[-2]:
        return None
    return Needs({query: rows}, {"is_causal": False})


@_rule("layer_norm.default", "rms_norm.default")
def _norm(node: Node, types: Types, rows: Rows) -> Needs | None:
    bound = node.bound()
    x = bound["input"]
    if rows.dim >= len(types.shape(x)) - len(bound["normalized_shape"]):
        return None
    return Needs({x: rows})


@_rule("softmax.int", "_softmax.default", "log_softmax.int", "_log_softmax.default")
def _softmax(node: Node, types: Types, rows: Rows) -> Needs | None:
    x = node.args[0]
    rank = len(types.shape(x))
    return None if rows.dim == node.bound()["dim"] % rank else Needs({x: rows})


@_rule("embedding.default")
def _embedding(node: Node, types: Types, rows: Rows) -> Needs | None:
    indices = node.bound()["indices"]
    return Needs({indices: rows}) if rows.dim < len(types.shape(indices)) else None


@_rule("cat.default")
def _cat(node: Node, types: Types, rows: Rows) -> Needs | None:
    tensors = node.args[0]
    ranks = {len(types.shape(tensor)) for tensor in tensors}
    if len(ranks) > 1 or rows.dim == node.bound()["dim"] % ranks.pop():
        return None
    return Needs(dict.fromkeys(tensors, rows))


@_rule("view.default", "reshape.default", "_unsafe_view.default")
def _view(node: Node, types: Types, rows: Rows) -> Needs | None:
    """The dim must be one of the operand too: equal in size, with as many elements before it."""
    x, size = node.args[0], list(node.args[1])
    before = types.shape(x)
    after = _after(node, types, before)
    if after is None:
        return None
    wanted = product(after[: rows.dim])
    for dim, length in enumerate(before):
        if length == after[rows.dim] and product(before[:dim]) == wanted and length != 1:
            size[rows.dim] = rows.length
            name = "shape" if node.op == "aten.reshape.default" else "size"
            return Needs({x: rows.along(dim)}, {name: tuple(size)})
    return None


def _after(node: Node, types: Types, before: tuple[Dim, ...]) -> tuple[Dim, ...] | None:
    shape = types.shape(Ref(node.id))
    return shape if len(shape) == len(node.args[1]) else None


@_rule("permute.default")
def _permute(node: Node, types: Types, rows: Rows) -> Needs:
    x, dims = node.args[0], node.args[1]
    return Needs({x: rows.along(dims[rows.dim] % len(dims))})


@_rule("transpose.int")
def _transpose(node: Node, types: Types, rows: Rows) -> Needs:
    x = node.args[0]
    rank = len(types.shape(x))
    one, other = node.args[1] % rank, node.args[2] % rank
    return Needs({x: rows.along({one: other, other: one}.get(rows.dim, rows.dim))})


@_rule("t.default")
def _t(node: Node, types: Types, rows: Rows) -> Needs:
    x = node.args[0]
    return Needs({x: rows.along(len(types.shape(x)) - 1 - rows.dim)})


@_rule("unsqueeze.default")
def _unsqueeze(node: Node, types: Types, rows: Rows) -> Needs | None:
    x = node.args[0]
    new = node.bound()["dim"] % (len(types.shape(x)) + 1)
    if rows.dim == new:
        return None
    return Needs({x: rows.along(rows.dim - (rows.dim > new))})


@_rule("expand.default")
def _expand(node: Node, types: Types, rows: Rows) -> Needs:
    x, size = node.args[0], list(node.args[1])
    size[rows.dim] = rows.length
    part = _aligned(x, len(size), types, rows)
    return Needs({} if part is None else {x: part}, {"size": tuple(size)})


@_rule("slice.Tensor", "select.int")
def _other_dim(node: Node, types: Types, rows: Rows) -> Needs | None:
    """Rows of a value that is itself cut out along another dim."""
    x = node.args[0]
    cut = node.bound()["dim"] % len(types.shape(x))
    if node.op == "aten.select.int":
        return Needs({x: rows.along(rows.dim + (rows.dim >= cut))})
    return None if rows.dim == cut else Needs({x: rows})
