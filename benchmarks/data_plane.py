"""What one inference request costs the server, in CPU time: graphopt's data plane and MLServer.

Our model is one relu on the real engine (`thread`: always on an executor thread, `inline`: on the
event loop once it has proven quick, as `data.inline: auto` has it), MLServer's returns its input; so
what is measured is HTTP, decoding, queueing and encoding. Each server runs in a process of its own;
one client sends prepared bytes and reads whole answers, over one connection and over eight at once
(as a busy service sees them; then its caches stay warm). Server CPU is the run time that the
kernel's scheduler accounts to all threads of the server (`/proc/PID/task/*/schedstat`). Rounds are
interleaved and medians reported. `uvicorn alone` answers the same bytes without looking at them: the
floor under this HTTP stack, and the measure of how busy the host was.

    python -m benchmarks.data_plane [--requests 2000] [--rounds 5] [--mlserver PYTHON]

`--mlserver` names an interpreter that has MLServer; without it, this one and `mlserver` on the PATH
are tried.
"""

import argparse
import asyncio
import contextlib
import gc
import importlib.util
import json
import random
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import uvloop
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from benchmarks.harness import ROOT, report
from graphopt.dims import symbol
from graphopt.engine import EngineSettings, Host
from graphopt.graph import Graph, Ref, Symbol
from graphopt.nodes import make_node
from graphopt.types import TensorType
from graphoptd.data import DataServer, DataSettings
from graphoptd.data.inline import WINDOW_RUNS
from graphoptd.directory import HostDirectory
from graphoptd.service import SWITCH_INTERVAL_S

N_ELEMENTS = 1024  # FP32: 4 KB
TARGET_CPU_US = 150
CONNECTIONS = (1, 8)


@dataclass(frozen=True)
class Case:
    """One server under one kind of request."""

    name: str
    server: str
    request: bytes
    n_connections: int


@dataclass(frozen=True)
class Row:
    """Medians over the rounds, per request."""

    name: str
    server_cpu_us: float
    latency_us_p50: float
    latency_us_p99: float


def main() -> None:
    options = _options()
    if options.serve is not None:
        _serve(options.serve)
        return
    cases = [
        Case(f"graphopt, {what}, {how}, {n} connections", how, request, n)
        for what, request in (("binary", _binary_request()), ("JSON", _json_request()))
        for how in ("inline", "thread")
        for n in CONNECTIONS
    ]
    cases += [
        Case(f"uvicorn alone, binary, {n} connections", "floor", _binary_request(), n)
        for n in CONNECTIONS
    ]
    mlserver = _mlserver_python(options.mlserver)
    if mlserver is None:
        print("MLServer is not installed; its rows are absent (--mlserver PYTHON)")
    else:
        cases += [
            Case(f"MLServer, JSON, {n} connections", "mlserver", _json_request(), n)
            for n in CONNECTIONS
        ]
    with contextlib.ExitStack() as stack:
        servers = {
            name: stack.enter_context(_started(name, mlserver))
            for name in {case.server for case in cases}
        }
        rounds: dict[str, list[Row]] = {case.name: [] for case in cases}
        for _ in range(options.rounds):
            for case in random.sample(cases, len(cases)):
                pid, port = servers[case.server]
                rounds[case.name].append(_measure(case, pid, port, options.requests))
    rows = [_median(rounds[case.name]) for case in cases]
    _report(rows, options)


# -- measuring


