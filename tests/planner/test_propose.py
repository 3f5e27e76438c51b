"""What is proposed: layers where they are worth a region, the whole otherwise, cut around what a
runtime cannot run.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from graphopt.analysis.blocks import CONTEXT
from graphopt.analysis.facts import Facts, analyse
from graphopt.analysis.regions import Region
from graphopt.executor.backend import Options, options_of
from graphopt.planner import propose
from graphopt.planner.layout import chain, layers
from helpers.graphs import transformer

FACTS = analyse(transformer(5))


class Runtime:
    """A backend of which only the planner's side exists."""

    def __init__(self, name: str, without: str = "", extras: Sequence[str] = ("",)) -> None:
        self.name, self.without, self.extras = name, without, extras

    def unsupported(self, facts: Facts, region: Region) -> dict[str, str]:
        nodes = facts.graph.nodes
        return {id: "not mapped" for id in region.order if self.without in ("*", nodes[id].op)}

    def choices(self, facts: Facts, region: Region, options: Options) -> Sequence[Options]:
        return [
            Options(options.threads, options.streams, None, (("kind", extra),) if extra else ())
            for extra in self.extras
        ]


def ask(
    offered: Sequence[Runtime],
    latency_s: float | None,
    *buckets: Mapping[str, int],
    share: float = 0.5,
    restless: Sequence[str] = (),
) -> list[Any]:
    document = {
        "backends": [runtime.name for runtime in offered],
        "threads": 2,
        "streams": 1,
        "buckets": list(buckets),
        "buckets_share": share,
        "restless": list(restless),
        "latency_s": latency_s,
    }
    return propose(FACTS, document, {runtime.name: runtime for runtime in offered})["plans"]


class Compiler(Runtime):
    last_resort = True


def test_a_last_resort_is_proposed_only_where_nothing_else_is():
    assert {p["backend"] for p in ask([Compiler("a"), Runtime("b")], 0.1)} == {"b"}
    (alone,) = ask([Compiler("a"), Runtime("b", without="*")], 0.1)
    assert (alone["backend"], alone["layout"]) == ("a", "whole")


def test_long_layers_come_first_and_the_whole_has_to_win():
    plans = ask([Runtime("a"), Runtime("b")], 0.100)
    assert [(p["layout"], p["backend"]) for p in plans] == [
        ("layers", "a"), ("layers", "b"), ("whole", "a"), ("whole", "b"),
    ]  # fmt: skip
    runs = [tuple(region["blocks"]) for region in plans[0]["regions"]]
    assert runs == [run for run in layers(FACTS) if run in runs]
    assert plans[2]["regions"][0]["blocks"] == [CONTEXT, *chain(FACTS)]


@pytest.mark.parametrize("latency_s", [None, 0.004])
def test_short_layers_and_unmeasured_models_run_as_a_whole(latency_s: float | None):
    assert [p["layout"] for p in ask([Runtime("a")], latency_s)] == ["whole"]


def test_hot_shapes_get_variants_beside_the_one_for_every_shape():
    (plan,) = ask([Runtime("a")], None, {"batch": 1, "seq": 16}, {"seq": 8, "batch": 4})
    options = [options_of(region["options"]) for region in plan["regions"]]
    assert [option.sizes for option in options] == [None, (1, 16), (4, 8)]
    assert {option.threads for option in options} == {2}


def test_quick_models_are_tried_on_one_thread_too():
    labels = [plan["label"] for plan in ask([Runtime("a")], 0.0005)]
    assert labels == ["a whole threads=1", "a whole"]


def test_where_hardly_a_request_has_another_shape_no_artifact_waits_for_it():
    (plan,) = ask([Runtime("a")], None, {"batch": 1, "seq": 16}, share=0.99)
    assert [options_of(region["options"]).sizes for region in plan["regions"]] == [(1, 16)]


def test_a_run_is_cut_around_the_block_a_runtime_cannot_run():
    (plan,) = ask([Runtime("a", without="aten.tanh.default")], None)
    runs = [tuple(region["blocks"]) for region in plan["regions"]]
    assert len(runs) == 1, "the classifier alone is not worth a call"
    assert CONTEXT not in runs[0], "its values are needed beside the region too"
    assert "pooler/tanh" not in runs[0]
    assert runs[0] == chain(FACTS)[: len(runs[0])]


class Converting(Runtime):
    """Its own converter writes `by_converter`, for which it has no rule."""

    def __init__(self, name: str, by_converter: str, without: str = "") -> None:
        super().__init__(name, without)
        self.by_converter = by_converter

    def without_rule(self, facts: Facts, region: Region) -> dict[str, str]:
        without = Runtime("rules", without=self.by_converter).unsupported(facts, region)
        return without | self.unsupported(facts, region)


def test_regions_with_what_a_converter_writes_are_tried_beside_those_without():
    gelu = "aten.gelu.default"
    (alone,) = ask([Runtime("a", without=gelu)], None)
    whole, cut = ask([Converting("a", by_converter=gelu)], None)
    assert (whole["label"], cut["label"]) == ("a whole", "a whole by rules")
    assert len(whole["regions"]) == 1
    assert cut["regions"] == alone["regions"]
    assert len(cut["regions"]) > 1


@pytest.mark.parametrize("by_converter", ["aten.glu.default", "*"])
def test_without_such_nodes_or_with_nothing_else_there_is_one_way(by_converter: str):
    (plan,) = ask([Converting("a", by_converter)], None)
    assert plan["label"] == "a whole"


def test_context_a_runtime_cannot_compute_stays_outside():
    (plan,) = ask([Runtime("a", without="aten.rsub.Scalar")], None)
    assert tuple(plan["regions"][0]["blocks"]) == chain(FACTS)


def test_each_way_of_a_runtime_is_a_plan_of_its_own():
    plans = ask([Runtime("a", extras=("one", "two"))], None)
    assert [p["label"] for p in plans] == ["a whole kind=one", "a whole kind=two"]


def test_nothing_is_proposed_where_nothing_can_run():
    assert ask([Runtime("a", without="*")], None) == []
    assert ask([], None) == []


def test_a_block_that_deltas_keep_editing_is_kept_out_of_larger_regions():
    (plan,) = ask([Runtime("a")], None, restless=["layer.2/attention/norm"])
    assert plan["label"] == "a whole around edits"
    blocks = chain(FACTS)
    at = blocks.index("layer.2/attention/norm")
    runs = [tuple(region["blocks"]) for region in plan["regions"]]
    assert all("layer.2/attention/norm" not in run for run in runs)
    assert {block for run in runs for block in run} == {*blocks[:at], *blocks[at + 1 :]}


def test_only_the_layer_that_is_edited_is_parted():
    calm = {tuple(region["blocks"]) for region in ask([Runtime("a")], 0.1)[0]["regions"]}
    plan = ask([Runtime("a")], 0.1, restless=["layer.2/attention/norm"])[0]
    assert plan["label"] == "a layers around edits"
    edited = {tuple(region["blocks"]) for region in plan["regions"]}
    (parted,) = calm - edited
    assert "layer.2/attention/norm" in parted


@pytest.mark.parametrize("restless", [chain(FACTS), ("gone",)], ids=["all", "unknown"])
def test_edits_everywhere_or_of_what_is_gone_part_nothing(restless: Sequence[str]):
    assert ask([Runtime("a")], 0.1, restless=restless) == ask([Runtime("a")], 0.1)
