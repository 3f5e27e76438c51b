"""A graph being edited: mutable maps over a graph's persistent ones, finished into the next graph.

Edits may pass through states that are not graphs (a node removed while still used); `finish` checks
the final state, only where it was touched. The draft records what it touched, which `change`
returns for incremental analysis.
"""

from collections.abc import Callable, Iterable

import immutables

from graphopt.change import OUTPUT_PREFIX, Change
from graphopt.dims import symbols_of
from graphopt.errors import (
    DeltaError,
    DuplicateNodeError,
    NodeInUseError,
    UnknownConstantError,
    UnknownNodeError,
    nearest,
)  # fmt: skip
from graphopt.graph import (
    HASH_MODULUS,
    Constant,
    Graph,
    Node,
    Ref,
    Symbol,
    alias_digest,
    const_digest,
    frame_digest,
)
from graphopt.limits import NAME_CHARS_MAX
from graphopt.order import update_labels
from graphopt.types import TensorType, ValueType

__all__ = ["OUTPUT_PREFIX", "Change", "Draft"]


class Draft:
    """One graph on its way to the next. Every method raises DeltaError subclasses; a raised draft
    is thrown away.
    """

    def __init__(self, graph: Graph, types: Callable[[Ref], ValueType] | None = None) -> None:
        """`types` answers for `graph`'s values; macros that ask about types need it."""
        self.base = graph
        self._types = types
        self.name = graph.name
        self.symbols = graph.symbols
        self.inputs = dict(graph.inputs)
        self.outputs = graph.outputs
        self.nodes = graph.nodes.mutate()
        self.constants = graph.constants.mutate()
        self.aliases = graph.aliases.mutate()
        self.users = graph.users.mutate()
        self.const_users = graph.const_users.mutate()
        self.labels = graph.labels.mutate()
        self._touched_nodes: dict[str, None] = {}
        self._touched_uses: set[str] = set()
        self._touched_consts: set[str] = set()
        self._touched_aliases: set[str] = set()
        self._relabelled: set[str] = set()
        self._new_edges: set[tuple[str, str]] = set()

    # -- edits

    def add_node(self, node: Node) -> None:
        """Adds `node`; DuplicateNodeError when a node or input of that id exists."""
        self._check_free(node.id)
        self.nodes[node.id] = node
        self._touched_nodes[node.id] = None
        self._use(node, +1)

    def remove_node(self, id: str) -> None:
        """Removes the node; its users must be rewired or removed in the same delta."""
        node = self.get_node(id)
        self._use(node, -1)
        del self.nodes[id]
        self._touched_nodes[id] = None

    def replace_node(self, node: Node) -> None:
        """Puts `node` in the place of the node of the same id."""
        self._use(self.get_node(node.id), -1)
        self.nodes[node.id] = node
        self._touched_nodes[node.id] = None
        self._use(node, +1)

    def rewire(self, old: Ref, new: Ref, users: Iterable[str] | None = None) -> None:
        """Makes `users` (all of them by default) read `new` where they read `old`."""
        known = self.users.get(old.id, _EMPTY)
        chosen = sorted(known) if users is None else list(users)
        if users is None and not any(True for _ in chosen):
            raise DeltaError(f"nothing uses {old}", where=str(old), remedy="leave the rewire out")
        matched = False
        for user in chosen:
            if user == new.id and users is None:
                # a node inserted after `old` reads it; rewiring that use would tie it to itself
                continue
            matched |= self._rewire_user(user, old, new, is_explicit=users is not None)
        if not matched:
            raise DeltaError(
                f"nothing but {new.id} uses {old}",
                where=str(old),
                remedy="name the users to rewire",
            )

    def put_constant(self, name: str, constant: Constant) -> None:
        """Adds the constant or replaces its value; a tied name stands for the name it is tied to."""
        name = self.aliases.get(name, name)
        self._check_name(name)
        known = self.base.constants.get(name)
        self.constants[name] = known if known == constant else constant  # one copy of one content
        self._touched_consts.add(name)

    def drop_constant(self, name: str) -> None:
        """Drops the constant and every name tied to it."""
        if name not in self.constants:
            raise UnknownConstantError(
                f"no constant {name!r}", where=name, remedy=nearest(name, self.known_constants())
            )
        del self.constants[name]
        self._touched_consts.add(name)
        for alias in {*self.base.aliases, *self._touched_aliases}:
            if self.aliases.get(alias) == name:
                del self.aliases[alias]
                self._touched_aliases.add(alias)

    def add_alias(self, alias: str, name: str) -> None:
        """Makes `alias` another name of the constant `name`; a name stands for one constant only."""
        name, known = self.aliases.get(name, name), self.aliases.get(alias)
        if known == name:
            return
        if alias in self.constants or known is not None:
            raise DuplicateNodeError(
                f"{alias!r} is {f'tied to {known!r}' if known else 'a constant'} already",
                where=alias,
                remedy="choose another name, or drop that one in the same delta",
            )
        self.aliases[alias] = name
        self._touched_aliases.add(alias)

    def add_input(
        self,
        name: str,
        type_: TensorType,
        position: int | None = None,
        symbols: Iterable[Symbol] = (),
    ) -> None:
        """Adds a model input at `position` (None: at the end); `symbols` gives ranges to dims that
        are new.
        """
        self._check_free(name)
        items = list(self.inputs.items())
        items.insert(len(items) if position is None else position, (name, type_))
        self.inputs = dict(items)
        self._touched_uses.add(name)
        ranges = {symbol.name: symbol for symbol in symbols}
        self.symbols = tuple(ranges.get(symbol.name, symbol) for symbol in self.symbols)
        known = {symbol.name for symbol in self.symbols}
        wanted = sorted(set().union(*(symbols_of(dim) for dim in type_.shape)) - known)
        self.symbols = (*self.symbols, *(ranges.get(name, Symbol(name)) for name in wanted))

    def drop_input(self, name: str) -> None:
        """Drops a model input that nothing uses any more."""
        if name not in self.inputs:
            raise UnknownNodeError(
                f"no input {name!r}", where=name, remedy=nearest(name, self.inputs)
            )
        del self.inputs[name]
        self._touched_uses.add(name)
        # At once, not in `finish`: an input added later in the delta brings its own ranges, as it
        # would in a delta of its own.
        self._drop_unused_symbols()

    def set_outputs(self, outputs: tuple[tuple[str, Ref], ...]) -> None:
        """Makes `outputs`, in this order, the model's outputs."""
        if len({name for name, _ in outputs}) != len(outputs):
            raise DeltaError(
                "two outputs have the same name", where="outputs", remedy="give each its own name"
            )
        for name, ref in self.outputs:
            self._count(self.users, ref.id, OUTPUT_PREFIX + name, -1)
        for name, ref in outputs:
            self._count(self.users, ref.id, OUTPUT_PREFIX + name, +1)
        self.outputs = outputs

    # -- questions

    def get_node(self, id: str) -> Node:
        """The node called `id` as it stands now."""
        node: Node | None = self.nodes.get(id)
        if node is None:
            raise UnknownNodeError(
                f"no node {id!r}", where=id, remedy=nearest(id, self.known_values())
            )
        return node

    def order_key(self, id: str) -> tuple[int, str]:
        """The sort key of a value by its place before the edits; values that are new sort last."""
        return (
            self.base.order_key(id)
            if id in self.base.labels or id not in self.nodes
            else (1 << 1024, id)
        )

    def type_of(self, ref: Ref) -> ValueType | None:
        """The type a value had before the edits; None for a value that is new."""
        if self._types is None:
            raise DeltaError(
                "this edit needs types", where=ref.id, remedy="apply it with the graph's facts"
            )
        return (
            self._types(ref)
            if ref.id in self.base.nodes or ref.id in dict(self.base.inputs)
            else None
        )

    def aliases_of(self, name: str) -> list[str]:
        """The other names of the constant `name`."""
        known = {*self.base.aliases, *self._touched_aliases}
        return sorted(alias for alias in known if self.aliases.get(alias) == name)

    def known_values(self) -> list[str]:
        """The ids of nodes and inputs, for error messages. O(n)."""
        ids = {**dict.fromkeys(self.base.nodes), **self._touched_nodes}
        return [*(id for id in ids if id in self.nodes), *self.inputs]

    def known_constants(self) -> list[str]:
        """The names of constants and their aliases, for error messages. O(n)."""
        names = {*self.base.constants, *self._touched_consts, *self.base.aliases}
        return sorted(name for name in names if self.aliases.get(name, name) in self.constants)

    # -- finish

    def finish(self) -> Graph:
        """The graph as edited; checks everything touched. Raises the DeltaError that says what is
        wrong.
        """
        self._check_references()
        self._fix_order()
        self._drop_unused_symbols()
        return Graph(
            self.name,
            self.nodes.finish(),
            tuple(self.inputs.items()),
            self.outputs,
            self.constants.finish(),
            self.aliases.finish(),
            self.symbols,
            self.users.finish(),
            self.const_users.finish(),
            self.labels.finish(),
            self._digest(),
        )

    def change(self, graph: Graph) -> Change:
        """What `graph`, finished from this draft, differs in from the base; edits that cancel out
        are left out.
        """
        base = self.base
        nodes = {
            id
            for id in self._touched_nodes
            if id in graph.nodes and graph.nodes[id] != base.nodes.get(id)
        }
        removed = {id for id in self._touched_nodes if id in base.nodes and id not in graph.nodes}
        old_inputs, new_inputs = dict(base.inputs), dict(graph.inputs)
        inputs = {
            n
            for n in old_inputs.keys() | new_inputs.keys()
            if old_inputs.get(n) != new_inputs.get(n)
        }
        constants = {
            n for n in self._touched_consts if base.constants.get(n) != graph.constants.get(n)
        }
        for alias in self._touched_aliases:
            tied = {base.aliases.get(alias), graph.aliases.get(alias)}
            constants |= {name for name in tied if name is not None} if len(tied) > 1 else set()
        return Change(
            frozenset(nodes),
            frozenset(removed),
            frozenset(id for id in self._touched_uses if base.users.get(id) != graph.users.get(id)),
            frozenset(
                id
                for id in self._relabelled
                if base.labels.get(id) != graph.labels.get(id) and id in graph.nodes
            ),
            frozenset(constants),
            frozenset(inputs),
            base.outputs != graph.outputs,
        )

    # -- helpers

    def _drop_unused_symbols(self) -> None:
        used = set().union(
            *(symbols_of(dim) for type_ in self.inputs.values() for dim in type_.shape)
        )
        self.symbols = tuple(
            sorted((s for s in self.symbols if s.name in used), key=lambda s: s.name)
        )

    def _check_free(self, id: str) -> None:
        self._check_name(id)
        if id in self.nodes or id in self.inputs:
            raise DuplicateNodeError(
                f"{id!r} exists already",
                where=id,
                remedy="choose another id, or use set_attr or rewire",
            )

    def _check_name(self, name: str) -> None:
        bad = (
            not name
            or len(name) > NAME_CHARS_MAX
            or any(c.isspace() or c in "$,()[]{}'\"=" for c in name)
        )
        if bad or name.startswith(("@", OUTPUT_PREFIX)):
            remedy = (
                f"use at most {NAME_CHARS_MAX} characters "
                "without spaces, quotes, brackets, commas, = or $"
            )
            raise DeltaError(f"{name!r} is not a name", where=name[:80], remedy=remedy)

    def _rewire_user(self, user: str, old: Ref, new: Ref, *, is_explicit: bool) -> bool:
        if user.startswith(OUTPUT_PREFIX):
            name = user.removeprefix(OUTPUT_PREFIX)
            changed = tuple(
                (n, new if n == name and ref == old else ref) for n, ref in self.outputs
            )
            if changed == self.outputs and is_explicit:
                raise DeltaError(
                    f"output {name!r} is not {old}",
                    where=user,
                    remedy="see the outputs with `graphoptctl show`",
                )
            matched = changed != self.outputs
            self.set_outputs(changed)
            return matched
        node = self.get_node(user)
        changed_node = node.with_args({old: new})
        if changed_node is node:
            if is_explicit:
                raise DeltaError(
                    f"{user} does not use {old}",
                    where=user,
                    remedy=f"it uses {', '.join(map(str, node.refs))}",
                )
            return False  # it uses another output of the same node
        self.replace_node(changed_node)
        return True

    def _use(self, node: Node, sign: int) -> None:
        for ref in node.refs:
            self._count(self.users, ref.id, node.id, sign)
            if sign > 0:
                self._new_edges.add((ref.id, node.id))
        for name in node.consts:
            self._count(self.const_users, self.aliases.get(name, name), node.id, sign)

    def _count(
        self,
        index: "immutables.MapMutation[str, immutables.Map[str, int]]",
        key: str,
        user: str,
        sign: int,
    ) -> None:
        counts = index.get(key, _EMPTY)
        count = counts.get(user, 0) + sign
        counts = counts.set(user, count) if count else counts.delete(user)
        if counts:
            index[key] = counts
        else:
            del index[key]
        if index is self.users:
            self._touched_uses.add(key)

    def _check_references(self) -> None:
        for id in self._touched_nodes:
            node = self.nodes.get(id)
            if node is None:
                if id in self.users:
                    used = ", ".join(sorted(self.users[id]))
                    raise NodeInUseError(
                        f"remove {id}: still used by {used}",
                        where=id,
                        remedy="rewire or remove them in the same delta",
                    )
                continue
            for ref in node.refs:
                self._check_value(ref, id)
            for name in node.consts:
                if self.aliases.get(name, name) not in self.constants:
                    remedy = nearest(name, self.known_constants()) or "put it in the same delta"
                    raise UnknownConstantError(
                        f"{id} uses the constant {name!r}, which does not exist",
                        where=id,
                        remedy=remedy,
                    )
        for name, ref in self.outputs:
            self._check_value(ref, OUTPUT_PREFIX + name)
        for id in self._touched_uses:
            if id in self.users and id not in self.nodes and id not in self.inputs:
                used = ", ".join(sorted(self.users[id]))
                raise NodeInUseError(
                    f"{id} does not exist but is used by {used}",
                    where=id,
                    remedy="rewire them in the same delta",
                )
        for name in self._touched_consts:
            if name not in self.constants and name in self.const_users:
                used = ", ".join(sorted(self.const_users[name]))
                raise NodeInUseError(
                    f"drop constant {name}: still used by {used}",
                    where=name,
                    remedy="rewire or remove them first",
                )

        self._check_aliases()

    def _check_aliases(self) -> None:
        """No node may still use a tied name that went away: its constant may exist again without
        it.
        """
        for alias in self._touched_aliases:
            target = self.base.aliases.get(alias)
            if target is None or alias in self.aliases or alias in self.constants:
                continue
            used = [
                user
                for user in self.const_users.get(target, _EMPTY)
                if alias in self.get_node(user).consts
            ]
            if used:
                raise NodeInUseError(
                    f"{alias} is tied to {target} no longer but is used by {', '.join(sorted(used))}",
                    where=alias,
                    remedy="tie it again in the same delta, or remove them first",
                )

    def _check_value(self, ref: Ref, user: str) -> None:
        if ref.id not in self.nodes and ref.id not in self.inputs:
            known = self.known_values()
            raise UnknownNodeError(
                f"{user} uses {ref}, which does not exist",
                where=user,
                remedy=nearest(ref.id, known),
            )

    def _operands(self, id: str) -> list[str]:
        return [ref.id for ref in self.nodes[id].refs if ref.id in self.nodes]

    def _users(self, id: str) -> list[str]:
        return [user for user in self.users.get(id, _EMPTY) if user in self.nodes]

    def _fix_order(self) -> None:
        for id in self._touched_nodes:
            if id not in self.nodes and id in self.labels:
                del self.labels[id]
        fresh = [id for id in self._touched_nodes if id in self.nodes and id not in self.labels]
        edges = sorted(edge for edge in self._new_edges if self._is_edge(*edge))
        moved = update_labels(
            self.labels, fresh, edges, self._operands, self._users, self._by_label
        )
        self._relabelled.update(moved)

    def _is_edge(self, source: str, target: str) -> bool:
        node = self.nodes.get(target)
        return (
            node is not None and source in self.nodes and any(ref.id == source for ref in node.refs)
        )

    def _by_label(self) -> list[str]:
        """The nodes of the base that are still there, in its order."""
        return sorted((id for id in self.base.nodes if id in self.nodes), key=self.base.order_key)

    def _digest(self) -> int:
        base = self.base
        total = base.digest
        for id in self._touched_nodes:
            old, new = base.nodes.get(id), self.nodes.get(id)
            total += (new.digest if new else 0) - (old.digest if old else 0)
        for name in self._touched_consts:
            total += const_digest(name, self.constants.get(name)) - const_digest(
                name, base.constants.get(name)
            )
        for alias in self._touched_aliases:
            total += alias_digest(alias, self.aliases.get(alias)) - alias_digest(
                alias, base.aliases.get(alias)
            )
        total += frame_digest(tuple(self.inputs.items()), self.outputs, self.symbols)
        total -= frame_digest(base.inputs, base.outputs, base.symbols)
        return total % HASH_MODULUS


_EMPTY: "immutables.Map[str, int]" = immutables.Map()
