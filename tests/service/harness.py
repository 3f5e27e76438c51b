"""Real graphoptd processes for tests: start, wait for READY, ask, kill, read the log.

A process that loads torch takes seconds to start, and a crash test needs a hundred. So a *zygote*
loads everything once, without starting a thread, and forks: each child is a process of its own with
its own arguments, files and death. What loading itself does is tested by `Daemon.exec`.
"""

import http.client
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch

from graphopt.bundle import save_bundle
from graphopt.constants import constant_of
from graphopt.dims import symbol
from graphopt.graph import Const, Graph, Ref, Symbol
from graphopt.nodes import make_node
from graphopt.types import TensorType
from graphoptd.ctl.client import Client

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 60.0  # of a broken test; a good one waits milliseconds
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'daemon'}", "OMP_NUM_THREADS": "1"}

_ZYGOTE = """
import json, os, sys
import graphoptd.cli, graphoptd.service, graphoptd.control.server, uvloop
for line in sys.stdin:
    call = json.loads(line)
    if "wait" in call:
        print(os.waitstatus_to_exitcode(os.waitpid(call["wait"], 0)[1]), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(call["log"], os.O_WRONLY), 2)
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(2, 1)
        exec(call["env"].pop("BEFORE", ""))
        os.environ.update(call["env"])
        status = 99
        try:
            status = graphoptd.cli.main(call["argv"])
        except SystemExit as error:
            status = error.code
        finally:
            sys.stderr.flush()
            os._exit(status)
    print(pid, flush=True)
"""


