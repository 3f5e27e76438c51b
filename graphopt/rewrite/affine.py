"""Affine folding: what is affine in one operand with constant matrices becomes one linear.

A low-rank adapter on a linear layer is `x W' + s * (x A') B'`: one matrix `W + s B A`. Two linears
with no activation between them are one, as are a linear and a scale of its value, constants that are
added before or after it, and sums of such values. The law: composition and sums of affine maps are
affine maps. Matrices are computed in float64 and rounded once. A row that holds an infinity stays one that is
not finite, though an infinity may come out as nan or the other way round.

How it is found: every value has a *form* for each operand it is affine in, by one walk in
topological order. From the last node backward, a node whose form saves multiply-adds (or nodes, at
equal multiply-adds) takes the form that saves the most; what lies inside it has no other reader.

Deliberately absent: `x + linear(x)` (a residual costs nothing behind a linear, and an identity in
its weight costs precision), a gain in front of a linear (a pass over the rows costs less than a copy
of the weight: norms in front of tied heads), convolutions and embeddings with adapters, weights that
are not float32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.analysis.facts import Facts
from graphopt.analysis.infer import infer_node
from graphopt.analysis.neighbours import Neighbours
from graphopt.analysis.regions import Region
from graphopt.constants import constant_of
from graphopt.delta import AddNode, PutConstant, RemoveNode
from graphopt.graph import Const, Graph, Node, Ref
from graphopt.nodes import make_node
from graphopt.rewrite.affine_forms import LINEAR, PRODUCTS, Form, Forms
from graphopt.rewrite.rewrite import Rewrite, Sketch

WORK_MAX = 1 << 34  # multiply-adds to compute one folded weight: some seconds of float64


@dataclass(frozen=True, slots=True)
class Map:
    """An affine map: `matrix` [out, in] (None: the identity), then `bias`.

    `weight` is the constant that `matrix` is, where it is one as it stands.
    """

    matrix: Tensor | None = None
    bias: Tensor | None = None
    weight: Const | None = None


def fold_affine(facts: Facts, region: Region) -> Rewrite:
    """The pass: folds every affine value that is cheaper, or fewer nodes, as one linear."""
    near, sketch = Neighbours(facts, region), Sketch(facts.graph)
    forms = Forms(facts, near, sketch).of(region.order)
    taken: set[str] = set()
    for id in reversed(region.order):
        found = [form for form in forms.get(id, {}).values() if form.nodes > 1 and form.size]
        if id in taken or not found:
            continue
        best = max(found, key=lambda form: (form.saved, form.nodes))
        why = _why_not(best) or _fold(facts, sketch, near.nodes[id], best)
        if why:
            sketch.decline(id, why)
        else:
            taken.update(best.ids())
    return sketch.rewrite()


def _why_not(form: Form) -> str:
    if form.saved < 0:
        return f"one linear takes {-form.saved} multiply-adds more for each row than {form.macs}"
    return "its weight takes too long to compute" if form.work > WORK_MAX else ""


def _fold(facts: Facts, sketch: Sketch, top: Node, form: Form) -> str:
    """Replaces `top` by one linear; why not, when that cannot be."""
    found, size = _map(facts.graph, form), form.size
    assert found.matrix is not None
    assert size is not None
    tensors = {"folded": found.matrix} if found.weight is None else {}
    if found.bias is not None:
        tensors["bias"] = found.bias.expand(size[0])
    rounded = {mark: tensor.float() for mark, tensor in tensors.items()}
    if not all(bool(tensor.isfinite().all()) for tensor in rounded.values()):
        return "its folded weight is not finite"
    before = facts.types[top.id]
    names = {mark: Const(sketch.name(top.id, mark)) for mark in rounded}
    made = {const.name: constant_of(rounded[mark], is_param=True) for mark, const in names.items()}
    node = make_node(
        top.id, LINEAR, (form.root, names.get("folded", found.weight), names.get("bias"))
    )
    known = facts.graph.get_constant
    after = infer_node(
        node,
        lambda arg: facts.type_of(arg) if isinstance(arg, Ref)
        else (made.get(arg.name) or known(arg.name)).type,
    )  # fmt: skip
    if after != before:
        return f"a linear would give {after[0]} where it gives {before[0]}"
    sketch.edit(*(PutConstant(name, constant) for name, constant in made.items()))
    sketch.edit(RemoveNode(top.id), AddNode(top.id, node.op, node.args, node.kwargs))
    sketch.comes_from(top.id, form.ids())
    return ""


def _map(graph: Graph, form: Form) -> Map:
    """The map of a form, in float64 wherever something was computed.

    Recursive: a form is no deeper than `NODES_MAX` nodes.
    """
    parts = [_map(graph, part) for part in form.parts]
    match form.kind:
        case "root":
            return Map()
        case "same":
            return parts[0]
        case "scale":
            return _scaled(parts[0], _value(graph, form.factor))
        case "shift":
            assert not isinstance(form.factor, Const)
            shift = _value(graph, form.constant) * form.factor
            (part,) = parts
            bias = shift if part.bias is None else part.bias.double() + shift
            return Map(part.matrix, torch.as_tensor(bias), part.weight)
        case "sum":
            left, right = parts[0], _scaled(parts[1], _value(graph, form.factor))
            assert left.matrix is not None
            assert right.matrix is not None
            biases = [part.bias.double() for part in (left, right) if part.bias is not None]
            total = sum(biases[1:], biases[0]) if biases else None
            return Map(left.matrix.double() + right.matrix, total)
        case "product":
            return _product(graph, form.node, parts[0])


def _product(graph: Graph, node: Node | None, inner: Map) -> Map:
    assert node is not None
    _, matrix, bias = PRODUCTS[node.op]
    bound = node.bound()
    weight: Tensor = graph.get_constant(bound[matrix].name).tensor
    weight = weight if node.op == LINEAR else weight.t()
    added = bound[bias] if bias else None
    kept = bound[matrix] if node.op == LINEAR else None
    total = own = None if added is None else _value(graph, added)
    if inner.bias is not None:
        wide = weight.double()
        carried = wide @ inner.bias.double().expand(wide.shape[1])
        total = carried if own is None else carried + own
    if inner.matrix is not None:
        return Map(weight.double() @ inner.matrix.double(), total)
    return Map(weight, total, kept)


def _scaled(inner: Map, factor: Tensor) -> Map:
    bias = None if inner.bias is None else inner.bias.double() * factor
    assert inner.matrix is not None
    column = factor.unsqueeze(-1) if factor.dim() else factor
    return Map(inner.matrix.double() * column, bias)


def _value(graph: Graph, given: float | Const) -> Tensor:
    """A number or a constant row as float64, of at most one dim."""
    if not isinstance(given, Const):
        return torch.tensor(given, dtype=torch.float64)
    tensor: Tensor = graph.get_constant(given.name).tensor
    return tensor.reshape(tensor.shape[-1:]).double()
