"""The configuration changes while the service runs: whole or not at all, and said."""

import os
import signal
from pathlib import Path

import pytest

from graphoptd.ctl.client import Refused
from service.harness import Zygote, running

HEAD = """
state: {path: state}
control: {socket: run/graphoptd.sock, group: ""}
data: {port: null, socket_path: run/graphoptd-data.sock}
builder: {enabled: false}
"""


@pytest.fixture
def config(folder: Path) -> Path:
    path = folder / "graphoptd.yaml"
    path.write_text(HEAD)
    return path


def replace(path: Path, text: str) -> None:
    """As editors and package managers do."""
    draft = path.with_suffix(".new")
    draft.write_text(text)
    os.replace(draft, path)


def test_a_model_added_to_the_file_serves_and_nothing_restarts(
    folder: Path, config: Path, bundle: Path, zygote: Zygote
) -> None:
    with running(folder, ["--config", str(config)], zygote) as daemon:
        daemon.until("READY=1")
        replace(config, HEAD + f"models: {{pair: {{bundle: {bundle}}}}}\n")
        done = daemon.log.wait_for("config.reloaded")
        assert done["applied"] == ["models.pair"]
        assert daemon.infer()["revision"] == 1


def test_keys_that_need_a_restart_are_named(folder: Path, config: Path, zygote: Zygote) -> None:
    with running(folder, ["--config", str(config)], zygote) as daemon:
        daemon.until("READY=1")
        config.write_text(HEAD + "executor: {threads: 3}\nlog: {failures_period_s: 5.0}\n")
        with daemon.control() as client:
            answer = client.ask("reload")
        assert answer["needs_restart"] == ["executor.threads"]
        assert answer["applied"] == ["log.failures_period_s"]


@pytest.mark.parametrize("text", ["daat: {}\n", "models: {m: {bundle: none}}\n"])
def test_a_bad_file_or_bundle_changes_nothing(
    folder: Path, config: Path, zygote: Zygote, text: str
) -> None:
    with running(folder, ["--config", str(config)], zygote) as daemon:
        daemon.until("READY=1")
        config.write_text(HEAD + "log: {failures_period_s: 5.0}\n" + text)
        with daemon.control() as client:
            with pytest.raises(Refused):
                client.ask("reload")
            assert daemon.log.wait_for("config.rejected")["path"] == str(config)
            config.write_text(HEAD)
            assert client.ask("reload")["applied"] == []  # the 5.0 was never in force


def test_sighup_reloads_too(folder: Path, config: Path, zygote: Zygote) -> None:
    with running(folder, ["--config", str(config)], zygote) as daemon:
        daemon.until("READY=1")
        daemon.signal(signal.SIGHUP)
        assert daemon.log.wait_for("config.reloaded")["applied"] == []
        daemon.until("RELOADING=1")


def test_without_a_file_a_reload_is_refused_with_the_remedy(
    folder: Path, model_argv: list[str], zygote: Zygote
) -> None:
    with running(folder, model_argv, zygote) as daemon:
        daemon.until("READY=1")
        with daemon.control() as client, pytest.raises(Refused, match="without a configuration"):
            client.ask("reload")


def test_the_cost_folder_is_taken_over_as_it_changes_whole_or_not_at_all(
    folder: Path, config: Path, zygote: Zygote
) -> None:
    costs = folder / "cost"
    costs.mkdir()
    replace(costs / "a.yaml", "cost: 1\nweights: {alpha: 1.0}\n")
    config.write_text(HEAD + "costs: {path: cost}\n")
    with running(folder, ["--config", str(config)], zygote) as daemon:
        daemon.until("READY=1")
        replace(costs / "b.yaml", "cost: 1\nweights: {alpha: 2.0, beta: 3.0}\n")
        done = daemon.log.wait_for("config.reloaded")
        assert done["applied"] == ["costs: weights.alpha", "costs: weights.beta"]
        replace(costs / "a.yaml", "cost: 1\nweights: {alpha: many}\n")
        refused = daemon.log.wait_for("config.rejected")
        assert "a.yaml:2:18" in refused["where"]
        with daemon.control() as client:
            rows = client.ask("cost", {"glob": "weights.*"})["coefficients"]
        assert {row["name"]: row["value"] for row in rows} == {
            "weights.alpha": 2.0,
            "weights.beta": 3.0,
        }
        assert {row["origin"] for row in rows} == {str(costs / "b.yaml")}


def test_a_bad_cost_folder_refuses_the_whole_configuration(
    folder: Path, config: Path, zygote: Zygote
) -> None:
    (folder / "cost").mkdir()
    (folder / "cost" / "a.yaml").write_text("cost: 7\n")
    with running(folder, ["--config", str(config)], zygote) as daemon:
        daemon.until("READY=1")
        config.write_text(HEAD + "costs: {path: cost}\nlog: {failures_period_s: 5.0}\n")
        with daemon.control() as client:
            with pytest.raises(Refused):
                client.ask("reload")
            config.write_text(HEAD + "log: {failures_period_s: 5.0}\n")
            assert client.ask("reload")["applied"] == ["log.failures_period_s"]
