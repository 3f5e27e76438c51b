"""Graph builders for tests and benchmarks: a transformer of any depth, NAS-Bench-201 cells, and
what a graph means.
"""

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from graphopt.analysis.probe import torch_literal
from graphopt.constants import TORCH_DTYPES, constant_of
from graphopt.dims import evaluate, symbol
from graphopt.graph import Const, Constant, Graph, Node, Ref, Symbol
from graphopt.nodes import make_node
from graphopt.ops import get_overload
from graphopt.types import TensorType

torch.set_num_threads(1)

BATCH, SEQ = symbol("batch"), symbol("seq")
_AS_RESHAPE = ("aten.view.default", "aten._unsafe_view.default")
_SYM = {
    "sym.add": operator.add, "sym.sub": operator.sub, "sym.mul": operator.mul, "sym.neg": operator.neg,
    "sym.floordiv": operator.floordiv, "sym.mod": operator.mod, "sym.max": max, "sym.min": min,
}  # fmt: skip


class Builder:
    """Collects nodes and constants; `node` returns the reference to what it added."""

    def __init__(self, seed: int = 0) -> None:
        self.nodes: list[Node] = []
        self.constants: dict[str, Constant] = {}
        self._random = torch.Generator().manual_seed(seed)

    def node(self, id: str, op: str, *args: Any, **kwargs: Any) -> Ref:
        self.nodes.append(
            make_node(
                id, f"aten.{op}" if "." in op and not op.startswith("sym.") else op, args, kwargs
            )
        )
        return Ref(id)

    def weight(self, name: str, *shape: int, is_param: bool = True, scale: float = 0.3) -> Const:
        tensor = torch.randn(*shape, generator=self._random) * scale
        self.constants[name] = constant_of(tensor, is_param=is_param)
        return Const(name)

    def linear(self, id: str, x: Ref, n_in: int, n_out: int) -> Ref:
        weight, bias = self.weight(f"{id}.weight", n_out, n_in), self.weight(f"{id}.bias", n_out)
        return self.node(id, "linear.default", x, weight, bias)

    def norm(self, id: str, x: Ref, size: int) -> Ref:
        weight, bias = self.weight(f"{id}.weight", size), self.weight(f"{id}.bias", size)
        return self.node(id, "layer_norm.default", x, (size,), weight, bias)


def transformer(
    n_layers: int = 2, hidden: int = 8, heads: int = 2, vocab: int = 16, n_labels: int = 3
) -> Graph:
    """An encoder as transformers exports one: embeddings, a mask every layer reads, layers, a
    pooler, a classifier.
    """
    b = Builder()
    ids, seq = Ref("input_ids"), b.node("seq", "sym_size.int", Ref("input_ids"), 1)
    table = b.weight("position_ids", 1, 32, is_param=False)
    b.constants["position_ids"] = constant_of(torch.arange(32)[None], is_param=False)
    positions = b.node("positions", "slice.Tensor", table, 1, 0, seq)
    words = b.node(
        "embeddings/word",
        "embedding.default",
        b.weight("embeddings.word.weight", vocab, hidden),
        ids,
    )
    places = b.node(
        "embeddings/position",
        "embedding.default",
        b.weight("embeddings.position.weight", 32, hidden),
        positions,
    )
    x = b.norm("embeddings/norm", b.node("embeddings/add", "add.Tensor", words, places), hidden)
    mask = b.node("mask/float", "_to_copy.default", Ref("attention_mask"), dtype="f32")
    mask = b.node(
        "mask/view", "unsqueeze.default", b.node("mask/row", "unsqueeze.default", mask, 1), 1
    )
    mask = b.node("mask", "mul.Tensor", b.node("mask/inverse", "rsub.Scalar", mask, 1.0), -1e4)
    for idx in range(n_layers):
        x = encoder_layer(b, f"layer.{idx}", x, mask, seq, hidden, heads)
    first = b.node("pooler/first", "select.int", x, 1, 0)
    pooled = b.node("pooler/tanh", "tanh.default", b.linear("pooler", first, hidden, hidden))
    logits = b.linear("classifier", pooled, hidden, n_labels)
    shape = (BATCH, SEQ)
    inputs = [("input_ids", TensorType("i64", shape)), ("attention_mask", TensorType("i64", shape))]
    symbols = [Symbol("batch", 1, 64), Symbol("seq", 2, 32)]
    return Graph.build(
        "transformer", b.nodes, inputs, [("logits", logits)], b.constants, None, symbols
    )


def relu_chain(length: int, name: str = "chain") -> Graph:
    """Relus one after the other, x[rows, 8] to y."""
    b = Builder()
    x = Ref("x")
    for i in range(length):
        x = b.node(f"relu.{i}", "relu.default", x)
    type_ = TensorType("f32", (symbol("rows"), 8))
    symbols = [Symbol("rows", 1, 64)]
    return Graph.build(name, b.nodes, [("x", type_)], [("y", x)], {}, None, symbols)