class Zygote:
    """The process that the others are forked from."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _ZYGOTE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )

    def fork(self, argv: Sequence[str], env: Mapping[str, str], log: Path) -> int:
        return self._ask({"argv": list(argv), "env": dict(env), "log": str(log)})

    def wait(self, pid: int) -> int:
        return self._ask({"wait": pid})

    def close(self) -> None:
        self._process.communicate()

    def _ask(self, call: Mapping[str, Any]) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(call) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


class Log:
    """The lines of a process, as they come."""

    def __init__(self, pipe: Path) -> None:
        os.mkfifo(pipe)
        self._pipe = pipe
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def wait_for(self, event: str, count: int = 1) -> dict[str, Any]:
        """The `count`th line of this event."""

        def found() -> bool:
            return len(self.events(event)) >= count or self._ended

        with self._changed:
            assert self._changed.wait_for(found, TIMEOUT_S), f"no {event} in {self._lines}"
        events = self.events(event)
        assert len(events) >= count, f"ended without {event}: {self._lines}"
        return events[count - 1]

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in list(self._lines) if line.startswith("{")]
        return [line for line in lines if line["event"] == name]

    def text(self) -> str:
        """Everything, once the process has ended."""
        self._thread.join(TIMEOUT_S)
        return "".join(self._lines)

    def _read(self) -> None:
        with self._pipe.open() as lines:
            for line in lines:
                with self._changed:
                    self._lines.append(line)
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()


class Daemon:
    """One run of graphoptd in a folder of its own; the folder may serve several runs."""

    def __init__(
        self, folder: Path, argv: Sequence[str], zygote: Zygote | None, env: Mapping[str, str]
    ) -> None:
        self.folder = folder
        self.run_dir = folder / "run"
        self._zygote = zygote
        number = len(list(folder.glob("log*")))
        self.notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notify.bind(str(folder / f"notify{number}"))
        self.notify.settimeout(TIMEOUT_S)
        self._told: list[str] = []
        log = folder / f"log{number}"
        self.log = Log(log)
        env = {"NOTIFY_SOCKET": str(folder / f"notify{number}"), **env}
        self.pid = self._spawn(list(argv), env, log)
        self._status: int | None = None

    def _spawn(self, argv: list[str], env: dict[str, str], log: Path) -> int:
        if self._zygote is not None:
            return self._zygote.fork(argv, env, log)
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "graphoptd", *argv],
                env=ENVIRONMENT | env,
                stdin=subprocess.DEVNULL,
                stderr=stderr,
                stdout=stderr,
            )
        return self._process.pid

    def until(self, told: str) -> Self:
        """Wait until the process has told its manager a line that begins so."""
        while not any(line.startswith(told) for line in self._told):
            self._hear()
        return self

    def _hear(self) -> None:
        """The next message, or the end of the process as an assertion."""
        pidfd = os.pidfd_open(self.pid)
        try:
            ready, _, _ = select.select([self.notify, pidfd], [], [], TIMEOUT_S)
        finally:
            os.close(pidfd)
        assert self.notify in ready, (
            f"the process {'ended' if ready else 'is silent'}: {self.log._lines}"
        )
        self._told += self.notify.recv(65536).decode().splitlines()

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """The exit status; negative: the signal it died of."""
        if self._status is None:
            self._status = (
                self._zygote.wait(self.pid)
                if self._zygote is not None
                else self._process.wait(TIMEOUT_S)
            )
            self.notify.close()
        return self._status

    def stop(self) -> int:
        if self._status is None:
            self.signal(signal.SIGKILL)
        return self.wait()

    def control(self) -> Client:
        return Client(str(self.run_dir / "graphoptd.sock"))

    def connect(self) -> socket.socket:
        """A connection to the data plane."""
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connected.settimeout(TIMEOUT_S)
        try:
            connected.connect(str(self.run_dir / "graphoptd-data.sock"))
        except OSError:
            connected.close()
            raise
        return connected

    def get(self, path: str) -> tuple[int, Any]:
        return self.request("GET", path, None)

    def infer(self, model: str = "pair", x: float = 1.0) -> dict[str, Any]:
        """One request; the outputs by name, and the revision."""
        status, answer = self.request("POST", f"/v2/models/{model}/infer", infer_body(x))
        assert status == 200, answer
        outputs = {each["name"]: each["data"] for each in answer["outputs"]}
        return outputs | {"revision": int(answer["model_version"])}

    def request(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("localhost")
        connection.sock = self.connect()
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            response = connection.getresponse()
            content = response.read()
            return response.status, json.loads(content) if content else None
        finally:
            connection.close()


@contextmanager
def running(
    folder: Path, argv: Sequence[str], zygote: Zygote | None, **env: str
) -> Iterator[Daemon]:
    """A process that is ended with the block, however the block ends."""
    daemon = Daemon(folder, argv, zygote, env)
    try:
        yield daemon
    finally:
        daemon.stop()


def infer_body(x: float) -> dict[str, Any]:
    return {"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [x, x]}]}


def pair() -> Graph:
    """`a` and `b` of the input: two constants that a delta changes together or not at all."""
    rows = symbol("batch")
    nodes = [
        make_node("times_a", "aten.mul.Tensor", (Ref("x"), Const("a")), {}),
        make_node("times_b", "aten.mul.Tensor", (Ref("x"), Const("b")), {}),
    ]
    constants = {name: constant_of(torch.zeros(2), is_param=True) for name in "ab"}
    return Graph.build(
        "pair",
        nodes,
        [("x", TensorType("f32", (rows, 2)))],
        [("a", Ref("times_a")), ("b", Ref("times_b"))],
        constants,
        None,
        [Symbol("batch", 1, 64)],
    )


def both(number: int) -> str:
    """The delta that makes both constants `number`; its id is the number."""
    data = [float(number)] * 2
    return json.dumps(
        {
            "delta": 1,
            "graph": "pair",
            "id": f"d{number}",
            "edits": [
                {"put_constant": {"name": name, "dtype": "f32", "data": data}} for name in "ab"
            ],
        }
    )


def apply(client: Client, number: int) -> int:
    """Apply `both(number)`; the revision it made."""
    answer = client.ask("apply", {"document": both(number), "format": "json"})
    return int(answer["revision"])


def save_pair(folder: Path) -> Path:
    path = folder / "pair.bundle"
    save_bundle(pair(), path)
    return path
