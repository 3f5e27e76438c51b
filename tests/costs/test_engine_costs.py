"""Costs of live models: absent or told with a band, measured before predicted, and nothing changes."""

import time
from pathlib import Path

import pytest
import torch
from test_host_model import LAYER

import graphopt
from cost_models.host_model import HostModel
from graphopt.costs.op_work import CLASSES
from graphopt.engine.costs import sizes_of
from graphopt.executor.step_times import time_steps
from helpers.graphs import transformer

SETTINGS = graphopt.EngineSettings(intra_op=1, builder=False, improve=False)
INPUTS = {
    "input_ids": torch.ones(2, 5, dtype=torch.int64),
    "attention_mask": torch.ones(2, 5, dtype=torch.int64),
}
DELTA = graphopt.Delta([graphopt.Bypass("layer.0/gelu")])


@pytest.fixture
def model(tmp_path: Path) -> HostModel:
    path = tmp_path / "host.yaml"
    head = LAYER[: LAYER.index("backends:")]
    rates = "".join(
        f"      {name}: {{kernel_s: 1e-5, compute: 2.0, memory: 2.0}}\n" for name in CLASSES
    )
    path.write_text(f"{head}backends:\n  eager:\n    threads_1:\n      error: 0.2\n{rates}")
    return HostModel(path)


def test_a_dry_run_tells_costs_and_changes_nothing(model: HostModel) -> None:
    with graphopt.Engine(transformer(2), SETTINGS, cost_model=model) as engine:
        before = (engine.revision, engine.graph.hash, engine.model.slot.plan.id)
        history, coefficients = engine.history(), model.coefficients
        cost = engine.dry_run(DELTA).cost
        assert cost is not None
        assert cost.before is not None
        assert cost.live is not None
        assert cost.live.seconds < cost.before.seconds  # one kernel less
        assert cost.before.low_s < cost.before.seconds < cost.before.high_s
        assert cost.before.measured_steps == 0
        assert cost.settled == cost.live  # no runtime region is dropped
        assert (engine.revision, engine.graph.hash, engine.model.slot.plan.id) == before
        assert engine.history() == history
        assert model.coefficients is coefficients


def test_what_cannot_be_predicted_is_absent() -> None:
    with graphopt.Engine(transformer(2), SETTINGS, cost_model=HostModel()) as engine:
        cost = engine.dry_run(DELTA).cost
        assert cost is not None
        assert cost.before is cost.live is cost.settled is None
        assert {step.predicted_s for step in engine.explain().steps} == {None}


def test_a_plan_costs_the_sum_of_its_steps(model: HostModel) -> None:
    with graphopt.Engine(transformer(3), SETTINGS, cost_model=model) as engine:
        steps = engine.explain().steps
        cost = engine.dry_run(DELTA).cost
        assert cost is not None
        assert cost.before is not None
        assert cost.before.steps == len(steps)
        told = [step.predicted_s for step in steps if step.predicted_s is not None]
        assert sum(told) == pytest.approx(cost.before.seconds)


def test_steps_are_measured_shown_kept_and_learned_from(model: HostModel, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with graphopt.Engine(transformer(2), SETTINGS, model, state) as engine:
        engine.run(INPUTS)
        live, costs = engine.model, engine.host.better.costs
        guessed = {step.block: step.predicted_s for step in engine.explain().steps}
        costs.measure(live, live.facts, live.arrangement)
        steps = engine.explain().steps
        measured = {step.block: step.measured_s for step in steps}
        assert all(each is not None and each > 0 for each in measured.values())
        assert any(step.predicted_s != guessed[step.block] for step in steps)
        cost = engine.dry_run(DELTA).cost
        assert cost is not None
        assert cost.before is not None
        assert cost.before.measured_steps == len(steps)
        assert cost.before.seconds == pytest.approx(sum(filter(None, measured.values())))
    with graphopt.Engine(None, SETTINGS, HostModel(), state) as engine:
        engine.run(INPUTS)
        assert sizes_of(engine.model) == {"batch": 2, "seq": 5}
        assert {step.block: step.measured_s for step in engine.explain().steps} == measured


def test_a_request_in_between_ends_the_timing_of_steps(model: HostModel) -> None:
    with graphopt.Engine(transformer(2), SETTINGS, cost_model=model) as engine:
        plan = engine.model.slot.plan
        looks = iter([False] * len(plan.steps) + [True])
        assert time_steps(plan, INPUTS, time.perf_counter, lambda: next(looks), 60.0) is None
        assert next(looks, "none left") == "none left"
