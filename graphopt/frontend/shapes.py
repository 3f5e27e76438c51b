"""Dynamic dims after export: readable symbols, their ranges, and sizes as dimensions.

Deliberately absent: solving relations between dims (torch does, and refuses what does not hold).
"""

from collections.abc import Mapping
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils._sympy.numbers import int_oo

from graphopt import dims
from graphopt.frontend.examples import TRACED_SIZE_MIN, Call, axes_of
from graphopt.frontend.names import unique_name
from graphopt.graph import Symbol


def dim_names(program: ExportedProgram, call: Call | None) -> dict[sympy.Symbol, str]:
    """A readable name for each symbol: the caller's where there is one, else by position.

    Without a name, dim 0 is `batch` and dim 1 of an integer matrix `seq`; any other is called after
    its input.
    """
    names: dict[sympy.Symbol, str] = {}
    asked = _asked_names(call)
    for position, (input_name, value) in enumerate(input_values(program)):
        if not isinstance(value, torch.Tensor):
            continue
        for axis, size in enumerate(value.shape):
            expr = getattr(getattr(size, "node", None), "expr", None)
            if not isinstance(expr, sympy.Symbol) or expr in names:
                continue
            wanted = asked.get((position, axis)) or _default_name(input_name, value, axis)
            names[expr] = unique_name(wanted, set(names.values()))
    return names


def symbols(
    program: ExportedProgram, names: Mapping[sympy.Symbol, str], call: Call | None
) -> tuple[Symbol, ...]:
    """The graph's symbols with the ranges that torch found."""
    explicit = _explicit_minima(call)
    found = []
    for symbol, name in names.items():
        bounds = program.range_constraints.get(symbol)
        low = int(bounds.lower) if bounds is not None else 1
        if low <= TRACED_SIZE_MIN and explicit.get(name, 0) < TRACED_SIZE_MIN:
            low = 1
        is_bounded = bounds is not None and bounds.upper not in (int_oo, sympy.oo)
        found.append(Symbol(name, low, int(bounds.upper) if is_bounded else None))
    return tuple(found)


def to_dim(expr: Any, names: Mapping[sympy.Symbol, str]) -> dims.Dim:
    """A traced size (int, SymInt or sympy) as a dimension of the inputs' symbols.

    ValueError when it is not a polynomial of them.
    """
    if isinstance(expr, int):
        return expr
    if isinstance(expr, torch.SymInt):
        return to_dim(expr.node.expr, names)
    if isinstance(expr, sympy.Integer):
        return int(expr)
    if isinstance(expr, sympy.Symbol) and expr in names:
        return dims.symbol(names[expr])
    if isinstance(expr, sympy.Add):
        total: dims.Dim = 0
        for part in expr.args:
            total = total + to_dim(part, names)
        return total
    if isinstance(expr, sympy.Mul):
        return dims.product(to_dim(part, names) for part in expr.args)
    raise ValueError(f"{expr} is not a polynomial of the inputs' dims")


def input_values(program: ExportedProgram) -> list[tuple[str, Any]]:
    """Torch's name and traced value of each user input, in order; constants included."""
    values = {n.name: n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"}
    return [(name, values.get(name)) for name in _user_inputs(program)]


def _user_inputs(program: ExportedProgram) -> list[str]:
    specs = program.graph_signature.input_specs
    return [spec.arg.name for spec in specs if spec.kind == InputKind.USER_INPUT]


def _default_name(input_name: str, value: torch.Tensor, axis: int) -> str:
    if axis == 0:
        return "batch"
    if axis == 1 and value.ndim == 2 and not value.is_floating_point():
        return "seq"
    return f"{input_name}_{axis}"


def _asked_names(call: Call | None) -> dict[tuple[int, int], str]:
    """(position of the flat input, axis) -> the name the caller gave."""
    asked: dict[tuple[int, int], str] = {}
    for position, shapes in enumerate(call.leaf_shapes() if call else ()):
        for axis, dim in axes_of(shapes):
            if isinstance(dim, Dim):
                asked[position, axis] = dim.__name__
    return asked


def _explicit_minima(call: Call | None) -> dict[str, int]:
    return {dim.__name__: int(dim.min) for dim in (call.dims() if call else ())}