def encoder_layer(
    b: Builder, name: str, x: Ref, mask: Ref, seq: Ref, hidden: int, heads: int
) -> Ref:
    """One post-norm encoder layer of 20 nodes: six cuts' worth of blocks are what tests count on."""
    parts = {}
    for part in ("query", "key", "value"):
        projected = b.linear(f"{name}/{part}", x, hidden, hidden)
        split = b.node(
            f"{name}/{part}/view", "view.default", projected, (-1, seq, heads, hidden // heads)
        )
        parts[part] = b.node(f"{name}/{part}/heads", "transpose.int", split, 1, 2)
    mixed = b.node(
        f"{name}/attention", "scaled_dot_product_attention.default", *parts.values(), mask
    )
    back = b.node(f"{name}/attention/back", "transpose.int", mixed, 1, 2)
    rows = b.node(f"{name}/attention/view", "reshape.default", back, (-1, seq, hidden))
    x = b.node(
        f"{name}/attention/add", "add.Tensor", b.linear(f"{name}/out", rows, hidden, hidden), x
    )
    x = b.norm(f"{name}/attention/norm", x, hidden)
    inner = b.node(f"{name}/gelu", "gelu.default", b.linear(f"{name}/up", x, hidden, 2 * hidden))
    y = b.node(f"{name}/add", "add.Tensor", b.linear(f"{name}/down", inner, 2 * hidden, hidden), x)
    return b.norm(f"{name}/norm", y, hidden)


# -- NAS-Bench-201 (Dong and Yang, ICLR 2020): a cell is 4 nodes and an op on each of 6 edges.

CELL_OPS = ("none", "skip", "conv1x1", "conv3x3", "avgpool")
CELL_EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))


def cell_network(cells: Sequence[Sequence[str]], channels: int = 4) -> Graph:
    """Cells in a row between a stem and a head; `cells` name the op of each edge of each cell."""
    b = Builder(1)
    x = b.node(
        "stem",
        "conv2d.default",
        Ref("image"),
        b.weight("stem.weight", channels, 3, 3, 3),
        None,
        (1, 1),
        (1, 1),
    )
    for idx, ops in enumerate(cells):
        sums: list[Ref] = [x]
        for target in range(1, 4):
            terms = [
                cell_edge(b, f"cell.{idx}/{s}-{t}", op, sums[s], channels)
                for (s, t), op in zip(CELL_EDGES, ops, strict=True) if t == target
            ]  # fmt: skip
            total = terms[0]
            for position, term in enumerate(terms[1:], 1):
                total = b.node(f"cell.{idx}/{target}/add{position}", "add.Tensor", total, term)
            sums.append(total)
        x = sums[3]
    pooled = b.node("pool", "mean.dim", x, (2, 3))
    logits = b.linear("head", pooled, channels, 5)
    image = TensorType("f32", (BATCH, 3, 6, 6))
    return Graph.build(
        "cells",
        b.nodes,
        [("image", image)],
        [("logits", logits)],
        b.constants,
        None,
        [Symbol("batch", 1, 8)],
    )


def cell_edge(b: Builder, id: str, op: str, x: Ref, channels: int) -> Ref:
    """The op on an edge. Every edge owns its two weights, used or not, as a supernet does."""
    narrow = b.weight(f"{id}.conv1x1.weight", channels, channels, 1, 1)
    wide = b.weight(f"{id}.conv3x3.weight", channels, channels, 3, 3)
    match op:
        case "none":
            return b.node(id, "mul.Tensor", x, 0.0)
        case "skip":
            return b.node(id, "clone.default", x)
        case "conv1x1":
            return b.node(id, "conv2d.default", x, narrow)
        case "conv3x3":
            return b.node(
                id,
                "conv2d.default",
                b.node(f"{id}/relu", "relu.default", x),
                wide,
                None,
                (1, 1),
                (1, 1),
            )
        case _:
            return b.node(id, "avg_pool2d.default", x, (3, 3), (1, 1), (1, 1))


# -- what a graph means


def reference(graph: Graph, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The outputs of a graph by name: one torch call a node, in any topological order."""
    values: dict[str, Any] = dict(feeds)

    def final(param: Any, arg: Any) -> Any:
        if isinstance(arg, Ref):
            found = values[arg.id]
            return found[arg.idx] if isinstance(found, tuple | list) else found
        if isinstance(arg, Const):
            return graph.get_constant(arg.name).tensor
        if isinstance(arg, tuple):
            return [final(param, item) for item in arg]
        return torch_literal(param, arg)

    with torch.no_grad():
        for node in _in_order(graph):
            params = {param.name: param for param in node.spec.params}
            positional = [param for param in node.spec.params if not param.is_keyword]
            args = [final(param, arg) for param, arg in zip(positional, node.args, strict=False)]
            kwargs = {name: final(params[name], arg) for name, arg in node.kwargs}
            op = _SYM.get(node.op) or (
                torch.reshape if node.op in _AS_RESHAPE else get_overload(node.op)
            )
            values[node.id] = op(*args, **kwargs)
    return {name: final(None, ref) for name, ref in graph.outputs}


def _in_order(graph: Graph) -> Iterator[Node]:
    """Operands first, by plain depth-first search: it does not lean on the labels."""
    done: set[str] = set()
    for id in sorted(graph.nodes):
        stack = [id]
        while stack:
            at = stack[-1]
            waiting = [
                r.id for r in graph.nodes[at].refs if r.id in graph.nodes and r.id not in done
            ]
            if at in done or not waiting:
                stack.pop()
                if at not in done:
                    done.add(at)
                    yield graph.nodes[at]
            else:
                stack.extend(waiting)


def feeds_of(graph: Graph, sizes: Mapping[str, int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random inputs at these sizes: integers are 0 or 1, valid as mask, index and token alike."""
    random = torch.Generator().manual_seed(seed)
    feeds = {}
    for name, type_ in graph.inputs:
        shape = [evaluate(dim, sizes) for dim in type_.shape]
        if type_.is_float:
            feeds[name] = torch.randn(shape, generator=random).to(TORCH_DTYPES[type_.dtype])
        else:
            feeds[name] = torch.randint(0, 2, shape, generator=random).to(TORCH_DTYPES[type_.dtype])
    return feeds


def same_outputs(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    """Whether names, order, dtypes and every bit agree."""
    return list(left) == list(right) and all(
        a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)
        for a, b in zip(left.values(), right.values(), strict=True)
    )


def bits(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor's elements, nan included."""
    return (
        tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        if tensor.numel()
        else b""
    )
