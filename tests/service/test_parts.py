import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from graphopt.engine import ModelLimits
from graphopt.engine.records import ignore_event
from graphopt.engine.thread_budget import ThreadBudget, usable_cpus
from graphoptd.app import engine_settings
from graphoptd.configured import FILE, ConfiguredModels
from graphoptd.engine_events import EngineEvents
from graphoptd.garbage import BUSY_GROWTH_MAX, IDLE_GROWTH_MIN, Garbage
from graphoptd.logs import install
from graphoptd.settings import ExecutorSettings, LogSettings, ModelSettings, Settings
from service.harness import ENVIRONMENT


@pytest.mark.parametrize(
    ("settings", "cpus", "expected"),
    [
        (ExecutorSettings(), 1, (1, 1)),
        (ExecutorSettings(), 2, (1, 2)),
        (ExecutorSettings(), 16, (4, 4)),
        (ExecutorSettings(threads=2), 16, (2, 8)),
        (ExecutorSettings(threads=8), 2, (8, 1)),
        (ExecutorSettings(intra_op_threads=1), 6, (6, 1)),
        (ExecutorSettings(prefer="throughput"), 6, (6, 1)),
        (ExecutorSettings(prefer="throughput", threads=2), 6, (2, 3)),
        (ExecutorSettings(threads=3, intra_op_threads=5), 2, (3, 5)),
    ],
)
def test_threads_fit_the_cpus_and_what_is_given_is_kept(
    settings: ExecutorSettings, cpus: int, expected: tuple[int, int]
) -> None:
    assert settings.budget(cpus) == ThreadBudget(*expected)


def of_model(**keys: Any) -> ModelSettings:
    return ModelSettings(bundle=Path("bundle"), **keys)


@pytest.mark.parametrize(
    ("executor", "model", "cpus", "expected"),
    [
        (ExecutorSettings(), of_model(), 16, (4, 4)),
        (ExecutorSettings(threads=3, intra_op_threads=5), of_model(), 2, (3, 5)),
        (ExecutorSettings(), of_model(prefer="throughput"), 16, (16, 1)),
        (ExecutorSettings(prefer="throughput"), of_model(prefer="latency"), 16, (4, 4)),
        (ExecutorSettings(prefer="throughput"), of_model(prefer="latency"), 2, (1, 2)),
        # Fewer at once are not wider, more are narrower
        (ExecutorSettings(), of_model(threads=1), 16, (1, 4)),
        (ExecutorSettings(), of_model(threads=8), 16, (8, 2)),
        (ExecutorSettings(), of_model(threads=3), 2, (3, 1)),
        (ExecutorSettings(), of_model(threads=2, prefer="throughput"), 16, (2, 1)),
        (ExecutorSettings(threads=2), of_model(threads=1), 16, (1, 8)),
        # What the operator gave as numbers wins, unless the model prefers something itself
        (ExecutorSettings(threads=2), of_model(prefer="throughput"), 16, (16, 1)),
        (ExecutorSettings(intra_op_threads=8), of_model(threads=4), 16, (4, 8)),
        (ExecutorSettings(intra_op_threads=8), of_model(threads=4, prefer="latency"), 16, (4, 4)),
        # and then, too, no model has more CPUs than he left to all of them
        (ExecutorSettings(threads=2, intra_op_threads=2), of_model(prefer="latency"), 16, (1, 4)),
        (
            ExecutorSettings(threads=2, intra_op_threads=2),
            of_model(prefer="throughput"),
            16,
            (4, 1),
        ),
        (ExecutorSettings(threads=8), of_model(prefer="throughput"), 2, (2, 1)),
    ],
)
def test_a_model_has_what_it_prefers_of_the_cpus_of_the_process(
    executor: ExecutorSettings, model: ModelSettings, cpus: int, expected: tuple[int, int]
) -> None:
    assert executor.budget_of(model, cpus) == ThreadBudget(*expected)


def test_the_engine_is_told_what_each_model_may_have() -> None:
    settings = Settings(
        executor=ExecutorSettings(threads=2, intra_op_threads=2),
        models={"a": of_model(prefer="throughput", memory_bytes_max=7), "b": of_model()},
    )
    told = engine_settings(settings, ignore_event)
    assert told.limits("a") == ModelLimits(ThreadBudget(4, 1), 7)
    assert told.limits("b") == told.limits("loaded since") == ModelLimits(ThreadBudget(2, 2))


