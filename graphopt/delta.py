"""Deltas: the one way a graph changes.

A delta is a transaction of edits, all applied or none, and a pure function from one graph to the
next. The primitive edits are the closed union `Primitive`; macros (`graphopt.macros`) are edits
that expand into primitives against the graph they meet. Clients send deltas, passes return them,
the journal stores them expanded, undo inverts them.

Laws, proven in tests/property/test_delta_laws.py:
    apply(apply(g, a), b) == apply(g, compose(a, b))
    apply(apply(g, a), invert(a, g)) == g
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

from graphopt.constants import constant_of
from graphopt.dims import symbols_of
from graphopt.draft import Change, Draft
from graphopt.errors import (
    DeltaError,
    GraphoptError,
    LimitError,
    PreconditionError,
    UnknownNodeError,
    nearest,
)
from graphopt.graph import Arg, Constant, Graph, Node, Ref, Symbol
from graphopt.limits import EDITS_MAX
from graphopt.nodes import make_node
from graphopt.types import TensorType, ValueType


@dataclass(frozen=True, slots=True)
class AddNode:
    """A new node. `args` follow the op's positional parameters; references are `Ref` and `Const`."""

    id: str
    op: str
    args: tuple[Arg, ...] = ()
    kwargs: tuple[tuple[str, Arg], ...] = ()

    def apply(self, draft: Draft) -> None:
        """Adds the node to `draft`."""
        draft.add_node(make_node(self.id, self.op, self.args, dict(self.kwargs)))


@dataclass(frozen=True, slots=True)
class RemoveNode:
    """The node goes; whatever used it must be rewired or removed in the same delta."""

    id: str

    def apply(self, draft: Draft) -> None:
        """Removes the node from `draft`."""
        draft.remove_node(self.id)


@dataclass(frozen=True, slots=True)
class Rewire:
    """`users` (None: all) read `target` where they read `source`; `output:NAME` names a graph
    output.
    """

    source: Ref
    target: Ref
    users: tuple[str, ...] | None = None

    def apply(self, draft: Draft) -> None:
        """Rewires the uses in `draft`."""
        for ref in (self.source, self.target):
            if ref.id not in draft.nodes and ref.id not in draft.inputs:
                remedy = nearest(ref.id, draft.known_values())
                raise UnknownNodeError(f"no value {ref}", where=str(ref), remedy=remedy)
        draft.rewire(self.source, self.target, self.users)


@dataclass(frozen=True, slots=True)
class SetAttr:
    """One argument of a node, by the op schema's parameter name, gets another value."""

    node: str
    name: str
    value: Arg

    def apply(self, draft: Draft) -> None:
        """Replaces the argument in `draft`."""
        node = draft.get_node(self.node)
        idx = node.spec.param_idx(self.name)
        if idx is None:
            names = [param.name for param in node.spec.params]
            remedy = nearest(self.name, names) or f"its parameters are {', '.join(names)}"
            raise DeltaError(
                f"{node.op} has no parameter {self.name!r}", where=self.node, remedy=remedy
            )
        bound = node.bound() | {self.name: self.value}
        positional = [bound[param.name] for param in node.spec.params if not param.is_keyword]
        keywords = {param.name: bound[param.name] for param in node.spec.params if param.is_keyword}
        draft.replace_node(make_node(node.id, node.op, positional, keywords))


@dataclass(frozen=True, slots=True, init=False)
class PutConstant:
    """A constant gets a value, or appears. `is_param` None keeps the mark of an existing one (new
    ones are parameters).
    """

    name: str
    constant: Constant
    is_param: bool | None
    aliases: tuple[str, ...]

    def __init__(
        self,
        name: str,
        value: "Constant | torch.Tensor",
        is_param: bool | None = None,
        aliases: tuple[str, ...] = (),
    ) -> None:
        constant = value if isinstance(value, Constant) else constant_of(value)
        for attribute, given in (
            ("name", name),
            ("constant", constant),
            ("is_param", is_param),
            ("aliases", aliases),
        ):
            object.__setattr__(self, attribute, given)

    def apply(self, draft: Draft) -> None:
        """Puts the constant into `draft`."""
        old = draft.constants.get(draft.aliases.get(self.name, self.name))
        is_param = self.is_param if self.is_param is not None else (old.is_param if old else True)
        given = self.constant
        draft.put_constant(self.name, Constant(given.digest, given.type, is_param, given.tensor))
        for alias in self.aliases:
            draft.add_alias(alias, self.name)


