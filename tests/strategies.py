"""What tests draw: small random graphs, and deltas that meet them (most fit, some must be refused).

A graph grows from facts: a node takes operands of types its op wants, so that most deltas are valid
and reach far. Ops are picked for what they exercise: several outputs, context values, symbolic
integers, aliases, shape changes that stop early and ones that go on to the end.
"""

from random import Random
from typing import Any

import torch
from hypothesis import strategies as st

from graphopt.analysis.facts import Facts, analyse
from graphopt.constants import constant_of
from graphopt.delta import (
    AddInput,
    AddNode,
    Delta,
    DropConstant,
    DropInput,
    Edit,
    PutConstant,
    RemoveNode,
    Rewire,
    SetAttr,
    SetOutputs,
    apply,
)  # fmt: skip
from graphopt.dims import symbol
from graphopt.draft import OUTPUT_PREFIX
from graphopt.errors import GraphoptError
from graphopt.graph import Const, Graph, Ref, Symbol
from graphopt.types import SymIntType, TensorType

randoms = st.randoms(use_true_random=False)

BATCH = symbol("batch")
ROWS = TensorType("f32", (BATCH, 4))
IDS = TensorType("i64", (BATCH,))
Draw = Random  # Hypothesis drives it with `st.randoms`, a soak with a seed

UNARY = ("relu", "tanh", "sigmoid", "neg", "gelu", "clone", "exp")
BINARY = ("add.Tensor", "mul.Tensor", "sub.Tensor", "maximum.default")
# name -> shape; `table` and `bias_table` are buffers, so that context values exist
CONSTANTS = {
    "w": (4, 4),
    "v": (4, 4),
    "half.weight": (2, 4),
    "wide.weight": (4, 2),
    "bias": (4,),
    "words": (4, 4),
    "table": (64, 4),
    "bias_table": (4,),
}


def constant(draw: Draw, shape: tuple[int, ...], *, is_param: bool = True) -> Any:
    seed = draw.randint(0, 7)
    return constant_of(
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.5, is_param=is_param
    )


def start() -> Graph:
    """The smallest graph of the family: every constant, two inputs, one op."""
    random = torch.Generator().manual_seed(3)
    graph = Graph.empty("random")
    puts = [
        PutConstant(
            name, torch.randn(*shape, generator=random) * 0.5, is_param=not name.endswith("table")
        )
        for name, shape in CONSTANTS.items()
    ]
    edits: list[Edit] = [
        *puts,
        AddInput("x", ROWS, None, (Symbol("batch", 1, 64),)),
        AddInput("ids", IDS),
        AddNode("first", "aten.linear.default", (Ref("x"), Const("w"), Const("bias"))),
        SetOutputs((("y", Ref("first")),)),
    ]
    return apply(graph, Delta(edits))


def draw_graph(draw: Draw, max_nodes: int = 12) -> Graph:
    """A random graph with several outputs."""
    graph = start()
    for _ in range(draw.randint(0, max_nodes)):
        graph = accepted(graph, Delta(draw_additions(draw, graph, analyse(graph)))) or graph
    return accepted(graph, Delta([draw_outputs(draw, graph, analyse(graph))])) or graph


def accepted(graph: Graph, delta: Delta) -> Graph | None:
    """The graph after `delta`, or None where it is refused, by the draft or by type inference."""
    try:
        after = apply(graph, delta)
        analyse(after)
    except GraphoptError:
        return None
    return after


def values(graph: Graph, facts: Facts) -> list[Ref]:
    """Every value of the graph, symbolic integers included."""
    refs = [Ref(name) for name, _ in graph.inputs]
    return refs + [
        Ref(id, idx) for id in sorted(graph.nodes) for idx in range(len(facts.types[id]))
    ]


def tensors(
    graph: Graph, facts: Facts, *, dtype: str | None = None, rank: int | None = None
) -> list[Ref]:
    """The tensor values of this dtype and rank."""
    found = []
    for ref in values(graph, facts):
        type_ = facts.type_of(ref)
        if (
            isinstance(type_, TensorType)
            and dtype in (None, type_.dtype)
            and rank in (None, type_.rank)
        ):
            found.append(ref)
    return found


def fresh_id(graph: Graph, taken: int = 0) -> str:
    """An id no node or input has."""
    known = set(graph.nodes) | {name for name, _ in graph.inputs}
    return next(
        id for id in (f"n{i}" for i in range(taken, len(known) + taken + 1)) if id not in known
    )


