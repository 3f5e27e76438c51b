"""A plan over two runtimes: proposed by the planner from the coefficients that the engine sends it, built,
published, repaired after a delta, and held by a pin against either of its tiers.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from test_delta_to_best import SETTLED_S, winning

import graphopt
from cost_models.coefficients import write_document
from cost_models.host_model import HostModel
from graphopt import AddNode, Delta, Engine, Ref, Rewire
from graphopt.costs.op_work import CLASSES, LINEAR
from graphopt.dims import symbol
from graphopt.engine.costs import Costs
from graphopt.engine.prospects import Prospects
from graphopt.graph import Graph, Symbol
from graphopt.types import TensorType
from helpers.graphs import Builder

REQUEST = {"x": torch.linspace(-1, 1, 24).reshape(3, 8)}
RUNTIMES = {"openvino", "onnxruntime"}


def two_parts() -> Graph:
    """Ten linears, then ten sigmoids, which are quick on another runtime than those."""
    b, x = Builder(), Ref("x")
    for i in range(10):
        x = b.linear(f"linear.{i}", x, 8, 8)
    for i in range(10):
        x = b.node(f"exp.{i}", "sigmoid.default" if i % 2 else "exp.default", x)
    rows = TensorType("f32", (symbol("batch"), 8))
    symbols = [Symbol("batch", 1, 64)]
    return Graph.build("parts", b.nodes, [("x", rows)], [("y", x)], b.constants, symbols=symbols)


def layer(folder: Path) -> Path:
    values = {
        "host.working_set.near": 262144.0, "host.working_set.middle": 8388608.0,
        "host.working_set.far": 134217728.0, "host.threads_1.peak": 1e11,
        "host.threads_1.bandwidth.near": 8e10, "host.threads_1.bandwidth.middle": 6e10,
        "host.threads_1.bandwidth.far": 2e10,
    }  # fmt: skip
    for tier in ("eager", "fused", *RUNTIMES):
        values[f"backends.{tier}.threads_1.call_s"] = 1e-5
        for kind in CLASSES:
            is_good = (kind == LINEAR) == (tier == "openvino")
            factor = (0.4 if is_good else 2.0) if tier in RUNTIMES else 1.0
            values[f"backends.{tier}.threads_1.{kind}.kernel_s"] = 1e-5 * factor
    path = folder / "host.yaml"
    path.write_text(write_document(values, "for a test"))
    return path


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """Settled on the parted plan, as if that had won its trial; no other plan is looked at."""
    torch.set_num_threads(1)
    monkeypatch.setattr(Prospects, "is_open", lambda self, plan: plan["label"] == "parted")
    # What is measured here would say that the coefficients are made up
    monkeypatch.setattr(Costs, "measure", lambda *args: None)
    settings = graphopt.EngineSettings(intra_op=1, backends=tuple(RUNTIMES))
    with ExitStack() as stack:
        stack.enter_context(winning())
        model = HostModel(layer(tmp_path))
        engine = stack.enter_context(Engine(two_parts(), settings, cost_model=model))
        for _ in range(20):
            engine.run(REQUEST)
        assert engine.settle(SETTLED_S)
        yield engine


def tiers(engine: Engine) -> dict[str, int]:
    return {step.tier: len(step.blocks) for step in engine.model.slot.plan.steps}


def test_both_runtimes_serve_one_request(engine: Engine) -> None:
    assert tiers(engine) == {"openvino": 10, "onnxruntime": 10}
    (found,) = engine.explain().candidates
    assert (found.label, found.state) == ("parted", "chosen")
    assert found.predicted_s == pytest.approx(20 * 0.4e-5 + 2 * 1e-5, rel=1e-3)
    whys = {step.reason for step in engine.explain().steps}
    assert whys == {"part of the parted plan"}
    with Engine(engine.graph, graphopt.EngineSettings(improve=False)) as reference:
        expected = reference.run(REQUEST).outputs
    torch.testing.assert_close(engine.run(REQUEST).outputs, expected, rtol=1e-4, atol=1e-5)


def test_a_delta_leaves_the_other_runtimes_region_as_it_is(engine: Engine) -> None:
    (kept,) = [o for o in engine.model.arrangement.overlays if o.step.tier == "onnxruntime"]
    old, added = Ref("linear.4"), Ref("more")
    edit = [AddNode(added.id, "aten.tanh.default", (old,)), Rewire(old, added)]
    engine.apply(Delta(edit))
    assert list(engine.model.arrangement.overlays) == [kept]
    assert engine.settle(SETTLED_S)
    assert any(o is kept for o in engine.model.arrangement.overlays)
    assert tiers(engine) == {"openvino": 11, "onnxruntime": 10}


def test_a_pin_against_either_tier_holds_it(engine: Engine) -> None:
    engine.host.better.pin("parts", "me", "a look at it", 600.0, ("openvino",))
    assert engine.settle(SETTLED_S)
    assert "onnxruntime" not in tiers(engine)
    (found,) = engine.explain().candidates
    assert (found.label, found.state) == ("parted", "held")
    engine.host.better.unpin("parts", "me")
    assert engine.settle(SETTLED_S)
    assert tiers(engine) == {"openvino": 10, "onnxruntime": 10}