@dataclass(frozen=True, slots=True)
class DropConstant:
    """A constant that nothing uses goes, with the names tied to it."""

    name: str

    def apply(self, draft: Draft) -> None:
        """Drops the constant from `draft`."""
        draft.drop_constant(self.name)


@dataclass(frozen=True, slots=True)
class AddInput:
    """A new model input, at `position` (None: last). `symbols` gives ranges to dims the graph does
    not know yet.
    """

    name: str
    type: TensorType
    position: int | None = None
    symbols: tuple[Symbol, ...] = ()

    def apply(self, draft: Draft) -> None:
        """Adds the input to `draft`."""
        draft.add_input(self.name, self.type, self.position, self.symbols)


@dataclass(frozen=True, slots=True)
class DropInput:
    """A model input that nothing uses goes."""

    name: str

    def apply(self, draft: Draft) -> None:
        """Drops the input from `draft`."""
        draft.drop_input(self.name)


@dataclass(frozen=True, slots=True)
class SetOutputs:
    """The model's outputs, by name and in order."""

    outputs: tuple[tuple[str, Ref], ...]

    def apply(self, draft: Draft) -> None:
        """Sets the outputs of `draft`."""
        draft.set_outputs(self.outputs)


Primitive = (
    AddNode
    | RemoveNode
    | Rewire
    | SetAttr
    | PutConstant
    | DropConstant
    | AddInput
    | DropInput
    | SetOutputs
)
PRIMITIVES = (
    AddNode,
    RemoveNode,
    Rewire,
    SetAttr,
    PutConstant,
    DropConstant,
    AddInput,
    DropInput,
    SetOutputs,
)


@runtime_checkable
class Macro(Protocol):
    """An edit that means primitives, depending on the graph it meets."""

    def expand(self, draft: Draft) -> Iterable[Primitive]:
        """The primitives this edit means in `draft`; reads the draft, never changes it. Raises
        DeltaError subclasses.
        """


Edit = Primitive | Macro


@dataclass(frozen=True, slots=True)
class Delta:
    """A transaction of edits. `if_revision` and `id` guard it: see `docs/GLOSSARY.md`."""

    edits: tuple[Edit, ...]
    graph: str | None = None
    if_revision: int | None = None
    id: str | None = None
    allow_interface_change: bool = False
    source: str = field(default="", compare=False)

    def __init__(
        self,
        edits: Iterable[Edit],
        graph: str | None = None,
        if_revision: int | None = None,
        id: str | None = None,
        allow_interface_change: bool = False,
        source: str = "",
    ) -> None:
        given: Mapping[str, Any] = {
            "edits": tuple(edits), "graph": graph, "if_revision": if_revision, "id": id,
            "allow_interface_change": allow_interface_change, "source": source,
        }  # fmt: skip
        for attribute, value in given.items():
            object.__setattr__(self, attribute, value)

    def check_revision(self, revision: int) -> None:
        """PreconditionError when `if_revision` names another revision than the current one."""
        if self.if_revision is not None and self.if_revision != revision:
            raise PreconditionError(
                f"the delta is for revision {self.if_revision}, the graph is at {revision}",
                where="if_revision",
                remedy="read the graph again and rebuild the delta, or leave if_revision out",
            )


@dataclass(frozen=True, slots=True)
class Applied:
    """A delta's outcome on the graph level: the next graph, what differs, and the primitives it
    came down to.
    """

    graph: Graph
    change: Change
    expansion: Delta


def apply(graph: Graph, delta: Delta) -> Graph:
    """The graph that `delta` makes of `graph`, which stays as it is. Raises DeltaError subclasses."""
    return apply_fully(graph, delta).graph


