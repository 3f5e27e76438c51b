"""Small hand-made models behind the engine's Protocols, and a real server in front of them."""

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import uvloop

from graphopt.errors import ModelNotFoundError
from graphoptd.data import (
    DataServer,
    DataSettings,
    IndexEntry,
    Result,
    Served,
    Signature,
    TensorSpec,
    Timed,
    timed,
)

torch.set_num_threads(1)

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Ran:
    outputs: Tensors
    revision: int
    plan_id: str


class Model:
    """Runs `compute` on `n_threads` threads, or on the caller's when 0; remembers the batch sizes it saw."""

    def __init__(
        self,
        name: str,
        signature: Signature,
        compute: Callable[[Tensors], Tensors],
        n_threads: int = 1,
    ) -> None:
        self.name = name
        self._signature = signature
        self._compute = compute
        self._n_threads = n_threads
        self._pool = ThreadPoolExecutor(n_threads, f"model-{name}") if n_threads else None
        self.batch_rows: list[int] = []
        self.ran_on: list[int] = []
        self.refused: Exception | None = None
        self.own_queue_max: int | None = None

    def signature(self) -> Signature:
        return self._signature

    def set_revision(self, revision: int) -> None:
        old = self._signature
        self._signature = Signature(old.inputs, old.outputs, revision)

    def capacity(self) -> int:
        return max(self._n_threads, 1)

    def queue_max(self) -> int | None:
        return self.own_queue_max

    def plan_id(self) -> str:
        return f"plan-{self._signature.revision}"

    def submit(self, inputs: Tensors) -> Future[Timed]:
        if self.refused is not None:
            raise self.refused
        if self._pool is not None:
            return self._pool.submit(timed, self.run, inputs)
        future: Future[Timed] = Future()
        try:
            future.set_result(timed(self.run, inputs))
        except Exception as error:
            future.set_exception(error)
        return future

    def run(self, inputs: Tensors) -> Result:
        self.ran_on.append(threading.get_ident())
        first = next(iter(inputs.values()))
        self.batch_rows.append(first.shape[0] if first.ndim else 1)
        outputs = self._compute(inputs)
        revision = self._signature.revision
        return Ran(outputs, revision, f"plan-{revision}")

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


def tensors(*rows: tuple[str, str, list[int]], batch: bool = False) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, datatype, tuple(shape), batch) for name, datatype, shape in rows)


def identity(name: str = "identity", datatype: str = "FP32", n_threads: int = 1) -> Model:
    signature = Signature(
        tensors(("x", datatype, [-1, -1]), batch=True),
        tensors(("y", datatype, [-1, -1]), batch=True),
        1,
    )
    return Model(name, signature, lambda inputs: {"y": inputs["x"]}, n_threads)


def simple(name: str = "simple") -> Model:
    """Triton's `simple`: INT32[16] sums and differences."""
    signature = Signature(
        tensors(("INPUT0", "INT32", [-1, 16]), ("INPUT1", "INT32", [-1, 16]), batch=True),
        tensors(("OUTPUT0", "INT32", [-1, 16]), ("OUTPUT1", "INT32", [-1, 16]), batch=True),
        3,
    )
    return Model(
        name,
        signature,
        lambda inputs: {
            "OUTPUT0": inputs["INPUT0"] + inputs["INPUT1"],
            "OUTPUT1": inputs["INPUT0"] - inputs["INPUT1"],
        },
    )


class Gate(Model):
    """An identity that says when a run has begun and waits until it is opened."""

    def __init__(self, name: str = "gate", n_threads: int = 1) -> None:
        self.opened = threading.Event()
        self.entered = threading.Semaphore(0)

        def compute(inputs: Tensors) -> Tensors:
            self.entered.release()
            assert self.opened.wait(60)
            return {"y": inputs["x"]}

        signature = Signature(
            tensors(("x", "FP32", [-1, -1]), batch=True),
            tensors(("y", "FP32", [-1, -1]), batch=True),
            1,
        )
        super().__init__(name, signature, compute, n_threads)

    def close(self) -> None:
        self.opened.set()
        super().close()


def failing(name: str = "failing") -> Model:
    """Fails when any row holds a 13; its batch-mates must not suffer."""

    def compute(inputs: Tensors) -> Tensors:
        if (inputs["x"] == 13).any():
            raise RuntimeError("a secret from inside the model")
        return {"y": inputs["x"]}

    signature = Signature(
        tensors(("x", "FP32", [-1, -1]), batch=True),
        tensors(("y", "FP32", [-1, -1]), batch=True),
        1,
    )
    return Model(name, signature, compute)


