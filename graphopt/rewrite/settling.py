"""Replacements of single values, settled against the types of everything that reads them.

A pass that gives nodes a simpler form, or has their users read something else, proposes its changes
node by node. `settle` walks the region with them, operands first, and infers again what reads a
value that lies otherwise in memory than before. Where a size would be written otherwise, an exit
would get another type, or an op would no longer take its operands, the changes upstream that are to
blame are barred, and the walk starts again without them.

Deliberately absent: new nodes under new ids; what is proposed keeps its id or goes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from graphopt.analysis.facts import Facts
from graphopt.analysis.infer import infer_node
from graphopt.analysis.regions import Region
from graphopt.delta import AddNode, RemoveNode
from graphopt.dims import simplify
from graphopt.errors import GraphoptError
from graphopt.graph import Arg, Const, Node, Ref
from graphopt.rewrite.rewrite import Sketch
from graphopt.types import SymIntType, TensorType, ValueType

Operand = Ref | Const
Change = Node | Mapping[Ref, Operand]  # the node in another form, or what its users read instead
Propose = Callable[[Node, "Settled"], Change | None]

# Ops whose result depends on where values lie in memory, which types do not tell exactly.
MEMORY_READERS = frozenset(
    f"aten.{name}"
    for name in (
        "as_strided.default", "as_strided_copy.default", "as_strided_scatter.default",
        "sym_stride.int", "sym_stride.default", "sym_storage_offset.default", "view.dtype",
        "view_as_complex.default", "_reshape_alias.default",
    )
)  # fmt: skip


@dataclass(slots=True)
class Settled:
    """A region with changes in it: what is read instead of what, and each node as it is now."""

    facts: Facts
    region: Region
    made: Mapping[str, TensorType] = field(default_factory=dict)  # constants to come, by name
    values: dict[Operand, Operand] = field(default_factory=dict)
    nodes: dict[str, Node] = field(default_factory=dict)  # those that are left, operands first
    types: dict[str, tuple[ValueType, ...]] = field(default_factory=dict)  # where they differ
    blame: dict[str, frozenset[str]] = field(default_factory=dict)  # and which changes made them

    def type_of(self, operand: Operand) -> ValueType:
        """The type of a value or constant as things stand."""
        if isinstance(operand, Const):
            known = self.made.get(operand.name)
            return known or self.facts.graph.get_constant(operand.name).type
        types = self.types.get(operand.id)
        return types[operand.idx] if types is not None else self.facts.type_of(operand)

    def tensor(self, operand: Arg) -> TensorType | None:
        """The type of a tensor; None for symbolic integers and literals."""
        type_ = self.type_of(operand) if isinstance(operand, Ref | Const) else None
        return type_ if isinstance(type_, TensorType) else None

    def needed(self) -> dict[str, Node]:
        """The nodes that the exits still need, in order."""
        wanted, waiting = set(), [ref.id for ref in self.region.exits]
        while waiting:
            id = waiting.pop()
            if id in self.nodes and id not in wanted:
                wanted.add(id)
                waiting.extend(ref.id for ref in self.nodes[id].refs)
        return {id: node for id, node in self.nodes.items() if id in wanted}

    def write(self, sketch: Sketch) -> dict[str, Node]:
        """Writes the changes as edits and returns the nodes that are still needed."""
        left = self.needed()
        stands_for: dict[str, list[str]] = {}
        for ref, operand in self.values.items():
            if isinstance(ref, Ref) and isinstance(operand, Ref) and operand.id in left:
                stands_for.setdefault(operand.id, [operand.id]).append(ref.id)
        for id, node in left.items():
            if node is not self.facts.graph.nodes[id]:
                sketch.edit(RemoveNode(id), AddNode(id, node.op, node.args, node.kwargs))
            if id in stands_for:
                sketch.comes_from(id, stands_for[id])
        return left


def settle(
    facts: Facts, region: Region, propose: Propose, made: Mapping[str, TensorType] | None = None
) -> tuple[Settled, dict[str, str]]:
    """The region after the changes that `propose` asks for, and the changes that are barred, with
    reasons. `made` types the constants that changes name and the graph does not hold yet.

    `propose` sees every node with its operands replaced already, and may be asked again.
    """
    if reader := _memory_reader(facts, region):
        return _Walk(facts, region, made or {}, {}).run(lambda *_: None)[0], {
            reader: f"{facts.graph.nodes[reader].op} reads how values lie in memory"
        }
    barred: dict[str, str] = {}
    while True:  # every round bars at least one change that it made: there are finitely many
        settled, faults = _Walk(facts, region, made or {}, barred).run(propose)
        if not faults:
            return settled, barred
        barred.update(faults)


def _memory_reader(facts: Facts, region: Region) -> str | None:
    nodes = facts.graph.nodes
    for id in region.order:
        near: list[str] = [id, *facts.graph.users.get(id, ())]
        found = [at for at in near if at in nodes and nodes[at].op in MEMORY_READERS]
        if found:
            return found[0]
    return None


class _Walk:
    """One walk over the region with everything proposed but what is barred."""

    def __init__(
        self,
        facts: Facts,
        region: Region,
        made: Mapping[str, TensorType],
        barred: Mapping[str, str],
    ) -> None:
        self.settled = Settled(facts, region, made)
        self.barred = barred
        self.faults: dict[str, str] = {}
        self.exits = {ref.id for ref in region.exits}
        self.ranges = {symbol.name: (symbol.min, symbol.max) for symbol in facts.graph.symbols}

    def run(self, propose: Propose) -> tuple[Settled, dict[str, str]]:
        settled = self.settled
        for id in settled.region.order:
            before = settled.facts.graph.nodes[id]
            node = before.with_args(settled.values)
            change = None if id in self.barred else propose(node, settled)
            guilty = frozenset[str]().union(
                *(settled.blame.get(ref.id, frozenset()) for ref in before.refs)
            )
            if change is None:
                self._keep(node, guilty, again=bool(guilty))
            elif isinstance(change, Node):
                self._keep(change, guilty | {id}, again=True)
            else:  # a constant lies as it lies, whatever happened before it
                has_ref = any(isinstance(operand, Ref) for operand in change.values())
                self._replace(id, change, guilty | {id} if has_ref else frozenset({id}))
        return settled, self.faults

    def _replace(self, id: str, change: Mapping[Ref, Operand], guilty: frozenset[str]) -> None:
        """The users of `id` read something else: of the same dtype and sizes."""
        settled = self.settled
        for ref, operand in change.items():
            settled.values[ref] = operand
            old, new = settled.facts.type_of(ref), settled.type_of(operand)
            if not _same_sizes(old, new):
                self._fault(guilty, f"{new} would stand for {old}")
            elif old != new:
                settled.blame[id] = guilty

    def _keep(self, node: Node, guilty: frozenset[str], *, again: bool) -> None:
        """The node stays, perhaps in another form; `again` says that its types may differ."""
        settled, id = self.settled, node.id
        settled.nodes[id] = node
        if not again:
            return
        old = settled.facts.types[id]
        try:
            new = tuple(map(self._within, infer_node(node, settled.type_of)))
        except GraphoptError as error:
            self._fault(guilty, f"{id} would not take its operands: {error.message}")
            return
        if len(old) != len(new) or not all(map(_same_sizes, old, new)):
            self._fault(guilty, f"the type of {id} would be written otherwise")
        elif old != new and id in self.exits:
            self._fault(guilty, f"{id} is handed out and would lie otherwise in memory")
        elif old != new:
            settled.types[id], settled.blame[id] = new, guilty

    def _fault(self, guilty: frozenset[str], reason: str) -> None:
        for id in sorted(guilty):
            self.faults.setdefault(id, reason)

    def _within(self, type_: ValueType) -> ValueType:
        """The type with every `max` and `min` settled that the symbols' ranges settle."""
        if isinstance(type_, SymIntType):
            return SymIntType(simplify(type_.value, self.ranges))
        shape = tuple(simplify(dim, self.ranges) for dim in type_.shape)
        return TensorType(type_.dtype, shape, type_.layout)


def _same_sizes(old: ValueType, new: ValueType) -> bool:
    if isinstance(old, TensorType) and isinstance(new, TensorType):
        return (old.dtype, old.shape) == (new.dtype, new.shape)
    return old == new