def draw_call(draw: Draw, graph: Graph, facts: Facts) -> tuple[str, tuple[Any, ...]]:
    """An op and arguments that mostly fit it."""
    kind = draw.choice(sorted(_CALLS))
    return _CALLS[kind](draw, graph, facts)


def _pick(draw: Draw, refs: list[Ref]) -> Ref:
    return draw.choice(refs or [Ref("x")])


def _rows(graph: Graph, facts: Facts) -> list[Ref]:
    return [
        ref
        for ref in tensors(graph, facts, dtype="f32", rank=2)
        if facts.type_of(ref).shape[-1] == 4
    ]


def _unary(draw: Draw, graph: Graph, facts: Facts) -> tuple[str, tuple[Any, ...]]:
    return f"aten.{draw.choice(UNARY)}.default", (_pick(draw, tensors(graph, facts, dtype="f32")),)


def _binary(draw: Draw, graph: Graph, facts: Facts) -> tuple[str, tuple[Any, ...]]:
    left = _pick(draw, tensors(graph, facts, dtype="f32"))
    same = [
        ref
        for ref in tensors(graph, facts, dtype="f32")
        if facts.type_of(ref).shape == facts.type_of(left).shape
    ]
    anything = tensors(graph, facts)
    right = _pick(draw, same if draw.randint(0, 4) else anything)
    return f"aten.{draw.choice(BINARY)}", (left, right)


def _linear(draw: Draw, graph: Graph, facts: Facts) -> tuple[str, tuple[Any, ...]]:
    weight = draw.choice(["w", "v", "half.weight", "wide.weight", *graph.aliases])
    columns = 2 if weight == "wide.weight" else 4
    fitting = [
        ref
        for ref in tensors(graph, facts, dtype="f32")
        if facts.type_of(ref).shape[-1:] == (columns,)
    ]
    bias = (Const("bias"),) if weight != "half.weight" and draw.choice((False, True)) else ()
    return "aten.linear.default", (_pick(draw, fitting), Const(weight), *bias)


def _norm(draw: Draw, graph: Graph, facts: Facts) -> tuple[str, tuple[Any, ...]]:
    if draw.choice((False, True)):
        return "aten.layer_norm.default", (
            _pick(draw, _rows(graph, facts)),
            (4,),
            Const("bias_table"),
        )
    return "aten.native_layer_norm.default", (
        _pick(draw, _rows(graph, facts)),
        (4,),
        Const("bias"),
        None,
        1e-5,
    )


def _several(draw: Draw, graph: Graph, facts: Facts) -> tuple[str, tuple[Any, ...]]:
    ref = _pick(draw, _rows(graph, facts))
    op, args = draw.choice(
        [("split.Tensor", (2, 1)), ("max.dim", (1,)), ("unbind.int", (1,)), ("sort.default", ())]
    )
    return f"aten.{op}", (ref, *args)


def _join(draw: Draw, graph: Graph, facts: Facts) -> tuple[str, tuple[Any, ...]]:
    refs = [_pick(draw, tensors(graph, facts, dtype="f32", rank=2)) for _ in range(2)]
    return "aten.cat.default", (tuple(refs), 1)


def _embedding(draw: Draw, graph: Graph, facts: Facts) -> tuple[str, tuple[Any, ...]]:
    table = draw.choice(["words", "table"])
    return "aten.embedding.default", (Const(table), _pick(draw, tensors(graph, facts, dtype="i64")))


def _context(draw: Draw, graph: Graph, facts: Facts) -> tuple[str, tuple[Any, ...]]:
    ints, bools = tensors(graph, facts, dtype="i64", rank=1), tensors(graph, facts, dtype="bool")
    kind = draw.randint(0, 3)
    if kind == 0:
        return "aten.eq.Scalar", (_pick(draw, ints), draw.randint(0, 1))
    if kind == 1 and bools:
        return "aten.to.dtype", (_pick(draw, bools), "f32")
    if kind == 2:
        return "aten.unsqueeze.default", (_pick(draw, tensors(graph, facts, rank=1)), 1)
    return "aten.mul.Tensor", (Const("table"), Const("bias_table"))


