"""All derived facts of one graph, and their update along a change.

`analyse(graph)` is `update` from the facts of the empty graph, so incremental and from scratch are
one piece of code; what keeps it honest is `graphopt.analysis.check`, which recomputes everything by
other means. The facts of a graph are an immutable value like the graph, and share structure with
those of the graph before it.

    query      direction   what it answers
    type       forward     dtype, shape and layout of each output of a node
    traits     forward     what a node depends on (`traits`), hence whether it is data or context
    live       backward    whether a node reaches an output
    blocks     interval    where exactly one data value crosses
    home       backward    the block (or the context region) that computes a context node
    region     block       the structure key of what a block computes, and what it takes from outside
    reader     value       the last block that reads a value from outside: after it the value can be let go
"""

from collections.abc import Callable, Mapping

import immutables

from graphopt.analysis.blocks import CONTEXT, BlockUpdate, DataView, update_blocks
from graphopt.analysis.fact_table import Facts, Trace, Update
from graphopt.analysis.infer import infer_node
from graphopt.analysis.propagate import backward_key, operand_nodes, propagate, user_nodes
from graphopt.analysis.region_facts import RegionUpdate
from graphopt.analysis.traits import INTEGER, is_data, is_shape_query, node_traits
from graphopt.dims import simplify
from graphopt.draft import OUTPUT_PREFIX, Change
from graphopt.errors import TypeMismatchError, UnknownNodeError
from graphopt.graph import Const, Graph, Ref
from graphopt.types import SymIntType, TensorType, ValueType

__all__ = ["Facts", "Update", "analyse", "update"]

_NONE: "immutables.Map[str, int]" = immutables.Map()


def analyse(graph: Graph) -> Facts:
    """The facts of `graph`, from scratch. Raises TypeMismatchError naming the node that does not
    take its operands.
    """
    everything = frozenset(graph.nodes)
    inputs = frozenset(name for name, _ in graph.inputs)
    change = Change(
        everything,
        frozenset(),
        everything | inputs,
        everything,
        frozenset(graph.constants),
        inputs,
        True,
    )
    return update(Facts(Graph.empty(graph.name)), graph, change).facts


def update(
    facts: Facts, graph: Graph, change: Change, between: Callable[[], None] = lambda: None
) -> Update:
    """The facts of `graph`, which differs from `facts.graph` by `change`. Raises TypeMismatchError;
    `facts` stays as it is. `between` is called at each query, for work that is done in stretches.
    """
    return _Updater(facts, graph, change, between).run()


