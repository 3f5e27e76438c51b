"""What the connections of a server share: limits, counts, and the sweep that closes late ones."""

import asyncio
from collections import Counter
from collections.abc import Sized
from typing import Any, Protocol

from graphoptd.data.settings import DataSettings

# All connections of the Unix socket count as one peer, bounded by connections_max alone
LOCAL_PEER = "unix"


class Connection(Protocol):
    """One of them, as the server sees it."""

    peer: str
    transport: Any

    def check_deadlines(self, now_s: float) -> None:
        """Acts on what took too long."""

    def shutdown(self) -> None:
        """Ends after the answer that is owed."""


class UnderWay:
    """How many requests are being answered.

    Attributes:
        tasks: of those that have one.
        here: whether one is being answered where it was read.
    """

    __slots__ = ("here", "tasks")

    def __init__(self, tasks: Sized) -> None:
        self.tasks = tasks
        self.here = False

    def __len__(self) -> int:
        return len(self.tasks) + self.here


class Guard:
    """The shared part of all connections of one server."""

    def __init__(
        self,
        settings: DataSettings,
        loop: asyncio.AbstractEventLoop,
        under_way: UnderWay,
    ) -> None:
        self.settings = settings
        self.loop = loop
        self.under_way = under_way
        self.last: Connection | None = None  # that sent a request
        self.connections: set[Connection] = set()
        self.by_peer: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()  # by reason; the service logs it
        self.emptied: asyncio.Event = asyncio.Event()
        self.emptied.set()
        waits_s = (
            settings.header_deadline_s,
            settings.body_deadline_s,
            settings.keep_alive_s,
            settings.linger_s,
        )
        self.sweep_s = min(max(min(waits_s) / 4, 0.02), 1.0)

    def admit(self, connection: Connection) -> str:
        """Count a new connection; the reason when there are too many."""
        peer = connection.peer
        self.connections.add(connection)
        self.by_peer[peer] += 1
        self.emptied.clear()
        if len(self.connections) > self.settings.connections_max:
            return f"{self.settings.connections_max} connections are open"
        if peer != LOCAL_PEER and self.by_peer[peer] > self.settings.connections_per_peer_max:
            return f"{self.settings.connections_per_peer_max} connections of {peer} are open"
        return ""

    def forget(self, connection: Connection) -> None:
        """A connection is gone."""
        self.connections.discard(connection)
        if self.last is connection:
            self.last = None
        self.by_peer[connection.peer] -= 1
        if not self.by_peer[connection.peer]:
            del self.by_peer[connection.peer]
        if not self.connections:
            self.emptied.set()

    def sweep(self) -> None:
        """Close every connection that is past its deadline."""
        now_s = self.loop.time()
        for connection in list(self.connections):
            connection.check_deadlines(now_s)
