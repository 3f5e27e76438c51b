"""What differs between two revisions of a graph, as `diff` shows it.

Lines of the text form for people, counts of what they are about, and where one of the two is the
current revision, the steps of the plan that compute what differs. Deliberately absent: the delta
between them, which `graphopt.delta.difference` makes.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from graphopt.executor.plan import Plan
from graphopt.graph import Constant, Graph, Node
from graphopt.text import print_node

Tables = tuple[tuple[str, Mapping[str, Any], Mapping[str, Any]], ...]


def difference_lines(old: Graph, new: Graph) -> Iterator[str]:
    """Lines of the text form that went (`-`) and came (`+`); only what differs is looked at twice."""
    changed = [id for id in {*old.nodes, *new.nodes} if old.nodes.get(id) != new.nodes.get(id)]
    place = {id: (1, new.order_key(id)) for id in changed if id in new.nodes}
    place |= {id: (0, old.order_key(id)) for id in changed if id not in new.nodes}
    for id in sorted(changed, key=place.__getitem__):
        for sign, graph in (("-", old), ("+", new)):
            if id in graph.nodes:
                yield f"{sign} {print_node(graph.nodes[id])}"
    for word, before, after in _tables(old, new):
        for name in sorted({*before, *after}):
            if before.get(name) != after.get(name):
                for sign, table in (("-", before), ("+", after)):
                    if name in table:
                        yield f"{sign} {word} {name}: {_shown(table[name])}"
    for sign, graph in (("-", old), ("+", new)):
        if old.symbols != new.symbols:
            for symbol in graph.symbols:
                yield f"{sign} symbol {symbol.name} in {symbol.min}..{symbol.max or ''}"


def difference_counts(old: Graph, new: Graph) -> dict[str, dict[str, int]]:
    """How many nodes, constants, aliases, inputs and outputs were added, removed and changed.

    Kinds in which nothing differs are left out.
    """
    found = {}
    for word, before, after in (("node", old.nodes, new.nodes), *_tables(old, new)):
        counts = {
            "added": sum(name not in before for name in after),
            "removed": sum(name not in after for name in before),
            "changed": sum(
                name in after and value != after[name] for name, value in before.items()
            ),
        }
        if any(counts.values()):
            found[word] = counts
    return found


def plan_of_difference(plan: Plan, old: Graph, new: Graph) -> dict[str, Any]:
    """The plan's steps by tier, and the steps that compute nodes which differ."""
    touched = {id for id, node in plan.graph.nodes.items() if _differs(node, old, new)}
    steps = [
        {
            "block": step.block,
            "blocks": len(step.blocks),
            "tier": step.tier,
            "options": step.options,
        }
        for step in plan.steps
        if not touched.isdisjoint(step.nodes)
    ]
    head = {"revision": plan.revision, "plan_id": plan.id, "tiers": plan.tiers()}
    return {**head, "touched": steps}


def _differs(node: Node, old: Graph, new: Graph) -> bool:
    """Whether the node is another one in one of the two, or reads a constant of another value."""
    if old.nodes.get(node.id) != node or new.nodes.get(node.id) != node:
        return True
    return any(_constant(old, name) != _constant(new, name) for name in node.consts)


def _constant(graph: Graph, name: str) -> Constant | None:
    return graph.constants.get(graph.aliases.get(name, name))


def _tables(old: Graph, new: Graph) -> Tables:
    return (
        ("const", old.constants, new.constants),
        ("alias", old.aliases, new.aliases),
        ("input", dict(old.inputs), dict(new.inputs)),
        ("output", dict(old.outputs), dict(new.outputs)),
    )


def _shown(value: Any) -> str:
    if hasattr(value, "digest"):
        return f"{value.type} sha256:{value.digest[:12]}"
    return str(value)
