"""Graphs for the tests of the text form: random ones out of every legal part, and a small real one."""

import torch
from hypothesis import strategies as st

from graphopt.constants import constant_of
from graphopt.dims import Dim, floordiv, maximum, minimum, mod, symbol
from graphopt.graph import Const, Constant, Graph, Node, Ref, Symbol
from graphopt.nodes import make_node
from graphopt.types import DTYPES, STRIDED, TensorType

SYMBOLS = ("batch", "seq", "s0", "_x")
FORBIDDEN = "$,()[]{}'\"="  # as graphopt.draft refuses them
OPS = ("aten.relu.default", "aten.add.Tensor", "aten.split.Tensor", "sym.mul", "aten.cat.default")
NASTY_NAMES = [
    "graph", "symbol", "input", "const", "alias", "output", "node", "format", "in", "param", "#",
    "#a", "a#b", "a#",
    ":", "a:", "a:1", "a:01", "a:1:2", ":0", "a:9999999", "true", "none", "nan", "-inf", "1",
    "-1", "1e5", "\\", "a\\n",
    "..", "/", "a/b.c@1", "é", "日本", "\x00", "\x7f", "\u200b", "\u202e", "\ufeff", "\U0001f600",
    "\U000e0001", "\ud800",
    "\ud83d\ude00", "sha256:", "a" * 256,
]  # fmt: skip
NASTY_TEXTS = [
    "", " ", "$", "$a", "@a", "$$a", '"', "\\", "\\n", "\n", "\r\n", "\t", "a  # b", "a, b",
    "[1]", "(", ")", "none", "é",
    "\u2028", "\x85", "\x00", "\ud800", "\ud83d\ude00", "\U0001f600", "\U000e0001", "f32",
    "channels_last", "\\u0041", "'",
]  # fmt: skip
NASTY_FLOATS = [
    0.0,
    -0.0,
    1.0,
    -1.5,
    1e-38,
    5e-324,
    1e308,
    1e16,
    0.1,
    float("inf"),
    -float("inf"),
    float("nan"),
]


def _is_legal(name: str) -> bool:
    if name.startswith(("@", "output:")) or any(c.isspace() or c in FORBIDDEN for c in name):
        return False
    return 0 < len(name) <= 256


characters = st.characters(exclude_categories=(), exclude_characters=FORBIDDEN)
names = st.sampled_from(NASTY_NAMES) | st.text(characters, min_size=1, max_size=8).filter(_is_legal)
# Names of graphs, outputs, aliases and symbols, which a draft does not check.
free_names = names | st.sampled_from([*NASTY_TEXTS, "@a", "output:a", "a = b"])
texts = st.sampled_from(NASTY_TEXTS) | st.text(st.characters(exclude_categories=()), max_size=6)
scalars = (
    st.none() | st.booleans() | st.integers() | st.sampled_from([10**30, -1]) | st.floats()
    | st.sampled_from(NASTY_FLOATS) | texts
)  # fmt: skip


def dims() -> st.SearchStrategy[Dim]:
    leaves = st.integers(0, 1 << 40) | st.sampled_from(SYMBOLS).map(symbol)

    def grow(inner: st.SearchStrategy[Dim]) -> st.SearchStrategy[Dim]:
        pairs = st.tuples(inner, inner)
        positive = st.tuples(inner, st.integers(1, 9) | st.sampled_from(SYMBOLS).map(symbol))
        return (
            pairs.map(lambda p: p[0] + p[1])
            | pairs.map(lambda p: p[0] - p[1])
            | pairs.map(lambda p: p[0] * p[1])
            | positive.map(lambda p: floordiv(*p)) | positive.map(lambda p: mod(*p))
            | pairs.map(lambda p: maximum(*p)) | pairs.map(lambda p: minimum(*p))
        )  # fmt: skip

    return st.recursive(leaves, grow, max_leaves=5)


@st.composite
def tensor_types(draw) -> TensorType:
    shape = tuple(draw(st.lists(dims(), max_size=4).filter(lambda s: len(str(s)) < 120)))
    layouts = ["contiguous", STRIDED, *([tuple(reversed(range(len(shape))))] if shape else [])]
    return TensorType(draw(st.sampled_from(list(DTYPES))), shape, draw(st.sampled_from(layouts)))


@st.composite
def constants(draw) -> Constant:
    shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
    digest = f"{draw(st.integers(0, 1 << 255)):064x}"
    type_ = TensorType(draw(st.sampled_from(list(DTYPES))), shape)
    return Constant(digest, type_, draw(st.booleans()), None)


