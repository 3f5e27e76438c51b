"""One way to write every node: arguments bound to the op's schema and brought into canonical form.

Two nodes that mean the same have the same `args` and `kwargs`, so they hash and compare equal
whoever wrote them: positional parameters stand in schema order with trailing defaults left out,
keyword-only ones are sorted by name with defaults left out, and literals have the type the schema
names. Where a value lives is not part of a node: device, layout and pinning arguments are left out.

Deliberately absent: operand types, which `graphopt.analysis` checks.
"""

from collections.abc import Mapping, Sequence

from graphopt.errors import TypeMismatchError, UnknownOpError, nearest
from graphopt.graph import Arg, Node
from graphopt.ops import OpSpec, Param, canonical_literal, get_spec, same_literal


def make_node(
    id: str, op: str, args: Sequence[Arg] = (), kwargs: Mapping[str, Arg] | None = None
) -> Node:
    """The node `id` that applies `op` to `args` and `kwargs`, in canonical form.

    Positional parameters may be given by name. References pass through unchecked.

    Raises:
        UnknownOpError: torch has no such op, or a graph may not hold it.
        TypeMismatchError: wrong arity, an unknown or doubled keyword, or a literal of the wrong
            kind; names node, parameter and remedy.
    """
    spec = get_spec(op)
    given = _bind(id, spec, args, dict(kwargs or {}))
    values = {name: _literal(id, spec, _param(spec, name), value) for name, value in given.items()}
    positional: list[Arg] = []
    keywords: list[tuple[str, Arg]] = []
    last = -1
    for param in spec.params:
        is_default = param.name not in values or (
            param.has_default and same_literal(values[param.name], param.default)
        )
        if param.is_keyword:
            if not is_default:
                keywords.append((param.name, values[param.name]))
            continue
        positional.append(values.get(param.name, param.default))
        if not is_default or not param.has_default:
            last = len(positional)
    node = Node(id, op, tuple(positional[: max(last, 0)]), tuple(sorted(keywords)))
    reason = spec.why_random(node.bound())
    if reason:
        raise UnknownOpError(reason, where=id, remedy="set that argument")
    return node


def is_placement(param: Param) -> bool:
    """Whether the parameter says where a tensor lives, which is the engine's business."""
    return param.kind in ("Device", "Layout") or param.name in ("pin_memory", "non_blocking")


def _bind(id: str, spec: OpSpec, args: Sequence[Arg], kwargs: dict[str, Arg]) -> dict[str, Arg]:
    positional = [param for param in spec.params if not param.is_keyword]
    if len(args) > len(positional):
        raise TypeMismatchError(
            f"{spec.name} takes {len(positional)} positional arguments, not {len(args)}",
            where=id,
            remedy=f"its parameters are {signature_text(spec)}",
        )
    given = {param.name: value for param, value in zip(positional, args, strict=False)}
    for name, value in kwargs.items():
        if spec.param_idx(name) is None:
            known = [param.name for param in spec.params]
            raise TypeMismatchError(
                f"{spec.name} has no parameter {name!r}",
                where=f"{id}.{name}",
                remedy=nearest(name, known) or f"its parameters are {signature_text(spec)}",
            )
        if name in given:
            raise TypeMismatchError(
                f"{name} is given twice", where=f"{id}.{name}", remedy="leave the keyword out"
            )
        given[name] = value
    missing = [p.name for p in spec.params if not p.has_default and p.name not in given]
    if missing:
        raise TypeMismatchError(
            f"{spec.name} needs {', '.join(missing)}",
            where=f"{id}.{missing[0]}",
            remedy=f"its parameters are {signature_text(spec)}",
        )
    return given


def _literal(id: str, spec: OpSpec, param: Param, value: Arg) -> Arg:
    if is_placement(param):
        if value in (None, False, "strided"):
            return param.default
        raise TypeMismatchError(
            f"{param.name} of {spec.name} may not be set: the engine places values",
            where=f"{id}.{param.name}",
            remedy="leave it out",
        )
    try:
        return canonical_literal(param, value)
    except ValueError as error:
        raise TypeMismatchError(
            f"{spec.name}: {error}",
            where=f"{id}.{param.name}",
            remedy=f"its parameters are {signature_text(spec)}",
        ) from error


def _param(spec: OpSpec, name: str) -> Param:
    return next(param for param in spec.params if param.name == name)


def signature_text(spec: OpSpec) -> str:
    """The parameters as people write them: `self: Tensor, dim: int = 0`."""
    parts = []
    for param in spec.params:
        if is_placement(param):
            continue
        kind = f"[{param.kind}]" if param.is_list else param.kind
        default = f" = {param.default}" if param.has_default else ""
        parts.append(f"{param.name}: {kind}{default}")
    return ", ".join(parts)
