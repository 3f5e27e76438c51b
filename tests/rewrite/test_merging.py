"""Linears of one operand as one: the parts are what each linear was."""

from random import Random

from hypothesis import given, settings
from rewrite_laws import assert_law, edits_of, lowered_by

from graphopt.graph import Graph, Ref
from graphopt.rewrite.merging import merge_linears
from graphopt.text import print_graph
from graphopt.types import TensorType
from helpers.golden import check_golden
from helpers.graphs import BATCH, Builder, transformer
from strategies import randoms

SIZES = {"batch": 3, "seq": 5}


def build(b: Builder, *outputs: str) -> Graph:
    named = [(f"y{i}", Ref(id)) for i, id in enumerate(outputs)]
    x = [("x", TensorType("f32", (BATCH, 8)))]
    return Graph.build("small", b.nodes, x, named, b.constants)


def test_the_projections_of_attention_become_one_product():
    graph = transformer(1)
    lowered = assert_law(graph, SIZES, merge=merge_linears)
    (merged,) = [id for id in lowered.region.order if id.endswith("~merged")]
    assert set(lowered.sources[merged]) == {f"layer.0/{part}" for part in ("query", "key", "value")}
    assert lowered.region.made == (
        "layer.0/query.weight~merged",
        "layer.0/query.bias~merged",
    )
    check_golden("merged.graph", print_graph(lowered.graph))


def test_what_is_handed_out_keeps_its_own_linear():
    b = Builder()
    b.linear("a", Ref("x"), 8, 4)
    b.node("y", "relu.default", b.linear("b", Ref("x"), 8, 4))
    lowered = lowered_by(build(b, "a", "y"), merge=merge_linears)
    assert edits_of(lowered) == 0
    assert ("a", "its value is handed out") in [
        (declined.node, declined.reason) for declined in lowered.steps[0].declined
    ]


def test_a_computed_weight_is_left_alone():
    b = Builder()
    weight = b.node("w", "neg.default", b.weight("raw", 4, 8))
    for id in ("a", "b"):
        b.node(f"{id}y", "relu.default", b.node(id, "linear.default", Ref("x"), weight))
    assert edits_of(lowered_by(build(b, "ay", "by"), merge=merge_linears)) == 0


@settings(max_examples=30, deadline=None)
@given(randoms)
def test_any_number_of_widths_with_and_without_bias(draw: Random):
    b = Builder()
    outputs = []
    for i in range(draw.randint(2, 5)):
        weight = b.weight(f"w{i}", draw.randint(1, 6), 8)
        bias = (
            b.weight(f"b{i}", b.constants[f"w{i}"].type.shape[0]) if draw.random() < 0.5 else None
        )
        b.node(f"n{i}", "linear.default", Ref("x"), weight, bias)
        b.node(f"y{i}", draw.choice(("relu.default", "tanh.default")), Ref(f"n{i}"))
        outputs.append(f"y{i}")
    lowered = assert_law(build(b, *outputs), SIZES, merge=merge_linears)
    assert sum("linear" in lowered.graph.nodes[id].op for id in lowered.region.order) == 1
