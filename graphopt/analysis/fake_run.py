"""What torch itself says about every value: the whole graph run on fake tensors of given sizes.

A fake tensor has dtype, sizes and strides and no data; torch's own kernels and meta registrations
compute them. Strides flow from node to node as they would in a run, so layouts can be compared too.
Milliseconds a node: for the verify mode, never for the live path.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from graphopt.analysis.probe import torch_literal
from graphopt.constants import SHORT_DTYPES, TORCH_DTYPES, layout_of
from graphopt.dims import evaluate
from graphopt.graph import Arg, Const, Graph, Node, Ref
from graphopt.ops import SYM_OPS, Param, get_overload
from graphopt.types import STRIDED, SymIntType, TensorType, ValueType

_AS_RESHAPE = (
    "aten.view.default",
    "aten._unsafe_view.default",
)  # what `view` means in a graph: graphopt.analysis.rules


class FakeRunError(Exception):
    """An op refused its operands; `id` is the node."""

    def __init__(self, id: str, reason: str) -> None:
        super().__init__(f"{id}: {reason}")
        self.id = id
        self.reason = reason


def run_fake(graph: Graph, sizes: Mapping[str, int]) -> dict[str, tuple[Any, ...]]:
    """The outputs of every node as fake tensors and ints, each symbol at its size. Raises
    FakeRunError where torch refuses.
    """
    with FakeTensorMode(), torch.no_grad():
        values: dict[str, tuple[Any, ...]] = {}
        for name, type_ in graph.inputs:
            values[name] = (fake_tensor(type_, sizes),)
        constants = {
            name: fake_tensor(constant.type, {}) for name, constant in graph.constants.items()
        }
        constants |= {alias: constants[name] for alias, name in graph.aliases.items()}
        for node in graph.iter_nodes():
            values[node.id] = _run(node, values, constants)
    return values


def fault_of(type_: ValueType, value: Any, sizes: Mapping[str, int]) -> str:
    """Why `value` is not of `type_` at these sizes; empty when it is."""
    if isinstance(type_, SymIntType):
        expected = evaluate(type_.value, sizes)
        return "" if value == expected else f"{type_} is {expected}, torch says {value}"
    if not isinstance(value, torch.Tensor):
        return f"{type_} is a tensor, torch says {value}"
    shape = tuple(evaluate(dim, sizes) for dim in type_.shape)
    is_same = shape == tuple(value.shape) and type_.dtype == SHORT_DTYPES.get(value.dtype)
    if not is_same:
        return f"{type_} is {type_.dtype}{list(shape)}, torch says {value.dtype}{list(value.shape)}"
    if type_.layout != STRIDED and not _fits(value, type_.layout):
        return (
            f"{type_} is laid out otherwise by torch: strides {value.stride()}, {layout_of(value)}"
        )
    return ""


def fake_tensor(type_: TensorType, sizes: Mapping[str, int], device: str = "cpu") -> torch.Tensor:
    """An empty tensor of the type, laid out as it says; a strided one gets gaps between its rows."""
    shape = [evaluate(dim, sizes) for dim in type_.shape]
    dtype = TORCH_DTYPES[type_.dtype]
    if type_.layout == STRIDED and shape:
        return torch.empty([*shape[:-1], 2 * shape[-1]], dtype=dtype, device=device)[..., ::2]
    if isinstance(type_.layout, str):
        return torch.empty(shape, dtype=dtype, device=device)
    inner = torch.empty([shape[d] for d in type_.layout], dtype=dtype, device=device)
    return inner.permute([type_.layout.index(d) for d in range(len(shape))])


def _fits(value: torch.Tensor, layout: str | tuple[int, ...]) -> bool:
    """Whether the memory order is `layout`; dims of size 1 lie anywhere."""
    if value.numel() == 0:
        return True
    return (
        value.is_contiguous() if isinstance(layout, str) else value.permute(layout).is_contiguous()
    )


def _run(
    node: Node, values: Mapping[str, tuple[Any, ...]], constants: Mapping[str, torch.Tensor]
) -> tuple[Any, ...]:
    def final(param: Param, arg: Arg) -> Any:
        if isinstance(arg, Ref):
            return values[arg.id][arg.idx]
        if isinstance(arg, Const):
            return constants[arg.name]
        if isinstance(arg, tuple):
            return [final(param, item) for item in arg]
        return torch_literal(param, arg)

    positional = [param for param in node.spec.params if not param.is_keyword]
    args = [final(param, arg) for param, arg in zip(positional, node.args, strict=False)]
    params = {param.name: param for param in node.spec.params}
    kwargs = {name: final(params[name], arg) for name, arg in node.kwargs}
    if node.op in SYM_OPS:
        return (SYM_OPS[node.op](*args),)
    op = torch.reshape if node.op in _AS_RESHAPE else get_overload(node.op)
    try:
        out = op(*args, **kwargs)
    except (
        Exception
    ) as error:  # meta kernels written in Python assert, index and divide as they like
        raise FakeRunError(node.id, str(error).split("\n")[0] or type(error).__name__) from None
    return tuple(out) if isinstance(out, tuple | list) else (out,)