def _measure(case: Case, pid: int, port: int, n_requests: int) -> Row:
    with contextlib.ExitStack() as stack:
        connections = []
        for _ in range(case.n_connections):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connections.append(connection)
        n_turns = max(n_requests // case.n_connections, 10)
        for _ in range(max(n_turns // 10, 2 * WINDOW_RUNS)):
            _exchange(connections, case.request)
        latencies_us = []
        before_ns = _cpu_ns(pid)
        for _ in range(n_turns):
            started_ns = time.perf_counter_ns()
            _exchange(connections, case.request)
            latencies_us.append((time.perf_counter_ns() - started_ns) / 1e3)
        cpu_us = (_cpu_ns(pid) - before_ns) / 1e3 / n_turns / case.n_connections
    latencies_us.sort()
    return Row(
        case.name, cpu_us, statistics.median(latencies_us), latencies_us[n_turns * 99 // 100]
    )


def _exchange(connections: list[socket.socket], request: bytes) -> None:
    """One request on each connection, then one answer from each."""
    for connection in connections:
        connection.sendall(request)
    for connection in connections:
        _read_answer(connection)


def _read_answer(connection: socket.socket) -> None:
    answer = b""
    end = -1
    while end < 0 or len(answer) < end:
        part = connection.recv(1 << 18)
        if not part:
            raise SystemExit(f"the server closed: {answer[:300]!r}")
        answer += part
        head_end = answer.find(b"\r\n\r\n")
        if end < 0 <= head_end:
            length = re.search(rb"(?i)content-length: (\d+)", answer[:head_end])
            if not answer.startswith(b"HTTP/1.1 200") or length is None:
                raise SystemExit(f"unexpected answer: {answer[:600]!r}")
            end = head_end + 4 + int(length[1])


def _cpu_ns(pid: int) -> int:
    """Run time of all threads."""
    return sum(
        int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")
    )


def _median(rows: list[Row]) -> Row:
    return Row(
        rows[0].name,
        statistics.median(row.server_cpu_us for row in rows),
        statistics.median(row.latency_us_p50 for row in rows),
        statistics.median(row.latency_us_p99 for row in rows),
    )


# -- requests


def _post(body: bytes, header_length: int | None) -> bytes:
    head = "POST /v2/models/identity/infer HTTP/1.1\r\nHost: localhost\r\n"
    if header_length is None:
        head += "Content-Type: application/json\r\n"
    else:
        head += f"Inference-Header-Content-Length: {header_length}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def _binary_request() -> bytes:
    """As tritonclient sends it."""
    size = N_ELEMENTS * 4
    tensor = {
        "name": "x",
        "shape": [1, N_ELEMENTS],
        "datatype": "FP32",
        "parameters": {"binary_data_size": size},
    }
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return _post(head + random.Random(7).randbytes(size), len(head))


def _json_request() -> bytes:
    rng = random.Random(7)
    data = [round(rng.gauss(0, 1), 4) for _ in range(N_ELEMENTS)]
    tensor = {"name": "x", "shape": [1, N_ELEMENTS], "datatype": "FP32", "data": data}
    return _post(json.dumps({"inputs": [tensor]}).encode(), None)


# -- servers


@contextlib.contextmanager
def _started(name: str, mlserver: str | None) -> Iterator[tuple[int, int]]:
    """A server process: its id and port."""
    with tempfile.TemporaryDirectory() as folder:
        if name == "mlserver":
            assert mlserver is not None
            port = _free_port()
            command = _mlserver_command(mlserver, Path(folder), port)
        else:
            port = 0
            command = [sys.executable, "-m", "benchmarks.data_plane", "--serve", name]
        process = subprocess.Popen(
            command,
            cwd=folder if name == "mlserver" else ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            if port == 0:
                assert process.stdout is not None
                port = int(process.stdout.readline())
            else:
                _await_ready(process, port)
            yield process.pid, port
        finally:
            process.terminate()
            process.wait(30)


def _serve(kind: str) -> None:
    """The server process, until it is told to end."""
    torch.set_num_threads(1)
    uvloop.run(
        _serve_floor() if kind == "floor" else _serve_model("auto" if kind == "inline" else "never")
    )


async def _serve_model(inline: Literal["auto", "never"]) -> None:
    """Our data plane in front of the real engine, as the daemon puts them together."""
    batch = symbol("batch")
    type_ = TensorType("f32", (batch, N_ELEMENTS))
    nodes = [make_node("y", "aten.relu.default", [Ref("x")])]
    graph = Graph.build(
        "identity", nodes, [("x", type_)], [("y", Ref("y"))], {}, symbols=[Symbol("batch")]
    )
    with contextlib.closing(Host(EngineSettings(threads=1, intra_op=1))) as host:
        host.load(graph)
        host.settle()
        directory = HostDirectory(host, lambda: None)
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        gc.freeze()
        server = DataServer(directory, DataSettings(port=0, inline=inline))
        await server.start()
        directory.open()
        print(server.addresses[0].rsplit(":", 1)[1], flush=True)
        await asyncio.Event().wait()


async def _serve_floor() -> None:
    """Stock uvicorn in front of an application that reads the body and answers as many bytes."""

    async def application(scope: Any, receive: Any, send: Any) -> None:
        more = True
        while more:
            more = (await receive())["more_body"]
        headers = [
            (b"content-type", b"application/octet-stream"),
            (b"content-length", b"%d" % len(_FLOOR_ANSWER)),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": _FLOOR_ANSWER})

    config = Config(application, ws="none", lifespan="off", log_config=None, access_log=False)
    config.load()
    state, loop = ServerState(), asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: HttpToolsProtocol(config, state, {}, loop), "127.0.0.1", 0
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.Event().wait()


_FLOOR_ANSWER = bytes(N_ELEMENTS * 4 + 150)


_MLSERVER_MODEL = """
from mlserver import MLModel
from mlserver.types import InferenceResponse, ResponseOutput

class Identity(MLModel):
    async def load(self):
        return True

    async def predict(self, payload):
        given = payload.inputs[0]
        output = ResponseOutput(
            name="y", shape=given.shape, datatype=given.datatype, data=given.data
        )
        return InferenceResponse(model_name=self.name, outputs=[output])
"""


def _mlserver_command(python: str, folder: Path, port: int) -> list[str]:
    """MLServer at its leanest: no worker processes, no metrics, no gRPC traffic, errors logged only."""
    (folder / "identity_model.py").write_text(_MLSERVER_MODEL)
    settings = {
        "host": "127.0.0.1",
        "http_port": port,
        "grpc_port": _free_port(),
        "metrics_endpoint": None,
        "parallel_workers": 0,
        "debug": False,
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    model = {"name": "identity", "implementation": "identity_model.Identity"}
    (folder / "model-settings.json").write_text(json.dumps(model))
    return [str(Path(python).parent / "mlserver"), "start", str(folder)]


def _mlserver_python(named: str | None) -> str | None:
    if named is not None:
        return named
    if importlib.util.find_spec("mlserver") is not None:
        return sys.executable
    found = shutil.which("mlserver")
    return str(Path(found).parent / "python") if found else None


def _await_ready(process: subprocess.Popen, port: int) -> None:
    deadline_s = time.monotonic() + 120
    while time.monotonic() < deadline_s and process.poll() is None:
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", port), 1) as connection,
        ):
            connection.sendall(b"GET /v2/models/identity/ready HTTP/1.0\r\nHost: localhost\r\n\r\n")
            if b" 200 " in connection.recv(4096).split(b"\r\n")[0]:
                return
        time.sleep(0.2)
    raise SystemExit("MLServer did not come up")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# -- reporting


def _report(rows: list[Row], options: argparse.Namespace) -> None:
    extra = {"requests": options.requests, "rounds": options.rounds, "target_cpu_us": TARGET_CPU_US}
    report("data_plane", [asdict(row) for row in rows], **extra)
    cpu_us = {row.name: row.server_cpu_us for row in rows}
    for n in CONNECTIONS:
        ours = cpu_us[f"graphopt, binary, inline, {n} connections"]
        floor = cpu_us[f"uvicorn alone, binary, {n} connections"]
        print(
            f"binary on {n} connections: {ours:.0f} us, target {TARGET_CPU_US}; "
            f"{ours / floor:.2f} times uvicorn alone"
        )
        theirs = cpu_us.get(f"MLServer, JSON, {n} connections")
        if theirs is not None:
            ratio = theirs / cpu_us[f"graphopt, JSON, inline, {n} connections"]
            print(f"JSON on {n} connections: MLServer takes {ratio:.2f} times our CPU")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=2000, help="per case and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mlserver", metavar="PYTHON", help="an interpreter that has MLServer")
    parser.add_argument("--serve", choices=("thread", "inline", "floor"), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