def _sizes(draw: Draw, graph: Graph, facts: Facts) -> tuple[str, tuple[Any, ...]]:
    ints = [ref for ref in values(graph, facts) if isinstance(facts.type_of(ref), SymIntType)]
    kind = draw.randint(0, 4)
    if kind == 0 or not ints:
        return "aten.sym_size.int", (_pick(draw, tensors(graph, facts, rank=2)), 0)
    ref = _pick(draw, ints)
    if kind == 1:
        return draw.choice(["sym.add", "sym.mul"]), (ref, draw.choice([0, 1, 2, ref]))
    if kind == 2:
        return "aten.slice.Tensor", (Const("table"), 0, 0, ref)
    if kind == 3:
        return "aten.full.default", ((ref, 4), 0.5)
    return "aten.view.default", (
        _pick(draw, _rows(graph, facts)),
        draw.choice([(ref, 4), (-1, 4), (4, ref), (ref, 2, 2)]),
    )


def _moved(draw: Draw, graph: Graph, facts: Facts) -> tuple[str, tuple[Any, ...]]:
    ref = _pick(draw, tensors(graph, facts, rank=2))
    return draw.choice(
        [
            ("aten.transpose.int", (ref, 0, 1)),
            ("aten.permute.default", (ref, (1, 0))),
            ("aten.t.default", (ref,)),
            ("aten.sum.dim_IntList", (ref, (1,))),
            ("aten.select.int", (ref, 1, 0)),
            ("aten.softmax.int", (ref, 1)),
        ]
    )


_CALLS = {
    "unary": _unary,
    "binary": _binary,
    "linear": _linear,
    "norm": _norm,
    "several": _several,
    "join": _join,
    "embedding": _embedding,
    "context": _context,
    "sizes": _sizes,
    "moved": _moved,
    "unary2": _unary,
    "binary2": _binary,
}


# -- deltas


def draw_delta(draw: Draw, graph: Graph, facts: Facts) -> Delta:
    """A delta for `graph`, perhaps an invalid one: one to three kinds of change, each drawn against
    the graph as it is.
    """
    edits: list[Edit] = []
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        edits += draw_edits(draw, graph, facts)
    return Delta(edits, allow_interface_change=True)


def draw_edits(draw: Draw, graph: Graph, facts: Facts) -> list[Edit]:
    """The edits of one kind of change."""
    return list(draw.choice(_EDITS)(draw, graph, facts))


def draw_additions(draw: Draw, graph: Graph, facts: Facts) -> list[Edit]:
    op, args = draw_call(draw, graph, facts)
    return [AddNode(fresh_id(graph, draw.randint(0, 2)), op, args)]


def draw_outputs(draw: Draw, graph: Graph, facts: Facts) -> Edit:
    known = tensors(graph, facts)
    refs = [draw.choice(known) for _ in range(draw.randint(1, 3))]
    return SetOutputs(tuple((f"y{i}" if i else "y", ref) for i, ref in enumerate(refs)))


def _node(draw: Draw, graph: Graph) -> str:
    return draw.choice(sorted(graph.nodes) or ["nothing"])


def _insert(draw: Draw, graph: Graph, facts: Facts) -> list[Edit]:
    ref = _pick(draw, tensors(graph, facts))
    op, args = draw_call(draw, graph, facts)
    if draw.choice((False, True)):
        op, args = f"aten.{draw.choice(UNARY)}.default", (ref,)
    id = fresh_id(graph)
    return [AddNode(id, op, args), Rewire(ref, Ref(id))]


def _remove(draw: Draw, graph: Graph, facts: Facts) -> list[Edit]:
    return [RemoveNode(_node(draw, graph))]


def _bypass(draw: Draw, graph: Graph, facts: Facts) -> list[Edit]:
    id = _node(draw, graph)
    refs = graph.nodes[id].refs if id in graph.nodes else ()
    target = draw.choice(refs) if refs else Ref("x")
    if not graph.users.get(id):
        return [RemoveNode(id)]
    return [Rewire(Ref(id), target), RemoveNode(id)]


def _replace(draw: Draw, graph: Graph, facts: Facts) -> list[Edit]:
    id = _node(draw, graph)
    op, args = draw_call(draw, graph, facts)
    if (
        id in graph.nodes and graph.nodes[id].refs and draw.choice((False, True))
    ):  # another op on the same operand
        ref = graph.nodes[id].refs[0]
        op, args = draw.choice(
            [(f"aten.{u}.default", (ref,)) for u in UNARY] + [("aten.sym_size.int", (ref, 0))]
        )
    return [RemoveNode(id), AddNode(id, op, args)]


