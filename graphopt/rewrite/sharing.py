"""Sharing: nodes that apply one op to the same operands become one.

Exporters write a mask, a table of positions or a shape once for every layer that wants it, and a
delta that adds an adapter to each projection repeats what these have in common. Graphs hold
functional ops only, none of them random, so equal op and equal arguments mean equal values, for
every output; numbering values by what computes them finds all such nodes in one pass.

The law: nothing is computed that was not. Constants count as equal by name alone (a tied name is
the name it is tied to), never by content: a delta may change one of two that are equal today.
Deliberately absent: sharing up to the order of operands, and the memory that a value held for
longer takes.
"""

from graphopt.analysis.facts import Facts
from graphopt.analysis.neighbours import Neighbours
from graphopt.analysis.regions import Region
from graphopt.delta import RemoveNode, Rewire
from graphopt.graph import Arg, Const, Node, Ref
from graphopt.rewrite.rewrite import Rewrite, Sketch
from graphopt.types import SymIntType


def share_equal(facts: Facts, region: Region) -> Rewrite:
    """The pass: one node of each set of equal ones stays, an exit if there is one among them."""
    near = Neighbours(facts, region)
    exits = {ref.id for ref in region.exits}
    sketch = Sketch(facts.graph)
    chosen: dict[str, str] = {}  # node -> the one that stays for it
    for ids in equal_nodes(facts, region):
        kept = next((id for id in ids if id in exits), ids[0])
        chosen.update((id, kept) for id in ids if id != kept)
        dropped = [id for id in ids if id != kept and id not in exits]
        if dropped:
            sketch.comes_from(kept, [kept, *dropped])
    for id in region.order:  # operands first: what reads a node is still there when it is rewired
        if id not in chosen:
            continue
        _rewire(facts, near, sketch, id, chosen[id], is_exit=id in exits)
        if id in exits:
            sketch.decline(id, f"it equals {chosen[id]}, and both are handed out")
        else:
            sketch.edit(RemoveNode(id))
    return sketch.rewrite()


def equal_nodes(facts: Facts, region: Region) -> list[list[str]]:
    """The sets of two or more nodes of a region that compute the same values, each in order."""
    numbers: dict[str, int] = {}
    classes: dict[str, list[str]] = {}
    for id in region.order:
        key = _key(facts, facts.graph.nodes[id], numbers)
        known = classes.setdefault(key, [])
        numbers[id] = numbers[known[0]] if known else len(numbers)
        known.append(id)
    return [ids for ids in classes.values() if len(ids) > 1]


def _key(facts: Facts, node: Node, numbers: dict[str, int]) -> str:
    """What a node computes, as text: literals by type and value, so `1` is not `1.0`."""

    def text(arg: Arg) -> str:
        if isinstance(arg, Ref):
            type_ = facts.type_of(arg)
            if isinstance(type_, SymIntType):
                return f"{type_.value}"  # a size is what it comes to, wherever it was asked for
            number = numbers.get(arg.id)
            outside = f"${arg.idx}:{arg.id}"
            return outside if number is None else f"%{arg.idx}:{number}"
        if isinstance(arg, Const):
            return f"@{facts.graph.aliases.get(arg.name, arg.name)}"
        if isinstance(arg, tuple):
            return f"({','.join(map(text, arg))})"
        return repr(arg)

    keywords = [f"{name}={text(value)}" for name, value in node.kwargs]
    return f"{node.op} {text(node.args)} {keywords}"


def _rewire(
    facts: Facts, near: Neighbours, sketch: Sketch, id: str, kept: str, *, is_exit: bool
) -> None:
    """What reads `id` reads `kept`: everything, or what is inside where `id` itself must stay."""
    for idx in range(len(facts.types[id])):
        inside = tuple(dict.fromkeys(user.id for user in near.users(Ref(id, idx))))
        if is_exit and inside:
            sketch.edit(Rewire(Ref(id, idx), Ref(kept, idx), inside))
        elif not is_exit and _is_read(facts, Ref(id, idx)):
            sketch.edit(Rewire(Ref(id, idx), Ref(kept, idx)))


def _is_read(facts: Facts, ref: Ref) -> bool:
    nodes = facts.graph.nodes
    users = facts.graph.users.get(ref.id, ())
    return any(user in nodes and ref in nodes[user].refs for user in users)
