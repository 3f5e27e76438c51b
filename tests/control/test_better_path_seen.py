"""The operator's view of the better path: a real builder process, pins that act at once, and what
`explain`, `diff`, `status` and `settle` say about it.
"""

import json
import os
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from control_serving import Raw, Service, ctl, serving

from graphopt.engine.builder_jobs import BuilderStatus
from graphopt.engine.explain import explain
from graphopt.explained import builder_line
from graphopt.graph import Graph
from graphoptd.control.pinning import user_name
from graphoptd.control.streams import too_late
from helpers.graphs import relu_chain

RUNTIMES = str(Path(__file__).parents[1] / "engine")  # has chain_backends
LENGTH = 150  # relus: about 0.3 ms of Python in eager
SETTLED_S = "60"  # of a broken test; a good one takes seconds


def chain(name: str = "chain") -> Graph:
    return relu_chain(LENGTH, name)


def engine(*runtimes: str) -> dict[str, Any]:
    return {
        "improve": True,
        "backends": tuple(name.lower() for name in runtimes),
        "extra_backends": tuple(f"chain_backends:{name}" for name in runtimes),
        "extra_path": (RUNTIMES,),
    }


@pytest.fixture
def settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """A service that has found the faster runtime."""
    monkeypatch.syspath_prepend(RUNTIMES)
    torch.set_num_threads(1)
    with serving(tmp_path, chain(), **engine("Once")) as service:
        answers(service)
        assert ctl(service, "settle", "--timeout", SETTLED_S).code == 0
        yield service


def tiers(service: Service) -> dict[str, int]:
    return service.host.get("chain").slot.plan.tiers()


def explained(service: Service) -> dict[str, Any]:
    return json.loads(ctl(service, "explain", "--json").out)


def answers(service: Service) -> torch.Tensor:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    y = service.host.get("chain").run({"x": x}).outputs["y"]
    torch.testing.assert_close(y, torch.relu(x), rtol=0, atol=0)
    return y


def test_explain_says_what_runs_what_was_tried_and_with_what_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(RUNTIMES)
    with serving(tmp_path, chain(), **engine("Once", "Slow")) as service:
        answers(service)  # in what shapes to compare plans, only requests can tell
        assert ctl(service, "settle", "--timeout", SETTLED_S).code == 0
        found = explained(service)
        text = ctl(service, "explain").out
        printed = str(explain(service.host, service.host.get("chain")))
    (step,) = found["steps"]
    assert (step["tier"], step["nodes"], step["blocks"]) == ("once", LENGTH, LENGTH)
    assert step["reason"] == "part of once whole"
    assert "thread" in step["options"]
    by_label = {row["label"]: row for row in found["candidates"]}
    once, slow = by_label["once whole"], by_label["slow whole"]
    assert once["state"] == "chosen"
    assert once["ratio"] < 0.8
    assert once["latency_s"] > 0
    assert once["build_s"] > 0
    assert slow["state"] == "no gain"
    assert slow["ratio"] > 2
    assert slow["reason"]
    assert found["pin"] is None
    assert found["builder"]["state"] in ("idle", "building")
    for shown in (text, printed):
        for word in ("step", "candidate", "once whole", "no gain", "builder"):
            assert word in shown
        assert f"{slow['ratio']:.2f}x" in shown


def test_a_pin_of_tiers_takes_off_the_others_before_it_is_answered(settled: Service) -> None:
    assert tiers(settled) == {"once": 1}
    ran = ctl(settled, "pin", "--for", "2h", "--reason", "once spins", "--tier", "eager", "--json")
    assert ran.code == 0, ran.err
    pinned = json.loads(ran.out)
    assert pinned["in_force"]
    assert "once" not in pinned["tiers"]
    assert pinned["pin"]["owner"] == user_name(os.getuid())
    answers(settled)
    assert ctl(settled, "settle", "--timeout", SETTLED_S).code == 0
    assert "once" not in tiers(settled)
    assert tiers(settled) == {"eager": LENGTH}  # `fused` is not among the tiers either
    held = {row["label"]: row for row in explained(settled)["candidates"]}["once whole"]
    assert held["state"] == "held"
    assert "once spins" in held["reason"]
    assert held["ratio"] < 0.8  # what was measured before the pin is still known
    assert ctl(settled, "unpin").code == 0
    assert ctl(settled, "settle", "--timeout", SETTLED_S).code == 0
    assert tiers(settled) == {"once": 1}
    answers(settled)
    said = [name for name, _, _ in settled.engine_events if name.startswith("pin.")]
    assert said == ["pin.set", "pin.cleared"]
    source = next(origin for name, _, origin in settled.engine_events if name == "pin.set")
    assert source["source"] == "control"


def test_nothing_is_built_for_tiers_that_a_pin_leaves_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(RUNTIMES)
    state = tmp_path / "state"
    with serving(tmp_path, chain(), state=state) as service:
        pin = ("pin", "--for", "2h", "--reason", "it harms", "--tier", "fused")
        assert ctl(service, *pin).code == 0
    with serving(tmp_path, chain("other"), state=state, **engine("Once")) as service:
        assert ctl(service, "settle", "--timeout", SETTLED_S).code == 0
        built = {
            fields["graph"] for name, fields, _ in service.engine_events if name == "plan.built"
        }
        assert built == {"other"}
        (held,) = explained_of(service, "chain")["candidates"]
        assert (held["label"], held["state"]) == ("once whole", "held")