def _rewire(draw: Draw, graph: Graph, facts: Facts) -> list[Edit]:
    source, target = (_pick(draw, values(graph, facts)) for _ in range(2))
    if draw.randint(0, 3):
        wanted = facts.type_of(source)
        target = _pick(draw, [ref for ref in values(graph, facts) if facts.type_of(ref) == wanted])
    users = sorted(graph.users.get(source.id, ()))
    if users and draw.choice((False, True)):
        return [Rewire(source, target, (draw.choice(users),))]
    return [Rewire(source, target)]


def _swap(draw: Draw, graph: Graph, facts: Facts) -> list[Edit]:
    """Exchanges two stretches a..b and b..c of nodes: what came before comes after."""
    chain = [_node(draw, graph)]
    while len(chain) < 5:
        users = [
            u
            for u in graph.users.get(chain[-1], ())
            if not u.startswith(OUTPUT_PREFIX) and u not in chain
        ]
        if not users:
            break
        chain.append(draw.choice(sorted(users)))
    if len(chain) < 3 or chain[0] not in graph.nodes:
        return [RemoveNode("nothing")]
    cut = draw.randint(1, len(chain) - 2)
    heads = list(graph.nodes[chain[0]].refs)
    if not heads:
        return [RemoveNode("nothing")]
    first, second, last = chain[0], chain[cut], chain[-1]
    return [
        Rewire(heads[0], Ref(chain[-2]), (first,)),
        Rewire(Ref(chain[cut - 1]), heads[0], (second,)),
        Rewire(Ref(chain[-2]), Ref(chain[cut - 1]), (last,)),
    ]


def _set_attr(draw: Draw, graph: Graph, facts: Facts) -> list[Edit]:
    id = _node(draw, graph)
    if id not in graph.nodes:
        return [SetAttr(id, "dim", 0)]
    names = [param.name for param in graph.nodes[id].spec.params]
    attributes = [
        name
        for name in names
        if name in ("dim", "dim0", "approximate", "eps", "alpha", "other", "index", "keepdim")
    ]
    name = draw.choice(attributes or names)
    literals = [0, 1, -1, 0.0, -0.0, 0.5, "tanh", True, None, Const("bias"), (1,)]
    value = draw.choice([*literals, *values(graph, facts)])
    return [SetAttr(id, name, value)]


def _put(draw: Draw, graph: Graph, facts: Facts) -> list[Edit]:
    names = sorted({*CONSTANTS, *graph.constants, *graph.aliases})
    name = draw.choice(names)
    shape = CONSTANTS.get(name, (4, 4))
    if not draw.randint(0, 2):
        shape = draw.choice([(3, *shape[1:]), (*shape[:-1], 4), (4,)])
    is_param = draw.choice([None, None, None, True, False])
    aliases = draw.choice([(), (), ("tied",), ("tied", "tied2"), ("bias",)])
    return [PutConstant(name, constant(draw, shape), is_param, aliases)]


def _drop(draw: Draw, graph: Graph, facts: Facts) -> list[Edit]:
    name = draw.choice(sorted(graph.constants) or ["w"])
    if draw.choice((False, True)):
        return [DropConstant(name)]
    return [DropConstant(name), PutConstant(name, constant(draw, CONSTANTS.get(name, (4, 4))))]


def _inputs(draw: Draw, graph: Graph, facts: Facts) -> list[Edit]:
    names = [name for name, _ in graph.inputs]
    name = draw.choice([*names, "z", "late"])
    type_ = draw.choice(
        [
            ROWS,
            ROWS,
            IDS,
            TensorType("i64", (BATCH, 4)),
            TensorType("f32", (symbol("seq"), 4)),
            TensorType("f32", (BATCH, 3)),
        ]
    )
    position = draw.choice([None, 0, 1])
    ranges = (Symbol("batch", 1, draw.choice([32, 64])), Symbol("seq", 2, 9))
    added = AddInput(name, type_, position, ranges)
    if name in names:
        return draw.choice([[DropInput(name)], [DropInput(name), added]])
    return [added]


def _outputs(draw: Draw, graph: Graph, facts: Facts) -> list[Edit]:
    return [draw_outputs(draw, graph, facts)]


_EDITS = (
    draw_additions,
    draw_additions,
    _insert,
    _insert,
    _remove,
    _bypass,
    _replace,
    _replace,
    _rewire,
    _rewire,
    _swap,
    _set_attr,
    _set_attr,
    _put,
    _drop,
    _inputs,
    _outputs,
    _outputs,
)
