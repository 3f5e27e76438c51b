"""What one inference request costs the server, in CPU time: graphopt's data plane, and MLServer beside it.

The model returns its input, so what is measured is HTTP, decoding, queueing and encoding. Each server runs in a process
of its own; one client sends prepared bytes and reads whole answers, over one connection and over eight at once (as a
busy service sees them; then its caches stay warm). Server CPU is the run time that the kernel's scheduler accounts to
all threads of the server (`/proc/PID/task/*/schedstat`). Rounds are interleaved and medians reported.

    python benchmarks/data_plane.py [--requests 3000] [--rounds 5] [--mlserver PYTHON]

`--mlserver` names an interpreter that has MLServer; without it, this one and `mlserver` on the PATH are tried.
"""

import argparse
import asyncio
import contextlib
import gc
import importlib.util
import json
import os
import platform
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
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "data_plane.json"
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
        for how in ("thread", "inline")
        for n in CONNECTIONS
    ]
    mlserver = _mlserver_python(options.mlserver)
    if mlserver is None:
        print("MLServer is not installed; its rows are absent (--mlserver PYTHON)")
    else:
        cases += [
            Case(f"MLServer, JSON, in process, {n} connections", "mlserver", _json_request(), n)
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
    _print(rows)
    _write(rows, options)


# -- measuring


def _measure(case: Case, pid: int, port: int, n_requests: int) -> Row:
    with contextlib.ExitStack() as stack:
        connections = []
        for _ in range(case.n_connections):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connections.append(connection)
        n_turns = max(n_requests // case.n_connections, 10)
        for _ in range(n_turns // 10):
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
    """Run time of all threads; the counter of one that runs right now is brought up to date when it is read."""
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
            command = [sys.executable, __file__, "--serve", name]
        process = subprocess.Popen(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
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
    """The server process: an identity model behind the data plane, until it is told to end."""
    sys.path[:0] = [str(ROOT), str(ROOT / "daemon")]
    import uvloop

    async def serve() -> None:
        from concurrent.futures import ThreadPoolExecutor

        import torch

        from graphoptd.data import DataServer, DataSettings, Signature, TensorSpec

        torch.set_num_threads(1)
        gc.freeze()  # as the daemon does after start-up

        @dataclass(frozen=True, slots=True)
        class Ran:
            outputs: dict[str, torch.Tensor]
            revision: int
            plan_id: str

        class Identity:
            name = "identity"

            def __init__(self) -> None:
                shape = (-1, N_ELEMENTS)
                self._signature = Signature(
                    (TensorSpec("x", "FP32", shape, True),),
                    (TensorSpec("y", "FP32", shape, True),),
                    1,
                )
                self._pool = ThreadPoolExecutor(1) if kind == "thread" else None

            def signature(self) -> Signature:
                return self._signature

            def capacity(self) -> int:
                return 1

            def submit(self, inputs: dict[str, torch.Tensor]) -> Future:
                if self._pool is not None:
                    return self._pool.submit(self.run, inputs)
                future = Future()
                future.set_result(self.run(inputs))
                return future

            def run(self, inputs: dict[str, torch.Tensor]) -> Ran:
                return Ran({"y": inputs["x"]}, 1, "plan")

        class Only:
            model = Identity()

            def find(self, name: str) -> Identity | None:
                return self.model if name == "identity" else None

            def index(self) -> list:
                return []

            def ready(self) -> bool:
                return True

        server = DataServer(Only(), DataSettings(port=0))
        await server.start()
        print(server.addresses[0].rsplit(":", 1)[1], flush=True)
        await asyncio.Event().wait()

    uvloop.run(serve())


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


def _print(rows: list[Row]) -> None:
    print(
        f"{'4 KB FP32 identity':44} {'server CPU us':>14} {'p50 us':>9} {'p99 us':>9}   (a turn of all connections)"
    )
    for row in rows:
        print(
            f"{row.name:44} {row.server_cpu_us:14.1f} {row.latency_us_p50:9.0f} {row.latency_us_p99:9.0f}"
        )
    cpu_us = {row.name: row.server_cpu_us for row in rows}
    for n in CONNECTIONS:
        ours = cpu_us[f"graphopt, binary, thread, {n} connections"]
        print(f"target {TARGET_CPU_US} us for binary on {n} connections: {ours:.0f} us")
        theirs = cpu_us.get(f"MLServer, JSON, in process, {n} connections")
        if theirs is not None:
            ratio = theirs / cpu_us[f"graphopt, JSON, thread, {n} connections"]
            print(
                f"MLServer takes {ratio:.1f} times our CPU for the same JSON request on {n} connections"
            )


def _write(rows: list[Row], options: argparse.Namespace) -> None:
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    machine = {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "processor": _processor(),
    }
    content = {
        "benchmark": "data_plane",
        "machine": machine,
        "requests": options.requests,
        "rounds": options.rounds,
        "rows": [asdict(row) for row in rows],
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


def _processor() -> str:
    text = Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*: (.*)", text)
    return model[1] if model else platform.machine()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=3000, help="per case and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mlserver", metavar="PYTHON", help="an interpreter that has MLServer")
    parser.add_argument("--serve", choices=("thread", "inline"), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
