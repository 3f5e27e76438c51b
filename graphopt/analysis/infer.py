"""The types of one node's outputs, from the types of its operands.

Common ops have rules of their own (`graphopt.analysis.rules`), microseconds each; every other op
runs on torch's meta device at a few probe sizes, and the symbolic output shape is fitted through
the results (`graphopt.analysis.probe`). Results are remembered by (op, argument types): the twelfth
layer costs a dictionary look-up.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from graphopt.analysis import probe, rules
from graphopt.dims import Expr, evaluate
from graphopt.errors import LimitError, TypeMismatchError
from graphopt.graph import Arg, Const, Node, Ref
from graphopt.limits import OUTPUT_BYTES_MAX
from graphopt.ops import SYM_OPS, Param, get_spec
from graphopt.types import DTYPE_BYTES, SymIntType, TensorType, ValueType

Lookup = Callable[[Ref | Const], ValueType]
# Ops whose every entry takes a number for their second tensor; torch has scalar overloads of the
# others.
_NUMBER_FOR_TENSOR = frozenset({"add", "sub", "mul", "div", "floor_divide"})
NODES_REMEMBERED = 65_536  # distinct (op, argument types); a 24-layer model has about 60


def infer_node(node: Node, lookup: Lookup) -> tuple[ValueType, ...]:
    """The types of the outputs of `node`.

    Raises, naming the node: TypeMismatchError when the op does not take its operands, LimitError
    when it would make too much of them.
    """
    args = tuple(_resolve(arg, lookup, node) for arg in node.args)
    kwargs = tuple((name, _resolve(value, lookup, node)) for name, value in node.kwargs)
    try:
        return _infer(node.op, args, kwargs)
    except TypeMismatchError as error:
        operands = ", ".join(str(a) for a in args if isinstance(a, TensorType))
        raise TypeMismatchError(
            f"{node.op} does not take these operands: {error.message} (operands: {operands})",
            where=node.id,
            remedy=error.remedy or "see the types with `graphoptctl show`",
        ) from None
    except LimitError as error:
        error.where = node.id
        raise


@lru_cache(maxsize=NODES_REMEMBERED)
def _infer(
    op: str, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...]
) -> tuple[ValueType, ...]:
    spec = get_spec(op)
    bound: dict[str, Any] = {param.name: param.default for param in spec.params}
    bound |= {param.name: arg for param, arg in zip(spec.params, args, strict=False)}
    bound |= dict(kwargs)
    _check_kinds(op, bound)
    if why := spec.why_random(bound):
        raise TypeMismatchError(why, remedy="set it")
    if op in SYM_OPS:
        return (SymIntType(SYM_OPS[op](*bound.values())),)
    rule = rules.RULES.get(op)
    found = rule(bound) if rule is not None else None
    types = found if found is not None else probe.infer(op, bound)
    _check_size(op, types)
    return types


def _resolve(arg: Arg, lookup: Lookup, node: Node) -> Any:
    """An argument with references replaced: tensors by their type, symbolic integers by their
    dimension.
    """
    if isinstance(arg, Ref | Const):
        type_ = lookup(arg)
        return type_.value if isinstance(type_, SymIntType) else type_
    if isinstance(arg, tuple):
        return tuple(_resolve(item, lookup, node) for item in arg)
    # 1, 1.0 and True are one key to a dict; the tag keeps them apart in the memo.
    return Literal(arg) if isinstance(arg, bool | float) else arg


class Literal:
    """A bool or float argument whose equality respects its type."""

    __slots__ = ("value",)

    def __init__(self, value: bool | float) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Literal) and repr(self.value) == repr(other.value)

    def __hash__(self) -> int:
        return hash(repr(self.value))


def plain(value: Any) -> Any:
    """A resolved argument with literals unwrapped."""
    if isinstance(value, Literal):
        return value.value
    if isinstance(value, tuple):
        return tuple(plain(item) for item in value)
    return value


def _check_kinds(op: str, bound: dict[str, Any]) -> None:
    for param in get_spec(op).params:
        value = bound[param.name] = plain(bound[param.name])
        for item in value if isinstance(value, tuple) else (value,):
            _check_kind(op, param, item)
        if value is None and not param.is_optional and not param.has_default:
            raise TypeMismatchError(f"{param.name} is missing")


def _check_kind(op: str, param: Param, item: Any) -> None:
    """A reference may turn out to be what its place cannot take; literals were checked when the
    node was made.
    """
    if isinstance(item, TensorType):
        if param.kind != "Tensor":
            raise TypeMismatchError(f"{param.name} takes {param.kind}, not a tensor")
    elif param.kind == "Tensor":
        takes_number = param.name == "other" and op.split(".")[1] in _NUMBER_FOR_TENSOR
        if item is not None and not takes_number:
            raise TypeMismatchError(
                f"{param.name} takes a tensor, not {item}", remedy="make one with aten.full.default"
            )
    elif isinstance(item, Expr) and not param.is_size and param.kind not in ("number", "float"):
        raise TypeMismatchError(f"{param.name} takes a fixed {param.kind}, not a dynamic size")
    elif (
        isinstance(item, int)
        and not isinstance(item, bool)
        and param.kind in ("bool", "str", "ScalarType", "MemoryFormat")
    ):
        raise TypeMismatchError(f"{param.name} takes {param.kind}, not a size")


def _check_size(op: str, types: tuple[ValueType, ...]) -> None:
    for type_ in types:
        if isinstance(type_, TensorType):
            values = _Probe()
            count = DTYPE_BYTES[type_.dtype]
            for dim in type_.shape:
                count *= max(evaluate(dim, values), 0)
            if count > OUTPUT_BYTES_MAX:
                raise LimitError(
                    f"{op} would produce {count / 2**30:.1f} GiB",
                    remedy=f"at most {OUTPUT_BYTES_MAX >> 30} GiB a value",
                )


class _Probe(Mapping[str, int]):
    """Every symbol at 8: large enough to notice a blow-up, small enough not to invent one."""

    def __getitem__(self, name: str) -> int:
        return 8

    def __iter__(self) -> Any:
        return iter(())

    def __len__(self) -> int:
        return 0
