"""Where layers begin, in a network as it was and after deltas to some of its layers."""

from collections.abc import Collection

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.analysis.facts import Facts, analyse
from graphopt.delta import Delta, apply
from graphopt.graph import Ref
from graphopt.macros import InsertAfter
from graphopt.planner.layout import Run, layer_count, layers
from helpers.graphs import transformer

LAYERS = 6
GRAPH = transformer(LAYERS)
PLAIN = layers(analyse(GRAPH))
INDICES = range(LAYERS)


def edited(attentions: Collection[int], norms: Collection[int] = ()) -> Facts:
    """The network with another op in the attention of some layers, and behind the last norm of some."""
    places = [
        *(f"layer.{i}/{part}" for i in attentions for part in ("query", "value")),
        *(f"layer.{i}/norm" for i in norms),
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


@pytest.mark.parametrize("idx", range(1, LAYERS - 1))
def test_a_layer_edited_in_all_of_its_parts_is_told_by_the_one_before(idx: int) -> None:
    assert len(layers(edited([idx], [idx]))) >= len(PLAIN) - 1
    starts = {run[0] for run in layers(edited([idx], [idx]))}
    assert f"layer.{idx}/attention/add" in starts


def test_a_small_block_before_the_rest_of_a_layer_is_no_anchor() -> None:
    """The embeddings' norm is like the layers', and what is before it is not like an attention."""
    assert PLAIN[0] == ("embeddings/word", "embeddings/add", "embeddings/norm")
