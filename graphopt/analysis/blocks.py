"""Blocks: the stretches of a graph between points where exactly one data value crosses.

A data node is a cut when every path of data values from the inputs to the outputs runs through it:
a node of the dominator chain. In a topological order these are exactly the positions that no other
value's life spans, whatever the order, because a node that lies on all paths is comparable with
every other node. So one sweep over an interval of labels finds the cuts in it, and an edit sweeps
only the blocks whose values' lives it changed. A value lives from its definition to its last data
user; the inputs live until the last node that reads one (or starts from parameters); a value nobody
reads further lives to the end, so that parallel heads stay in one block. An output that is also
read further is a tap and does not count.

Context nodes are in nobody's way. One whose users all lie in one block belongs to it; the others
form the context region, which runs first.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import immutables

from graphopt.analysis.propagate import operand_nodes, user_nodes
from graphopt.analysis.traits import FLOAT_INPUT, input_traits, is_data
from graphopt.graph import Graph

START = ""  # the entry of the first block
END = "$end"  # the exit of a last block that has no single one
CONTEXT = "$context"  # the home of context nodes that several blocks read

Key = tuple[int, str]
_FOREVER: Key = (1 << 1024, "")


@dataclass(frozen=True, slots=True)
class Block:
    """The data nodes after the cut `entry` up to the cut `exit`, in topological order. `exit` names
    the block.
    """

    entry: str
    exit: str
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BlockTable:
    """All blocks of a graph as a linked list, and each data node's block."""

    blocks: "immutables.Map[str, Block]" = immutables.Map()  # by exit
    next: "immutables.Map[str, str]" = immutables.Map()  # entry -> exit
    member: "immutables.Map[str, str]" = immutables.Map()  # data node -> exit of its block
    tail: str = ""  # exit of the last block

    def __iter__(self) -> Iterator[Block]:
        exit_ = self.next.get(START)
        while exit_ is not None:
            yield self.blocks[exit_]
            exit_ = self.next.get(exit_)

    def run(self, first: str, last: str) -> list[Block]:
        """The blocks from `first` to `last`, both by exit."""
        found = [self.blocks[first]]
        while found[-1].exit != last:
            found.append(self.blocks[self.next[found[-1].exit]])
        return found


class DataView:
    """The data nodes of a graph that reach an output, and their neighbourhood among themselves."""

    def __init__(
        self, graph: Graph, traits: "immutables.Map[str, int]", live: "immutables.Map[str, bool]"
    ) -> None:
        self.graph = graph
        self._traits = traits
        self._live = live

    def is_member(self, id: str) -> bool:
        """Whether `id` is a data node that reaches an output."""
        return is_data(self._traits.get(id, 0)) and self._live.get(id, False)

    def users(self, id: str) -> list[str]:
        """The data nodes that read `id`."""
        return [user for user in user_nodes(self.graph, id) if self.is_member(user)]

    def operands(self, id: str) -> list[str]:
        """The data nodes that `id` reads."""
        return [op for op in operand_nodes(self.graph, id) if self.is_member(op)]

    def is_root(self, id: str) -> bool:
        """Whether data enters the graph at `id`."""
        refs = self.graph.nodes[id].refs
        reads_input = any(
            r.id not in self.graph.nodes and input_traits(self.graph, r.id) & FLOAT_INPUT
            for r in refs
        )
        return reads_input or not self.operands(id)

    def reach(self, id: str) -> Key:
        """Where the life of `id` ends."""
        users = self.users(id)
        return max(map(self.graph.order_key, users)) if users else _FOREVER

    def has_one_value(self, id: str) -> bool:
        """Whether data nodes read at most one output of `id`."""
        nodes = self.graph.nodes
        return len({r.idx for user in self.users(id) for r in nodes[user].refs if r.id == id}) <= 1


@dataclass(frozen=True, slots=True)
class BlockUpdate:
    """The new table, and the exits of blocks that are `fresh`, `gone`, or the same and in another
    order among each other (`moved`).
    """

    table: BlockTable
    fresh: frozenset[str] = frozenset()
    gone: frozenset[str] = frozenset()
    moved: frozenset[str] = frozenset()


