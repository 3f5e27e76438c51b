"""A network of layers, each of which runs on OpenVINO, as a large one would settle on it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import graphopt
from graphopt.delta import AddNode, Delta, Rewire
from graphopt.engine.engine import Engine
from graphopt.engine.prospects import Prospects
from graphopt.executor.step_trial import StepTrial
from graphopt.executor.switch import Switch
from graphopt.executor.trial import TrialResult
from graphopt.graph import Ref
from helpers.graphs import transformer

SETTLED_S = 120.0  # of a broken test; a good one takes seconds
LAYERED, WHOLE = "openvino layers", "openvino whole"
REQUEST = {
    "input_ids": torch.arange(12).reshape(1, 12) % 16,
    "attention_mask": torch.ones(1, 12, dtype=torch.int64),
}

Said = list[tuple[str, Mapping[str, Any]]]


@contextmanager
def winning() -> Iterator[None]:
    """Every plan that is put together is published, as if it had won its trial."""
    consider: Callable[..., str] = Switch.consider
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Switch, "consider", lambda *a, **k: consider(*a, **{**k, "known": "forced"}))
        yield


def compare_as(monkeypatch: pytest.MonkeyPatch, **found: Any) -> list[TrialResult]:
    """Has every comparison of steps end so, when it ends; returns what they found themselves."""
    run = StepTrial.run
    really: list[TrialResult] = []

    def changed(self: StepTrial, budget_s: float) -> TrialResult | None:
        result = run(self, budget_s)
        if result is None:
            return None
        really.append(result)
        return replace(result, buckets=(), **found)

    monkeypatch.setattr(StepTrial, "run", changed)
    return really


def only_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are worth a region each, as large ones are, and no other plan is looked at. Steps are
    really timed, but these are too small for the result to be the same each time: new ones win.
    """
    torch.set_num_threads(1)
    for module in ("campaign", "pursuit"):
        monkeypatch.setattr(f"graphopt.engine.{module}.latency_of", lambda *args: 1.0)
    monkeypatch.setattr(Prospects, "is_open", lambda self, plan: plan["label"] == LAYERED)
    compare_as(monkeypatch, verdict="better", ratio=0.5, reason="0.5 of the current plan's time")


def open_engine(said: Said, state: Path | None = None, *, anew: bool = True) -> Engine:
    """An engine of six layers; with `anew` off, of the model that lies in `state`."""
    settings = graphopt.EngineSettings(
        intra_op=1,
        backends=("openvino",),
        events=lambda name, fields: said.append((name, dict(fields))),
    )
    return graphopt.Engine(transformer(6) if anew else None, settings, state_dir=state)


def settle_on_layers(engine: Engine) -> None:
    """Serves some requests until every layer has its region."""
    with winning():
        for _ in range(20):
            engine.run(REQUEST)
        assert engine.settle(SETTLED_S)
    (found,) = engine.host.better.findings("transformer")
    assert (found.label, found.state) == (LAYERED, "chosen")
    engine.host.better.supply.prove(LAYERED, found.kinds)


def edit(engine: Engine, layer: int, factor: float = 1.25) -> None:
    """One more node in the middle of a layer."""
    value = f"layer.{layer}/gelu"
    readers = tuple(engine.model.graph.users[value])
    scaled = AddNode(f"scaled.{layer}", "aten.mul.Tensor", (Ref(value), factor))
    engine.apply(Delta([scaled, Rewire(Ref(value), Ref(scaled.id), readers)]))


def of(said: Said, name: str, revision: int) -> list[Mapping[str, Any]]:
    return [f for event, f in said if event == name and f.get("revision") == revision]


def check_answers(engine: Engine) -> None:
    with graphopt.Engine(engine.model.graph, graphopt.EngineSettings(improve=False)) as reference:
        expected = reference.run(REQUEST).outputs
    torch.testing.assert_close(engine.run(REQUEST).outputs, expected, rtol=1e-4, atol=1e-5)
