"""A real control server on a thread of its own, and clients: raw sockets and the command."""

import array
import asyncio
import contextlib
import io
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import uvloop
from safetensors.torch import save_file

from graphopt.engine import EngineSettings, Host
from graphopt.engine.host import SYSTEM_CLOCKS
from graphopt.engine.live import Clocks
from graphopt.graph import Graph
from graphoptd.config import Reload
from graphoptd.control import ControlContext, ControlServer
from graphoptd.control.connection import Deadlines
from graphoptd.control.context import origin
from graphoptd.ctl.main import main
from graphoptd.logs import install
from graphoptd.settings import ControlSettings, LevelSettings, LogSettings, Settings
from helpers.graphs import transformer

ROOT = Path(__file__).parents[2]
ENVIRON = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'daemon'}:{ROOT / 'tests'}", "TZ": "UTC"}
COMMAND = [sys.executable, "-m", "graphoptd.ctl.main"]
WAIT_S = 20.0  # for what must happen; reached only when it does not


@dataclass
class Service:
    """A running server and what is behind it."""

    socket: Path
    host: Host
    server: ControlServer
    loop: asyncio.AbstractEventLoop
    settings: Settings
    engine_events: list[tuple[str, Mapping[str, Any], Mapping[str, Any]]] = field(
        default_factory=list
    )
    reloads: list[Any] = field(default_factory=list)

    def lines(self, event: str = "") -> list[dict[str, Any]]:
        """The log so far."""
        page = self.server.context.ring.read(0, 100_000)
        found = [json.loads(line) for _, line in page.lines]
        return [line for line in found if event in ("", line["event"])]

    def run(self, work: Any) -> Any:
        """Runs a coroutine on the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(WAIT_S)


@contextlib.contextmanager
def serving(
    folder: Path,
    *graphs: Graph,
    levels: LevelSettings | None = None,
    deadlines: Deadlines | None = None,
    inherited: Sequence[socket.socket] = (),
    state: Path | None = None,
    clocks: Clocks = SYSTEM_CLOCKS,
    **engine: Any,
) -> Iterator[Service]:
    """A service of `graphs`; `engine` are settings of it, by default without the better path."""
    settings = Settings(
        control=ControlSettings(
            socket=folder / "c.sock", group="", levels=levels or LevelSettings()
        )
    )
    silent = os.open(os.devnull, os.O_WRONLY)
    logs = install(LogSettings(), silent)
    said: list[Any] = []
    reloads: list[Any] = []
    host = Host(
        EngineSettings(
            threads=1,
            intra_op=1,
            events=lambda name, fields: said.append((name, dict(fields), dict(origin()))),
            **{"improve": False, **engine},
        ),
        state,
        clocks=clocks,
    )
    for graph in graphs or (transformer(1),):
        host.load(graph)

    async def reload() -> Reload:
        if reloads:
            raise reloads.pop()
        return Reload(settings, ("log.level",), ("data.port",))

    context = ControlContext(
        host, lambda: settings, logs.ring, reload, "0.1.0", time.time(), lambda: {"requests": 7}
    )
    ready: list[Any] = []
    started = threading.Event()
    stop = threading.Event()

    async def life() -> None:
        server = ControlServer(context, deadlines)
        await server.start(inherited)
        ready.extend((server, asyncio.get_running_loop()))
        started.set()
        await asyncio.to_thread(stop.wait)
        await server.stop(drain_s=5)

    failed: list[BaseException] = []

    def run() -> None:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # as the service
                runner.run(life())
        except BaseException as error:
            failed.append(error)
            started.set()

    thread = threading.Thread(target=run)
    thread.start()
    started.wait(WAIT_S)
    if failed:
        raise failed[0]
    try:
        yield Service(settings.control.socket, host, *ready, settings, said, reloads)
    finally:
        stop.set()
        thread.join(WAIT_S)
        host.close()
        logs.close()
        os.close(silent)
        assert not thread.is_alive()
        assert not failed


class Raw:
    """A client that sends any bytes it likes."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(WAIT_S)
        self.socket.connect(str(path))
        self.buffer = b""

    def send(self, data: bytes, files: Sequence[int] = ()) -> None:
        if files:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))]
            self.socket.sendmsg([data[:1]], rights)
            data = data[1:]
        self.socket.sendall(data)

    def call(self, method: str, files: Sequence[int] = (), **call: Any) -> dict[str, Any]:
        message = {"method": method, **call} | ({"descriptors": len(files)} if files else {})
        self.send(json.dumps(message).encode() + b"\n", files)
        return self.reply()

    def reply(self) -> dict[str, Any]:
        line = self.line()
        assert line, "the server hung up"
        return json.loads(line)

    def line(self) -> bytes:
        """A line, or nothing at the end."""
        while b"\n" not in self.buffer:
            try:
                data = self.socket.recv(1 << 16)
            except ConnectionResetError:
                return b""
            if not data:
                return b""
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line

    def __enter__(self) -> "Raw":
        return self

    def __exit__(self, *args: object) -> None:
        self.socket.close()


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


def ctl(service: Service | Path, *arguments: str) -> Ran:
    """`graphoptctl` in this process: the same code as the command, without its start-up."""
    path = service.socket if isinstance(service, Service) else service
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = int(main(["--socket", str(path), *arguments]))
        except SystemExit as end:
            code = int(end.code or 0)
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())
    return Ran(code, *texts)


def adapter(
    folder: Path, rank: int = 2, modules: Sequence[str] = ("layer.0/query",), **config: Any
) -> Path:
    """A PEFT LoRA folder for the hidden size 8 of the test transformer."""
    folder.mkdir(parents=True)
    settings = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": list(modules), "bias": "none",
        "lora_dropout": 0.0, "fan_in_fan_out": False, "task_type": None, **config,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    random = torch.Generator().manual_seed(3)
    tensors = {}
    for module in modules:
        stem = f"base_model.model.{module}"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, 8, generator=random)
        tensors[f"{stem}.lora_B.weight"] = torch.randn(8, rank, generator=random)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder
