"""Regions: what one block computes, told apart from where it stands and from its weights.

The structure key of a region is a canonical text of its nodes, numbered by a depth-first walk from
its exits in operand order; operands are ordered, so this takes no isomorphism search. Values from
outside, constants and symbols are numbered as they are met and described by type alone, so the
twelve layers of an encoder share one key, and an edit upstream leaves the keys downstream as they
were. Regions in a row make one of theirs: its key is that of their keys and of what each reads from
which, so that it takes the regions and not their nodes.
"""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from graphopt.dims import Dim, Expr, substitute, symbol, symbols_of
from graphopt.graph import Arg, Const, Graph, Node, Ref
from graphopt.types import SymIntType, TensorType, ValueType

Types = Callable[[Ref], ValueType]


@dataclass(frozen=True, slots=True)
class Region:
    """A block ready to be given to a backend.

    `order` lists its nodes, operands first. `reads`, `consts` and `symbols` are what it takes from
    outside, `exits` what it hands out, each in canonical order: two regions of equal `key` differ
    only in these names.
    """

    key: str
    order: tuple[str, ...]
    reads: tuple[Ref, ...]
    consts: tuple[str, ...]
    symbols: tuple[str, ...]
    exits: tuple[Ref, ...]
    made: tuple[str, ...] = ()


def build_region(
    graph: Graph, types: Types, exits: tuple[Ref, ...], is_inside: Callable[[str], bool]
) -> Region:
    """The region that computes `exits` from values outside; `is_inside` tells which nodes belong to
    it. O(nodes of the region).
    """
    walk = _Walk(graph, types, is_inside)
    taps = [walk.visit(ref) for ref in exits]
    walk.text.append(f"exits {taps}")
    key = blake2b("\n".join(walk.text).encode(), digest_size=20).hexdigest()
    return Region(
        key, tuple(walk.order), tuple(walk.reads), tuple(walk.consts), tuple(walk.symbols), exits
    )


def join_regions(parts: Sequence[Region], exits: tuple[Ref, ...]) -> Region:
    """The region that computes what `parts` do, one after the other.

    Args:
        parts: what one reads of another is an exit of that one, which comes before it.
        exits: of theirs, those that are handed out.

    O(parts and what crosses between them), but for the list of nodes.
    """
    order: list[str] = []
    made: dict[Ref, int] = {}
    reads: dict[Ref, int] = {}
    consts: dict[str, int] = {}
    symbols: dict[str, int] = {}
    # How many numbers a part adds, and what for, its key says
    numbers = array("q")
    for part in parts:
        order += part.order
        for ref in part.reads:
            source = made.get(ref)
            numbers.append(-1 - reads.setdefault(ref, len(reads)) if source is None else source)
        numbers.extend([consts.setdefault(name, len(consts)) for name in part.consts])
        numbers.extend([symbols.setdefault(name, len(symbols)) for name in part.symbols])
        for ref in part.exits:
            made[ref] = len(made)
    numbers.extend([made[ref] for ref in exits])
    text = " ".join(["run", *(part.key for part in parts), ""]).encode()
    key = blake2b(text + numbers.tobytes(), digest_size=20).hexdigest()
    return Region(key, tuple(order), tuple(reads), tuple(consts), tuple(symbols), exits)


class _Walk:
    """The depth-first walk; `text` is what the key is a hash of."""

    def __init__(self, graph: Graph, types: Types, is_inside: Callable[[str], bool]) -> None:
        self.graph = graph
        self.types = types
        self.is_inside = is_inside
        self.text: list[str] = []
        self.order: dict[str, int] = {}
        self.reads: dict[Ref, int] = {}
        self.consts: dict[str, int] = {}
        self.symbols: dict[str, Dim] = {}

    def visit(self, root: Ref) -> str:
        """Numbers everything `root` needs, operands first, and returns how it is written."""
        stack = [root.id] if self._is_new(root) else []
        while stack:
            id = stack[-1]
            if id in self.order:
                stack.pop()
                continue
            node = self.graph.nodes[id]
            waiting = [ref.id for ref in reversed(node.refs) if self._is_new(ref)]
            if waiting:
                stack.extend(waiting)
                continue
            stack.pop()
            self.text.append(f"{node.op} {self._arguments(node)}")
            self.order[id] = len(self.order)
        return self._operand(root)

    def _is_new(self, ref: Ref) -> bool:
        if ref.id in self.order or not self.is_inside(ref.id):
            return False
        return not isinstance(self.types(ref), SymIntType)

    def _arguments(self, node: Node) -> str:
        keywords = "".join(f" {name}={self._arg(value)}" for name, value in node.kwargs)
        return f"{[self._arg(arg) for arg in node.args]}{keywords}"

    def _arg(self, arg: Arg) -> str:
        if isinstance(arg, Ref):
            return self._operand(arg)
        if isinstance(arg, Const):
            name = self.graph.aliases.get(arg.name, arg.name)
            if name not in self.consts:
                self.consts[name] = len(self.consts)
                type_ = self.graph.constants[name].type
                self.text.append(f"w{self.consts[name]} {type_}")
            return f"w{self.consts[name]}"
        if isinstance(arg, tuple):
            return f"({', '.join(map(self._arg, arg))})"
        return repr(arg)

    def _operand(self, ref: Ref) -> str:
        type_ = self.types(ref)
        if isinstance(type_, SymIntType):
            return f"int {self._dim(type_.value)}"
        if ref.id in self.order:
            return f"v{self.order[ref.id]}:{ref.idx}"
        if ref not in self.reads:
            self.reads[ref] = len(self.reads)
            assert isinstance(type_, TensorType)
            shape = ",".join(map(self._dim, type_.shape))
            self.text.append(f"x{self.reads[ref]} {type_.dtype}[{shape}]{type_.layout}")
        return f"x{self.reads[ref]}"

    def _dim(self, dim: Dim) -> str:
        if not isinstance(dim, Expr):
            return str(dim)
        for name in sorted(symbols_of(dim)):
            self.symbols.setdefault(name, symbol(f"s{len(self.symbols)}"))
        return str(substitute(dim, self.symbols))