def test_a_quota_of_the_cgroup_counts(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert usable_cpus(tmp_path) == 1


def said(events: list[tuple[str, dict[str, Any]]], origin: dict[str, Any]) -> list[dict[str, Any]]:
    """What the log has after these events of the engine."""
    logs = install(LogSettings(), fd=2)
    try:
        sink = EngineEvents(lambda: origin)
        for name, fields in events:
            sink(name, fields)
        return [json.loads(line) for _, line in logs.ring.read().lines]
    finally:
        logs.close()


def test_the_proofs_of_a_revision_are_one_line_with_the_worst() -> None:
    proof = {"graph": "m", "revision": 2, "block": "b", "tier": "fused"}
    lines = said(
        [
            ("plan.verified", {**proof, "max_error": 1e-6, "allowed": 1e-5}),
            ("plan.verified", {**proof, "max_error": 3e-6, "allowed": 1e-5}),
            (
                "plan.published",
                {"graph": "m", "revision": 2, "plan_id": "p", "tiers": {"fused": 2}},
            ),
        ],
        {},
    )
    assert [line["event"] for line in lines] == ["plan.verified", "plan.published"]
    assert (lines[0]["blocks"], lines[0]["error_max"]) == (2, 3e-6)


def test_a_delta_is_logged_with_who_sent_it() -> None:
    fields = {"graph": "m", "revision": 3, "delta": "d", "kind": "delta", "live_s": 0.002}
    (line,) = said([("delta.applied", fields)], {"source": "control", "peer_uid": 7})
    assert (line["delta_id"], line["from_revision"], line["live_ms"]) == ("d", 2, 2.0)
    assert (line["source"], line["peer_uid"]) == ("control", 7)


def test_an_event_nobody_knows_is_logged_and_not_raised() -> None:
    (line,) = said([("engine.new", {})], {})
    assert line["event"] == "log.other"
    assert "engine.new" in line["message"]


def test_a_store_that_failed_is_told_at_once() -> None:
    told: list[bool] = []
    sink = EngineEvents(failed=lambda: told.append(True))
    for code in ("delta.rejected", "state.failed"):
        sink("delta.rejected", {"graph": "m", "revision": 1, "code": code, "message": "no"})
    assert told == [True]


def test_garbage_is_collected_when_idle_or_overdue_and_else_left() -> None:
    was_enabled = gc.isenabled()
    garbage = Garbage()
    gc.disable()
    try:
        gc.collect()
        assert not garbage.tick(is_idle=True)
        kept = [[] for _ in range(2 * IDLE_GROWTH_MIN)]  # type: ignore[var-annotated]
        assert not garbage.tick(is_idle=False)
        assert garbage.tick(is_idle=True)
        kept += [[] for _ in range(2 * BUSY_GROWTH_MAX)]
        assert garbage.tick(is_idle=False)
    finally:
        if was_enabled:
            gc.enable()


class FakeHost:
    """Only the names of live models matter here."""

    def __init__(self, names: set[str]) -> None:
        self._names = names

    def models(self) -> dict[str, None]:
        return dict.fromkeys(self._names)


def test_a_configured_model_is_wanted_until_the_state_has_seen_it(tmp_path: Path) -> None:
    model = ModelSettings(bundle=Path("bundle"))
    settings = Settings(models={"a": model, "b": model})
    configured = ConfiguredModels(FakeHost({"a"}), tmp_path)  # type: ignore[arg-type]
    assert configured.wanted(settings) == ["b"]
    configured.note()
    assert json.loads((tmp_path / FILE).read_text()) == ["a"]
    unloaded = ConfiguredModels(FakeHost(set()), tmp_path)  # type: ignore[arg-type]
    assert unloaded.wanted(settings) == ["b"]


def test_typing_a_graph_does_not_bring_torch_dynamo_into_the_service() -> None:
    program = """
import sys
import graphoptd.service
from graphoptd.no_dynamo import spare_dynamo
assert spare_dynamo() > 100
import torch
x = torch.empty(2, 3, device="meta")
torch.ops.aten.rsub.Scalar(x, 1.0)
torch.ops.aten.linalg_vector_norm.default(x, 2, [1], True)
assert "torch._dynamo" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT, check=False)
    assert done.returncode == 0
