"""Batch norms behind a convolution or a linear become part of its weight and bias.

In eval mode a batch norm is `scale * y + shift` for each channel, and so `y = W x + b` followed by
it is `(scale W) x + (scale b + shift)`. The law: scaling a row of the weights scales that channel.
Computed in float64 and rounded once; the norm's node becomes the convolution, under its own id.

Deliberately absent: norms in front of a convolution (padding is not shifted), transposed
convolutions, and linears whose features are not the norm's channels (rank above 2).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from graphopt.analysis.facts import Facts
from graphopt.analysis.infer import infer_node
from graphopt.analysis.neighbours import Neighbours
from graphopt.analysis.regions import Region
from graphopt.constants import constant_of
from graphopt.delta import AddNode, PutConstant, RemoveNode
from graphopt.graph import Arg, Const, Graph, Node, Ref
from graphopt.nodes import make_node
from graphopt.rewrite.rewrite import Rewrite, Sketch
from graphopt.types import TensorType

BATCH_NORM = "aten.batch_norm.default"
# Weights have the output channels first; stride, padding and groups stay as they are.
HOSTS = frozenset(
    f"aten.{name}.default" for name in ("conv1d", "conv2d", "conv3d", "convolution", "linear")
)
_STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True, slots=True)
class _Norms:
    """Batch norms in a row behind `host`: `scale * host + shift`, float64 [channels]."""

    host: Node
    scale: Tensor
    shift: Tensor
    ids: tuple[str, ...]


def fold_batch_norms(facts: Facts, region: Region) -> Rewrite:
    """The pass: folds each batch norm of constants into the product it follows."""
    near, sketch = Neighbours(facts, region), Sketch(facts.graph)
    found: dict[str, _Norms] = {}
    for id in region.order:
        node = near.nodes[id]
        if node.op != BATCH_NORM:
            continue
        ahead = _ahead(facts, near, node, found)
        why = ahead if isinstance(ahead, str) else _why_not(facts.graph, node)
        if why or isinstance(ahead, str):
            sketch.decline(id, why)
            continue
        scale, shift = _affine(facts.graph, node)
        if not bool((scale * ahead.scale).isfinite().all() and shift.isfinite().all()):
            sketch.decline(id, "its scale is not finite")
            continue
        found.pop(ahead.ids[-1], None)
        shift = scale * ahead.shift + shift
        found[id] = replace(ahead, scale=scale * ahead.scale, shift=shift, ids=(*ahead.ids, id))
    for id, norms in found.items():
        why = _fold(facts, sketch, near.nodes[id], norms)
        if why:
            sketch.decline(id, why)
    return sketch.rewrite()


def _ahead(facts: Facts, near: Neighbours, norm: Node, found: dict[str, _Norms]) -> "_Norms | str":
    """What a norm follows: a host, or norms that are folded into one already; else why not."""
    x = norm.args[0]
    if not isinstance(x, Ref) or x.id not in near.inside:
        return "what it follows is outside the region"
    host = near.nodes[x.id]
    if host.op not in HOSTS and x.id not in found:
        return f"it follows {host.op}"
    if near.only_user(x) is not norm:
        return f"{x.id} is read elsewhere too"
    if x.id in found:
        return found[x.id]
    why = _why_no_host(facts, host)
    ones = torch.ones((), dtype=torch.float64)
    return why or _Norms(host, ones, torch.zeros_like(ones), (host.id,))


def _why_no_host(facts: Facts, host: Node) -> str:
    bound = host.bound()
    if not all(_is_f32(facts.graph, bound[name]) for name in ("weight", "bias") if bound[name]):
        return f"the weight or bias of {host.id} is computed, or not float32"
    if bound.get("transposed"):
        return f"{host.id} is a transposed convolution"
    type_ = facts.type_of(Ref(host.id))
    assert isinstance(type_, TensorType)
    rank = facts.graph.get_constant(bound["weight"].name).type.rank
    return "" if type_.rank == rank else f"{host.id} gives {type_}"


def _why_not(graph: Graph, norm: Node) -> str:
    bound = norm.bound()
    if bound["training"]:
        return "it takes the statistics of its batch"
    if any(bound[name] is None for name in _STATISTICS):
        return "it has no statistics"
    given = [bound[name] for name in ("weight", "bias", *_STATISTICS) if bound[name] is not None]
    if all(_is_f32(graph, arg) for arg in given):
        return ""
    return "its parameters are computed, or not float32"


def _is_f32(graph: Graph, arg: Arg) -> bool:
    return isinstance(arg, Const) and graph.get_constant(arg.name).type.dtype == "f32"


def _affine(graph: Graph, norm: Node) -> tuple[Tensor, Tensor]:
    """Scale and shift, float64 [channels]."""
    bound = norm.bound()

    def value(name: str) -> Tensor:
        tensor: Tensor = graph.get_constant(bound[name].name).tensor
        return tensor.double()

    scale = (value("running_var") + bound["eps"]).rsqrt()
    if bound["weight"] is not None:
        scale = scale * value("weight")
    shift = -value("running_mean") * scale
    return scale, shift if bound["bias"] is None else shift + value("bias")


def _fold(facts: Facts, sketch: Sketch, top: Node, norms: _Norms) -> str:
    """Puts the host with its new weight in the place of the last norm; why not, otherwise."""
    graph, bound = facts.graph, norms.host.bound()
    weight: Tensor = graph.get_constant(bound["weight"].name).tensor
    column = norms.scale.reshape(-1, *(1 for _ in weight.shape[1:]))
    shift = norms.shift
    if bound["bias"] is not None:
        shift = shift + norms.scale * graph.get_constant(bound["bias"].name).tensor.double()
    tensors = {"weight": (weight.double() * column).float(), "bias": shift.float()}
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        return "the weight with its scale is not finite"
    names = {name: sketch.name(top.id, name) for name in tensors}
    made = {names[key]: constant_of(tensor, is_param=True) for key, tensor in tensors.items()}
    given = {**bound, **{key: Const(name) for key, name in names.items()}}
    node = make_node(top.id, norms.host.op, (), given)
    after = infer_node(
        node,
        lambda arg: facts.type_of(arg) if isinstance(arg, Ref)
        else (made.get(arg.name) or graph.get_constant(arg.name)).type,
    )  # fmt: skip
    if after != facts.types[top.id]:
        return f"{norms.host.op} gives {after[0]} where it gives {facts.types[top.id][0]}"
    sketch.edit(*(PutConstant(name, constant) for name, constant in made.items()))
    sketch.edit(RemoveNode(top.id), AddNode(top.id, node.op, node.args, node.kwargs))
    sketch.comes_from(top.id, norms.ids)
    return ""
