"""All passes together: real networks, the builder, and what a pass may not do."""

from functools import cache
from typing import Any

import pytest
from rewrite_laws import assert_law, edits_of, lowered_by, whole

from frontend import zoo
from graphopt.analysis.facts import Facts, analyse
from graphopt.analysis.regions import Region
from graphopt.delta import AddNode, Delta, Rewire
from graphopt.frontend.torch_export import from_torch
from graphopt.graph import Graph, Ref
from graphopt.rewrite import PASSES, Rewrite, lower
from helpers.graphs import transformer

SIZES = {"batch": 3, "seq": 7}


@cache
def imported(family: str) -> Graph:
    module, inputs = zoo.build(family), zoo.inputs(family, 2, 8)
    if hasattr(module.config, "use_cache"):
        module.config.use_cache = False
    is_text = "input_ids" in inputs
    dynamic: Any = {key: {0: "batch", 1: "seq"} for key in inputs} if is_text else "batch"
    return from_torch(module, inputs, dynamic, family)


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_a_network_is_what_it_was_and_has_no_more_nodes(family: str):
    graph = imported(family)
    lowered = assert_law(graph, SIZES, atol=1e-4, **PASSES)
    assert len(lowered.region.order) <= len(whole(analyse(graph)).order)


def test_the_user_s_graph_stays_and_everything_new_names_its_sources():
    graph = transformer(2)
    before = graph.hash
    lowered = lowered_by(graph, **PASSES)
    assert graph.hash == before
    assert edits_of(lowered) > 0
    new = [id for id in lowered.region.order if id not in graph.nodes]
    assert all(lowered.sources[id] for id in new)


def test_a_pass_that_makes_nonsense_is_left_out_and_the_others_run():
    def breaks(facts: Facts, region: Region) -> Rewrite:
        bad = AddNode("bad", "aten.linear.default", (Ref("input_ids"), Ref("input_ids")))
        return Rewrite(Delta([bad, Rewire(Ref("pooler/first"), Ref("bad"))]))

    facts = analyse(transformer(2))
    lowered = lower(facts, whole(facts), {"breaks": breaks, "rows": PASSES["rows"]})
    faults = {step.name: bool(step.fault) for step in lowered.steps}
    assert faults == {"breaks": True, "rows": False}
    assert "bad" not in lowered.graph.nodes
    assert any(id.endswith("~rows") for id in lowered.region.order)


def test_what_no_exit_needs_any_more_is_gone():
    lowered = lowered_by(transformer(2), **PASSES)
    inside = set(lowered.region.order)
    assert "layer.1/up" not in lowered.graph.nodes
    leaves = [id for id in lowered.graph.nodes if id not in inside and id != "seq"]
    assert leaves == [], "only what the exits need is left"