@st.composite
def graphs(draw) -> Graph:
    ids = draw(st.lists(names, min_size=1, max_size=8, unique=True))
    n_inputs = draw(st.integers(0, len(ids)))
    inputs = [(name, draw(tensor_types())) for name in ids[:n_inputs]]
    bound = draw(st.dictionaries(names, constants(), max_size=4))
    alias_names = draw(st.lists(free_names, max_size=2, unique=True)) if bound else []
    aliases = {
        alias: draw(st.sampled_from(sorted(bound))) for alias in alias_names if alias not in bound
    }
    nodes: list[Node] = []
    for position, id in enumerate(ids[n_inputs:], n_inputs):
        atoms = scalars
        if position:
            atoms |= st.builds(Ref, st.sampled_from(ids[:position]), st.integers(0, 12))
        if bound:
            atoms |= st.sampled_from([*map(Const, bound), *map(Const, aliases)])
        values = st.recursive(atoms, lambda v: st.lists(v, max_size=3).map(tuple), max_leaves=6)
        keys = st.sampled_from(["alpha", "dtype", "memory_format", "none", "_k1", "true"])
        kwargs = tuple(draw(st.dictionaries(keys, values, max_size=2)).items())
        args = tuple(draw(st.lists(values, max_size=4)))
        nodes.append(Node(id, draw(st.sampled_from(OPS)), args, kwargs))
    output_names = draw(st.lists(free_names, max_size=3, unique=True))
    outputs = [
        (name, Ref(draw(st.sampled_from(ids)), draw(st.integers(0, 2)))) for name in output_names
    ]
    limits = st.integers(-5, 1 << 40)
    symbols = draw(
        st.lists(
            st.builds(Symbol, free_names | st.sampled_from(SYMBOLS), limits, st.none() | limits),
            max_size=3, unique_by=lambda s: s.name,
        )
    )  # fmt: skip
    shuffled = draw(st.permutations(nodes))  # labels, and so the printed order, depend on it
    return Graph.build(draw(free_names), shuffled, inputs, outputs, bound, aliases, symbols)


def small_model() -> tuple[torch.nn.Module, Graph]:
    """An attention-like torch module with a tied weight, and its graph written by hand."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embeddings = torch.nn.Embedding(32, 8)
            self.query = torch.nn.Linear(8, 8)
            self.norm = torch.nn.LayerNorm(8)
            self.head = torch.nn.Linear(8, 32, bias=False)
            self.head.weight = self.embeddings.weight
            self.register_buffer("scale", torch.tensor(0.5))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            hidden = self.embeddings(ids)
            first, second = torch.split(self.query(hidden) * self.scale, [4, 4], -1)
            return self.head(self.norm(torch.cat([second, first], -1) + hidden))

    model = Model()
    with torch.no_grad():  # the same digests on every machine, in golden files
        for start, tensor in enumerate(model.parameters()):
            tensor.copy_(
                torch.arange(start, start + tensor.numel()).remainder(13).reshape(tensor.shape) / 8
                - 0.75
            )
    bound = {name: constant_of(tensor, is_param=True) for name, tensor in model.named_parameters()}
    bound["scale"] = constant_of(model.scale)

    def consts(name: str) -> list[Const]:
        return [Const(f"{name}.weight"), Const(f"{name}.bias")]

    split = make_node("split", "aten.split_with_sizes.default", [Ref("mul"), (4, 4), -1])
    nodes = [
        make_node("embeddings", "aten.embedding.default", [Const("embeddings.weight"), Ref("ids")]),
        make_node("query", "aten.linear.default", [Ref("embeddings"), *consts("query")]),
        make_node("mul", "aten.mul.Tensor", [Ref("query"), Const("scale")]),
        split,
        make_node("cat", "aten.cat.default", [(Ref("split", 1), Ref("split")), -1]),
        make_node("add", "aten.add.Tensor", [Ref("cat"), Ref("embeddings")]),
        make_node("norm", "aten.layer_norm.default", [Ref("add"), (8,), *consts("norm")]),
        make_node("head", "aten.linear.default", [Ref("norm"), Const("head.weight")]),
    ]  # fmt: skip
    inputs = [("ids", TensorType("i64", (symbol("batch"), symbol("seq"))))]
    symbols = [Symbol("batch"), Symbol("seq", 1, 512)]
    aliases = {"head.weight": "embeddings.weight"}
    graph = Graph.build("small", nodes, inputs, [("logits", Ref("head"))], bound, aliases, symbols)
    return model, graph


def run(graph: Graph, feeds: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Outputs of a graph, one torch call a node."""
    values: dict[str, object] = dict(feeds)

    def value(arg: object) -> object:
        if isinstance(arg, Ref):
            found = values[arg.id]
            return found[arg.idx] if isinstance(found, (tuple, list)) else found
        if isinstance(arg, Const):
            return graph.get_constant(arg.name).tensor
        return [value(item) for item in arg] if isinstance(arg, tuple) else arg

    for node in graph.iter_nodes():
        namespace, name, overload = node.op.split(".")
        op = getattr(getattr(getattr(torch.ops, namespace), name), overload)
        values[node.id] = op(*map(value, node.args), **{k: value(v) for k, v in node.kwargs})
    return [value(ref) for _, ref in graph.outputs]