class _Updater:
    """One update; each method is one query of the table above, in dependency order."""

    def __init__(
        self, facts: Facts, graph: Graph, change: Change, between: Callable[[], None]
    ) -> None:
        self.old, self.graph, self.change = facts, graph, change
        self.trace = Trace(between)
        self.seeds = {id for id in change.nodes if id in graph.nodes}
        for name in change.inputs:
            self.seeds.update(user_nodes(graph, name))
        self.retyped_consts = {
            n
            for n in change.constants
            if self._const_kind(facts.graph, n) != self._const_kind(graph, n)
        }
        for name in self.retyped_consts:
            self.seeds.update(graph.const_users.get(name, _NONE))

        # The ranges of symbols decide what a slice may cut off; they change with the interface
        # only.
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
        self.trace.between()
        self.moved = retraited | relived  # nodes that became data or context, live or not
        blocks = self._blocks(traits, live)
        homes, rehomed = self._homes(traits, live, blocks)
        facts = Facts(
            graph,
            types,
            traits,
            live,
            blocks.table,
            homes,
            old.regions,
            old.readers,
            old.last_readers,
        )
        last = RegionUpdate(old, graph, self.change, self.moved, self.retyped_consts, self.trace)
        return last.run(facts, blocks, retyped, rehomed)

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
                    f"{ref.id} has {len(found)} output{'s' * (len(found) != 1)}, there is no {ref}",
                    where=str(ref),
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
                or (
                    live.get(user, False) and not is_shape_query(graph.nodes[user])
                )  # sizes come from types
                for user in graph.users.get(id, _NONE)
            )

        seeds = {id for id in self.change.used | self.change.nodes if id in graph.nodes}
        # under the same id, what asks for a size keeps nothing alive, and what reads the value does
        for id in self.change.nodes:
            before = self.old.graph.nodes.get(id)
            if before is not None and is_shape_query(before) != is_shape_query(graph.nodes[id]):
                seeds |= operand_nodes(graph, id)
        return propagate(
            "live",
            live,
            seeds,
            compute,
            backward_key(graph),
            lambda id: operand_nodes(graph, id),
            self.trace,
        )

    def _blocks(
        self, traits: "immutables.Map[str, int]", live: "immutables.Map[str, bool]"
    ) -> BlockUpdate:
        change = self.change
        # A node that reads what it read before, and is data or not as it was, cuts as it did.
        rewired = {
            id
            for id in change.nodes
            if self._reads(self.old.graph, id) != self._reads(self.graph, id)
        }
        touched = set(rewired | change.removed | change.used | change.relabelled | self.moved)
        for name in change.inputs:  # what reads an input starts a path of data, or no longer does
            touched.update(user_nodes(self.graph, name))
        for graph in (
            self.old.graph,
            self.graph,
        ):  # a member's coming or going changes its neighbours' lives
            for id in (*self.moved, *rewired, *change.removed):
                if id in graph.nodes:
                    touched.update(user_nodes(graph, id))
                    touched.update(operand_nodes(graph, id))
        before = DataView(self.old.graph, self.old.traits, self.old.live)
        found = update_blocks(self.old.blocks, before, DataView(self.graph, traits, live), touched)
        for exit_ in sorted(found.fresh):
            self.trace("blocks", exit_)
        return found

    def _homes(
        self,
        traits: "immutables.Map[str, int]",
        live: "immutables.Map[str, bool]",
        update: BlockUpdate,
    ) -> tuple["immutables.Map[str, str]", set[str]]:
        graph, homes, blocks = self.graph, self.old.homes.mutate(), update.table
        reblocked = {
            id
            for exit_ in update.fresh | update.gone
            for table in (self.old.blocks, blocks)
            if exit_ in table.blocks
            for id in table.blocks[exit_].nodes
        }
        seeds = set(self.change.nodes | self.change.used | self.moved)
        for id in reblocked | self.moved | self.change.nodes:
            if id in graph.nodes:
                seeds |= operand_nodes(graph, id)

        def is_context(id: str) -> bool:
            flags = traits.get(id, 0)
            return (
                id in graph.nodes
                and live.get(id, False)
                and not is_data(flags)
                and not flags & INTEGER
            )

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

    @staticmethod
    def _reads(graph: Graph, id: str) -> tuple[Ref, ...] | None:
        node = graph.nodes.get(id)
        return node.refs if node else None

    @staticmethod
    def _const_kind(graph: Graph, name: str) -> object:
        constant = graph.constants.get(name)
        return (constant.type, constant.is_param) if constant else None


def _within(
    types: tuple[ValueType, ...], ranges: Mapping[str, tuple[int, int | None]]
) -> tuple[ValueType, ...]:
    """Types with every `max` and `min` settled that the symbols' ranges settle."""
    settled: list[ValueType] = []
    for type_ in types:
        if isinstance(type_, SymIntType):
            value = simplify(type_.value, ranges)
            settled.append(type_ if value == type_.value else SymIntType(value))
        else:
            shape = tuple(
                dim if isinstance(dim, int) else simplify(dim, ranges) for dim in type_.shape
            )
            settled.append(
                type_ if shape == type_.shape else TensorType(type_.dtype, shape, type_.layout)
            )
    return tuple(settled)