def test_a_pin_without_tiers_holds_the_plan_and_deltas_go_live_all_the_same(
    settled: Service,
) -> None:
    before = settled.host.get("chain").slot.plan.id
    assert ctl(settled, "pin", "--for", "2h", "--reason", "demo").code == 0
    assert ctl(settled, "settle", "--timeout", SETTLED_S).code == 0
    assert settled.host.get("chain").slot.plan.id == before
    (once,) = explained(settled)["candidates"]
    assert once["state"] == "chosen"
    assert once["ratio"] < 0.8
    assert ctl(settled, "bypass", "relu.7").code == 0
    live = settled.host.get("chain").slot.plan.id
    assert ctl(settled, "settle", "--timeout", SETTLED_S).code == 0
    assert settled.host.get("chain").slot.plan.id == live
    answers(settled)
    assert {step["reason"] for step in explained(settled)["steps"]} <= {
        "pinned", "verified against eager for this region and these weights"
    }  # fmt: skip
    assert ctl(settled, "unpin").code == 0
    assert ctl(settled, "settle", "--timeout", SETTLED_S).code == 0
    assert tiers(settled) == {"once": 1}


def test_a_plan_that_is_held_comes_back_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(RUNTIMES)
    state = tmp_path / "state"
    with serving(tmp_path, chain(), state=state, **engine("Once")) as service:
        assert ctl(service, "settle", "--timeout", SETTLED_S).code == 0
        assert ctl(service, "pin", "--for", "2h", "--reason", "demo").code == 0
    with serving(tmp_path, chain("other"), state=state, **engine("Once")) as service:
        assert ctl(service, "settle", "--timeout", SETTLED_S).code == 0
        assert tiers(service) == {"once": 1}
        assert explained_of(service, "chain")["pin"]["reason"] == "demo"
        status = ctl(service, "status").out
        assert "chain keeps its plan for another" in status
        assert "other keeps" not in status


def explained_of(service: Service, model: str) -> dict[str, Any]:
    return json.loads(ctl(service, "explain", model, "--json").out)


def test_diff_names_the_steps_that_run_what_differs(settled: Service) -> None:
    assert ctl(settled, "bypass", "relu.7").code == 0
    found = json.loads(ctl(settled, "diff", "1", "2", "--json").out)
    assert found["counts"] == {"node": {"added": 0, "removed": 1, "changed": 1}}
    assert found["plan"]["revision"] == 2
    touched = {step["block"]: step["tier"] for step in found["plan"]["touched"]}
    assert "relu.8" in touched or set(touched.values()) == {"once"}
    assert ctl(settled, "bypass", "relu.9").code == 0
    assert json.loads(ctl(settled, "diff", "1", "2", "--json").out)["plan"] is None
    back = json.loads(ctl(settled, "diff", "3", "2", "--json").out)
    assert back["counts"] == {"node": {"added": 1, "removed": 0, "changed": 1}}
    assert back["plan"]["revision"] == 3


def test_status_shows_the_builder_in_a_line(settled: Service) -> None:
    found = json.loads(ctl(settled, "status", "--json").out)["builder"]
    assert found["state"] in ("idle", "building")
    assert found["pid"] is not None
    line = next(row for row in ctl(settled, "status").out.splitlines() if "builder" in row)
    assert line.startswith(f"builder {found['state']}")


def test_settle_tells_a_starved_builder_from_one_at_work() -> None:
    starved = too_late(60, BuilderStatus("starved", 3, 7, 0.4))
    assert "the builder is starved with 0.4% of a core" in starved.message
    assert "builder.floor_pct" in starved.remedy
    at_work = too_late(60, BuilderStatus("building", 3, 7, 80.0))
    assert "building, 3 jobs" in at_work.message
    assert "starved" not in too_late(60, BuilderStatus("idle")).message
    assert starved.code == at_work.code == "deadline.exceeded"


def test_the_progress_of_settle_names_the_builder(service: Service) -> None:
    release = threading.Event()
    service.host._background.submit("blocked", release.wait)
    try:
        with Raw(service.socket) as client:
            first = client.call("settle", more=True)
            assert first["continues"]
            assert first["result"]["builder"]["state"] == "off"
            release.set()
            while client.reply().get("continues"):
                pass
    finally:
        release.set()


def test_a_pin_is_answered_though_the_background_is_at_something_long(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graphoptd.control.pinning.IN_FORCE_S", 0.05)
    release = threading.Event()
    service.host._background.submit("blocked", release.wait)
    try:
        ran = ctl(service, "pin", "--for", "30s", "--reason", "incident")
    finally:
        release.set()
    assert ran.code == 0
    assert "acts on the pin next" in ran.out


@pytest.mark.parametrize(
    ("builder", "line"),
    [
        ({}, "builder off"),
        ({"state": "disabled"}, "builder disabled"),
        (
            {
                "state": "building",
                "queued": 2,
                "job": 9,
                "share_pct": 52.34,
                "rss_bytes": 4 * 10**8,
            },
            "builder building, at job 9, 2 jobs without an answer, 52.3% of a core, 400.0 MB",
        ),
        (
            {"state": "restarting", "queued": 1, "restarts": 1, "quarantined": 2},
            "builder restarting, 1 job without an answer, 1 restart, 2 candidates quarantined",
        ),
    ],
)
def test_the_line_on_the_builder(builder: dict[str, Any], line: str) -> None:
    assert builder_line(asdict(BuilderStatus(**builder))) == line
