"""The smallest possible executor: what a graph means, node by node, with torch's own kernels."""

import operator
from collections.abc import Mapping
from typing import Any

import torch

from graphopt.constants import TORCH_DTYPES
from graphopt.graph import Const, Graph, Node, Ref
from graphopt.ops import SYM_OPS, get_overload

_SYM = {
    "sym.add": operator.add,
    "sym.sub": operator.sub,
    "sym.mul": operator.mul,
    "sym.neg": operator.neg,
    "sym.floordiv": operator.floordiv,
    "sym.mod": operator.mod,
    "sym.max": max,
    "sym.min": min,
}
assert _SYM.keys() == SYM_OPS.keys()
# In a graph a view is a reshape: values are never written to, so sharing memory means nothing.
_VIEWS = dict.fromkeys(
    ("aten.view.default", "aten._unsafe_view.default"), torch.ops.aten.reshape.default
)


def run(graph: Graph, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The outputs of `graph` by name."""
    assert set(inputs) == {name for name, _ in graph.inputs}
    values: dict[str, Any] = {name: (tensor,) for name, tensor in inputs.items()}
    with torch.no_grad():
        for node in graph.iter_nodes():
            values[node.id] = _run(graph, node, values)
    return {name: values[ref.id][ref.idx] for name, ref in graph.outputs}


def _run(graph: Graph, node: Node, values: Mapping[str, Any]) -> tuple[Any, ...]:
    def final(arg: Any, kind: str = "") -> Any:
        if isinstance(arg, Ref):
            return values[arg.id][arg.idx]
        if isinstance(arg, Const):
            return graph.get_constant(arg.name).tensor
        if isinstance(arg, tuple):
            return [final(item, kind) for item in arg]
        if kind == "ScalarType" and arg is not None:
            return TORCH_DTYPES[arg]
        if kind == "MemoryFormat" and arg is not None:
            return getattr(torch, arg)
        return arg

    positional = [p for p in node.spec.params if not p.is_keyword]
    kinds = {p.name: p.kind for p in node.spec.params}
    args = [final(arg, p.kind) for arg, p in zip(node.args, positional, strict=False)]
    kwargs = {name: final(arg, kinds[name]) for name, arg in node.kwargs}
    function = _SYM.get(node.op) or _VIEWS.get(node.op) or get_overload(node.op)
    result = function(*args, **kwargs)
    return tuple(result) if isinstance(result, list | tuple) else (result,)