def update_blocks(
    table: BlockTable, old: DataView, new: DataView, touched: Iterable[str]
) -> BlockUpdate:
    """The blocks of the new graph, from those of the old one.

    `touched` are the nodes whose data neighbourhood, membership or label may differ. Work: the
    blocks between the first and the last one whose values' lives changed.
    """
    touched = set(touched)
    span = _affected(table, old, new, touched)
    if span is None:
        return BlockUpdate(table)
    stale = table.run(*span) if span[0] else []
    entry = stale[0].entry if stale else START
    last = stale[-1].exit if stale else None
    after = table.next.get(last) if last is not None else None
    members = {id for block in stale for id in block.nodes} | touched
    nodes = sorted(
        (id for id in members if id in new.graph.nodes and new.is_member(id)),
        key=new.graph.order_key,
    )
    made = _sweep(new, entry, nodes)
    kept = {block.exit: block for block in stale}
    blocks, links, member = table.blocks.mutate(), table.next.mutate(), table.member.mutate()
    for block in stale:
        del blocks[block.exit]
        links.pop(block.entry, None)
        for id in block.nodes:
            member.pop(id, None)
    for block in made:
        blocks[block.exit] = block
        links[block.entry] = block.exit
        for id in block.nodes:
            member[id] = block.exit
    if after is not None:  # the stretch ended at a cut, which stays one
        links[made[-1].exit if made else entry] = after
    now = {block.exit: block for block in made}
    before = [exit_ for exit_, block in kept.items() if now.get(exit_) == block]
    survivors = [exit_ for exit_, block in now.items() if kept.get(exit_) == block]
    tail = table.tail if after is not None else (made[-1].exit if made else entry)
    return BlockUpdate(
        BlockTable(blocks.finish(), links.finish(), member.finish(), tail),
        frozenset(now.keys() - set(survivors)), frozenset(kept.keys() - set(survivors)),
        frozenset(survivors if before != survivors else ()),
    )  # fmt: skip


def _affected(
    table: BlockTable, old: DataView, new: DataView, touched: set[str]
) -> tuple[str, str] | None:
    """The first and the last old block (by exit) to sweep again; ("", "") where there are none yet,
    None for nothing to do.
    """
    concerned: set[str] = set()
    from_start = to_end = False
    for view in (old, new):
        for id in touched:
            if id not in view.graph.nodes or not view.is_member(id):
                continue
            users = view.users(id)
            concerned.update((id, *users, *view.operands(id)))
            from_start |= view.is_root(id)
            to_end |= not users
    if not concerned:
        return None
    exits = {table.member[id] for id in concerned if id in table.member}
    if not table.blocks:
        return ("", "")
    positions = {exit_: _position(table, old.graph, exit_) for exit_ in exits}
    first = table.next[START] if from_start or not exits else min(exits, key=positions.__getitem__)
    last = table.tail if to_end or not exits else max(exits, key=positions.__getitem__)
    return first, last


def _position(table: BlockTable, graph: Graph, exit_: str) -> Key:
    return graph.order_key(table.blocks[exit_].nodes[0])


def _sweep(view: DataView, entry: str, nodes: list[str]) -> list[Block]:
    """Cuts the sorted `nodes` into blocks; `entry` is the cut before them."""
    key = view.graph.order_key
    spanned: Key = view.reach(entry) if entry else (-1, "")
    roots = [key(id) for id in nodes if view.is_root(id)]
    spanned = max([spanned, *roots])
    made: list[Block] = []
    pending: list[str] = []
    for id in nodes:
        pending.append(id)
        if spanned <= key(id) and view.has_one_value(id):
            made.append(Block(entry, id, tuple(pending)))
            entry, pending = id, []
        spanned = max(spanned, view.reach(id))
    if pending:
        made.append(Block(entry, END, tuple(pending)))
    return made
