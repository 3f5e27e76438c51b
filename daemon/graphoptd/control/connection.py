"""One client's connection: lines in, with the descriptors that came along; lines out.

Descriptors belong to the bytes they were sent with. They wait in a queue until the line that
declares them is complete; a queue that no line claims ends the connection, as does a line that is
too long or takes too long. Nothing here blocks the event loop: a client that does not read its
answers holds up itself until its deadline.
"""

import array
import asyncio
import socket
from collections import deque
from dataclasses import dataclass

from graphopt.errors import DeadlineError, ProtocolError
from graphoptd.control.descriptors import close_all
from graphoptd.control.levels import Peer
from graphoptd.control.wire import DESCRIPTORS_CALL_MAX, DESCRIPTORS_MESSAGE_MAX, LINE_BYTES_MAX

_RECEIVE_BYTES = 64 << 10
_ANCILLARY_BYTES = socket.CMSG_SPACE(DESCRIPTORS_MESSAGE_MAX * array.array("i").itemsize)


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds a client may take.

    Attributes:
        idle_s: between calls; a forgotten connection holds one of a bounded number.
        line_s: from the first byte of a line to its end.
        write_s: to take an answer.
    """

    idle_s: float = 600.0
    line_s: float = 10.0
    write_s: float = 30.0


class Connection:
    """A connected client. Use from one task."""

    def __init__(self, connected: socket.socket, peer: Peer, deadlines: Deadlines) -> None:
        self.peer = peer
        self._socket = connected
        self._deadlines = deadlines
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()
        self._scanned = 0  # bytes of the buffer that are known to hold no newline
        self._descriptors: deque[int] = deque()

    async def next_line(self) -> bytes | None:
        """The next line without its newline; None when the client is done or idle for too long.

        Raises:
            ProtocolError: too long, too many descriptors, or descriptors that did not arrive.
            DeadlineError: a line was begun and not ended in time.
        """
        line_end_s: float | None = None
        while True:
            cut = self._buffer.find(b"\n", self._scanned)
            if cut >= 0:
                line = bytes(self._buffer[:cut])
                del self._buffer[: cut + 1]
                self._scanned = 0
                if len(line) <= LINE_BYTES_MAX:
                    return line
            if cut >= 0 or len(self._buffer) > LINE_BYTES_MAX:
                raise ProtocolError(
                    f"the line is longer than {LINE_BYTES_MAX} bytes",
                    where="call",
                    remedy="send large texts as files",
                )
            self._scanned = len(self._buffer)
            if self._buffer and line_end_s is None:
                line_end_s = self._loop.time() + self._deadlines.line_s
            try:
                until_s = line_end_s or self._loop.time() + self._deadlines.idle_s
                async with asyncio.timeout_at(until_s):
                    await self.readable()
            except TimeoutError:
                if not self._buffer:
                    return None
                raise DeadlineError(
                    f"a line was begun and not ended within {self._deadlines.line_s:g} s",
                    where="call",
                    remedy="end each call with a newline",
                ) from None
            if not self._receive():
                return None

    def claim(self, count: int) -> list[int]:
        """The next `count` descriptors; the caller closes them. ProtocolError when fewer came."""
        if count > len(self._descriptors):
            raise ProtocolError(
                f"{count} descriptors are declared and {len(self._descriptors)} came",
                where="descriptors",
                remedy="send them with the bytes of the line, at most 253 a message",
            )
        claimed = [self._descriptors.popleft() for _ in range(count)]
        if self._descriptors and not self._buffer:
            close_all(claimed)
            raise ProtocolError(
                f"{len(self._descriptors)} descriptors came that no call declares",
                where="descriptors",
                remedy="say how many in the call's descriptors",
            )
        return claimed

    async def send(self, line: bytes) -> None:
        """Sends a line whole. TimeoutError when the client does not take it, OSError when it left."""
        async with asyncio.timeout(self._deadlines.write_s):
            await self._loop.sock_sendall(self._socket, line)

    async def readable(self) -> None:
        """Returns when the client has sent something or left. During a stream both end it."""
        if self._buffer and self._scanned < len(self._buffer):
            return
        ready: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(self._socket.fileno(), _resolve, ready)
        try:
            await ready
        finally:
            self._loop.remove_reader(self._socket.fileno())

    def close(self) -> None:
        """Closes the connection and every descriptor that nobody claimed."""
        close_all(self._descriptors)
        self._socket.close()

    def _receive(self) -> bool:
        """Takes in what is there; False at the end."""
        try:
            data, ancillary, flags, _ = self._socket.recvmsg(
                _RECEIVE_BYTES, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
            )
        except (BlockingIOError, InterruptedError):
            return True
        except OSError:
            return False
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                found = array.array("i")
                found.frombytes(payload[: len(payload) - len(payload) % found.itemsize])
                self._descriptors.extend(found)
        if flags & socket.MSG_CTRUNC:
            raise ProtocolError(
                "descriptors were lost on the way: this service has none left",
                where="descriptors",
                remedy="raise the service's LimitNOFILE, or send fewer files",
            )
        if len(self._descriptors) > DESCRIPTORS_CALL_MAX:
            raise ProtocolError(
                f"more than {DESCRIPTORS_CALL_MAX} descriptors",
                where="descriptors",
                remedy="send fewer files in one call",
            )
        self._buffer += data
        return bool(data)


def _resolve(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)
