"""Slice pushdown: compute only the rows that somebody reads.

A classifier reads the first token of its encoder's result, a language model that is asked for the
next token the last position. Demand flows backward: a value that is read through one slice alone
needs that slice of its operands, as far as the ops keep rows apart (`row_rules`), up to and into the
query side of attention. Keys and values are read whole, so the pushdown ends there by itself.

The law: every exit keeps its value. A reader that wants everything undoes the pushdown as far as it
reaches, because demand is a function of all readers. Deliberately absent: several different slices
of one value (computing both would have to be weighed), and rows that differ between batch entries.
"""

from dataclasses import dataclass
from typing import Any

from graphopt.analysis.facts import Facts
from graphopt.analysis.neighbours import Neighbours
from graphopt.analysis.regions import Region
from graphopt.delta import AddNode, RemoveNode
from graphopt.dims import bounds
from graphopt.graph import Arg, Node, Ref
from graphopt.rewrite.rewrite import Rewrite, Sketch
from graphopt.rewrite.row_rules import Needs, Operand, Rows, Types, needs

# Ops whose work shrinks with their rows by more than a slice costs.
HEAVY = frozenset(
    f"aten.{name}"
    for name in (
        "linear.default", "addmm.default", "mm.default", "bmm.default", "matmul.default",
        "scaled_dot_product_attention.default",
    )
)  # fmt: skip
_TO_THE_END = 2**62  # exporters write the largest integer


@dataclass(frozen=True, slots=True)
class Demand:
    """What is read of the values of a region.

    `rows` holds the values of which only some rows are read *and* that can be computed for these
    rows alone, with what each then needs; every other value is computed whole. `cuts` are the
    nodes that read such a value by taking the rows out of it.
    """

    rows: dict[str, Rows]
    needs: dict[str, Needs]
    cuts: dict[str, Rows]
    walls: dict[str, str]  # nodes of which only rows are read, and that compute everything: why


def demand(facts: Facts, region: Region) -> Demand:
    """The demand on every node of a region: one backward pass, O(nodes)."""
    near = Neighbours(facts, region)
    exits = {ref.id for ref in region.exits}
    found = Demand({}, {}, {}, {})
    asked: dict[str, dict[str, Rows]] = {}  # value -> user -> the rows it reads
    for id in reversed(region.order):
        node = near.nodes[id]
        rows = None if id in exits or len(facts.types[id]) > 1 else _agreed(asked, near, id)
        if rows is not None:
            wanted = needs(node, facts, rows)
            if wanted is None:
                found.walls[id] = f"{node.op} mixes the rows of dim {rows.dim}"
            else:
                found.rows[id], found.needs[id] = rows, wanted
                for operand, part in wanted.rows.items():
                    if isinstance(operand, Ref):
                        asked.setdefault(operand.id, {})[id] = part
                continue
        cut = _cut_of(facts, node)
        if cut is not None:
            found.cuts[id] = cut
            asked.setdefault(node.args[0].id, {})[id] = cut
    return found


def push_rows(facts: Facts, region: Region) -> Rewrite:
    """The pass: narrows what `demand` finds, where something heavy is among it."""
    found = demand(facts, region)
    sketch = Sketch(facts.graph)
    for id, reason in found.walls.items():
        sketch.decline(id, reason)
    if not _heavy(facts, found):
        for id in found.rows:
            sketch.decline(id, "nothing heavier than a slice would be saved")
        return sketch.rewrite()
    return _Narrowing(facts, region, found, sketch).run()


def narrowed(facts: Facts, region: Region) -> list[str]:
    """The heavy nodes of which `push_rows` would compute some rows alone."""
    return _heavy(facts, demand(facts, region))


def _heavy(facts: Facts, found: Demand) -> list[str]:
    return [id for id in found.rows if facts.graph.nodes[id].op in HEAVY]


def _agreed(asked: dict[str, dict[str, Rows]], near: Neighbours, id: str) -> Rows | None:
    """The rows that every reader of `id` reads, None when they differ or one reads everything."""
    readers = near.users(Ref(id))
    parts = asked.get(id, {})
    if not readers or any(reader.id not in parts for reader in readers):
        return None
    first, *others = (parts[reader.id] for reader in readers)
    return first if all(other == first for other in others) else None


