"""How much work a region is at given sizes: a pure function of facts, region and sizes.

Sizes of values are expressions in the graph's symbols; they are evaluated first, so that a node
takes microseconds. Deliberately absent: rewrites (a backend that rewrites is asked about the lowered
region) and time.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

from graphopt.analysis.facts import Facts
from graphopt.analysis.regions import Region
from graphopt.analysis.traits import is_shape_query
from graphopt.costs.op_work import (
    CONVOLUTION,
    COUNTED_BY_TORCH,
    DEPTHWISE,
    ELEMENTWISE,
    EPILOGUE,
    LINEAR,
    MOVING,
    NORMALISATION,
    TRANSCENDENTAL,
    VIEW,
    Kernel,
    class_of,
    kernel_class,
    moves,
    operations,
)
from graphopt.dims import evaluate
from graphopt.graph import Const, Node, Ref
from graphopt.types import CONTIGUOUS, DTYPE_BYTES, SymIntType, TensorType, ValueType

_FUSED_AFTER = frozenset(
    {LINEAR, CONVOLUTION, DEPTHWISE, ELEMENTWISE, EPILOGUE, NORMALISATION, TRANSCENDENTAL}
)
_RESHAPES = frozenset({"view", "reshape", "_unsafe_view", "flatten"})

Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Work:
    """A region's work.

    Attributes:
        key: structure key of the region.
        sizes: of its symbols, in their order.
        kernels: one for each node that runs something, in order.
        footprint_bytes: what one run goes through, weights and values, before it begins anew; a
            step of a plan has that of the plan (`within`), because the other steps push it out of
            the caches.
    """

    key: str
    sizes: tuple[int, ...]
    kernels: tuple[Kernel, ...] = field(repr=False)
    footprint_bytes: int

    @cached_property
    def flops(self) -> int:
        """Floating-point operations as `torch.utils.flop_counter` counts them."""
        return sum(each.ops for each in self.kernels if each.op_class in COUNTED_BY_TORCH)

    @cached_property
    def bytes(self) -> int:
        """Bytes of values read and written by all kernels, weights apart."""
        return sum(each.read_bytes + each.write_bytes for each in self.kernels)

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of constants."""
        return sum(each.weight_bytes for each in self.kernels)

    @cached_property
    def by_class(self) -> Mapping[str, tuple[int, int, int]]:
        """Kernels, operations and bytes (weights included) of each class there is."""
        found: dict[str, tuple[int, int, int]] = {}
        for each in self.kernels:
            count, ops, size = found.get(each.op_class, (0, 0, 0))
            found[each.op_class] = (count + 1, ops + each.ops, size + each.bytes)
        return found

    def within(self, footprint_bytes: int) -> "Work":
        """The same work as part of something that goes through so many bytes."""
        return Work(self.key, self.sizes, self.kernels, footprint_bytes)


def work_of(facts: Facts, region: Region, sizes: Sizes) -> Work:
    """What `region` is to do where the graph's symbols have these sizes.

    Raises KeyError naming a symbol that `sizes` lacks. Microseconds a node.
    """
    counter = _Counter(facts, region, sizes)
    kernels = tuple(counter.kernels())
    boundary = sum(counter.size_of(facts.type_of(ref)) for ref in region.reads)
    footprint = boundary + sum(each.weight_bytes + each.write_bytes for each in kernels)
    return Work(region.key, tuple(sizes[name] for name in region.symbols), kernels, footprint)


class _Counter:
    """One region at one set of sizes."""

    def __init__(self, facts: Facts, region: Region, sizes: Sizes) -> None:
        self._facts, self._graph, self._region, self._sizes = facts, facts.graph, region, sizes
        self._exits = {ref.id for ref in region.exits}
        self._classes: dict[str, str] = {}

    def kernels(self) -> Iterable[Kernel]:
        """The kernels in the order of the region."""
        for id in self._region.order:
            node = self._graph.nodes[id]
            if not is_shape_query(node):
                yield self._kernel(node)

    def size_of(self, type_: ValueType) -> int:
        """Bytes of a value."""
        if isinstance(type_, SymIntType):
            return 0
        return prod(self._shape(type_)) * DTYPE_BYTES[type_.dtype]

    def _kernel(self, node: Node) -> Kernel:
        bound = node.bound()
        shapes = {name: self._shape(t) for name, v in bound.items() if (t := self._type(v))}
        results = [t for t in self._facts.types[node.id] if isinstance(t, TensorType)]
        kind = self._class(node, bound, shapes)
        self._classes[node.id] = kind
        ops = operations(node.op, shapes, [self._shape(t) for t in results], bound)
        written = sum(map(self.size_of, results))
        if kind == VIEW and not moves(node.op):
            return Kernel(kind, 0, 0, 0, 0)
        read = sum(self.size_of(self._facts.type_of(ref)) for ref in dict.fromkeys(node.refs))
        weights = sum(self._weight_bytes(name) for name in dict.fromkeys(node.consts))
        if class_of(node.op) == "lookup":  # of a table, only the rows that are asked for
            read, weights = min(read, written), min(weights, written)
        elif kind in (VIEW, MOVING):
            read = min(read, written)
        return Kernel(kind, ops, read, weights, written)

    def _class(
        self, node: Node, bound: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
    ) -> str:
        kind = kernel_class(class_of(node.op), bound, shapes)
        if kind == ELEMENTWISE and self._follows(node):
            return EPILOGUE
        if kind == VIEW and node.op.split(".")[1] in _RESHAPES and node.refs:
            source = self._facts.type_of(node.refs[0])
            if isinstance(source, TensorType) and source.layout != CONTIGUOUS:
                return MOVING
        return kind

    def _follows(self, node: Node) -> bool:
        """Whether a runtime can compute the node where its operand is made: nobody else reads it."""
        for ref in node.refs:
            is_inner = ref.id in self._classes and ref.id not in self._exits
            if is_inner and self._classes[ref.id] in _FUSED_AFTER:
                users = self._graph.users.get(ref.id, ())
                if len(users) == 1:
                    return True
        return False

    def _type(self, value: Any) -> TensorType | None:
        if isinstance(value, Const):
            return self._graph.get_constant(value.name).type
        if isinstance(value, Ref):
            type_ = self._facts.type_of(value)
            return type_ if isinstance(type_, TensorType) else None
        return None

    def _weight_bytes(self, name: str) -> int:
        return self.size_of(self._graph.get_constant(name).type)

    def _shape(self, type_: TensorType) -> tuple[int, ...]:
        sizes = self._sizes
        return tuple(d if isinstance(d, int) else evaluate(d, sizes) for d in type_.shape)
