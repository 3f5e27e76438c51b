"""The model as an immutable value: nodes, inputs, outputs and constants, with structural sharing.

A `Graph` never changes; `graphopt.draft.Draft` makes the next one, copying only what an edit
touches. Beside the model itself a graph keeps three indexes that are functions of it: who uses each
value, who uses each constant, and a sparse topological label for each node. Labels are not part of
the value: two graphs are equal when name and content are equal, however they came to be.

Deliberately absent: types (`graphopt.analysis` infers them), devices, execution order.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from os import PathLike
from typing import Any

import immutables

from graphopt.errors import UnknownConstantError, UnknownNodeError, nearest
from graphopt.ops import OpSpec, get_spec, same_literal
from graphopt.types import TensorType

HASH_MODULUS = 1 << 256


@dataclass(frozen=True, slots=True)
class Ref:
    """A value: output `idx` of the node or input called `id`."""

    id: str
    idx: int = 0

    def __str__(self) -> str:
        return f"${self.id}" if self.idx == 0 else f"${self.id}:{self.idx}"


@dataclass(frozen=True, slots=True)
class Const:
    """A use of the constant called `name`."""

    name: str

    def __str__(self) -> str:
        return f"@{self.name}"


Arg = Any  # None | bool | int | float | str | Ref | Const | tuple[Arg, ...]


class Node:
    """One op applied to arguments, immutable. `args` follow the schema's positional parameters,
    trailing defaults left out.
    """

    __slots__ = ("_digest", "args", "consts", "id", "kwargs", "op", "refs", "spec")

    def __init__(
        self, id: str, op: str, args: tuple[Arg, ...], kwargs: tuple[tuple[str, Arg], ...] = ()
    ) -> None:
        self.id = id
        self.op = op
        self.args = args
        self.kwargs = kwargs
        self.spec: OpSpec = get_spec(op)
        refs: list[Ref] = []
        consts: list[str] = []
        for arg in (*args, *(value for _, value in kwargs)):
            _collect(arg, refs, consts)
        self.refs: tuple[Ref, ...] = tuple(refs)
        self.consts: tuple[str, ...] = tuple(consts)
        self._digest: int | None = None

    def bound(self) -> dict[str, Arg]:
        """Every parameter of the op by name, defaults filled in."""
        values = {param.name: param.default for param in self.spec.params}
        values |= {param.name: arg for param, arg in zip(self.spec.params, self.args, strict=False)}
        return values | dict(self.kwargs)

    def with_args(self, replace: Mapping[Ref | Const, Ref | Const]) -> "Node":
        """This node with uses replaced, or itself when it has none of them."""
        args = tuple(_replaced(arg, replace) for arg in self.args)
        kwargs = tuple((name, _replaced(value, replace)) for name, value in self.kwargs)
        if args == self.args and kwargs == self.kwargs:
            return self
        return Node(self.id, self.op, args, kwargs)

    @property
    def digest(self) -> int:
        """The content hash of this node, id included, as an integer."""
        if self._digest is None:
            self._digest = _hash("node", self.id, self.op, self.args, self.kwargs)
        return self._digest

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Node)
            and (self.id, self.op) == (other.id, other.op)
            and same_literal(self.args, other.args)
            and same_literal(self.kwargs, other.kwargs)
        )

    def __hash__(self) -> int:
        return hash((self.id, self.op))

    def __repr__(self) -> str:
        return f"<Node {self.id} = {self.op}>"


@dataclass(frozen=True, slots=True)
class Constant:
    """A tensor by content hash. `is_param` marks learned parameters; others are buffers and lifted
    tensors.

    `tensor` is the data (torch.Tensor, never written to); equality is by content.
    """

    digest: str
    type: TensorType
    is_param: bool
    tensor: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self.digest)

    def _key(self) -> tuple[Any, ...]:
        return (self.digest, self.type, self.is_param)


@dataclass(frozen=True, slots=True)
class Symbol:
    """A dynamic dim of the model's inputs and the values it may take; `max` None means unbounded."""

    name: str
    min: int = 1
    max: int | None = None


