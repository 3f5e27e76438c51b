"""The client's end of the control socket: find it, call, take answers that come in parts.

Everything that can go wrong on the way ends as a `Refused`, with the words to print and the exit
code to leave with. Deliberately absent: retries. A caller that lost its connection sends the same
delta id again, and gets the answer of the first time.
"""

import array
import errno
import json
import os
import resource
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from typing import Any

from graphopt.errors import GraphoptError
from graphoptd.control.wire import (
    DESCRIPTORS_MESSAGE_MAX,
    LINE_BYTES_MAX,
    Call,
    call_line,
    error_body,
)

CONNECT_TIMEOUT_S = 5.0  # a Unix socket answers at once, or its service hangs
TIMEOUT_S = 120.0  # for an answer: a delta with gigabytes of weights takes a while
_RECEIVE_BYTES = 256 << 10
_SOCKETS = ("./run/graphoptd.sock", "/run/graphoptd.sock")


class Exit(IntEnum):
    """What the command leaves with."""

    OK = 0
    REJECTED = 1
    USAGE = 2
    UNREACHABLE = 3
    PRECONDITION = 4
    DENIED = 5
    TIMED_OUT = 6
    BUSY = 7
    INTERRUPTED = 130  # 128 + SIGINT, as shells say it


_EXITS = {
    "delta.precondition_failed": Exit.PRECONDITION,
    "auth.denied": Exit.DENIED,
    "deadline.exceeded": Exit.TIMED_OUT,
}


class Refused(Exception):  # noqa: N818 - an outcome, not only an error
    """What was asked did not happen; `body` as in a reply."""

    def __init__(self, body: Mapping[str, Any], exit_code: Exit | None = None) -> None:
        super().__init__(str(body.get("message", "")))
        self.body = body
        busy = Exit.BUSY if body.get("retryable") else Exit.REJECTED
        self.exit_code = exit_code or _EXITS.get(str(body.get("code")), busy)

    @classmethod
    def of(cls, error: GraphoptError) -> "Refused":
        """The same for an error met on this side."""
        return cls(error_body(error))


class Client:
    """One connection. A context manager."""

    def __init__(self, path: str, timeout_s: float = TIMEOUT_S) -> None:
        self.timeout_s = timeout_s
        self._path = path
        self._buffer = bytearray()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.settimeout(CONNECT_TIMEOUT_S)
        try:
            self._socket.connect(path)
        except (OSError, ValueError) as error:
            self._socket.close()
            raise _unreachable(path, error) from None

    def ask(
        self, method: str, params: Mapping[str, Any] | None = None, files: Sequence[int] = ()
    ) -> dict[str, Any]:
        """Calls and waits for the whole answer; lists that came in parts are joined.

        Raises:
            Refused: the service said no, is gone, or took too long.
        """
        whole: dict[str, Any] = {}
        for part in self.stream(method, params, files):
            for key, value in part.items():
                if isinstance(value, list) and isinstance(whole.get(key), list):
                    whole[key] += value
                else:
                    whole[key] = value
        return whole

    def stream(
        self,
        method: str,
        params: Mapping[str, Any] | None = None,
        files: Sequence[int] = (),
        *,
        timeout_s: float | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Calls and yields each part of the answer; `timeout_s` is for each of them."""
        given = {name: value for name, value in (params or {}).items() if value is not None}
        try:
            line = call_line(Call(method, given, 1, more=True, descriptors=len(files)))
        except GraphoptError as error:
            raise Refused.of(error) from None
        self._socket.settimeout(timeout_s or self.timeout_s)
        try:
            self._send(line, files)
        except OSError as error:
            # A refusal may have been sent before the service hung up: it says more than EPIPE.
            if error.errno not in (errno.EPIPE, errno.ECONNRESET):
                raise self._lost(method, error) from None
        while True:
            reply = self._reply(method)
            if not reply.get("ok"):
                raise Refused(reply.get("error") or {"message": "no reason was given"})
            result = dict(reply.get("result") or {})
            if "revision" in reply:
                result.setdefault("revision", reply["revision"])
            yield result
            if not reply.get("continues"):
                return

    def close(self) -> None:
        """Hangs up."""
        self._socket.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def _send(self, line: bytes, files: Sequence[int]) -> None:
        """The line, its first bytes carrying the descriptors, as many a message as Linux takes."""
        sent = 0
        for start in range(0, len(files), DESCRIPTORS_MESSAGE_MAX):
            group = array.array("i", files[start : start + DESCRIPTORS_MESSAGE_MAX])
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, group)]
            sent += self._socket.sendmsg([line[sent : sent + 1]], rights)
        self._socket.sendall(line[sent:])

    def _reply(self, method: str) -> dict[str, Any]:
        scanned = 0
        while (cut := self._buffer.find(b"\n", scanned)) < 0:
            scanned = len(self._buffer)
            if scanned > 2 * LINE_BYTES_MAX:
                raise Refused(_body("proto.invalid", "the service's reply has no end", self._path))
            try:
                data = self._socket.recv(_RECEIVE_BYTES)
            except OSError as error:
                raise self._lost(method, error) from None
            if not data:
                raise self._lost(method, None)
            self._buffer += data
        line = bytes(self._buffer[:cut])
        del self._buffer[: cut + 1]
        try:
            reply = json.loads(line)
        except ValueError:
            reply = None
        if not isinstance(reply, dict):
            body = _body("proto.invalid", "what answers is no graphoptd", self._path)
            raise Refused(body, Exit.UNREACHABLE)
        return reply

    def _lost(self, method: str, error: OSError | None) -> Refused:
        if isinstance(error, TimeoutError):
            waited_s = self._socket.gettimeout()
            remedy = "it may still be done: see graphoptctl history; --timeout S waits longer"
            return Refused(
                _body("deadline.exceeded", f"no answer within {waited_s:g} s", method, remedy),
                Exit.TIMED_OUT,
            )
        reason = "the service hung up" if error is None else str(error.strerror)
        remedy = "see graphoptctl status and the service's log; the same delta id may be sent again"
        return Refused(_body("unreachable", reason, self._path, remedy), Exit.UNREACHABLE)


def find_socket(given: str | None, environ: Mapping[str, str]) -> str:
    """The socket to use: as given, `$GRAPHOPT_SOCKET`, below the current folder, the system's."""
    if given:
        return given
    if named := environ.get("GRAPHOPT_SOCKET"):
        return named
    return next((path for path in _SOCKETS if os.path.exists(path)), _SOCKETS[-1])


def allow_many_files() -> None:
    """Raises the soft limit of open files to the hard one: a bundle may have hundreds."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _unreachable(path: str, error: Exception) -> Refused:
    code = error.errno if isinstance(error, OSError) else None
    where = str(Path(path).absolute())
    if code == errno.EACCES:
        body = _body(
            "auth.denied",
            "you may not open the control socket",
            where,
            "ask for membership in its group, or use sudo",
        )
        return Refused(body, Exit.DENIED)
    reason = {
        errno.ENOENT: "there is no control socket",
        errno.ECONNREFUSED: "nobody listens on the control socket",
    }.get(code or 0, getattr(error, "strerror", None) or str(error) or "cannot connect")
    remedy = "start graphoptd, or name its socket with --socket or $GRAPHOPT_SOCKET"
    return Refused(_body("unreachable", reason, where, remedy), Exit.UNREACHABLE)


def _body(code: str, message: str, where: str, remedy: str = "") -> dict[str, Any]:
    return {"code": code, "message": message, "where": where, "remedy": remedy, "detail": []}
