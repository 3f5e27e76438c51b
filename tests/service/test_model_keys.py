"""What one model may have, on the real service: its own queue and its own threads, and no other's."""

import json
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from graphoptd.ctl import views
from service.harness import TIMEOUT_S, Daemon, Zygote, infer_body, running

HELD = 13.0  # an input whose request does not end before the test says so

# Run in the service before it starts: a request of this input says in a pipe that it runs, then waits
# at another one.
BEFORE = """
from graphopt.engine.live import LiveModel
run = LiveModel.run
def held(self, inputs):
    if inputs["x"][0, 0] == {held}:
        with open("{folder}/begun", "w") as begun:
            begun.write(self.name + "\\n")
        with open("{folder}/end", "rb", buffering=0) as end:
            end.read(1)
    return run(self, inputs)
LiveModel.run = held
"""

CONFIG = """
state: {{path: state}}
control: {{socket: run/graphoptd.sock, group: ""}}
data: {{port: null, socket_path: run/graphoptd-data.sock, batch_max: 1, queue_max: 9}}
builder: {{enabled: false}}
executor: {{threads: 3, intra_op_threads: 1}}
models:
  pair: {{bundle: {bundle}, prefer: throughput, threads: 1, queue_max: 1}}
  other: {{bundle: {bundle}}}
"""


class Doors:
    """The pipes of `BEFORE`."""

    def __init__(self, folder: Path) -> None:
        for name in ("begun", "end"):
            os.mkfifo(folder / name)
        # Open at both ends: nobody waits for the other end, and nothing in between is lost
        self._begun = os.fdopen(os.open(folder / "begun", os.O_RDWR))
        self._end = os.open(folder / "end", os.O_RDWR)

    def wait_begun(self) -> str:
        """The model of the next request that runs and is held."""
        return self._begun.readline().strip()

    def let_end(self, count: int) -> None:
        """Lets so many requests end that are held, or will be."""
        os.write(self._end, bytes(count))

    def close(self) -> None:
        self._begun.close()
        os.close(self._end)


def until(is_so: Callable[[], bool]) -> None:
    """Asks the service again and again: each answer takes it a turn of its loop."""
    for _ in range(10_000):
        if is_so():
            return
    raise AssertionError("it never came to that")


def infer(daemon: Daemon, model: str, x: float) -> tuple[int, Any]:
    return daemon.request("POST", f"/v2/models/{model}/infer", infer_body(x))


@pytest.mark.timeout(4 * TIMEOUT_S)
def test_a_full_queue_is_one_models_own_and_so_are_its_threads(
    folder: Path, bundle: Path, zygote: Zygote, capsys: pytest.CaptureFixture[str]
) -> None:
    config = folder / "graphoptd.yaml"
    config.write_text(CONFIG.format(bundle=bundle))
    before = BEFORE.format(folder=folder, held=HELD)
    with (
        closing(Doors(folder)) as doors,
        running(folder, ["--config", str(config)], zygote, BEFORE=before) as daemon,
        ThreadPoolExecutor(8) as clients,
        daemon.until("READY=1").control() as control,
    ):

        def waiting() -> int:
            count: int = control.ask("status")["statistics"]["pair"]["waiting"]
            return count

        rows = {row["name"]: row for row in control.ask("status")["models"]}
        assert {name: (row["threads"], row["intra_op_threads"]) for name, row in rows.items()} == {
            "pair": (1, 1),
            "other": (3, 1),
        }
        views.status(control.ask("status"))
        shown = capsys.readouterr().out.splitlines()
        assert "pair has 1 x 1 threads" in shown
        assert not any(line.startswith("other has") for line in shown)
        asked: list[Future[tuple[int, Any]]] = [
            clients.submit(infer, daemon, "pair", HELD) for _ in range(3)
        ]
        assert doors.wait_begun() == "pair"
        until(lambda: waiting() == 1)  # one runs, one is next, and one waits
        status, answer = infer(daemon, "pair", 1.0)
        assert (status, answer["error"][:20]) == (503, "model pair: 1 reques"), answer
        assert infer(daemon, "other", 1.0)[0] == 200
        asked += [clients.submit(infer, daemon, "other", HELD) for _ in range(2)]
        # Of three threads two are free: had `pair` more than one, its second request were here first
        assert [doors.wait_begun(), doors.wait_begun()] == ["other", "other"]
        doors.let_end(len(asked))
        assert [future.result(TIMEOUT_S)[0] for future in asked] == [200] * 5
        assert infer(daemon, "pair", 1.0)[0] == 200


def test_a_changed_key_of_a_model_is_named_as_one_that_needs_a_restart(
    folder: Path, bundle: Path, zygote: Zygote
) -> None:
    config = folder / "graphoptd.yaml"
    config.write_text(CONFIG.format(bundle=bundle))
    with running(folder, ["--config", str(config)], zygote) as daemon:
        with daemon.until("READY=1").control() as control:
            config.write_text(
                CONFIG.format(bundle=bundle).replace("queue_max: 1}", "queue_max: 2}")
            )
            answer = control.ask("reload")
        assert answer["needs_restart"] == ["models.pair.queue_max"]
        assert json.dumps(answer["applied"]) == "[]"
