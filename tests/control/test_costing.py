"""The cost model from outside: what is in force, a calibration, what a delta would cost."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from control_serving import Service, ctl, serving

from cost_models.coefficients import DEFAULTS
from cost_models.host_model import calibration_path

DELTA = "delta: 1\nedits:\n  - bypass: {node: layer.0/gelu}\n"


@pytest.fixture
def stateful(tmp_path: Path) -> Iterator[Service]:
    with serving(tmp_path, state=tmp_path / "state") as running:
        yield running


def state(service: Service) -> Path:
    assert service.host.folder is not None
    return service.host.folder.path


def test_each_coefficient_is_shown_with_unit_range_and_origin(service: Service) -> None:
    ran = ctl(service, "--json", "cost", "show", "weights.*")
    rows = json.loads(ran.out)["coefficients"]
    assert [row["name"] for row in rows] == ["weights.alpha", "weights.beta"]
    assert {row["origin"] for row in rows} == {str(DEFAULTS)}
    shown = ctl(service, "cost", "show")
    assert "roofline.sharpness" in shown.out
    assert "seconds a second" in shown.out


def test_without_a_calibration_no_cost_is_told(service: Service, tmp_path: Path) -> None:
    (tmp_path / "d.yaml").write_text(DELTA)
    ran = ctl(service, "--json", "apply", str(tmp_path / "d.yaml"), "--dry-run")
    cost = json.loads(ran.out)["cost"]
    assert (cost["before"], cost["live"], cost["settled"]) == (None, None, None)
    assert "a request takes" not in ctl(service, "apply", str(tmp_path / "d.yaml"), "--dry-run").out


def test_a_calibration_is_written_taken_over_and_used(stateful: Service, tmp_path: Path) -> None:
    ran = ctl(stateful, "--json", "calibrate", "--threads", "1", "--within", "1")
    assert ran.code == 0, ran.err
    answer = json.loads(ran.out)
    path = calibration_path(state(stateful))
    assert answer["path"] == str(path)
    assert answer["changed"] > 0
    assert [line["count"] for line in stateful.lines("cost.calibrated")] == [answer["changed"]]
    rows = json.loads(ctl(stateful, "--json", "cost", "show", "host.*").out)["coefficients"]
    assert {row["origin"] for row in rows} == {str(path)}
    (tmp_path / "d.yaml").write_text(DELTA)
    found = json.loads(ctl(stateful, "--json", "apply", str(tmp_path / "d.yaml"), "--dry-run").out)
    before = found["cost"]["before"]
    assert 0 < before["low_s"] < before["seconds"] < before["high_s"]
    text = ctl(stateful, "apply", str(tmp_path / "d.yaml"), "--dry-run").out
    assert "a request takes now (batch=" in text
    assert "as soon as it is applied" in text
    steps = json.loads(ctl(stateful, "--json", "explain").out)["steps"]
    assert all(step["predicted_s"] > 0 for step in steps)
    assert all(step["measured_s"] is None for step in steps)


def test_a_calibration_that_fails_says_so_and_changes_nothing(stateful: Service) -> None:
    (state(stateful) / "calibration").write_text("a file where the folder should be")
    ran = ctl(stateful, "calibrate", "--threads", "1", "--within", "1")
    assert ran.code == 1
    assert "calibration" in ran.err
    assert stateful.lines("cost.calibrated") == []


def test_without_a_state_folder_there_is_no_calibration(service: Service) -> None:
    ran = ctl(service, "calibrate")
    assert ran.code == 4
    assert "no state folder" in ran.err
