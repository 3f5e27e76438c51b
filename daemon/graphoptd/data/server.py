"""Start, serve, drain, stop: the data plane on its sockets.

    start: open sockets -> listen -> sweep
    stop: close the listeners -> let requests finish, up to a deadline -> abort and count the rest

Inherited descriptors (socket activation, or a predecessor handing over) are only borrowed: closing
them here leaves the giver's copies open, so connections that wait in the kernel's queue go to the
next process.
"""

import asyncio
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from email.utils import formatdate
from importlib import metadata
from typing import NoReturn

from uvicorn.config import Config
from uvicorn.server import ServerState

from graphoptd.data.app import DataPlane
from graphoptd.data.connections import Guard, UnderWay
from graphoptd.data.failures import Failure
from graphoptd.data.http import GuardedProtocol
from graphoptd.data.served import Directory
from graphoptd.data.settings import DataSettings
from graphoptd.data.sockets import ListenError, open_tcp, open_unix, unlink_own


@dataclass(frozen=True, slots=True)
class Drained:
    """How a stop went: connections that were still busy at the deadline and were cut."""

    n_aborted: int


class DataServer:
    """The data plane, from start to stop, on the running event loop.

    Example:
        server = DataServer(directory, DataSettings(port=0))
        await server.start()
        print(server.addresses)
        await server.stop()
    """

    def __init__(self, directory: Directory, settings: DataSettings | None = None) -> None:
        self.settings = settings or DataSettings()
        self._directory = directory
        self._listeners: list[asyncio.Server] = []
        self._sockets: list[socket.socket] = []
        self._addresses: list[str] = []
        self._own_path: tuple[str, int] | None = None
        self._sweep: asyncio.TimerHandle | None = None
        self._state = ServerState()
        self._plane: DataPlane
        self._guard: Guard

    @property
    def addresses(self) -> list[str]:
        """Where it listens: `http://host:port` and `unix:/path`; nowhere before start and after stop."""
        return list(self._addresses)

    @property
    def plane(self) -> DataPlane:
        """The application, for its counters; there after `start`."""
        return self._plane

    def take_failures(self) -> list[Failure]:
        """Failed requests and refused connections since the last call, by kind; the caller logs them."""
        refused = [
            Failure("", "http.refused", count, reason)
            for reason, count in self._guard.refused.items()
        ]
        self._guard.refused.clear()
        return self._plane.failures.take() + refused

    async def start(self, inherited: Sequence[socket.socket] = ()) -> None:
        """Listen on the inherited sockets, else on those of the settings.

        Raises:
            ListenError: an address cannot be had; nothing is left open then.
        """
        loop = asyncio.get_running_loop()
        under_way = UnderWay(self._state.tasks)
        self._plane = DataPlane(self._directory, self.settings, _version(), loop, under_way)
        self._guard = Guard(self.settings, loop, under_way)
        config = Config(
            self._plane,
            http=GuardedProtocol,
            interface="asgi3",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
        )
        config.load()
        try:
            self._open(inherited)
            for each in self._sockets:
                listener = await loop.create_server(
                    self._factory(config, loop), sock=each, backlog=self.settings.backlog
                )
                self._listeners.append(listener)
        except BaseException:
            for listener in self._listeners:
                listener.close()
            self._close_sockets()
            self._plane.close()
            raise
        self._addresses = [_address(each) for each in self._sockets]
        self._on_sweep(loop)

    async def stop(self, drain_s: float | None = None) -> Drained:
        """Stop accepting, let running requests finish for `drain_s` seconds, then cut what is left."""
        for listener in self._listeners:
            listener.close()
        self._close_sockets()
        for connection in list(self._guard.connections):
            connection.shutdown()
        n_aborted = 0
        try:
            async with asyncio.timeout(self.settings.drain_s if drain_s is None else drain_s):
                await self._guard.emptied.wait()
        except TimeoutError:
            busy = list(self._guard.connections)
            n_aborted = len(busy)
            for connection in busy:
                connection.transport.abort()
            await self._guard.emptied.wait()
        if self._state.tasks:
            # Their connections are gone; they only have to notice.
            await asyncio.wait(self._state.tasks, timeout=1.0)
            for task in self._state.tasks:
                task.cancel()
        if self._sweep is not None:
            self._sweep.cancel()
        self._plane.close()
        return Drained(n_aborted)

    def _open(self, inherited: Sequence[socket.socket]) -> None:
        if inherited:
            self._sockets = list(inherited)
            return
        settings = self.settings
        if settings.port is not None:
            self._sockets.append(open_tcp(settings.host, settings.port))
        if settings.socket_path is not None:
            path = os.fspath(settings.socket_path)
            self._sockets.append(open_unix(path, settings.socket_mode))
            self._own_path = (path, os.stat(path).st_ino)
        if not self._sockets:
            _refuse_nothing()

    def _close_sockets(self) -> None:
        self._addresses = []
        for each in self._sockets:
            each.close()
        if self._own_path is not None:
            unlink_own(*self._own_path)
            self._own_path = None

    def _factory(
        self, config: Config, loop: asyncio.AbstractEventLoop
    ) -> Callable[[], asyncio.Protocol]:
        return lambda: GuardedProtocol(config, self._state, self._guard, loop)

    def _on_sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        self._state.default_headers = [(b"date", formatdate(usegmt=True).encode())]
        self._guard.sweep()
        self._sweep = loop.call_later(self._guard.sweep_s, self._on_sweep, loop)


def _address(listener: socket.socket) -> str:
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}"
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _version() -> str:
    try:
        return metadata.version("graphopt")
    except metadata.PackageNotFoundError:  # run from a checkout
        return "0"


def _refuse_nothing() -> NoReturn:
    raise ListenError(
        "neither a port nor a socket path",
        where="data",
        remedy="set data.port, data.socket_path, or both",
    )
