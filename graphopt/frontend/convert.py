"""From torch's exported program to graph nodes: values resolved, no-ops removed, dead ops dropped.

Three steps: read the FX graph into `Step`s (folding what changes nothing, undoing what
`run_decompositions` did to dropout and batch norm, inlining wrappers), keep what the outputs need,
and name what is left. Only then are ops checked, so an op that nothing needs cannot refuse an import.

Deliberately absent: optimisation. A rewrite that needs a proof belongs to the passes.
"""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from graphopt.constants import SHORT_DTYPES
from graphopt.errors import DeltaError, ImportRefusedError, UnknownOpError
from graphopt.frontend.names import Place, assign_ids, module_place
from graphopt.frontend.noops import INDEX_END, are_whole, is_noop
from graphopt.graph import Const, Node, Ref
from graphopt.nodes import is_placement, make_node
from graphopt.ops import get_spec

POWER_MAX = 8  # size ** n is written as products up to here; more is no shape anyone computes
_BATCH_NORM = "aten._native_batch_norm_legit_no_training.default"
_SYM_OPS: dict[Any, str] = {
    operator.add: "sym.add",
    operator.sub: "sym.sub",
    operator.mul: "sym.mul",
    operator.floordiv: "sym.floordiv",
    operator.mod: "sym.mod",
    operator.neg: "sym.neg",
    torch.sym_max: "sym.max",
    torch.sym_min: "sym.min",
}


@dataclass(slots=True, eq=False)
class Step:
    """One op on its way to become a node. Arguments hold `Out`, `Const`, tuples and literals."""

    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    path: str
    call: int
    value: Any = None  # torch's traced value
    problem: str = ""  # why it cannot be imported, said only when something needs it
    symbol: str = ""

    @property
    def place(self) -> Place:
        """Where it ran, for naming."""
        is_shape = self.op.startswith("sym.") or self.op == "aten.sym_size.int"
        return Place(self.path, self.call, self.op, is_shape, self.symbol)

    @property
    def where(self) -> str:
        """Op and module path, for errors."""
        path = f"{self.path}@{self.call}" if self.call else self.path
        return f"{self.op} in {path or 'the root module'}"


@dataclass(frozen=True, slots=True)
class Out:
    """Output `idx` of a step."""

    step: Step
    idx: int = 0


