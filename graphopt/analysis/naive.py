"""The facts of a graph computed the plain way: whole graph, textbook algorithms, no memory of the
graph before.

This is the other side of `graphopt.analysis.check`. It shares no code with the incremental queries:
reachability instead of flags that flow along edges, networkx dominators instead of a sweep over
labels, sets of readers by walking every edge. It trusts nothing that a draft maintains (users,
labels, hash), only nodes, inputs, outputs and constants.

Deliberately absent: speed. O(nodes x blocks) in places; for tests and the verify mode.
"""

from collections.abc import Iterable, Iterator

import networkx as nx

from graphopt.analysis.blocks import CONTEXT, END
from graphopt.analysis.traits import CONTENT, FLOAT_INPUT, INTEGER, PARAM
from graphopt.dims import symbols_of
from graphopt.graph import HASH_MODULUS, Graph, Ref, part_digest

_SOURCE, _SINK = ("source",), ("sink",)  # no node id is a tuple


class Naive:
    """Everything `Facts` says about `graph`, under the same names where the same thing is meant;
    types come from elsewhere.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.edges: nx.DiGraph[str] = nx.DiGraph()
        self.edges.add_nodes_from(graph.nodes)
        self.edges.add_edges_from(
            (r.id, n.id) for n in graph.nodes.values() for r in n.refs if r.id in graph.nodes
        )
        self.queries = {id for id, node in graph.nodes.items() if is_query(node.op)}
        self.traits = self._traits()
        self.live = self._live()
        self.data = {
            id
            for id in self.live
            if self.traits[id] & FLOAT_INPUT or not (CONTENT | PARAM) & ~self.traits[id]
        }
        self.context = self.live - self.data - self.queries
        self.cuts, self.block_nodes = self._blocks()
        self.member = {id: exit_ for exit_, ids in self.block_nodes.items() for id in ids}
        self.homes = self._homes()

    def home(self, id: str) -> str | None:
        """The block, or CONTEXT, that computes `id`."""
        return self.member.get(id) or self.homes.get(id)

    def chain(self) -> list[str]:
        """The exits of all blocks, in order."""
        return [*self.cuts, *([END] if END in self.block_nodes else [])]

    def taps(self, home: str) -> list[Ref]:
        """The outputs that `home` hands out."""
        return [ref for _, ref in self.graph.outputs if self.home(ref.id) == home]

    def crossing(self) -> Iterator[tuple[Ref, str]]:
        """Each value that a home reads from another home or from the inputs, with the reading home."""
        for id, node in self.graph.nodes.items():
            home = self.home(id)
            if home is None:
                continue
            for ref in node.refs:
                if ref.id not in self.queries and self.home(ref.id) != home:
                    yield ref, home

    def readers(self) -> dict[Ref, set[str]]:
        """The homes that read a value from outside, cuts left out: only the block behind a cut
        reads it.
        """
        found: dict[Ref, set[str]] = {}
        for ref, home in self.crossing():
            if ref.id not in self.data:
                found.setdefault(ref, set()).add(home)
        return found

    def last_readers(self) -> dict[Ref, str]:
        """The last home, in execution order, that reads each value of `readers`."""
        order = {home: position for position, home in enumerate([CONTEXT, *self.chain()])}
        return {ref: max(homes, key=order.__getitem__) for ref, homes in self.readers().items()}

    def exits(self, home: str) -> tuple[Ref, ...]:
        """What a home hands out, in the order its region lists it."""
        read = {ref for ref, reader in self.crossing() if self.home(ref.id) == home}
        if home == CONTEXT:
            return tuple(sorted({*read, *self.taps(home)}, key=lambda r: (r.id, r.idx)))
        crossing = sorted((ref for ref in read if ref.id == home), key=lambda r: r.idx)
        return tuple(dict.fromkeys([*crossing, *self.taps(home)]))

    # -- helpers

    def _traits(self) -> dict[str, int]:
        graph = self.graph
        flags = {id: INTEGER if id in self.queries else 0 for id in graph.nodes}
        floats = {name for name, type_ in graph.inputs if type_.is_float}
        names = {name for name, _ in graph.inputs}
        sources = {
            CONTENT: {id for id, n in graph.nodes.items() if any(r.id in names for r in n.refs)},
            FLOAT_INPUT: {
                id for id, n in graph.nodes.items() if any(r.id in floats for r in n.refs)
            },
            PARAM: {
                id
                for id, n in graph.nodes.items()
                if any(graph.get_constant(c).is_param for c in n.consts)
            },
        }
        for flag, start in sources.items():
            for id in self._reach(start - self.queries, self.edges.successors):
                flags[id] |= flag
        return flags

    def _live(self) -> set[str]:
        wanted = {ref.id for _, ref in self.graph.outputs if ref.id in self.graph.nodes}
        found = self._reach(wanted - self.queries, self.edges.predecessors, through_queries=True)
        return found | wanted

    def _reach(
        self, start: Iterable[str], step: object, *, through_queries: bool = False
    ) -> set[str]:
        """What `start` reaches. Nothing flows out of a shape query; walking backwards one is
        reached and not walked through.
        """
        found, stack = set(start), list(start)
        while stack:
            id = stack.pop()
            if through_queries and id in self.queries:
                continue
            for other in step(id):  # type: ignore[operator]
                if other not in found and (through_queries or other not in self.queries):
                    found.add(other)
                    stack.append(other)
        return found

    def _blocks(self) -> tuple[list[str], dict[str, set[str]]]:
        if not self.data:
            return [], {}
        graph = self.graph
        floats = {name for name, type_ in graph.inputs if type_.is_float}
        flow: nx.DiGraph[object] = nx.DiGraph(self.edges.subgraph(self.data))
        roots = [
            id for id in self.data
            if flow.in_degree(id) == 0 or any(ref.id in floats for ref in graph.nodes[id].refs)
        ]  # fmt: skip
        ends = [id for id in self.data if flow.out_degree(id) == 0]
        flow.add_edges_from((_SOURCE, id) for id in roots)
        flow.add_edges_from((id, _SINK) for id in ends)
        dominators = nx.immediate_dominators(flow, _SOURCE)
        cuts: list[str] = []
        at: object = dominators[_SINK]
        while at != _SOURCE:
            assert isinstance(at, str)
            read = {
                r.idx
                for user in flow.successors(at)
                if user != _SINK
                for r in graph.nodes[str(user)].refs
                if r.id == at
            }
            if len(read) <= 1:
                cuts.insert(0, at)
            at = dominators[at]
        blocks: dict[str, set[str]] = {}
        left = set(self.data)
        for cut in cuts:
            before = ({str(id) for id in nx.ancestors(flow, cut) if id != _SOURCE} | {cut}) & left
            blocks[cut] = before
            left -= before
        if left:
            blocks[END] = left
        return cuts, blocks

    def _homes(self) -> dict[str, str]:
        graph = self.graph
        tapped = {ref.id for _, ref in graph.outputs}
        reached: dict[str, set[str]] = {}
        for id in reversed(list(nx.topological_sort(self.edges))):
            if id not in self.context:
                continue
            found = {CONTEXT} if id in tapped else set()
            for user in self.edges.successors(id):
                found |= {self.member[user]} if user in self.data else reached.get(user, set())
            reached[id] = found
        return {
            id: next(iter(found)) if len(found) == 1 else CONTEXT for id, found in reached.items()
        }


def index_faults(graph: Graph) -> Iterator[tuple[str, str]]:
    """Where what a draft maintains (users, constant users, labels, symbols, hash) is not what the
    graph says.
    """
    users: dict[str, dict[str, int]] = {}
    const_users: dict[str, dict[str, int]] = {}
    reads = [(ref.id, id) for id, node in graph.nodes.items() for ref in node.refs]
    for owner, user in [*reads, *((ref.id, f"output:{name}") for name, ref in graph.outputs)]:
        counts = users.setdefault(owner, {})
        counts[user] = counts.get(user, 0) + 1
    for id, node in graph.nodes.items():
        if node.id != id:
            yield f"nodes {id}", f"holds a node called {node.id}"
        for name in node.consts:
            counts = const_users.setdefault(graph.aliases.get(name, name), {})
            counts[id] = counts.get(id, 0) + 1
    yield from _map_faults("users", {k: dict(v) for k, v in graph.users.items()}, users)
    yield from _map_faults(
        "const_users", {k: dict(v) for k, v in graph.const_users.items()}, const_users
    )
    known = set(graph.nodes) | {name for name, _ in graph.inputs}
    yield from (
        (f"users {owner}", "is no value of the graph") for owner in sorted(set(users) - known)
    )
    missing = sorted(const_users.keys() - graph.constants.keys())
    yield from ((f"const_users {name}", "is no constant of the graph") for name in missing)
    for alias, name in graph.aliases.items():
        if name not in graph.constants or alias in graph.constants:
            yield (
                f"aliases {alias}",
                f"is tied to {name}; a tied name stands for one constant and is none itself",
            )
    if set(graph.labels) != set(graph.nodes):
        yield (
            "labels",
            f"are not those of the nodes: {sorted(set(graph.labels) ^ set(graph.nodes))[:5]}",
        )
    for owner, user in reads:
        if owner in graph.nodes and graph.labels.get(owner, 0) >= graph.labels.get(user, 1):
            yield f"labels {owner}", f"is not before its user {user}"
    used = {name for _, type_ in graph.inputs for dim in type_.shape for name in symbols_of(dim)}
    if [symbol.name for symbol in graph.symbols] != sorted(used):
        yield "symbols", f"are {[s.name for s in graph.symbols]}, the inputs have {sorted(used)}"
    if graph.digest != digest(graph):
        yield "digest", "is not the hash of the content"


def digest(graph: Graph) -> int:
    """The hash of a graph's content, summed part by part."""
    parts = [part_digest("node", n.id, n.op, n.args, n.kwargs) for n in graph.nodes.values()]
    parts += [
        part_digest("const", n, c.digest, str(c.type), c.is_param)
        for n, c in graph.constants.items()
    ]
    parts += [part_digest("alias", alias, name) for alias, name in graph.aliases.items()]
    if graph.inputs or graph.outputs or graph.symbols:
        parts.append(part_digest("frame", graph.inputs, graph.outputs, graph.symbols))
    return sum(parts) % HASH_MODULUS


def is_query(op: str) -> bool:
    """Whether the op yields a symbolic integer."""
    return op.startswith("sym.") or op.removeprefix("aten.").partition(".")[0] in (
        "sym_size",
        "sym_numel",
        "sym_stride",
    )


def _map_faults(
    name: str, got: dict[str, dict[str, int]], want: dict[str, dict[str, int]]
) -> Iterator[tuple[str, str]]:
    for key in sorted(got.keys() | want.keys()):
        if got.get(key) != want.get(key):
            yield f"{name} {key}", f"is {got.get(key)}, the nodes say {want.get(key)}"