class Graph:
    """An immutable model graph; see the module docstring. Build one with `Graph.build`, edit it
    with deltas.
    """

    __slots__ = (
        "aliases",
        "const_users",
        "constants",
        "digest",
        "inputs",
        "labels",
        "name",
        "nodes",
        "outputs",
        "symbols",
        "users",
    )

    def __init__(
        self,
        name: str,
        nodes: "immutables.Map[str, Node]",
        inputs: tuple[tuple[str, TensorType], ...],
        outputs: tuple[tuple[str, Ref], ...],
        constants: "immutables.Map[str, Constant]",
        aliases: "immutables.Map[str, str]",
        symbols: tuple[Symbol, ...],
        users: "immutables.Map[str, immutables.Map[str, int]]",
        const_users: "immutables.Map[str, immutables.Map[str, int]]",
        labels: "immutables.Map[str, int]",
        digest: int,
    ) -> None:
        self.name = name
        self.nodes = nodes
        self.inputs = inputs
        self.outputs = outputs
        self.constants = constants
        self.aliases = aliases
        self.symbols = symbols
        self.users = users  # value owner -> users; an output called y is the user `output:y`
        self.const_users = const_users
        self.labels = labels  # node -> int, increasing along every edge
        self.digest = digest

    @property
    def hash(self) -> str:
        """The content hash of the graph, its name left out: 64 hex digits."""
        return f"{self.digest:064x}"

    def input_type(self, name: str) -> TensorType | None:
        """The declared type of input `name`, or None."""
        return next((type_ for input_name, type_ in self.inputs if input_name == name), None)

    def get_node(self, id: str) -> Node:
        """The node called `id`; UnknownNodeError with the nearest ids otherwise."""
        node = self.nodes.get(id)
        if node is None:
            raise UnknownNodeError(
                f"no node {id!r} in graph {self.name}", where=id, remedy=nearest(id, self.nodes)
            )
        return node

    def get_constant(self, name: str) -> Constant:
        """The constant called `name`, through its alias when it is a tied name;
        UnknownConstantError otherwise.
        """
        constant = self.constants.get(self.aliases.get(name, name))
        if constant is None:
            known = [*self.constants, *self.aliases]
            raise UnknownConstantError(
                f"no constant {name!r} in graph {self.name}",
                where=name,
                remedy=nearest(name, known),
            )
        return constant

    def order_key(self, id: str) -> tuple[int, str]:
        """The key that sorts values topologically; inputs come first."""
        return (self.labels.get(id, -1), id)

    def iter_nodes(self) -> Iterator[Node]:
        """All nodes in topological order. O(n log n): not for the live path."""
        for id in sorted(self.nodes, key=self.order_key):
            yield self.nodes[id]

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the graph as a bundle: see `graphopt.bundle.save_bundle`."""
        from graphopt.bundle import save_bundle  # bundles build on graphs

        save_bundle(self, path)

    def __len__(self) -> int:
        return len(self.nodes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Graph) and self.name == other.name and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __str__(self) -> str:
        from graphopt.text import print_graph  # a graph can be read without loading the printer

        return print_graph(self)

    def __repr__(self) -> str:
        return f"<Graph {self.name}: {len(self.nodes)} nodes, {self.hash[:12]}>"

    @classmethod
    def empty(cls, name: str) -> "Graph":
        """A graph with nothing in it."""
        none: Any = immutables.Map()
        return cls(name, none, (), (), none, none, (), none, none, none, 0)

    @classmethod
    def build(
        cls,
        name: str,
        nodes: Iterable[Node],
        inputs: Iterable[tuple[str, TensorType]],
        outputs: Iterable[tuple[str, Ref]],
        constants: Mapping[str, Constant],
        aliases: Mapping[str, str] | None = None,
        symbols: Iterable[Symbol] = (),
    ) -> "Graph":
        """A graph from its parts, checked as a delta would be. Nodes may come in any order. Raises
        DeltaError subclasses.
        """
        from graphopt.draft import Draft  # Draft builds on Graph

        draft = Draft(cls.empty(name))
        draft.symbols = tuple(symbols)
        for input_name, type_ in inputs:
            draft.add_input(input_name, type_)
        for const_name, constant in constants.items():
            draft.put_constant(const_name, constant)
        for alias, target in (aliases or {}).items():
            draft.add_alias(alias, target)
        for node in nodes:
            draft.add_node(node)
        draft.set_outputs(tuple(outputs))
        return draft.finish()


def part_digest(kind: str, *parts: Any) -> int:
    """The share of one part (an input, a constant, ...) in a graph's hash."""
    return _hash(kind, *parts)


def const_digest(name: str, constant: Constant | None) -> int:
    """The share of a constant in a graph's hash; 0 where there is none."""
    return (
        part_digest("const", name, constant.digest, str(constant.type), constant.is_param)
        if constant
        else 0
    )


def alias_digest(alias: str, name: str | None) -> int:
    """The share of a tied name in a graph's hash; 0 where there is none."""
    return part_digest("alias", alias, name) if name is not None else 0


def frame_digest(inputs: object, outputs: object, symbols: object) -> int:
    """The share of inputs, outputs and symbols in a graph's hash; 0 while there are none."""
    return part_digest("frame", inputs, outputs, symbols) if (inputs or outputs or symbols) else 0


def _hash(*parts: Any) -> int:
    data = repr(parts).encode()
    return int.from_bytes(blake2b(data, digest_size=32).digest(), "little")


def _collect(arg: Arg, refs: list[Ref], consts: list[str]) -> None:
    if isinstance(arg, Ref):
        refs.append(arg)
    elif isinstance(arg, Const):
        consts.append(arg.name)
    elif isinstance(arg, tuple):
        for item in arg:
            _collect(item, refs, consts)


def _replaced(arg: Arg, replace: Mapping[Ref | Const, Ref | Const]) -> Arg:
    if isinstance(arg, Ref | Const):
        return replace.get(arg, arg)
    if isinstance(arg, tuple):
        return tuple(_replaced(item, replace) for item in arg)
    return arg
