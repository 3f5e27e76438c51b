"""Macros that change what is connected to what."""

from collections.abc import Iterator
from dataclasses import dataclass

from graphopt.delta import AddInput, AddNode, DropInput, Primitive, RemoveNode, Rewire
from graphopt.dims import symbols_of
from graphopt.draft import OUTPUT_PREFIX, Draft
from graphopt.errors import DeltaError, TypeMismatchError, UnknownNodeError, nearest
from graphopt.graph import Arg, Ref, Symbol


@dataclass(frozen=True, slots=True)
class InsertAfter:
    """A new node takes over the users of `value`. Without `args` it reads `value` alone."""

    value: Ref
    id: str
    op: str
    args: tuple[Arg, ...] = ()
    kwargs: tuple[tuple[str, Arg], ...] = ()

    def expand(self, draft: Draft) -> Iterator[Primitive]:
        """One node, one rewire."""
        yield AddNode(self.id, self.op, self.args or (self.value,), self.kwargs)
        users = tuple(
            sorted(user for user in draft.users.get(self.value.id, ()) if user != self.id)
        )
        reading = tuple(user for user in users if _reads(draft, user, self.value))
        if not reading:
            raise DeltaError(
                f"nothing uses {self.value}", where=str(self.value), remedy="use add_node"
            )
        yield Rewire(self.value, Ref(self.id), reading)


@dataclass(frozen=True, slots=True)
class Bypass:
    """A node, or all nodes of a module, is left out: its users read what it read.

    The value taken instead must have the type of the value it replaces.
    """

    node: str

    def expand(self, draft: Draft) -> Iterator[Primitive]:
        """Rewires the users of the one value that leaves, then removes the nodes."""
        inside = _members(draft, self.node)
        leaving = {
            ref for id in inside for user in draft.users.get(id, ()) if user not in inside
            for ref in _read_refs(draft, user) if ref.id == id
        }  # fmt: skip
        if len(leaving) != 1:
            found = ", ".join(sorted(map(str, leaving))) or "none"
            raise DeltaError(
                f"{self.node} hands out {len(leaving)} values ({found}), a bypass needs exactly one",
                where=self.node,
                remedy="rewire them one by one",
            )
        out = leaving.pop()
        wanted = draft.type_of(out)
        entering = [
            ref
            for id in sorted(inside, key=draft.order_key)
            for ref in draft.get_node(id).refs
            if ref.id not in inside
        ]
        fitting = [ref for ref in dict.fromkeys(entering) if draft.type_of(ref) == wanted]
        if not fitting:
            types = ", ".join(f"{ref}: {draft.type_of(ref)}" for ref in dict.fromkeys(entering))
            raise TypeMismatchError(
                f"{self.node} makes {wanted}, and nothing it reads has that type",
                where=self.node,
                remedy=f"it reads {types}",
            )
        users = tuple(sorted(user for user in draft.users.get(out.id, ()) if user not in inside))
        yield Rewire(out, fitting[0], users)
        for id in sorted(inside, key=draft.order_key):
            yield RemoveNode(id)


@dataclass(frozen=True, slots=True)
class ReplaceRegion:
    """Nodes go, nodes come, and the users left over are rewired, in one edit."""

    remove: tuple[str, ...]
    add: tuple[AddNode, ...]
    rewire: tuple[Rewire, ...]

    def expand(self, draft: Draft) -> Iterator[Primitive]:
        """The new nodes first, then the rewires, then the removals."""
        reused = set(self.remove) & {node.id for node in self.add}
        yield from (RemoveNode(id) for id in sorted(reused))
        yield from self.add
        yield from self.rewire
        yield from (RemoveNode(id) for id in self.remove if id not in reused)


@dataclass(frozen=True, slots=True)
class SetShapeProfile:
    """The sizes that dynamic dims may take: requests outside are refused, plans may count on it."""

    symbols: tuple[Symbol, ...]

    def expand(self, draft: Draft) -> Iterator[Primitive]:
        """Declares the inputs that have these dims anew, with the new ranges."""
        known = {symbol.name for symbol in draft.symbols}
        for symbol in self.symbols:
            if symbol.name not in known:
                raise UnknownNodeError(
                    f"no dynamic dim {symbol.name!r}",
                    where=symbol.name,
                    remedy=nearest(symbol.name, known),
                )
            if symbol.max is not None and symbol.max < symbol.min:
                raise DeltaError(
                    f"{symbol.name}: {symbol.min} to {symbol.max} is empty",
                    where=symbol.name,
                    remedy="swap them",
                )
        names = {symbol.name for symbol in self.symbols}
        for position, (name, type_) in enumerate(list(draft.inputs.items())):
            if any(symbols_of(dim) & names for dim in type_.shape):
                yield DropInput(name)
                yield AddInput(name, type_, position, self.symbols)


def _members(draft: Draft, name: str) -> set[str]:
    """The node called `name`, or the nodes of the module path `name`."""
    if name in draft.nodes:
        return {name}
    found = {
        id
        for id in draft.known_values()
        if id in draft.nodes and id.startswith((name + ".", name + "/", name + "@"))
    }
    if not found:
        remedy = nearest(name, [*_module_paths(draft), *draft.known_values()])
        raise UnknownNodeError(f"no node or module {name!r}", where=name, remedy=remedy)
    return found


def _module_paths(draft: Draft) -> set[str]:
    """Every module path that some node id begins with."""
    paths: set[str] = set()
    for id in draft.known_values():
        parts = id.split("/")[0].split(".")
        paths.update(".".join(parts[:n]) for n in range(1, len(parts) + 1))
    return paths


def _read_refs(draft: Draft, user: str) -> tuple[Ref, ...]:
    if user.startswith(OUTPUT_PREFIX):
        return tuple(ref for name, ref in draft.outputs if OUTPUT_PREFIX + name == user)
    return draft.get_node(user).refs


def _reads(draft: Draft, user: str, value: Ref) -> bool:
    return value in _read_refs(draft, user)
