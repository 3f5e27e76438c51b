"""A region of ATen ops written as calls on a target: the walk, sizes, and what is known already.

With fixed sizes everything that reads nothing is computed here, by torch itself: masks, positions,
ranges. An attention mask that masks nothing then disappears. With dynamic sizes dims are derived
from the shapes of the reads; a symbol that no read has as a dim becomes an input.

What no rule writes goes to the runtime's own converter, if it has one, node by node.

`why_not` makes the same walk on a target that emits nothing, so what it lets through is what
`translate` can write.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from graphopt.analysis.facts import Facts
from graphopt.analysis.probe import torch_literal
from graphopt.analysis.regions import Region
from graphopt.constants import TORCH_DTYPES
from graphopt.dims import Dim, Expr, bounds, substitute
from graphopt.executor.backends import rules_math, rules_nn, rules_shape
from graphopt.executor.backends.conversion import op_call
from graphopt.executor.backends.patterns import Pattern, find_patterns
from graphopt.executor.backends.rule_table import MANY_RULES, RULES
from graphopt.executor.backends.tape import Tape
from graphopt.executor.backends.target import (
    Capabilities,
    DeclinedError,
    InexactError,
    Rehearsal,
    Target,
    Value,
)
from graphopt.executor.kernels import kernel_of
from graphopt.graph import Arg, Const, Node, Ref
from graphopt.types import SymIntType, TensorType

__all__ = ["Guard", "Written", "rules_math", "rules_nn", "rules_shape", "translate", "why_not"]

KNOWN_BYTES_MAX = 16 << 20  # of a value computed here: a mask of 2048 x 2048
# Of one that is made of weights: more would copy weights into the artifact.
KNOWN_OF_WEIGHTS_BYTES_MAX = 1 << 20
# The operand that indexes, and the table and its dim: values outside are errors in torch.
_LOOKUPS = {
    "aten.embedding.default": ("indices", "weight", None),
    "aten.index_select.default": ("index", "self", "dim"),
    "aten.gather.default": ("index", "self", "dim"),
}


@dataclass(frozen=True, slots=True)
class Guard:
    """Bounds that the integers of read `read` must keep, as torch would check them: inclusive."""

    read: int
    low: int
    high: int


@dataclass(frozen=True, slots=True)
class Written:
    """A region on a target: the handles of its exits, and what a call has to know.

    `echoes` maps exits that are reads as they came to those reads: the target has no part in them
    (OpenVINO computes nonsense where an input is an output). `scalars` are the positions in
    `Region.symbols` of those that are inputs, after the reads.
    """

    exits: tuple[Any, ...]  # those that are no echoes, in order
    echoes: tuple[tuple[int, int], ...]
    scalars: tuple[int, ...]
    guards: tuple[Guard, ...]
    converted: tuple[str, ...]  # ops that the runtime's own converter wrote, one for each node


def translate(
    facts: Facts,
    region: Region,
    target: Target,
    capabilities: Capabilities,
    sizes: Sequence[int] | None,
) -> Written:
    """Writes `region` on `target`; `sizes` are those of `Options`.

    Raises DeclinedError naming the node, for what `why_not` would have named.
    """
    walk = _Walk(facts, region, target, capabilities, sizes)
    for id in region.order:
        if id not in walk.absorbed:
            try:
                walk.run(id)
            except DeclinedError as declined:
                raise DeclinedError(f"{id}: {declined}") from declined
    echoes = walk.echoes()
    exits = tuple(
        walk.tape.handle(walk.value(ref)) for i, ref in enumerate(region.exits) if i not in echoes
    )
    if not exits:
        raise DeclinedError("it computes nothing: every exit is a read")
    return Written(
        exits, tuple(echoes.items()), tuple(walk.scalars), tuple(walk.guards), tuple(walk.converted)
    )


def why_not(
    facts: Facts, region: Region, capabilities: Capabilities, *, converts: bool = True
) -> dict[str, str]:
    """The nodes that cannot be written, each with the reason. Reads types and arguments only.

    With `converts`, a node that no rule writes is shown to the runtime's own converter, if it has one:
    some 50 to 500 ms for each kind of call, once.
    """
    walk = _Walk(facts, region, Rehearsal(capabilities), capabilities, None)
    walk.converter = capabilities.converter if converts else None
    reasons: dict[str, str] = {}
    for id in region.order:
        if id in walk.absorbed:
            continue
        try:
            walk.run(id)
        except DeclinedError as declined:
            reasons[id] = str(declined)
            walk.assume(id)
    return reasons


class _Walk:
    """One pass over the nodes of a region, operands first."""

    def __init__(
        self,
        facts: Facts,
        region: Region,
        target: Target,
        capabilities: Capabilities,
        sizes: Sequence[int] | None,
    ) -> None:
        self.facts, self.region, self.target = facts, region, target
        self.names: Mapping[str, int] = dict(zip(region.symbols, sizes or (), strict=False))
        self.is_fixed = sizes is not None or not region.symbols
        self.may_compute = self.is_fixed and not isinstance(target, Rehearsal)
        self.ranges = {symbol.name: (symbol.min, symbol.max) for symbol in facts.graph.symbols}
        self.tape = Tape(target, capabilities, self._size_of)
        self.values: dict[Ref, Value] = {}
        self.consts: dict[str, Value] = {}
        self.of_weights: set[int] = set()  # ids of known tensors that constants went into
        self.scalars: list[int] = []
        self.guards: list[Guard] = []
        self.converter = capabilities.converter
        self.converted: list[str] = []
        self._sizes: dict[str, Value] = {}
        self._filled: dict[Dim, bool] = {}
        self.patterns: dict[str, Pattern] = find_patterns(facts, region)
        self.absorbed = {id for pattern in self.patterns.values() for id in pattern.absorbed}
        for position, ref in enumerate(region.reads):
            type_ = self.type_of(ref)
            handle = target.parameter(position, type_)
            self.values[ref] = Value(handle, type_.dtype, type_.shape)

    # -- types and sizes

    def type_of(self, ref: Ref) -> TensorType:
        type_ = self.facts.type_of(ref)
        assert isinstance(type_, TensorType)
        return self._settled(type_)

    def _settled(self, type_: TensorType) -> TensorType:
        if not self.names:
            return type_
        return TensorType(type_.dtype, tuple(self._dim(dim) for dim in type_.shape))

    def _dim(self, dim: Dim) -> Dim:
        return substitute(dim, self.names) if isinstance(dim, Expr) else dim

    def _size_of(self, name: str) -> Value:
        found = self._sizes.get(name)
        if found is None:
            found = self._sizes[name] = self._size_from_reads(name) or self._size_input(name)
        return found

    def _size_from_reads(self, name: str) -> Value | None:
        for ref in self.region.reads:
            read = self.values[ref]
            for axis, dim in enumerate(read.shape):
                if isinstance(dim, Expr) and dim.terms == (((name,), 1),):
                    shape = self.target.apply("shape_of", [read.handle], {})
                    at = self.tape.handle(self.tape.constant(torch.tensor([axis])))
                    handle = self.target.apply("gather", [shape, at], {"axis": 0})
                    return Value(handle, "i64", (1,))
        return None

    def _size_input(self, name: str) -> Value:
        position = self.region.symbols.index(name)
        self.scalars.append(position)
        return Value(self.target.scalar_parameter(position), "i64", (1,))

    # -- nodes

    def value(self, ref: Ref) -> Value:
        return self.values[ref]

    def echoes(self) -> dict[int, int]:
        """The exits that are reads as they came, each with the read."""
        reads = [self.values[ref] for ref in self.region.reads]
        found = {}
        for i, ref in enumerate(self.region.exits):
            value = self.values[ref]
            for position, read in enumerate(reads):
                if value.handle is read.handle and value.shape == read.shape:
                    found[i] = position
        return found

    def assume(self, id: str) -> None:
        """Goes on as if a declined node had been written."""
        for idx in range(len(self.facts.types[id])):
            type_ = self.facts.types[id][idx]
            if isinstance(type_, TensorType):
                self.values[Ref(id, idx)] = Value(id, type_.dtype, type_.shape)

    def run(self, id: str) -> None:
        node = self.facts.graph.nodes[id]
        outs = [self._settled(t) for t in self.facts.types[id] if isinstance(t, TensorType)]
        for out in outs:
            self._check_filled(out)
        pattern = self.patterns.get(id)
        if pattern is not None:
            self.values[Ref(id)] = self._pattern(pattern, outs[0])
            return
        arguments = {param.name: param.default for param in node.spec.params} | {
            name: self._argument(value) for name, value in node.bound().items()
        }
        if self.may_compute and self._compute(node, arguments, outs):
            return
        try:
            results = self._by_rule(node, arguments, outs)
        except InexactError:
            raise
        except DeclinedError as declined:
            self._convert(node, arguments, outs, declined)
        else:
            self.values.update(results)
            self._guard(node)

    def _by_rule(
        self, node: Node, arguments: Mapping[str, Any], outs: Sequence[TensorType]
    ) -> dict[Ref, Value]:
        if node.op in MANY_RULES:
            results = MANY_RULES[node.op](self.tape, arguments, outs)
        elif node.op in RULES:
            results = [RULES[node.op](self.tape, arguments, outs[0])]
        else:
            raise DeclinedError(f"{node.op} has no rule")
        return {
            Ref(node.id, idx): self._checked(result, out)
            for idx, (result, out) in enumerate(zip(results, outs, strict=True))
        }

    def _convert(
        self,
        node: Node,
        arguments: Mapping[str, Any],
        outs: Sequence[TensorType],
        declined: DeclinedError,
    ) -> None:
        """Has the runtime's own converter write what no rule writes, or says why neither does."""
        converter = self.converter
        if converter is None or len(outs) != len(self.facts.types[node.id]):
            raise declined
        call, operands = op_call(node, arguments, outs, self._read, self.ranges)
        try:
            if isinstance(self.target, Rehearsal):
                converter.check(call)
                handles: list[Any] = [None if type_ is None else node.id for type_ in call.results]
            else:
                handles = converter.convert(call, [self.tape.handle(x) for x in operands])
        except DeclinedError as refused:
            raise DeclinedError(f"{declined}; its own converter: {refused}") from declined
        for idx, (handle, out) in enumerate(zip(handles, outs, strict=True)):
            if handle is not None:
                self.values[Ref(node.id, idx)] = Value(handle, out.dtype, out.shape)
        self.converted.append(node.op)

    @cached_property
    def _read(self) -> set[Ref]:
        nodes = self.facts.graph.nodes
        return {*self.region.exits, *(ref for id in self.region.order for ref in nodes[id].refs)}

    def _argument(self, value: Arg) -> Any:
        if isinstance(value, Ref):
            type_ = self.facts.type_of(value)
            return self._dim(type_.value) if isinstance(type_, SymIntType) else self.values[value]
        if isinstance(value, Const):
            return self._constant(value)
        if isinstance(value, tuple):
            return tuple(self._argument(item) for item in value)
        return value

    def _constant(self, const: Const) -> Value:
        name = self.facts.graph.aliases.get(const.name, const.name)
        if name not in self.consts:
            constant = self.facts.graph.constants[name]
            position = self.region.consts.index(name)
            type_: TensorType = constant.type
            self._check_filled(type_)
            value = self.tape.region_constant(constant.tensor, position, type_.dtype)
            self.consts[name] = value
            self.of_weights.add(id(constant.tensor))
        return self.consts[name]

    def _pattern(self, pattern: Pattern, out: TensorType) -> Value:
        operands: list[Value | None] = [self._argument(operand) for operand in pattern.operands]
        if pattern.kind == "rms_norm" and len(operands) == 1:
            operands.append(None)
        attributes = dict(pattern.attributes)
        if pattern.kind == "rms_norm":
            attributes["size"] = out.shape[-1]
        return self._checked(
            self.tape.call(pattern.kind, operands, out.dtype, out.shape, **attributes), out
        )

    def _checked(self, result: Value, out: TensorType) -> Value:
        """The result under the graph's own type; a rule that yields another is not trusted."""
        if result.dtype != out.dtype or result.rank != len(out.shape):
            raise DeclinedError(f"it would yield {result.dtype} of rank {result.rank}")
        if result.shape == out.shape:
            return result
        for have, want in zip(result.shape, out.shape, strict=True):
            if isinstance(have, int) and isinstance(want, int) and have != want:
                raise DeclinedError(f"it would yield a dim of {have} and not {want}")
        return Value(result.handle, result.dtype, out.shape, result.data, result.lean)

    def _check_filled(self, type_: TensorType) -> None:
        for dim in type_.shape:
            known = self._filled.get(dim)
            if known is None:
                low, _ = bounds(dim, self.ranges)
                known = self._filled[dim] = low is not None and low > 0
            if not known:
                raise DeclinedError(f"a dim of {dim} may be empty")

    def _guard(self, node: Node) -> None:
        lookup = _LOOKUPS.get(node.op)
        if lookup is None:
            return
        bound = node.bound()
        index, table, dim = bound[lookup[0]], bound[lookup[1]], lookup[2]
        if index not in self.region.reads:
            return
        shape = self._argument(table).shape
        size = shape[0 if dim is None else bound[dim]]
        if isinstance(size, int):
            self.guards.append(Guard(self.region.reads.index(index), 0, size - 1))

    # -- what is known

    def _compute(
        self, node: Node, arguments: Mapping[str, Any], outs: Sequence[TensorType]
    ) -> bool:
        """Whether the node reads nothing, is small, and now has its value."""
        operands = list(_values(tuple(arguments.values())))
        if any(_known(value) is None for value in operands):
            return False
        if any(not isinstance(dim, int) for out in outs for dim in out.shape):
            return False
        is_of_weights = any(id(_source(value)) in self.of_weights for value in operands)
        limit = KNOWN_OF_WEIGHTS_BYTES_MAX if is_of_weights else KNOWN_BYTES_MAX
        for out in outs:
            n_bytes = TORCH_DTYPES[out.dtype].itemsize
            for dim in out.shape:
                n_bytes *= int(str(dim))
            if n_bytes > limit:
                return False
        positional = [param for param in node.spec.params if not param.is_keyword]
        final: Callable[[Any, Any], Any] = _final
        args = [final(p, arguments[p.name]) for p, _ in zip(positional, node.args, strict=False)]
        by_name = {param.name: param for param in node.spec.params}
        keywords = {name: final(by_name[name], arguments[name]) for name, _ in node.kwargs}
        with torch.no_grad():
            result = kernel_of(node.op)(*args, **keywords)
        results = list(result) if isinstance(result, tuple | list) else [result]
        for idx, tensor in enumerate(results):
            data = tensor.contiguous()
            self.values[Ref(node.id, idx)] = self.tape.constant(data)
            if is_of_weights:
                self.of_weights.add(id(data))
        return True


def _values(arg: Any) -> list[Value]:
    if isinstance(arg, Value):
        return [arg]
    return [v for item in arg for v in _values(item)] if isinstance(arg, tuple) else []


def _source(value: Value) -> torch.Tensor | None:
    return value.data if value.data is not None or value.lean is None else value.lean.data


def _known(value: Value) -> torch.Tensor | None:
    source = _source(value)
    if source is None or source is value.data:
        return source
    return source.expand([int(str(dim)) for dim in value.shape])


def _final(param: Any, value: Any) -> Any:
    """An argument as torch takes it."""
    if isinstance(value, Value):
        return _known(value)
    if isinstance(value, tuple):
        return [_final(param, item) for item in value]
    return torch_literal(param, value)
