"""All derived facts of one graph, and their update along a change.

`analyse(graph)` is `update` from the facts of the empty graph, so incremental and from scratch are one piece of code; what keeps it
honest is `graphopt.analysis.check`, which recomputes everything by other means. The facts of a graph are an immutable value like the
graph, and share structure with those of the graph before it.

    query      direction   what it answers
    type       forward     dtype, shape and layout of each output of a node
    traits     forward     what a node depends on (`traits`), hence whether it is data or context
    live       backward    whether a node reaches an output
    blocks     interval    where exactly one data value crosses
    home       backward    the block (or the context region) that computes a context node
    region     block       the structure key of what a block computes, and what it takes from outside
    reader     value       the last block that reads a value from outside: after it the value can be let go
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import immutables

from graphopt.analysis.blocks import CONTEXT, END, BlockTable, BlockUpdate, DataView, update_blocks
from graphopt.analysis.infer import infer_node
from graphopt.analysis.propagate import backward_key, operand_nodes, propagate, user_nodes
from graphopt.analysis.regions import Region, build_region
from graphopt.analysis.traits import INTEGER, is_data, is_shape_query, node_traits
from graphopt.dims import simplify
from graphopt.draft import OUTPUT_PREFIX, Change
from graphopt.errors import TypeMismatchError, UnknownNodeError
from graphopt.graph import Const, Graph, Ref
from graphopt.types import SymIntType, TensorType, ValueType

_NONE: "immutables.Map[str, int]" = immutables.Map()


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known about `graph`; see the module docstring for the queries."""

    graph: Graph
    types: "immutables.Map[str, tuple[ValueType, ...]]" = immutables.Map()
    traits: "immutables.Map[str, int]" = immutables.Map()
    live: "immutables.Map[str, bool]" = immutables.Map()
    blocks: BlockTable = field(default_factory=BlockTable)
    homes: "immutables.Map[str, str]" = immutables.Map()
    regions: "immutables.Map[str, Region]" = immutables.Map()  # by block exit, and CONTEXT
    readers: "immutables.Map[Ref, immutables.Map[str, int]]" = immutables.Map()
    last_readers: "immutables.Map[Ref, str]" = immutables.Map()

    def type_of(self, ref: Ref) -> ValueType:
        """The type of a value: a model input or an output of a node."""
        types = self.types.get(ref.id)
        if types is None:
            declared = self.graph.input_type(ref.id)
            assert declared is not None
            return declared
        return types[ref.idx]

    def home_of(self, id: str) -> str | None:
        """The block that computes node `id` (by exit, or CONTEXT), None for a node nothing needs."""
        return self.blocks.member.get(id) or self.homes.get(id)


@dataclass(frozen=True, slots=True)
class Update:
    """New facts and what it took: queries re-run by name, and the blocks whose region or weights differ."""

    facts: Facts
    reran: dict[str, list[str]]
    regions_changed: frozenset[str]  # blocks (and CONTEXT) that are new or compute something else
    regions_gone: frozenset[str]
    weights_changed: frozenset[str]  # blocks whose structure is the same and whose constants differ
    released: frozenset[str]  # other blocks after which other values can be let go


def analyse(graph: Graph) -> Facts:
    """The facts of `graph`, from scratch. Raises TypeMismatchError naming the node that does not take its operands."""
    everything = frozenset(graph.nodes)
    inputs = frozenset(name for name, _ in graph.inputs)
    change = Change(everything, frozenset(), everything | inputs, everything, frozenset(graph.constants), inputs, True)
    return update(Facts(Graph.empty(graph.name)), graph, change).facts


def update(facts: Facts, graph: Graph, change: Change) -> Update:
    """The facts of `graph`, which differs from `facts.graph` by `change`. Raises TypeMismatchError; `facts` stays as it is."""
    return _Updater(facts, graph, change).run()


