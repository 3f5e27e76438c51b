"""Topological labels that survive edits: sparse integers, repaired only where an edge breaks them.

A label is a Python int of any size, so there is room for hundreds of insertions at one place before
everything is labelled anew. A new node gets a label between its operands and its users; an edge
that runs against the labels is repaired by pooling the labels of the nodes between its ends (Pearce
and Kelly, "A dynamic topological sort algorithm for directed acyclic graphs", JEA 2007), at a cost
of the nodes between, never of the graph.
"""

from collections.abc import Callable, Iterable
from typing import Protocol
from zlib import crc32

from graphopt.errors import CycleError

GAP = 1 << 256  # 256 insertions at one place before a relabelling of the whole graph

Neighbours = Callable[[str], Iterable[str]]


class Labels(Protocol):
    """A mutable map from ids to labels: a dict, or an `immutables.MapMutation`."""

    def __getitem__(self, id: str, /) -> int: ...
    def __setitem__(self, id: str, label: int, /) -> None: ...
    def __contains__(self, id: str, /) -> bool: ...
    def __len__(self) -> int: ...


class LabelsExhaustedError(Exception):
    """No integer is left between two labels; label the whole graph anew."""


def topological(ids: Iterable[str], operands: Neighbours, users: Neighbours) -> list[str]:
    """`ids` so that operands among them come first, a function of the order given alone: `users`
    may list a node's users in any order, as maps of ids do. Kahn's algorithm, what was freed last
    first; CycleError names a cycle.
    """
    order = list(ids)
    position = {id: at for at, id in enumerate(order)}
    waiting = {id: len({op for op in operands(id) if op in position}) for id in order}
    ready = [id for id in reversed(order) if waiting[id] == 0]
    done: list[str] = []
    while ready:
        id = ready.pop()
        done.append(id)
        freed = [user for user in users(id) if user in position and _decrement(waiting, user) == 0]
        ready.extend(sorted(freed, key=position.__getitem__, reverse=True))
    if len(done) < len(order):
        left = [id for id in order if waiting[id] > 0]
        raise CycleError(
            f"the edited graph has a cycle through {_cycle(left, operands)}", where=left[0]
        )
    return done


def update_labels(
    labels: Labels,
    fresh: list[str],
    edges: list[tuple[str, str]],
    operands: Neighbours,
    users: Neighbours,
    old: Callable[[], list[str]],
) -> set[str]:
    """Makes `labels` valid again after edits; returns the nodes that got a label or another one.

    `fresh` are the nodes without a label, in the order they were added; `edges` the new edges
    between nodes, those of fresh nodes included. `old` lists the other nodes in their order, asked
    only where everything is labelled anew. CycleError names a cycle.
    """
    if not labels:
        return _relabel(labels, topological(fresh, operands, users))
    try:
        place(labels, topological(sorted(fresh), operands, users), operands, users)
        return {*fresh, *_repair_edges(labels, edges, operands, users)}
    except LabelsExhaustedError:
        known = old()
        order = [*known, *sorted(set(fresh) - set(known))]
        return _relabel(labels, topological(order, operands, users))


def _repair_edges(
    labels: Labels, edges: list[tuple[str, str]], operands: Neighbours, users: Neighbours
) -> set[str]:
    """Moves labels until every new edge agrees with them, one edge at a time.

    Edges not yet repaired are hidden from the search: Pearce and Kelly insert one edge into a valid
    order.
    """
    pending = [(source, target) for source, target in edges if labels[source] >= labels[target]]
    hidden = set(pending)
    moved: set[str] = set()
    for source, target in pending:
        hidden.discard((source, target))
        if source == target:
            raise CycleError(f"{source} would use itself", where=source)
        moved.update(
            repair(
                labels,
                source,
                target,
                lambda id: [op for op in operands(id) if (op, id) not in hidden],
                lambda id: [user for user in users(id) if (id, user) not in hidden],
            )
        )
    return moved


def _relabel(labels: Labels, order: list[str]) -> set[str]:
    for position, id in enumerate(order):
        labels[id] = (position + 1) * GAP
    return set(order)


def place(labels: Labels, new: list[str], operands: Neighbours, users: Neighbours) -> None:
    """Labels for the nodes `new`, given in topological order, between those of their neighbours.

    A node whose operands lie after its users is placed after its operands; `repair` then moves the
    users. Nodes placed at one place get labels that differ by a share drawn from their ids: equal
    labels would make later repairs fall back to a new labelling. Raises LabelsExhaustedError when
    two neighbours leave no integer between them.
    """
    for position, id in enumerate(new):
        low = max((labels[op] for op in operands(id) if op in labels), default=0)
        high = min((labels[user] for user in users(id) if user in labels), default=None)
        if high is None or high <= low:
            labels[id] = low + _share(id, GAP)
            continue
        step = (high - low) // (len(new) - position + 1)  # even spacing for a chain of new nodes
        if step == 0:
            raise LabelsExhaustedError
        labels[id] = low + _share(id, step)


def repair(
    labels: Labels,
    source: str,
    target: str,
    operands: Neighbours,
    users: Neighbours,
) -> list[str]:
    """Makes `label(source) < label(target)` for the new edge source -> target; returns the nodes
    that got another label.

    What leads to `source` moves down and what follows `target` moves up, within the labels they
    have together, so every edge to other nodes stays right. Nodes of equal label are unrelated and
    may share one again; a label on both sides would have to be given twice, and
    LabelsExhaustedError is raised instead.
    """
    low, high = labels[target], labels[source]
    if high < low:
        return []
    after = _reach(target, users, lambda id: id in labels and labels[id] <= high)
    if source in after:
        raise CycleError(f"the edge {source} -> {target} closes a cycle", where=target)
    before = _reach(source, operands, lambda id: id in labels and labels[id] >= low)
    down, up = sorted({labels[id] for id in before}), sorted({labels[id] for id in after})
    pool = sorted({*down, *up})
    if len(pool) < len(down) + len(up):
        raise LabelsExhaustedError
    lower = dict(zip(down, pool[: len(down)], strict=True))
    upper = dict(zip(up, pool[len(down) :], strict=True))
    for id in before:
        labels[id] = lower[labels[id]]
    for id in after:
        labels[id] = upper[labels[id]]
    return sorted(before | after)


def _reach(start: str, neighbours: Neighbours, within: Callable[[str], bool]) -> set[str]:
    found, stack = {start}, [start]
    while stack:
        for id in neighbours(stack.pop()):
            if id not in found and within(id):
                found.add(id)
                stack.append(id)
    return found


def _share(id: str, step: int) -> int:
    """Between half and one and a half times `step`, the same for the same id; at least 1 where
    `step` is.
    """
    return max(step // 2 + step * crc32(id.encode(errors="surrogatepass")) // (1 << 32), 1)


def _decrement(waiting: dict[str, int], id: str) -> int:
    waiting[id] -= 1
    return waiting[id]


def _cycle(left: list[str], operands: Neighbours) -> str:
    members, path, seen = set(left), [left[0]], {left[0]: 0}
    while True:
        step = next(op for op in operands(path[-1]) if op in members)
        if step in seen:
            return " <- ".join([*path[seen[step] :], step])
        seen[step] = len(path)
        path.append(step)
