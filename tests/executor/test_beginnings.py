"""Where steps begin: what earlier revisions leave behind is made use of where it fits, and only there."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.analysis.facts import Facts, analyse
from graphopt.delta import AddNode, Delta, PutConstant, Rewire, apply
from graphopt.executor.arrangement import Arrangement, Overlay
from graphopt.executor.beginnings import Beginnings, Crossings
from graphopt.executor.build import EagerBuilder, build_plan
from graphopt.executor.plan import Plan
from graphopt.executor.runs import eager_run
from graphopt.graph import Graph, Ref
from graphopt.planner.layout import layers
from helpers.graphs import feeds_of, transformer

SIZES = {"batch": 2, "seq": 5}
LAYERS = 4


class Model:
    """A graph laid out in layers, which count how often they run."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.facts: Facts = analyse(graph)
        self.runs: list[str] = []
        base = build_plan(self.facts, 1, EagerBuilder())
        self.plan: Plan = Arrangement.of(base, map(self.overlay, layers(self.facts))).plan

    def overlay(self, run: Any) -> Overlay:
        step = eager_run(self.facts, tuple(run))

        def counted(*args: Any) -> Any:
            self.runs.append(step.block)
            return step.function(*args)

        return Overlay(dataclasses.replace(step, function=counted), ())

    def begin(self, captured: Any, crossings: Crossings | None) -> Beginnings:
        return Beginnings(self.plan, [captured], self.facts, crossings)

    @property
    def starts(self) -> list[int]:
        """Positions of the layers."""
        return [i for i, step in enumerate(self.plan.steps) if len(step.blocks) > 1]


@pytest.fixture(scope="module")
def graph() -> Graph:
    return transformer(LAYERS)


@pytest.fixture(scope="module")
def captured(graph: Graph) -> Any:
    return feeds_of(graph, SIZES)


def weights(graph: Graph, layer: int) -> Graph:
    """The graph with other values in one layer."""
    name = next(
        n for n, c in sorted(graph.constants.items()) if f"layer.{layer}" in n and c.is_param
    )
    return apply(graph, Delta([PutConstant(name, graph.constants[name].tensor * 2)]))


@settings(deadline=None, max_examples=16)
@given(edited=st.integers(0, LAYERS - 1), asked=st.integers(0, LAYERS - 1))
def test_behind_an_edit_nothing_runs_again(
    graph: Graph, captured: Any, edited: int, asked: int
) -> None:
    crossings, before = Crossings(), Model(graph)
    before.begin(captured, crossings).at(captured, before.starts[-1])
    assert len(before.runs) == len(before.starts) - 1
    after = Model(weights(graph, edited))
    env, symbols = after.begin(captured, crossings).at(captured, after.starts[asked])
    assert after.runs == []
    fresh, same = after.begin(captured, None).at(captured, after.starts[asked])
    assert env.keys() == fresh.keys()
    assert symbols == same
    for name, value in fresh.items():
        assert type(env[name]) is type(value)
        if isinstance(value, torch.Tensor):
            assert (env[name].shape, env[name].dtype) == (value.shape, value.dtype)


def test_a_plan_runs_on_from_what_was_kept(graph: Graph, captured: Any) -> None:
    crossings, model = Crossings(), Model(graph)
    model.begin(captured, crossings).at(captured, model.starts[-1])
    again = Model(graph)
    again.begin(captured, crossings).run(
        captured, again.starts[2], again.plan.steps[again.starts[2] :]
    )
    assert len(again.runs) == len(again.starts) - 2


def test_values_of_other_types_are_not_taken(graph: Graph, captured: Any) -> None:
    """What crosses into the last layer is given in float64 by a delta."""
    crossings, before = Crossings(), Model(graph)
    before.begin(captured, crossings).at(captured, before.starts[-1])
    at = before.starts[-1]
    wide = {
        name: value.double()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in before.begin(captured, crossings).at(captured, at)[0].items()
    }
    block = before.plan.steps[at].blocks[0]
    crossings.put(captured, block, wide)
    after = Model(graph)
    env, _ = after.begin(captured, crossings).at(captured, at)
    assert after.runs, "computed"
    assert not any(isinstance(v, torch.Tensor) and v.dtype is torch.float64 for v in env.values())


def test_a_value_that_an_edit_made_cross_is_computed(graph: Graph, captured: Any) -> None:
    """The first layer's activation is read by the last one from now on."""
    crossings, before = Crossings(), Model(graph)
    before.begin(captured, crossings).at(captured, before.starts[-1])
    early, late = "layer.0/gelu", f"layer.{LAYERS - 1}/gelu"
    node = AddNode("long", "aten.add.Tensor", (Ref(late), Ref(early)))
    delta = Delta([node, Rewire(Ref(late), Ref("long"), tuple(graph.users[late]))])
    after = Model(apply(graph, delta))
    last = len(after.plan.steps) - 1
    env, _ = after.begin(captured, crossings).at(captured, last)
    assert after.runs
    assert {name for step in after.plan.steps[last:] for name in step.reads} <= env.keys()


def test_other_inputs_and_what_exceeds_the_bound_are_forgotten(graph: Graph, captured: Any) -> None:
    crossings, model = Crossings(), Model(graph)
    model.begin(captured, crossings).at(captured, model.starts[-1])
    block = model.plan.steps[model.starts[-1]].blocks[0]
    assert crossings.find(captured, block)
    crossings.keep_to([feeds_of(graph, SIZES)])
    assert not crossings.find(captured, block)
    small = Crossings(bytes_max=64)
    Model(graph).begin(captured, small).at(captured, model.starts[-1])
    assert not small.find(captured, block)


def test_what_is_kept_is_a_copy(graph: Graph, captured: Any) -> None:
    crossings = Crossings()
    crossings.keep_to([captured])
    value = torch.ones(3)
    crossings.put(captured, "b", {"x": value, "n": 3, **captured})
    value.zero_()
    kept = crossings.find(captured, "b")
    assert list(kept) == ["x"], "neither numbers nor the model's own inputs"
    assert kept["x"].tolist() == [1.0, 1.0, 1.0]
