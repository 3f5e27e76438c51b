"""Which values are affine in which operands: the forms of a region, found in one walk.

A form says how a value comes about from one operand by products with constant matrices, sums and
scales, and what that costs; `affine.py` turns the ones that pay into one linear. Every value between
a form's root and its top has one reader. Deliberately absent: the matrices, which are computed for
the forms that are taken.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from graphopt.analysis.facts import Facts
from graphopt.analysis.neighbours import Neighbours
from graphopt.graph import Arg, Const, Node, Ref
from graphopt.rewrite.rewrite import Sketch
from graphopt.types import TensorType

LINEAR = "aten.linear.default"
FORMS_MAX = 64  # operands that one value is known to be affine in; a chain of n linears has n
NODES_MAX = 256  # nodes that one form stands for; recursion over forms is no deeper
NUMBER_MAX = 3e38  # literals beyond are infinite as float32
PRODUCTS = {  # op: its operand, its matrix, its bias; all but linear's matrices are [in, out]
    LINEAR: ("input", "weight", "bias"),
    "aten.addmm.default": ("mat1", "mat2", "self"),
    "aten.mm.default": ("self", "mat2", None),
    "aten.matmul.default": ("self", "other", None),
}
_SAME = frozenset(
    f"aten.{name}.default" for name in ("clone", "alias", "detach", "contiguous", "dropout")
)
_SUMS = frozenset(f"aten.{name}.{kind}" for name in ("add", "sub") for kind in ("Tensor", "Scalar"))
_SCALES = frozenset(
    f"aten.{name}.{kind}" for name in ("mul", "div") for kind in ("Tensor", "Scalar")
)


@dataclass(frozen=True, slots=True)
class Form:
    """How a value is an affine function of `root`.

    Attributes:
        kind: what `node` does to `parts`; `root` is the operand itself.
        factor: of `scale`, a number or a constant of one row; of `sum`, the sign and alpha of
            the second part.
        constant: what `shift` adds, `factor` times it.
        size: rows and columns of the matrix, None while there is none.
        nodes: how many nodes it stands for.
        macs: their multiply-adds for one row.
        work: multiply-adds to compute the matrix.
    """

    root: Ref
    kind: Literal["root", "product", "same", "scale", "shift", "sum"]
    node: Node | None = None
    parts: tuple["Form", ...] = ()
    factor: float | Const = 1.0
    constant: float | Const = 0.0
    size: tuple[int, int] | None = None
    nodes: int = 0
    macs: int = 0
    work: int = 0

    @property
    def saved(self) -> int:
        """Multiply-adds of a row that one linear saves; negative where it costs some."""
        assert self.size is not None
        return self.macs - self.size[0] * self.size[1]

    def ids(self) -> Iterator[str]:
        """The nodes it stands for, each once."""
        stack = [self]
        while stack:
            form = stack.pop()
            if form.node is not None:
                yield form.node.id
            stack.extend(form.parts)


class Forms:
    """The forms of every value of a region."""

    def __init__(self, facts: Facts, near: Neighbours, sketch: Sketch) -> None:
        self.facts, self.near, self.sketch = facts, near, sketch
        self.known: dict[str, dict[Ref, Form]] = {}

    def of(self, order: tuple[str, ...]) -> dict[str, dict[Ref, Form]]:
        """Forms by node and root; a root's form of itself is left out."""
        for id in order:
            found = self._of_node(self.near.nodes[id])
            if found:
                short = [(root, form) for root, form in found.items() if form.nodes <= NODES_MAX]
                self.known[id] = dict(short[:FORMS_MAX])
        return self.known

    def _of_node(self, node: Node) -> dict[Ref, Form]:
        if node.op in PRODUCTS:
            return self._product(node)
        if node.op in _SAME and isinstance(node.args[0], Ref):
            return self._elementwise(node, node.args[0], "same")
        bound = node.bound()
        if node.op == "aten.neg.default":
            return self._elementwise(node, bound["self"], "scale", factor=-1.0)
        if node.op in _SCALES:
            return self._scale(node, bound["self"], bound["other"])
        return self._sum(node, bound) if node.op in _SUMS else {}

    def _parts(self, ref: Arg, user: Node) -> dict[Ref, Form]:
        """The forms of an operand of `user`, nearest root first: itself, and what it hides."""
        if not isinstance(ref, Ref) or self._type(ref).dtype != "f32":
            return {}
        forms = {ref: Form(ref, "root")}
        inner = self.known.get(ref.id) if ref.idx == 0 else None
        if inner:
            if self.near.only_user(ref) is user:
                forms |= inner
            else:
                self.sketch.decline(user.id, f"{ref.id} is read elsewhere too")
        return forms

    def _product(self, node: Node) -> dict[Ref, Form]:
        operand, matrix, bias = PRODUCTS[node.op]
        bound = node.bound()
        weight, added = bound[matrix], bound[bias] if bias else None
        if not isinstance(weight, Const) or not (added is None or isinstance(added, Const)):
            return {}
        type_ = self._type(weight)
        if type_.rank != 2 or bound.get("alpha", 1) != 1 or bound.get("beta", 1) != 1:
            return {}
        out_first = node.op == LINEAR
        rows, columns = self.facts.graph.get_constant(weight.name).tensor.shape[
            :: 1 if out_first else -1
        ]
        if any(self._type(const).dtype != "f32" for const in (weight, added) if const is not None):
            self.sketch.decline(node.id, f"its weight is {type_}")
            return {}
        if added is not None and not self._is_row(added, rows, 2):
            return {}
        found = {}
        for root, part in self._parts(bound[operand], node).items():
            columns_in = part.size[1] if part.size else columns
            work = part.work + (rows * columns * columns_in if part.size else 0)
            macs, size = part.macs + rows * columns, (rows, columns_in)
            found[root] = Form(
                root, "product", node, (part,), size=size, nodes=part.nodes + 1, macs=macs, work=work
            )  # fmt: skip
        return found

    def _elementwise(self, node: Node, operand: Arg, kind: Any, **settings: Any) -> dict[Ref, Form]:
        """`node` keeps the operand's shape and dtype, and does the same to each row."""
        parts = self._parts(operand, node)
        if not parts or not self._keeps(node, operand):
            return {}
        return {
            root: Form(
                root, kind, node, (part,), **settings,
                size=part.size, nodes=part.nodes + 1, macs=part.macs, work=part.work,
            )
            for root, part in parts.items()
            if part.size is not None or kind != "scale"
        }  # fmt: skip

    def _scale(self, node: Node, left: Arg, right: Arg) -> dict[Ref, Form]:
        is_product = ".mul." in node.op
        if isinstance(left, Const) and is_product:
            left, right = right, left
        if is_number(right):
            if not is_product and right == 0:
                return {}
            factor = float(right) if is_product else 1.0 / right
            return self._elementwise(node, left, "scale", factor=factor)
        if isinstance(right, Const) and is_product and self._is_row_of(right, left):
            return self._elementwise(node, left, "scale", factor=right)
        return {}

    def _sum(self, node: Node, bound: dict[str, Arg]) -> dict[Ref, Form]:
        left, right, alpha = bound["self"], bound["other"], bound["alpha"]
        if not is_number(alpha):
            return {}
        factor = -float(alpha) if ".sub." in node.op else float(alpha)
        if is_number(right) or (isinstance(right, Const) and self._is_row_of(right, left)):
            return self._elementwise(node, left, "shift", factor=factor, constant=right)
        if isinstance(left, Const) and factor == 1 and self._is_row_of(left, right):
            return self._elementwise(node, right, "shift", constant=left)
        if not (self._keeps(node, left) and self._keeps(node, right)):
            return {}
        lefts, rights = self._parts(left, node), self._parts(right, node)
        found = {}
        for root, part in lefts.items():
            other = rights.get(root)
            if other is None or part.size is None or other.size != part.size:
                continue
            nodes, macs = part.nodes + other.nodes + 1, part.macs + other.macs
            work = part.work + other.work
            found[root] = Form(
                root, "sum", node, (part, other), factor,
                size=part.size, nodes=nodes, macs=macs, work=work,
            )  # fmt: skip
        return found

    # -- types

    def _type(self, operand: Ref | Const) -> TensorType:
        if isinstance(operand, Const):
            return self.facts.graph.get_constant(operand.name).type
        type_ = self.facts.type_of(operand)
        return type_ if isinstance(type_, TensorType) else TensorType("i64", ())

    def _keeps(self, node: Node, operand: Arg) -> bool:
        if not isinstance(operand, Ref):
            return False
        before, after = self._type(operand), self._type(Ref(node.id))
        return (before.dtype, before.shape) == (after.dtype, after.shape)

    def _is_row(self, const: Const, size: Any, rank: int) -> bool:
        """Whether a constant is one row of `size` (or one number) to every row of a value."""
        type_ = self._type(const)
        fits = type_.rank <= rank and all(dim == 1 for dim in type_.shape[:-1])
        return fits and type_.dtype == "f32" and type_.shape[-1:] in ((), (1,), (size,))

    def _is_row_of(self, const: Const, operand: Arg) -> bool:
        if not isinstance(operand, Ref):
            return False
        type_ = self._type(operand)
        return type_.rank > 0 and self._is_row(const, type_.shape[-1], type_.rank)


def is_number(arg: Arg) -> bool:
    """Whether an argument is a literal that is finite as float32."""
    return isinstance(arg, int | float) and not isinstance(arg, bool) and abs(arg) < NUMBER_MAX
