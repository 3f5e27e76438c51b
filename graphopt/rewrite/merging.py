"""Horizontal merging: linears of one operand become one, whose value is split again.

The projections of attention to query, key and value, and the gate and up projections of a gated
feed-forward, read the same rows. One product of the stacked weights reads them once and has one
larger matrix to be quick with. The law: row `i` of a product depends on row `i` of the weights
alone, so each part is what its own linear computes.
"""

import torch

from graphopt.analysis.facts import Facts
from graphopt.analysis.neighbours import Neighbours
from graphopt.analysis.regions import Region
from graphopt.constants import constant_of
from graphopt.delta import AddNode, PutConstant, RemoveNode, Rewire
from graphopt.graph import Const, Graph, Node, Ref
from graphopt.rewrite.rewrite import Rewrite, Sketch

LINEAR = "aten.linear.default"


def merge_linears(facts: Facts, region: Region) -> Rewrite:
    """The pass: merges linears with constant weights that share their operand."""
    near = Neighbours(facts, region)
    sketch = Sketch(facts.graph)
    exits = {ref.id for ref in region.exits}
    groups: dict[Ref, list[Node]] = {}
    for id in region.order:
        node = near.nodes[id]
        if node.op != LINEAR or not isinstance(node.args[0], Ref):
            continue
        why = _why_not(facts.graph, node, id in exits)
        if why:
            sketch.decline(id, why)
        else:
            groups.setdefault(node.args[0], []).append(node)
    for nodes in groups.values():
        if len(nodes) > 1:
            _merge(facts.graph, sketch, nodes)
    return sketch.rewrite()


def _why_not(graph: Graph, node: Node, is_exit: bool) -> str:
    bound = node.bound()
    weight, bias = bound["weight"], bound["bias"]
    if not isinstance(weight, Const) or not (bias is None or isinstance(bias, Const)):
        return "its weight or bias is computed"
    type_ = graph.get_constant(weight.name).type
    if type_.dtype != "f32" or len(type_.shape) != 2:
        return f"its weight is {type_}"
    return "its value is handed out" if is_exit else ""


def _merge(graph: Graph, sketch: Sketch, nodes: list[Node]) -> None:
    bounds = [node.bound() for node in nodes]
    weights = [graph.get_constant(bound["weight"].name).tensor for bound in bounds]
    sizes = [len(weight) for weight in weights]
    name, first = sketch.name(nodes[0].id, "merged"), bounds[0]["weight"].name
    stacked = sketch.name(first, "merged")
    sketch.edit(PutConstant(stacked, constant_of(torch.cat(weights), is_param=True)))
    bias = _bias(graph, sketch, bounds, sizes)
    sketch.edit(AddNode(name, LINEAR, (nodes[0].args[0], Const(stacked), bias)))
    parts = sketch.name(nodes[0].id, "parts")
    sketch.edit(AddNode(parts, "aten.split_with_sizes.default", (Ref(name), tuple(sizes), -1)))
    ids = [node.id for node in nodes]
    for i, id in enumerate(ids):
        sketch.edit(Rewire(Ref(id), Ref(parts, i)), RemoveNode(id))
    sketch.comes_from(name, ids)
    sketch.comes_from(parts, ids)


def _bias(
    graph: Graph, sketch: Sketch, bounds: list[dict[str, object]], sizes: list[int]
) -> Const | None:
    names = [bound["bias"] for bound in bounds]
    given = [name for name in names if isinstance(name, Const)]
    if not given:
        return None
    pieces = [
        graph.get_constant(name.name).tensor if isinstance(name, Const) else torch.zeros(size)
        for name, size in zip(names, sizes, strict=True)
    ]
    stacked = sketch.name(given[0].name, "merged")
    sketch.edit(PutConstant(stacked, constant_of(torch.cat(pieces), is_param=True)))
    return Const(stacked)
