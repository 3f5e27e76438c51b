"""Where layers begin, in a network as it was and after deltas to some of its layers."""

from collections.abc import Collection

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.analysis.facts import Facts, analyse
from graphopt.delta import Delta, apply
from graphopt.executor.runs import run_region
from graphopt.graph import Graph, Ref
from graphopt.macros import InsertAfter
from graphopt.planner.layout import Run, layer_count, layers
from graphopt.types import TensorType
from helpers.graphs import BATCH, Builder, transformer

LAYERS = 6
GRAPH = transformer(LAYERS)
PLAIN_FACTS = analyse(GRAPH)
PLAIN = layers(PLAIN_FACTS)
INDICES = range(LAYERS)


def edited(attentions: Collection[int], rests: Collection[int] = ()) -> Facts:
    """The network with another op in the attention of some layers, and in the rest of some."""
    places = [
        *(f"layer.{i}/{part}" for i in attentions for part in ("query", "value")),
        *(f"layer.{i}/up" for i in rests),
    ]
    edits = [InsertAfter(Ref(place), f"{place}/added", "aten.tanh.default") for place in places]
    return analyse(apply(GRAPH, Delta(edits)))


def names(runs: list[Run]) -> list[Run]:
    """The blocks of each run, without what deltas added."""
    return [tuple(block for block in run if not block.endswith("/added")) for run in runs]


@given(st.sets(st.sampled_from(INDICES), max_size=LAYERS - 3))
def test_layers_begin_where_they_did_whatever_attentions_were_edited(attentions: set[int]) -> None:
    facts = edited(attentions)
    assert names(layers(facts)) == PLAIN
    assert layer_count(facts) == LAYERS


def test_an_adapter_in_every_layer_makes_layers_of_them_again() -> None:
    assert names(layers(edited(INDICES))) == PLAIN


@given(st.sets(st.sampled_from(INDICES), max_size=LAYERS - 3))
def test_after_edits_of_attentions_their_layers_are_to_be_built_and_no_more(
    attentions: set[int],
) -> None:
    before = {run_region(PLAIN_FACTS, run).key for run in PLAIN}
    facts = edited(attentions)
    runs = layers(facts)
    new = {idx for idx, run in enumerate(runs) if run_region(facts, run).key not in before}
    embeddings = 1
    assert new == {embeddings + idx for idx in attentions}


@pytest.mark.parametrize("idx", range(1, LAYERS))
def test_a_layer_edited_in_all_of_its_parts_is_told_by_the_one_before(idx: int) -> None:
    assert names(layers(edited([idx], [idx]))) == PLAIN


def test_a_block_like_an_anchor_before_one_small_op_is_none() -> None:
    """What follows a layer's anchor here, one relu, follows other blocks as well."""
    b = Builder()

    def residual(name: str, x: Ref, depth: int) -> Ref:
        y = x
        for i in range(depth):
            y = b.linear(f"{name}.{i}", y, 4, 4)
        return b.node(f"{name}.relu", "relu.default", b.node(f"{name}.add", "add.Tensor", y, x))

    x = residual("wide", b.node("stem", "tanh.default", Ref("x")), 3)
    for i in range(4):
        x = residual(f"layer.{i}", x, 2)
    inputs = [("x", TensorType("f32", (BATCH, 4)))]
    graph = Graph.build("net", b.nodes, inputs, [("y", x)], b.constants)
    assert [run[0] for run in layers(analyse(graph))] == [
        "stem", "layer.0.add", "layer.1.add", "layer.2.add", "layer.3.add"
    ]  # fmt: skip
