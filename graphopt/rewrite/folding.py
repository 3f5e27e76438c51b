"""Constant folding: what constants and literals alone decide is computed once, when the graph is.

Position and rotary tables, masks of fixed sizes, transposed or scaled weights: exporters leave the
sums in the graph, and every request would do them again. Each such node is one torch call here; what
else reads it reads a constant instead.

The law: the same elements, computed by the same op. A result is bounded (`RESULT_BYTES_MAX`,
`GROWTH_MAX`), for a constant is memory that stays; nothing above the bounds is computed to find out.
What depends on a dynamic size is left alone. Deliberately absent: folding across what inputs reach
(other passes know those identities), and values that a region hands out.
"""

from dataclasses import dataclass
from typing import Any

import torch

from graphopt.analysis.facts import Facts
from graphopt.analysis.probe import torch_literal
from graphopt.analysis.regions import Region
from graphopt.constants import SHORT_DTYPES, constant_of
from graphopt.delta import PutConstant
from graphopt.dims import product
from graphopt.graph import Arg, Const, Constant, Node, Ref
from graphopt.ops import Param, get_overload
from graphopt.rewrite.rewrite import Rewrite, Sketch
from graphopt.rewrite.settling import Change, Settled, settle
from graphopt.types import DTYPE_BYTES, SymIntType, TensorType, ValueType

RESULT_BYTES_MAX = 16 << 20  # as much as a 2048 x 2048 weight in f32
GROWTH_MAX = 2  # times the bytes of the operands: a broadcast is cheaper to repeat than to read
GROWTH_FREE_BYTES = 256 << 10  # below, growth is no matter: a mask of 512 x 512 flags
_AS_RESHAPE = frozenset({"aten.view.default", "aten._unsafe_view.default"})


@dataclass(frozen=True, slots=True)
class Folded:
    """The outputs of a node that constants alone decide."""

    outputs: tuple[torch.Tensor, ...]
    is_param: bool  # a learned parameter is among what it is computed from


def fold_constants(facts: Facts, region: Region) -> Rewrite:
    """The pass: nodes that constants alone decide become constants."""
    sketch = Sketch(facts.graph)
    folding = Folding(facts, region)
    for id in region.order:
        folding.visit(facts.graph.nodes[id])
    chosen = folding.worth_keeping({ref.id for ref in region.exits})
    changes: dict[str, dict[Ref, Const]] = {}
    made: dict[str, tuple[torch.Tensor, bool]] = {}
    for id, folded in chosen.items():
        changes[id] = {}
        for idx, tensor in enumerate(folded.outputs):
            name = sketch.name(id, f"folded{idx or ''}")
            changes[id][Ref(id, idx)] = Const(name)
            made[name] = tensor, folded.is_param

    def propose(node: Node, _: Settled) -> Change | None:
        return changes.get(node.id)

    types = {name: _contiguous(tensor) for name, (tensor, _) in made.items()}
    settled, barred = settle(facts, region, propose, types)
    for name in dict.fromkeys(name for node in settled.needed().values() for name in node.consts):
        if name in made:
            tensor, is_param = made[name]
            constant = constant_of(folding.alone(tensor), is_param=is_param)
            sketch.edit(PutConstant(name, constant, is_param))
    settled.write(sketch)
    for id, reason in {**folding.declined, **barred}.items():
        sketch.decline(id, reason)
    return sketch.rewrite()