def apply_fully(
    graph: Graph,
    delta: Delta,
    types: Callable[[Ref], ValueType] | None = None,
    between: Callable[[], None] = lambda: None,
) -> Applied:
    """Like `apply`, and says what changed and what the macros expanded to. `types` answers macros
    that ask for a value's type; `between` is called between two pieces of work.
    """
    draft = Draft(graph, types)
    expansion: list[Primitive] = []
    for idx, edit in enumerate(delta.edits):
        try:
            for primitive in [edit] if isinstance(edit, PRIMITIVES) else list(edit.expand(draft)):
                primitive.apply(draft)
                expansion.append(primitive)
        except GraphoptError as error:
            error.where = f"edits[{idx}]{' ' + error.where if error.where else ''}"
            raise
        if len(expansion) > EDITS_MAX:
            raise LimitError(
                f"more than {EDITS_MAX} edits", where=f"edits[{idx}]", remedy="send several deltas"
            )
        between()
    after = draft.finish()
    between()
    expanded = Delta(
        expansion,
        delta.graph,
        delta.if_revision,
        delta.id,
        delta.allow_interface_change,
        delta.source,
    )
    return Applied(after, draft.change(after), expanded)


def invert(delta: Delta, graph: Graph) -> Delta:
    """The delta that takes `apply(graph, delta)` back to `graph`, to the same hash."""
    applied = apply_fully(graph, delta)
    return difference(applied.graph, graph, applied.change)


def compose(first: Delta, second: Delta) -> Delta:
    """The delta that does `first`, then `second`; the guards are those of `first`."""
    allow = first.allow_interface_change or second.allow_interface_change
    return Delta((*first.edits, *second.edits), first.graph, first.if_revision, first.id, allow)


def difference(old: Graph, new: Graph, change: Change | None = None) -> Delta:
    """Primitives that make `new` of `old`. `change` (between the two, either way round) limits the
    search to what it names.

    Without it every id is compared: O(n), by identity where the graphs share structure.
    """
    if change is None:
        nodes: Iterable[str] = {*old.nodes, *new.nodes}
        constants: Iterable[str] = {*old.constants, *new.constants}
    else:
        nodes, constants = change.nodes | change.removed, change.constants
    edits: list[Primitive] = []
    added: list[Node] = []
    for id in sorted(nodes, key=new.order_key):
        before, after = old.nodes.get(id), new.nodes.get(id)
        if before is after or before == after:
            continue
        if before is not None:
            edits.append(RemoveNode(id))
        if after is not None:
            added.append(after)
    frame = (old.outputs, old.inputs, old.symbols) != (new.outputs, new.inputs, new.symbols)
    if frame:
        edits.extend(_input_edits(old, new))
    edits.extend(_constant_edits(old, new, constants))
    edits.extend(AddNode(node.id, node.op, node.args, node.kwargs) for node in added)
    if frame:
        edits.append(SetOutputs(new.outputs))
    return Delta(edits, allow_interface_change=frame)


def _constant_edits(old: Graph, new: Graph, names: Iterable[str]) -> list[Primitive]:
    """Drops first, so that a tied name may pass from one constant to another."""
    drops: list[Primitive] = []
    puts: list[Primitive] = []
    before_tied, after_tied = _tied(old), _tied(new)
    for name in sorted(names):
        before, after = old.constants.get(name), new.constants.get(name)
        was, tied = before_tied.get(name, ()), after_tied.get(name, ())
        if before == after and was == tied:
            continue
        if before is not None and (after is None or not set(was) <= set(tied)):
            drops.append(DropConstant(name))
        if after is not None:
            puts.append(PutConstant(name, after, after.is_param, tied))
    return [*drops, *puts]


def _tied(graph: Graph) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for alias in sorted(graph.aliases):
        found[graph.aliases[alias]] = (*found.get(graph.aliases[alias], ()), alias)
    return found


def _input_edits(old: Graph, new: Graph) -> list[Primitive]:
    """Drops every input from the first difference on and adds the new ones: order is part of the
    interface, and so are ranges.
    """
    moved = {symbol.name for symbol in set(old.symbols) ^ set(new.symbols)}
    same = 0
    for before, after in zip(old.inputs, new.inputs, strict=False):
        if before != after or any(symbols_of(dim) & moved for dim in before[1].shape):
            break
        same += 1
    drops = [DropInput(name) for name, _ in old.inputs[same:]]
    return [
        *drops,
        *(AddInput(name, type_, None, new.symbols) for name, type_ in new.inputs[same:]),
    ]