class Reader:
    """Reads FX graphs into steps. `symbols` gives plain symbols their names."""

    def __init__(self, symbols: Mapping[sympy.Symbol, str]) -> None:
        self.symbols = symbols
        self.steps: list[Step] = []

    def read(self, graph: fx.Graph, values: dict[fx.Node, Any]) -> Any:
        """The resolved outputs of `graph`; `values` holds its placeholders and is filled."""
        for node in graph.nodes:
            if node.op == "output":
                return self._resolve(node.args[0], values)
            if node.op == "get_attr":
                values[node] = getattr_path(graph.owning_module, str(node.target))
            elif node.op == "call_function":
                values[node] = self._call(node, values)
        return ()

    def _call(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        traced = node.meta.get("val")
        if isinstance(traced, int):  # a size that turned out static
            return traced
        args = self._resolve(node.args, values)
        kwargs = {name: self._resolve(value, values) for name, value in node.kwargs.items()}
        if node.target is operator.getitem:
            return args[0][args[1]]
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return self._wrapper(node, args, kwargs)
        if node.target in _SYM_OPS:
            return self._emit(node, _SYM_OPS[node.target], args, kwargs)
        if node.target is operator.pow and isinstance(args[1], int) and 0 < args[1] <= POWER_MAX:
            return self._chain(node, "sym.mul", [args[0]] * args[1])
        if node.target is torch.sym_sum:
            return self._chain(node, "sym.add", list(args[0]))
        if not isinstance(node.target, torch._ops.OpOverload):
            name = getattr(node.target, "__name__", str(node.target))
            problem = f"{name} is not arithmetic on whole sizes"
            return self._emit(node, f"sym.{name}", args, kwargs, problem)
        return self._aten(node, str(node.target), args, kwargs)

    def _aten(self, node: fx.Node, op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if is_noop(node, op):
            return args[0]
        if op == _BATCH_NORM:
            image, weight, bias, mean, var, momentum, eps = args
            args = (image, weight, bias, mean, var, False, momentum, eps, True)
            return (self._emit(node, "aten.batch_norm.default", args, {}),)
        if op == "aten.index.Tensor" and are_whole(node.args[1]):
            # With whole-number indices the result's shape is known; this overload takes no others.
            op = "aten._unsafe_index.Tensor"
        if op == "aten.slice.Tensor" and len(args) > 3 and args[3] == INDEX_END:
            args = (*args[:3], None, *args[4:])
        traced = node.meta.get("val")
        is_size = isinstance(traced, torch.SymInt) and op == "aten.sym_size.int"
        is_value = isinstance(traced, torch.Tensor | list | tuple) or traced is None or is_size
        problem = "" if is_value else f"it gives a {type(traced).__name__} and not a tensor"
        return self._emit(node, op, args, kwargs, problem)

    def _emit(
        self, node: fx.Node, op: str, args: Sequence[Any], kwargs: dict[str, Any], problem: str = ""
    ) -> Any:
        stack = [(key, value[0]) for key, value in (node.meta.get("nn_module_stack") or {}).items()]
        path, call = module_place(stack)
        traced = node.meta.get("val")
        symbol = ""
        if op == "aten.sym_size.int" and isinstance(traced, torch.SymInt):
            symbol = self.symbols.get(traced.node.expr, "")
        if free_unbacked_symbols(traced):
            problem = problem or "its output shape or value depends on tensor contents"
        step = Step(op, tuple(args), kwargs, path, call, traced, problem, symbol)
        self.steps.append(step)
        if isinstance(traced, list | tuple) and op != "aten.batch_norm.default":
            return tuple(Out(step, idx) for idx in range(len(traced)))
        return Out(step)

    def _chain(self, node: fx.Node, op: str, items: list[Any]) -> Any:
        total = items[0]
        for item in items[1:]:
            total = self._emit(node, op, (total, item), {})
        return total

    def _wrapper(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A higher-order op that only wraps a subgraph is replaced by the subgraph."""
        name = str(node.target)
        if name == "wrap_with_set_grad_enabled" and isinstance(args[1], fx.GraphModule):
            return self._inline(args[1], args[2:])
        if name == "wrap_with_autocast" and args[2] is False:
            return self._inline(args[4], args[5:])
        problem = f"the higher-order op {name} cannot be imported"
        return self._emit(node, f"higher_order.{name}.default", (), {}, problem)

    def _inline(self, module: fx.GraphModule, args: Sequence[Any]) -> Any:
        holders = [node for node in module.graph.nodes if node.op == "placeholder"]
        return self.read(module.graph, dict(zip(holders, args, strict=True)))

    def _resolve(self, arg: Any, values: Mapping[fx.Node, Any]) -> Any:
        if isinstance(arg, fx.Node):
            return values[arg]
        if isinstance(arg, list | tuple):
            return tuple(self._resolve(item, values) for item in arg)
        return arg


def getattr_path(module: Any, path: str) -> Any:
    """The attribute at a dotted path."""
    for part in path.split("."):
        module = getattr(module, part)
    return module


def live_steps(steps: Iterable[Step], outputs: Iterable[Any]) -> list[Step]:
    """The steps that the outputs need, in execution order."""
    steps = list(steps)
    needed: set[Step] = set()
    _each_out(tuple(outputs), needed.add)
    for step in reversed(steps):
        if step in needed:
            _each_out((step.args, tuple(step.kwargs.values())), needed.add)
    return [step for step in steps if step in needed]


def used_constants(steps: Iterable[Step]) -> set[str]:
    """The names of the constants that the steps read."""
    names: set[str] = set()

    def collect(value: Any) -> None:
        if isinstance(value, Const):
            names.add(value.name)
        elif isinstance(value, tuple):
            for item in value:
                collect(item)

    for step in steps:
        collect((step.args, tuple(step.kwargs.values())))
    return names


def make_nodes(steps: Sequence[Step], taken: Iterable[str]) -> tuple[list[Node], dict[Step, str]]:
    """The nodes of the live steps and each step's id. ImportRefusedError names op and module path."""
    ids = dict(zip(steps, assign_ids([step.place for step in steps], taken), strict=True))
    nodes = []
    for step in steps:
        if step.problem:
            raise ImportRefusedError(
                step.problem,
                where=step.where,
                remedy="compute it from shapes, or leave this part out of the imported module",
            )
        nodes.append(_node(step, ids))
    return nodes, ids


def _node(step: Step, ids: Mapping[Step, str]) -> Node:
    try:
        params = get_spec(step.op).params
        kwargs = {name: _final(value, ids) for name, value in step.kwargs.items()}
        args = [_final(value, ids) for value in step.args]
        for param, position in zip(params, range(len(args)), strict=False):
            if is_placement(param):
                args[position] = None
        for param in params:
            if is_placement(param):
                kwargs.pop(param.name, None)
        return make_node(ids[step], step.op, args, kwargs)
    except (DeltaError, ValueError) as error:
        message = error.message if isinstance(error, DeltaError) else str(error)
        remedy = (
            "replace it in the module by a functional op of torch's registry"
            if isinstance(error, UnknownOpError)
            else "leave this part out of the imported module"
        )
        raise ImportRefusedError(message, where=step.where, remedy=remedy) from error


def _final(value: Any, ids: Mapping[Step, str]) -> Any:
    if isinstance(value, Out):
        return Ref(ids[value.step], value.idx)
    if isinstance(value, tuple):
        return tuple(_final(item, ids) for item in value)
    if isinstance(value, torch.dtype):
        if value not in SHORT_DTYPES:
            raise ValueError(f"dtype {value} cannot be held")
        return SHORT_DTYPES[value]
    if isinstance(value, torch.memory_format):
        return str(value).removeprefix("torch.")
    if isinstance(value, torch.device | torch.layout):
        return None  # placement; make_node checks that the parameter is one
    if value is None or isinstance(value, bool | int | float | str | Ref | Const):
        return value
    raise ValueError(f"an argument of type {type(value).__name__} cannot be held")


def _each_out(value: Any, visit: Callable[[Step], None]) -> None:
    if isinstance(value, Out):
        visit(value.step)
    elif isinstance(value, tuple):
        for item in value:
            _each_out(item, visit)