def every_type() -> list[Model]:
    names = [
        "BOOL",
        "UINT8",
        "UINT16",
        "UINT32",
        "UINT64",
        "INT8",
        "INT16",
        "INT32",
        "INT64",
        "FP16",
        "BF16",
        "FP32",
        "FP64",
    ]
    return [identity(f"identity_{name.lower()}", name, n_threads=0) for name in names]


@dataclass
class Models:
    """A directory of models; `shelf` holds what can be loaded."""

    live: dict[str, Model] = field(default_factory=dict)
    shelf: dict[str, Callable[[], Model]] = field(default_factory=dict)
    is_ready: bool = True

    def find(self, name: str) -> Served | None:
        return self.live.get(name)

    def index(self) -> list[IndexEntry]:
        rows = [
            IndexEntry(name, model.signature().revision, "READY")
            for name, model in self.live.items()
        ]
        rows += [
            IndexEntry(name, None, "UNAVAILABLE", "unloaded")
            for name in self.shelf
            if name not in self.live
        ]
        return rows

    def ready(self) -> bool:
        return self.is_ready

    def load(self, name: str, bundle: str) -> None:
        if bundle not in self.shelf:
            raise ModelNotFoundError(f"no bundle {bundle!r}", where="repository")
        self.live[name] = self.shelf[bundle]()

    def unload(self, name: str) -> None:
        self.live.pop(name, None)

    def close(self) -> None:
        for model in self.live.values():
            model.close()


def directory(*models: Model) -> Models:
    return Models({model.name: model for model in models})


@dataclass(frozen=True)
class Reply:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        assert self.headers["content-type"] == "application/json"
        return json.loads(self.body)

    @property
    def error(self) -> str:
        text = self.json["error"]
        assert isinstance(text, str)
        return text


@dataclass(frozen=True)
class Running:
    """A server on a loop of its own thread."""

    server: DataServer
    loop: asyncio.AbstractEventLoop
    models: Models

    @property
    def url(self) -> str:
        return next(address for address in self.server.addresses if address.startswith("http"))

    @property
    def host(self) -> str:
        return self.url.removeprefix("http://")

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.host.rsplit(":", 1)
        return host, int(port)

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
    ) -> "Reply":
        """One request over a connection of its own; a dict is sent as JSON."""
        connection = http.client.HTTPConnection(*self.address, timeout=30)
        try:
            content = json.dumps(body).encode() if isinstance(body, dict) else body
            connection.request(method, path, content, headers or {})
            answer = connection.getresponse()
            return Reply(
                answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
            )
        finally:
            connection.close()

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=30)

    def call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)


@contextmanager
def serving(
    models: Models, settings: DataSettings | None = None, **changes: object
) -> Iterator[Running]:
    """A started server; stopped and its models closed at the end."""
    chosen = settings or DataSettings(port=0, **changes)  # type: ignore[arg-type]
    loop = uvloop.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="data-loop", daemon=True)
    thread.start()
    server = DataServer(models, chosen)
    running = Running(server, loop, models)
    running.call(server.start())
    try:
        yield running
    finally:
        models.close()
        running.call(server.stop())
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def read_all(connection: socket.socket) -> bytes:
    """Everything until the server closes."""
    content = b""
    while part := connection.recv(1 << 16):
        content += part
    return content


def json_request(x: list[Any], shape: list[int], **more: Any) -> dict[str, Any]:
    """A request to an FP32 identity."""
    tensor = {"name": "x", "shape": shape, "datatype": "FP32", "data": x}
    return {"inputs": [tensor], **more}


def binary_request(
    x: torch.Tensor, datatype: str = "FP32", **parameters: Any
) -> tuple[bytes, dict[str, str]]:
    """A request to an identity as tritonclient sends it: body and headers."""
    content = x.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if x.numel() else b""
    tensor = {
        "name": "x",
        "shape": list(x.shape),
        "datatype": datatype,
        "parameters": {"binary_data_size": len(content)},
    }
    document = {"inputs": [tensor], "parameters": {"binary_data_output": True, **parameters}}
    head = json.dumps(document).encode()
    return head + content, {"Inference-Header-Content-Length": str(len(head))}


def unix_settings(folder: Path, **changes: object) -> DataSettings:
    return DataSettings(port=None, socket_path=folder / "data.sock", **changes)  # type: ignore[arg-type]