class _Updater:
    """One update; each method is one query of the table above, in dependency order."""

    def __init__(self, facts: Facts, graph: Graph, change: Change) -> None:
        self.old, self.graph, self.change = facts, graph, change
        self.reran: dict[str, list[str]] = {}
        self.seeds = {id for id in change.nodes if id in graph.nodes}
        for name in change.inputs:
            self.seeds.update(user_nodes(graph, name))
        self.retyped_consts = {n for n in change.constants if self._const_kind(facts.graph, n) != self._const_kind(graph, n)}
        for name in self.retyped_consts:
            self.seeds.update(graph.const_users.get(name, _NONE))

        # The ranges of symbols decide what a slice may cut off; they change with the interface only.
        self.type_seeds = set(graph.nodes) if facts.graph.symbols != graph.symbols else self.seeds

    def run(self) -> Update:
        old, graph = self.old, self.graph
        self.types = old.types.mutate()
        self.traits = old.traits.mutate()
        self.live = old.live.mutate()
        for id in self.change.removed:
            for known in (self.types, self.traits, self.live):
                known.pop(id, None)
        retyped = self._infer()
        retraited = self._trait()
        relived = self._liveness()
        types, traits, live = self.types.finish(), self.traits.finish(), self.live.finish()
        self.moved = retraited | relived  # nodes that became data or context, live or not
        blocks = self._blocks(traits, live)
        homes, rehomed = self._homes(traits, live, blocks)
        facts = Facts(graph, types, traits, live, blocks.table, homes, old.regions, old.readers, old.last_readers)
        return self._regions(facts, blocks, retyped, rehomed)

    def trace(self, query: str, key: str) -> None:
        self.reran.setdefault(query, []).append(key)

    # -- forward

    def _infer(self) -> set[str]:
        graph, types, inputs = self.graph, self.types, dict(self.graph.inputs)

        def lookup(ref: Ref | Const) -> ValueType:
            if isinstance(ref, Const):
                return graph.get_constant(ref.name).type
            found = types.get(ref.id)
            if found is None:
                return inputs[ref.id]
            if ref.idx >= len(found):
                raise UnknownNodeError(
                    f"{ref.id} has {len(found)} output{'s' * (len(found) != 1)}, there is no {ref}", where=str(ref)
                )
            return found[ref.idx]

        ranges = {symbol.name: (symbol.min, symbol.max) for symbol in graph.symbols}
        changed = propagate(
            "type", types, self.type_seeds, lambda id: _within(infer_node(graph.nodes[id], lookup), ranges),
            graph.order_key, lambda id: user_nodes(graph, id), self.trace,
        )  # fmt: skip
        for name, ref in graph.outputs:
            if isinstance(lookup(ref), SymIntType):
                raise TypeMismatchError(
                    f"output {name} would be the integer {ref}; outputs are tensors",
                    where=OUTPUT_PREFIX + name, remedy="make a tensor of it with aten.full.default",
                )  # fmt: skip
        return changed

    def _trait(self) -> set[str]:
        graph, traits = self.graph, self.traits
        return propagate(
            "traits", traits, self.seeds, lambda id: node_traits(graph, graph.nodes[id], traits),
            graph.order_key, lambda id: user_nodes(graph, id), self.trace,
        )  # fmt: skip

    # -- backward

    def _liveness(self) -> set[str]:
        graph, live = self.graph, self.live

        def compute(id: str) -> bool:
            return any(
                user.startswith(OUTPUT_PREFIX)
                or (live.get(user, False) and not is_shape_query(graph.nodes[user]))  # sizes come from types
                for user in graph.users.get(id, _NONE)
            )

        seeds = {id for id in self.change.used | self.change.nodes if id in graph.nodes}
        for id in self.change.nodes:  # under the same id, what asks for a size keeps nothing alive, and what reads the value does
            before = self.old.graph.nodes.get(id)
            if before is not None and is_shape_query(before) != is_shape_query(graph.nodes[id]):
                seeds |= operand_nodes(graph, id)
        return propagate(
            "live", live, seeds, compute, backward_key(graph), lambda id: operand_nodes(graph, id), self.trace
        )

    def _blocks(self, traits: "immutables.Map[str, int]", live: "immutables.Map[str, bool]") -> BlockUpdate:
        change = self.change
        touched = set(change.nodes | change.removed | change.used | change.relabelled | self.moved)
        for name in change.inputs:  # what reads an input starts a path of data, or no longer does
            touched.update(user_nodes(self.graph, name))
        for graph in (self.old.graph, self.graph):  # a member's coming or going changes its neighbours' lives
            for id in (*self.moved, *change.nodes, *change.removed):
                if id in graph.nodes:
                    touched.update(user_nodes(graph, id))
                    touched.update(operand_nodes(graph, id))
        before = DataView(self.old.graph, self.old.traits, self.old.live)
        found = update_blocks(self.old.blocks, before, DataView(self.graph, traits, live), touched)
        for exit_ in sorted(found.fresh):
            self.trace("blocks", exit_)
        return found

    def _homes(
        self, traits: "immutables.Map[str, int]", live: "immutables.Map[str, bool]", update: BlockUpdate
    ) -> tuple["immutables.Map[str, str]", set[str]]:
        graph, homes, blocks = self.graph, self.old.homes.mutate(), update.table
        reblocked = {id for exit_ in update.fresh | update.gone for table in (self.old.blocks, blocks) if exit_ in table.blocks
                     for id in table.blocks[exit_].nodes}  # fmt: skip
        seeds = set(self.change.nodes | self.change.used | self.moved)
        for id in reblocked | self.moved | self.change.nodes:
            if id in graph.nodes:
                seeds |= operand_nodes(graph, id)

        def is_context(id: str) -> bool:
            flags = traits.get(id, 0)
            return id in graph.nodes and live.get(id, False) and not is_data(flags) and not flags & INTEGER

        def compute(id: str) -> str:
            found: set[str] = set()
            for user in graph.users.get(id, _NONE):
                if user.startswith(OUTPUT_PREFIX):
                    return CONTEXT
                home = blocks.member.get(user) or homes.get(user)
                if home is not None and (user in blocks.member or is_context(user)):
                    found.add(home)
            return found.pop() if len(found) == 1 else CONTEXT

        changed: set[str] = set()
        for id in [id for id in seeds | self.change.removed if id in homes and not is_context(id)]:
            del homes[id]
            changed.add(id)
        changed |= propagate(
            "home", homes, [id for id in seeds if is_context(id)], compute, backward_key(graph),
            lambda id: [op for op in operand_nodes(graph, id) if is_context(op)], self.trace,
        )  # fmt: skip
        return homes.finish(), changed

    # -- regions

    def _regions(self, facts: Facts, blocks: BlockUpdate, retyped: set[str], rehomed: set[str]) -> Update:
        graph, old = self.graph, self.old
        stale = set(blocks.fresh | blocks.gone) | self._other_outputs_read(facts)
        nodes = set(self.change.nodes | self.change.removed | retyped | rehomed)
        for id in retyped:
            nodes.update(user_nodes(graph, id))
        for name in self.change.inputs:
            nodes.update(user_nodes(graph, name))
        for name in self.retyped_consts:
            nodes.update(graph.const_users.get(name, _NONE))
        for id in nodes:
            stale.update(home for home in (old.home_of(id), facts.home_of(id)) if home)
        if self.change.outputs:
            for source in (old, facts):
                stale.update(home for _, ref in source.graph.outputs if (home := source.home_of(ref.id)))
        regions, readers = old.regions.mutate(), old.readers.mutate()
        taps = _taps(facts)
        recounted: set[Ref] = set()
        changed: set[str] = set()
        gone: set[str] = set()
        for exit_ in sorted(stale - {CONTEXT}):
            region = self._block_region(facts, exit_, taps) if exit_ in facts.blocks.blocks else None
            self._replace(facts.blocks, regions, readers, exit_, region, recounted, changed, gone)
        for exit_ in blocks.fresh | blocks.moved:  # they may read what they read before, and in another order
            recounted.update(self._foreign(regions.get(exit_), facts.blocks))
        counted = readers.finish()
        readers = counted.mutate()
        context = self._context_region(facts, counted, taps)
        if context != old.regions.get(CONTEXT):
            self._replace(facts.blocks, regions, readers, CONTEXT, context, recounted, changed, gone)
        counted = readers.finish()
        last, released = self._last_readers(facts, counted, recounted)
        done = Facts(
            graph, facts.types, facts.traits, facts.live, facts.blocks, facts.homes, regions.finish(), counted, last
        )
        weights = {
            home for name in self.change.constants for user in graph.const_users.get(name, _NONE)
            if (home := done.home_of(user))
        }  # fmt: skip
        if self.change.outputs:
            released |= self._output_readers(done)
        return Update(
            done, self.reran, frozenset(changed), frozenset(gone), frozenset(weights - changed),
            frozenset(b for b in released - changed - weights if b in done.regions),
        )  # fmt: skip

    def _other_outputs_read(self, facts: Facts) -> set[str]:
        """The blocks whose exit has several outputs, and another one of them may be read now."""
        found: set[str] = set()
        for source in (self.old, facts):
            nodes = source.graph.nodes
            for id in self.change.nodes | self.change.removed | self.moved:
                refs = nodes[id].refs if id in nodes else ()
                found.update(ref.id for ref in refs if ref.id in nodes and nodes[ref.id].spec.returns != 1)
        return {id for id in found if id in facts.blocks.blocks}

    def _output_readers(self, facts: Facts) -> set[str]:
        """The blocks that read a value that is, or was, an output: they may let go of it, or may no longer."""
        refs = {ref for _, ref in (*self.old.graph.outputs, *self.graph.outputs)}
        found = {exit_ for ref in refs for exit_ in facts.readers.get(ref, ())}
        return found | {exit_ for ref in refs if (exit_ := facts.blocks.next.get(ref.id)) is not None}

    def _block_region(self, facts: Facts, exit_: str, taps: dict[str, list[Ref]]) -> Region:
        block = facts.blocks.blocks[exit_]
        exits: dict[Ref, None] = {}
        if exit_ != END:
            users = self.graph.users.get(exit_, _NONE)
            read = {
                ref for user in users if not user.startswith(OUTPUT_PREFIX)
                for ref in self.graph.nodes[user].refs
                if ref.id == exit_ and (facts.blocks.member.get(user) not in (None, exit_))
            }  # fmt: skip
            exits |= dict.fromkeys(sorted(read, key=lambda r: r.idx))
        exits |= dict.fromkeys(taps.get(exit_, ()))
        self.trace("region", exit_)
        return build_region(
            self.graph, facts.type_of, tuple(exits), lambda id: facts.home_of(id) == block.exit
        )

    def _context_region(
        self, facts: Facts, readers: "immutables.Map[Ref, immutables.Map[str, int]]", taps: dict[str, list[Ref]]
    ) -> Region | None:
        wanted = {ref for ref in readers if facts.homes.get(ref.id) == CONTEXT} | set(taps.get(CONTEXT, ()))
        if not wanted:
            return None
        exits = tuple(sorted(wanted, key=lambda r: (r.id, r.idx)))
        previous = facts.regions.get(CONTEXT)
        touched = self.change.nodes | self.change.removed | self.change.inputs | set(self.reran.get("home", ()))
        inside = set(previous.order) if previous else set()
        is_same = previous is not None and previous.exits == exits and not (inside & touched) and not self._types_moved(previous)
        if is_same:
            return previous
        self.trace("region", CONTEXT)
        return build_region(self.graph, facts.type_of, exits, lambda id: facts.homes.get(id) == CONTEXT)

    def _types_moved(self, region: Region) -> bool:
        reran = set(self.reran.get("type", ()))
        return any(id in reran for id in region.order) or bool(set(region.consts) & self.retyped_consts)

    @staticmethod
    def _foreign(region: Region | None, blocks: BlockTable) -> list[Ref]:
        """What `region` reads besides the cut before it, which nobody else can read."""
        return [ref for ref in region.reads if ref.id not in blocks.member] if region else []

    def _replace(
        self,
        blocks: BlockTable,
        regions: "immutables.MapMutation[str, Region]",
        readers: "immutables.MapMutation[Ref, immutables.Map[str, int]]",
        exit_: str,
        region: Region | None,
        recounted: set[Ref],
        changed: set[str],
        gone: set[str],
    ) -> None:
        previous = regions.get(exit_)
        if previous == region:
            return
        for ref in self._foreign(previous, self.old.blocks):
            counts = readers[ref].delete(exit_)
            if counts:
                readers[ref] = counts
            else:
                del readers[ref]
            recounted.add(ref)
        if region is None:
            del regions[exit_]
            gone.add(exit_)
            return
        regions[exit_] = region
        changed.add(exit_)
        for ref in self._foreign(region, blocks):
            readers[ref] = readers.get(ref, _NONE).set(exit_, 1)
            recounted.add(ref)

    def _last_readers(
        self, facts: Facts, readers: "immutables.Map[Ref, immutables.Map[str, int]]", recounted: set[Ref]
    ) -> tuple["immutables.Map[Ref, str]", set[str]]:
        last = self.old.last_readers.mutate()
        moved: set[str] = set()
        blocks, key = facts.blocks.blocks, self.graph.order_key

        def position(exit_: str) -> tuple[int, str]:
            return key(blocks[exit_].nodes[0]) if exit_ in blocks else (-1, "")

        for ref in sorted(recounted, key=lambda r: (r.id, r.idx)):
            before = last.pop(ref, None)
            after = None
            if ref in readers:
                self.trace("reader", str(ref))
                after = last[ref] = max(readers[ref], key=position)
            if before != after:
                moved.update(block for block in (before, after) if block is not None)
        return last.finish(), moved

    @staticmethod
    def _const_kind(graph: Graph, name: str) -> object:
        constant = graph.constants.get(name)
        return (constant.type, constant.is_param) if constant else None


def _within(types: tuple[ValueType, ...], ranges: Mapping[str, tuple[int, int | None]]) -> tuple[ValueType, ...]:
    """Types with every `max` and `min` settled that the symbols' ranges settle."""
    settled: list[ValueType] = []
    for type_ in types:
        if isinstance(type_, SymIntType):
            value = simplify(type_.value, ranges)
            settled.append(type_ if value == type_.value else SymIntType(value))
        else:
            shape = tuple(dim if isinstance(dim, int) else simplify(dim, ranges) for dim in type_.shape)
            settled.append(type_ if shape == type_.shape else TensorType(type_.dtype, shape, type_.layout))
    return tuple(settled)


def _taps(facts: Facts) -> dict[str, list[Ref]]:
    """The outputs each block hands out, in the order of the graph's outputs."""
    found: dict[str, list[Ref]] = {}
    for _, ref in facts.graph.outputs:
        home = facts.home_of(ref.id)
        if home is not None:
            found.setdefault(home, []).append(ref)
    return found
