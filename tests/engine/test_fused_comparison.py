"""A `fused` step that gains nothing over `eager` gives way to it: once a kind, and with a reason."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

import graphopt
from graphopt.analysis.facts import Facts
from graphopt.constants import constant_of
from graphopt.delta import PutConstant
from graphopt.dims import Dim, symbol
from graphopt.engine import fused_comparison, improve
from graphopt.executor.fused import FusedBuilder
from graphopt.executor.plan import Step
from graphopt.executor.switch import Switch
from graphopt.graph import Graph, Ref, Symbol
from graphopt.types import TensorType
from helpers.graphs import Builder, feeds_of

SETTLED_S = 120
SLOW = 40  # times what it takes
LAYERS = ("a", "b")


class Slowed(FusedBuilder):
    """Steps of oneDNN that hold a batch-norm compute everything many times over."""

    def prepare_run(self, facts: Facts, run: tuple[str, ...]) -> Step | None:
        step = super().prepare_run(facts, run)
        if step is None or not any("batch_norm" in facts.graph.nodes[n].op for n in step.nodes):
            return step
        function = step.function

        def slowly(*args: Any) -> Any:
            for _ in range(SLOW):
                result = function(*args)
            return result

        return replace(step, function=slowly)


def net(batch: Dim = 1) -> Graph:
    """Three convolutions and activations; the last two have a norm between them and are of one kind."""
    b, x = Builder(), Ref("x")
    x = b.node(
        "stem", "conv2d.default", x, b.weight("stem.weight", 16, 3, 3, 3), None, (1, 1), (1, 1)
    )
    x = b.node("stem/relu", "relu.default", x)
    for name in LAYERS:
        weight = b.weight(f"{name}.weight", 16, 16, 3, 3, scale=0.1)
        x = b.node(name, "conv2d.default", x, weight, None, (1, 1), (1, 1))
        mean, scale = b.weight(f"{name}.mean", 16), b.weight(f"{name}.scale", 16)
        variance = b.weight(f"{name}.variance", 16)
        b.constants[variance.name] = constant_of(torch.ones(16), is_param=False)
        x = b.node(
            f"{name}/norm",
            "batch_norm.default",
            x,
            scale,
            mean,
            mean,
            variance,
            False,
            0.1,
            1e-5,
            True,
        )
        x = b.node(f"{name}/relu", "relu.default", x)
    symbols = [] if batch == 1 else [Symbol("batch", 1, 8)]
    image = TensorType("f32", (batch, 3, 32, 32))
    return Graph.build("net", b.nodes, [("x", image)], [("y", x)], b.constants, None, symbols)


Said = list[tuple[str, Mapping[str, Any]]]


@pytest.fixture
def said() -> Said:
    return []


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often which plan was compared."""
    counts: Counter[str] = Counter()
    real = fused_comparison.result_of

    def counted(model: Any, begun: Any, bare: Any, *rest: Any, **named: Any) -> Any:
        counts[bare.id] += 1
        return real(model, begun, bare, *rest, **named)

    monkeypatch.setattr(fused_comparison, "result_of", counted)
    return counts


def start(said: Said, batch: Dim = 1) -> graphopt.Engine:
    settings = graphopt.EngineSettings(
        intra_op=1, builder=False, events=lambda name, fields: said.append((name, fields))
    )
    return graphopt.Engine(net(batch), settings)


@pytest.fixture
def slowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(improve, "FusedBuilder", Slowed)


def tiers(engine: graphopt.Engine) -> dict[str, str]:
    """By the node that a step ends with."""
    return {line.block: line.tier for line in engine.explain().steps}


def ask(engine: graphopt.Engine, batch: int = 1) -> torch.Tensor:
    return engine.run(feeds_of(engine.graph, {"batch": batch})).outputs["y"]


def test_what_gains_stays_and_what_loses_gives_way(
    slowed: None, compared: Counter[str], said: Said
) -> None:
    with start(said) as engine:
        assert engine.settle(SETTLED_S)
        found = engine.explain()
        assert tiers(engine)["stem/relu"] == "fused"
        lost = [line for line in found.steps if line.block.startswith(LAYERS)]
        assert {line.tier for line in lost} == {"eager"}
        assert any(line.reason.startswith("no faster than eager") for line in lost)
        assert sorted(compared.values()) == [1, 1], "the two layers are of one kind"
        (declined,) = [fields for name, fields in said if name == "plan.declined"]
        assert declined["reason"].startswith("fused is no faster than eager")
        before = ask(engine)
        with graphopt.Engine(net(), graphopt.EngineSettings(improve=False)) as reference:
            torch.testing.assert_close(before, ask(reference), rtol=1e-4, atol=1e-4)


def test_a_kind_that_gave_way_is_not_prepared_again(
    slowed: None, compared: Counter[str], said: Said
) -> None:
    with start(said) as engine:
        assert engine.settle(SETTLED_S)
        compared.clear()
        weight = f"{LAYERS[0]}.weight"
        doubled = constant_of(engine.graph.constants[weight].tensor * 2)
        engine.apply(graphopt.Delta([PutConstant(weight, doubled)]))
        assert engine.settle(SETTLED_S)
        assert not compared
        assert tiers(engine)[f"{LAYERS[0]}/relu"] == "eager"


def test_dynamic_sizes_are_compared_once_requests_tell_them(
    slowed: None, compared: Counter[str], said: Said
) -> None:
    with start(said, symbol("batch")) as engine:
        assert engine.settle(SETTLED_S)
        assert set(tiers(engine).values()) == {"fused"}
        assert not compared
        ask(engine, 3)
        engine.host.better.look_again("net")
        assert engine.settle(SETTLED_S)
        assert tiers(engine)[f"{LAYERS[1]}/relu"] == "eager"


def test_a_plan_under_watch_is_left_as_it_is(
    slowed: None, compared: Counter[str], said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    always = property(lambda _: "watch", lambda _, phase: None)
    monkeypatch.setattr(Switch, "phase", always, raising=False)
    with start(said) as engine:
        assert engine.settle(SETTLED_S)
        assert not compared
        assert set(tiers(engine).values()) == {"fused"}
