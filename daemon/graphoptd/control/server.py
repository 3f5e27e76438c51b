"""The control socket: listens, knows who connects, answers calls in order, stops in good time.

One task a connection, and one call at a time on it, so answers come in the order of calls. Engine
work runs on the lanes; here nothing waits for anything but sockets. Connections are bounded, in all
and for each user who is not root, so that nobody can shut others out.

Deliberately absent: HTTP, TCP and tokens (the file mode and the kernel's word on the peer are the
guard), and any state of a connection beyond its half-read line.
"""

import asyncio
import logging
import os
import socket
from collections import Counter
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from graphopt.errors import (
    AccessDeniedError,
    BusyError,
    GraphoptError,
    ProtocolError,
)
from graphoptd.control import listening
from graphoptd.control.calls import parse_call
from graphoptd.control.connection import Connection, Deadlines
from graphoptd.control.context import ControlContext
from graphoptd.control.levels import Level, Peer, level_of, peer_of
from graphoptd.control.methods import decode_params, find_method, log_denied
from graphoptd.control.replies import reply_lines
from graphoptd.control.task import Answer, Task
from graphoptd.control.wire import (
    error_line,
    result_line,
)
from graphoptd.control.work import Lanes
from graphoptd.events import emit
from graphoptd.settings import LevelSettings

CONNECTIONS_MAX = 128  # people and their scripts, not traffic
CONNECTIONS_PER_USER_MAX = 32  # of users other than root and the service's own
_ROWS_INLINE_MAX = 100  # of an answer that is encoded on the event loop: about 0.2 ms
_ACCEPT_PAUSE_S = 0.5  # when no descriptors are left, until some may be

_LOG = logging.getLogger(__name__)