def _cut_of(facts: Facts, node: Node) -> Rows | None:
    """The rows that a slice, select or index_select takes of its operand, if that is some of them."""
    if node.op not in ("aten.slice.Tensor", "aten.select.int", "aten.index_select.default"):
        return None
    x = node.args[0]
    if not isinstance(x, Ref) or x.idx != 0:
        return None
    bound, shape = node.bound(), Types(facts).shape(x)
    dim = bound["dim"] % len(shape)
    size = shape[dim]
    ranges = {symbol.name: (symbol.min, symbol.max) for symbol in facts.graph.symbols}
    least = bounds(size, ranges)[0] or 0
    if node.op == "aten.index_select.default":
        index = bound["index"]
        count = Types(facts).shape(index)
        known = count[0] if len(count) == 1 else None
        return Rows(dim, 0, known, index) if isinstance(known, int) and known < least else None
    span = _select(bound) if node.op == "aten.select.int" else _slice(bound, size)
    if span is None:
        return None
    start, length = span
    reach = -start if start < 0 else start + length
    if length < 1 or reach > least or size == length:
        return None
    if isinstance(size, int) and start < 0:
        start += size
    return Rows(dim, start, length)


def _select(bound: dict[str, Any]) -> tuple[int, int] | None:
    index = bound["index"]
    return (index, 1) if isinstance(index, int) else None


def _slice(bound: dict[str, Any], size: object) -> tuple[int, int] | None:
    """Start and length, where both are known whatever the size of the dim."""
    start, end = bound["start"], bound["end"]
    start = 0 if start is None else start
    if bound["step"] != 1 or not isinstance(start, int):
        return None
    if end is None or (isinstance(end, int) and end >= _TO_THE_END):
        if start < 0:
            return start, -start
        return (start, size - start) if isinstance(size, int) else None
    if not isinstance(end, int):
        return None
    if isinstance(size, int):
        start, end = (at + size if at < 0 else at for at in (start, end))
        return start, min(end, size) - start
    return (start, end - start) if (start < 0) == (end < 0) else None


class _Narrowing:
    """The delta: narrow nodes beside the whole ones, slices where narrow meets whole."""

    def __init__(self, facts: Facts, region: Region, found: Demand, sketch: Sketch) -> None:
        self.nodes = facts.graph.nodes
        self.region = region
        self.found = found
        self.sketch = sketch
        self.narrow: dict[str, str] = {}  # node -> its narrow twin
        self.slices: dict[tuple[Operand, Rows], Ref] = {}

    def run(self) -> Rewrite:
        for id in self.region.order:
            if id in self.found.rows:
                self._narrow(id)
            elif id in self.found.cuts and self.nodes[id].args[0].id in self.narrow:
                self._settle(id)
        return self.sketch.rewrite()

    def _narrow(self, id: str) -> None:
        node, wanted = self.nodes[id], self.found.needs[id]
        replaced = {operand: self._rows_of(operand, rows) for operand, rows in wanted.rows.items()}
        name = self.sketch.name(id, "rows")
        narrowed = node.with_args(replaced)
        args, kwargs = narrowed.args, narrowed.kwargs
        if wanted.arguments:
            bound = {**narrowed.bound(), **wanted.arguments}
            params = node.spec.params
            args = tuple(bound[param.name] for param in params if not param.is_keyword)
            kwargs = tuple((param.name, bound[param.name]) for param in params if param.is_keyword)
        self.sketch.edit(AddNode(name, node.op, args, kwargs))
        self.sketch.comes_from(name, [id])
        self.narrow[id] = name

    def _rows_of(self, operand: Operand, rows: Rows) -> Ref:
        """The rows of an operand: its narrow twin, or a slice of the whole."""
        if isinstance(operand, Ref) and operand.id in self.narrow:
            return Ref(self.narrow[operand.id])
        known = self.slices.get((operand, rows))
        if known is None:
            is_node = isinstance(operand, Ref) and operand.id in self.nodes
            base = operand.id if isinstance(operand, Ref) else operand.name
            name = self.sketch.name(base, "slice")
            self.sketch.edit(_take(name, operand, rows))
            self.sketch.comes_from(name, [base] if is_node else [])
            known = self.slices[operand, rows] = Ref(name)
        return known

    def _settle(self, id: str) -> None:
        """The node that took the rows out finds nothing else there any more."""
        node, rows = self.nodes[id], self.found.cuts[id]
        twin = Ref(self.narrow[node.args[0].id])
        self.sketch.edit(RemoveNode(id))
        if node.op == "aten.select.int":
            self.sketch.edit(AddNode(id, node.op, (twin, rows.dim, 0)))
        else:
            self.sketch.edit(AddNode(id, "aten.slice.Tensor", (twin, rows.dim, 0, rows.length)))
        self.sketch.comes_from(id, [id])


def _take(name: str, operand: Operand, rows: Rows) -> AddNode:
    if rows.index is not None:
        return AddNode(name, "aten.index_select.default", (operand, rows.dim, rows.index))
    end: Arg = rows.start + rows.length
    end = None if end == 0 else end  # the last ones, counted from the end
    return AddNode(name, "aten.slice.Tensor", (operand, rows.dim, rows.start, end))