class Folding:
    """What is known of the values of a region, node by node, operands first."""

    def __init__(self, facts: Facts, region: Region) -> None:
        self.facts = facts
        self.known: dict[str, Folded] = {}
        self.declined: dict[str, str] = {}
        tensors = (self._constant(name).tensor for name in region.consts)
        self._kept = {tensor.untyped_storage().data_ptr() for tensor in tensors}

    def visit(self, node: Node) -> None:
        """Computes the node where constants and literals alone decide it."""
        dynamic = False
        for ref in node.refs:
            type_ = self.facts.type_of(ref)
            if isinstance(type_, SymIntType):
                dynamic |= not isinstance(type_.value, int)
            elif ref.id not in self.known:
                return
        reason = "its size is dynamic" if dynamic else self._why_not(node)
        if not reason:
            reason = self._compute(node)
        if reason:
            self.declined[node.id] = reason

    def worth_keeping(self, exits: set[str]) -> dict[str, Folded]:
        """The nodes known that are to become constants. What is not may still be an operand."""
        chosen = {}
        for id, folded in self.known.items():
            if id in exits:
                self.declined[id] = "its value is handed out"
            elif any(map(self._is_free, folded.outputs)):
                self.declined[id] = "it is a view of a constant, and a constant would be a copy"
            else:
                chosen[id] = folded
        return chosen

    def alone(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor without the memory around it, unless that is a constant's anyhow."""
        storage = tensor.untyped_storage()
        is_part = storage.nbytes() > tensor.nbytes and storage.data_ptr() not in self._kept
        return tensor.clone(memory_format=torch.contiguous_format) if is_part else tensor

    def _is_free(self, tensor: torch.Tensor) -> bool:
        """Whether it takes no time to compute, and memory to keep: `t` of a large weight."""
        is_view = tensor.untyped_storage().data_ptr() in self._kept
        return is_view and not tensor.is_contiguous() and tensor.nbytes > GROWTH_FREE_BYTES

    def _why_not(self, node: Node) -> str:
        """Why the result would be too much to keep; empty when it would not."""
        size = 0
        for type_ in self.facts.types[node.id]:
            count = product(type_.shape) if isinstance(type_, TensorType) else None
            if not isinstance(type_, TensorType) or not isinstance(count, int):
                return "its size is dynamic"
            size += count * DTYPE_BYTES[type_.dtype]
        if size > RESULT_BYTES_MAX:
            return f"its {size} bytes are more than {RESULT_BYTES_MAX}"
        operands = {id(tensor): tensor.nbytes for tensor in self._tensors(node)}
        given = sum(operands.values())
        if operands and size > max(GROWTH_MAX * given, GROWTH_FREE_BYTES):
            return f"its {size} bytes are more than {GROWTH_MAX} times its operands' {given}"
        return ""

    def _tensors(self, node: Node) -> list[torch.Tensor]:
        """The tensors a node reads."""
        found = [self._constant(name).tensor for name in node.consts]
        known = [ref for ref in node.refs if ref.id in self.known]
        return found + [self.known[ref.id].outputs[ref.idx] for ref in known]

    def _constant(self, name: str) -> Constant:
        return self.facts.graph.get_constant(name)

    def _compute(self, node: Node) -> str:
        """One torch call; says why there is no result, or nothing when there is."""
        params = {param.name: param for param in node.spec.params}
        positional = [param for param in node.spec.params if not param.is_keyword]
        pairs = zip(positional, node.args, strict=False)
        args = [self._argument(param, arg) for param, arg in pairs]
        kwargs = {name: self._argument(params[name], arg) for name, arg in node.kwargs}
        op: Any = torch.reshape if node.op in _AS_RESHAPE else get_overload(node.op)
        try:
            with torch.no_grad():
                result = op(*args, **kwargs)
        except Exception as error:  # kernels raise what they like: an index out of range, a dtype
            return (
                f"torch does not compute it: {str(error).splitlines()[0] or type(error).__name__}"
            )
        outputs = tuple(result) if isinstance(result, tuple | list) else (result,)
        types = self.facts.types[node.id]
        if len(outputs) != len(types) or not all(map(_fits, outputs, types)):
            return "torch makes something else of it than its type says"
        is_param = any(self._constant(name).is_param for name in node.consts)
        is_param |= any(self.known[ref.id].is_param for ref in node.refs if ref.id in self.known)
        self.known[node.id] = Folded(outputs, is_param)
        return ""

    def _argument(self, param: Param, arg: Arg) -> Any:
        if isinstance(arg, Ref):
            type_ = self.facts.type_of(arg)
            if isinstance(type_, SymIntType):
                return type_.value
            return self.known[arg.id].outputs[arg.idx]
        if isinstance(arg, Const):
            return self._constant(arg.name).tensor
        if isinstance(arg, tuple):
            return [self._argument(param, item) for item in arg]
        return torch_literal(param, arg)


def _contiguous(tensor: torch.Tensor) -> TensorType:
    """The type of the constant that will hold `tensor`."""
    return TensorType(SHORT_DTYPES[tensor.dtype], tuple(tensor.shape))


def _fits(value: object, type_: ValueType) -> bool:
    """Whether a result is what its type says, its layout aside."""
    if not isinstance(value, torch.Tensor) or not isinstance(type_, TensorType):
        return False
    same = (SHORT_DTYPES.get(value.dtype), tuple(value.shape)) == (type_.dtype, type_.shape)
    return same and value.layout == torch.strided