class ControlServer:
    """The control plane. Make it and use it on one event loop.

    Attributes:
        address: where it listens; a path, or several joined by a comma when systemd passed several.
    """

    def __init__(self, context: ControlContext, deadlines: Deadlines | None = None) -> None:
        self.context = context
        self.address = ""
        self._deadlines = deadlines or Deadlines()
        self._lanes = Lanes()
        self._stopping = asyncio.Event()
        self._listeners: list[socket.socket] = []
        self._own_file: listening.OwnFile | None = None
        self._tasks: dict[asyncio.Task[None], Peer] = {}
        self._busy: set[asyncio.Task[None]] = set()
        self._background: set[asyncio.Task[Any]] = set()

    async def start(self, inherited: Sequence[socket.socket] = ()) -> None:
        """Listens on the sockets passed in, else on a file of its own.

        Raises:
            ListenError: the file cannot be made, or another process listens there.
        """
        if inherited:
            self._listeners = list(inherited)
        else:
            control = self.context.settings().control
            listener, self._own_file = listening.open_socket(control.socket, control.group)
            self._listeners = [listener]
        self.address = ", ".join(str(each.getsockname()) for each in self._listeners)
        loop = asyncio.get_running_loop()
        for each in self._listeners:
            each.setblocking(False)
            each.listen(CONNECTIONS_MAX)
            loop.add_reader(each.fileno(), self._accept, each)
        emit(
            "daemon.listening",
            plane="control",
            addresses=[str(each.getsockname()) for each in self._listeners],
            inherited=bool(inherited),
        )

    async def stop(self, drain_s: float) -> None:
        """Takes no more calls, gives those under way `drain_s` to end, then cuts them off."""
        loop = asyncio.get_running_loop()
        for each in self._listeners:
            loop.remove_reader(each.fileno())
            each.close()
        self._listeners = []
        if self._own_file is not None:
            self._own_file.remove()
            self._own_file = None
        self._stopping.set()
        for task in [task for task in self._tasks if task not in self._busy]:
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=drain_s)
        rest = [*self._tasks, *self._background]
        for each_task in rest:
            each_task.cancel()
        if rest:
            await asyncio.wait(rest)
        self._lanes.close()

    # -- connections

    def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connected, _ = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                # No descriptors left: the listener would wake us without end.
                emit("limit.reached", limit="open files", bound=0, reason=error.strerror)
                loop.remove_reader(listener.fileno())
                loop.call_later(_ACCEPT_PAUSE_S, self._accept_again, listener)
                return
            connected.setblocking(False)
            try:
                peer = peer_of(connected)
            except OSError:
                connected.close()
                continue
            reason = self._too_many(peer)
            if reason is not None:
                _turn_away(connected, reason)
                continue
            task = loop.create_task(self._serve(connected, peer))
            self._tasks[task] = peer
            task.add_done_callback(lambda done: self._tasks.pop(done, None))

    def _accept_again(self, listener: socket.socket) -> None:
        if listener in self._listeners:
            asyncio.get_running_loop().add_reader(listener.fileno(), self._accept, listener)

    def _too_many(self, peer: Peer) -> BusyError | None:
        by_user = Counter(each.uid for each in self._tasks.values())
        if len(self._tasks) >= CONNECTIONS_MAX:
            limit, bound = "control.connections", CONNECTIONS_MAX
        elif peer.uid not in (0, os.geteuid()) and by_user[peer.uid] >= CONNECTIONS_PER_USER_MAX:
            limit, bound = "control.connections_per_user", CONNECTIONS_PER_USER_MAX
        else:
            return None
        emit("limit.reached", limit=limit, bound=bound)
        return BusyError(
            f"{bound} control connections are open already",
            where="connect",
            remedy="close some, or try again",
        )

    async def _serve(self, connected: socket.socket, peer: Peer) -> None:
        """One connection, from its first line to its end."""
        connection = Connection(connected, peer, self._deadlines)
        own = asyncio.current_task()
        assert own is not None
        try:
            while not self._stopping.is_set():
                line = await connection.next_line()
                if line is None:
                    break
                if not line.strip():
                    continue
                self._busy.add(own)
                await self._answer_line(connection, line)
                self._busy.discard(own)
        except (GraphoptError, OSError, TimeoutError) as error:
            # The stream is out of step, or nobody reads: say why if it can be heard, and hang up.
            if isinstance(error, GraphoptError):
                with suppress(OSError, TimeoutError):
                    await connection.send(error_line(None, error))
        finally:
            self._busy.discard(own)
            connection.close()

    # -- calls

    async def _answer_line(self, connection: Connection, line: bytes) -> None:
        try:
            call = parse_call(line)
        except ProtocolError as error:
            await connection.send(error_line(None, error))
            connection.claim(0)  # files that came along belong to nothing
            return
        level = await self._level(connection.peer)
        task = Task(
            call,
            connection.peer,
            level,
            self.context,
            self._lanes,
            self._stopping,
            connection.claim(call.descriptors),
            lambda part: connection.send(result_line(call, part, None, continues=True)),
            connection.readable,
            self._in_background,
        )
        try:
            answer = await self._answer(task)
            rows = answer.result.get(answer.rows, ())
            if len(rows) < _ROWS_INLINE_MAX:
                replies = reply_lines(task, answer)
            else:
                replies = await self._lanes.look.run(partial(reply_lines, task, answer))
            for reply in replies:
                await connection.send(reply)
        except GraphoptError as error:
            await connection.send(error_line(call.id, error, task.revision))
        except (OSError, TimeoutError):
            raise
        except Exception as error:
            _LOG.exception("control method %s failed", call.method)
            unknown = GraphoptError(
                f"{type(error).__name__}: {error}",
                where=call.method,
                remedy="this is a defect of graphoptd: its log has the traceback",
            )
            await connection.send(error_line(call.id, unknown, task.revision))
        finally:
            task.close()

    async def _answer(self, task: Task) -> Answer:
        method = find_method(task.call)
        if task.level < method.level:
            log_denied(task, method)
            raise AccessDeniedError(
                f"{task.call.method} needs the level {method.level.word}, "
                f"user {task.peer.uid} has {task.level.word}",
                where=task.call.method,
                remedy="ask for membership in a group of control.levels, or use sudo",
            )
        return await method.run(task, decode_params(method, task.call))

    async def _level(self, peer: Peer) -> Level:
        levels: LevelSettings = self.context.settings().control.levels
        if peer.uid in (0, os.geteuid()):
            return Level.ADMIN  # no user database needed
        return await self._lanes.look.run(partial(level_of, peer, levels))

    def _in_background(self, work: Awaitable[Any]) -> None:
        async def run() -> None:
            with suppress(GraphoptError):  # the service has logged it
                await work

        task = asyncio.get_running_loop().create_task(run())
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _turn_away(connected: socket.socket, reason: GraphoptError) -> None:
    """One line, if it fits into the socket's buffer at once, and the end."""
    with suppress(OSError):
        connected.send(error_line(None, reason))
    connected.close()
