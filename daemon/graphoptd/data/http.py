"""uvicorn's HTTP/1.1 protocol with the guards that it lacks: deadlines, caps, and counted connections.

Each connection is in one *phase*. A sweep a few times a second closes those that stay too long in
one, which costs a request nothing but a timestamp:

    IDLE -first byte-> HEADER -headers complete-> BODY -body complete-> BUSY -answered-> IDLE
    any -refused-> LINGER -client closed, or time is up-> gone

A refusal half-closes and lingers, reading and dropping what still arrives: closing with unread
bytes would reset the connection and the client might never see the answer. Not here: TLS, HTTP/2,
WebSockets.

A request that came in one piece, on the connection that sent the last one too, is answered where it
was read: a task for it would cost a tenth of what it takes. Where requests come from several
connections each has its task, so that they meet in a queue and may run as one.

This subclass relies on uvicorn internals (`cycle` and its fields, `flow`, `pipeline`, `parser`,
`_start_asgi_task`); `tests/data/test_http_guards.py` and `test_request_beginnings.py` cover each.
"""

import asyncio
import types
from collections.abc import Coroutine, Generator
from enum import Enum
from typing import Any

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from graphoptd.data.answers import error_body
from graphoptd.data.app import CONNECTION_EXTENSION
from graphoptd.data.connections import LOCAL_PEER, Guard

_FRAMING_BYTES_MAX = (
    1 << 20
)  # chunk sizes, extensions and trailers, beyond as many bytes as the body itself has


_JOIN_BYTES = 64 << 10  # below this one copy is cheaper than one more write


class Phase(Enum):
    """What a connection is waiting for."""

    IDLE = "idle"
    HEADER = "header"
    BODY = "body"
    BUSY = "busy"
    LINGER = "linger"


class GuardedProtocol(HttpToolsProtocol):
    """One connection.

    Attributes:
        on_lost: called once when the connection is lost while a request runs; set by whoever runs
            it.
        peer: the client's address, or `unix`.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        guard: Guard,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        super().__init__(config, server_state, {}, loop)
        self.guard = guard
        self.peer = LOCAL_PEER
        self.on_lost: Any = None
        self._phase = Phase.IDLE
        self._since_s = 0.0
        self._wire_bytes = 0  # received of the current message
        self._body_bytes = 0  # of these, body
        self._write_paused_s: float | None = None
        self._closing_s: float | None = None
        self._starts: tuple[Any, Any] | None = None  # a request and its application, read just now

    # -- connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count it; refuse it when there are too many."""
        super().connection_made(transport)
        self._since_s = self.loop.time()
        if self.client:
            self.peer = self.client[0]
        reason = self.guard.admit(self)
        if reason:
            self.refuse(503, reason, "busy")

    def connection_lost(self, exc: Exception | None) -> None:
        """Withdraw what runs for it."""
        super().connection_lost(exc)
        self.guard.forget(self)
        on_lost, self.on_lost = self.on_lost, None
        if on_lost is not None:
            on_lost()

    def pause_writing(self) -> None:
        """The client reads slower than we answer."""
        self._write_paused_s = self.loop.time()
        super().pause_writing()

    def resume_writing(self) -> None:
        """It has caught up."""
        self._write_paused_s = None
        super().resume_writing()

    def eof_received(self) -> None:
        """The client sends no more; asyncio closes the connection."""

    def data_received(self, data: bytes) -> None:
        """Feed the parser, within the caps."""
        if self._phase is Phase.IDLE:
            self._enter(Phase.HEADER)
        elif self._phase is Phase.LINGER:
            self._wire_bytes += len(data)
            if self._wire_bytes > 2 * self.guard.settings.body_bytes_max:
                self.transport.abort()
            return
        self._wire_bytes += len(data)
        self._feed(data)
        if self._starts is not None:
            self._start_what_was_read()
        if self._phase is Phase.HEADER and self._wire_bytes > self.guard.settings.header_bytes_max:
            self._refuse_headers()
        elif self._phase is Phase.BODY:
            self._check_framing()

    def answer_at_once(
        self, send: Any, status: int, headers: list[tuple[bytes, bytes]], body: bytes | memoryview
    ) -> bool:
        """Write a whole answer in one piece; False when it must go through `send` instead.

        What uvicorn's `send` does in two calls with checks of headers that are our own constants:
        6 us less for a small answer. Not while the client reads too slowly, nor for HEAD.

        Args:
            send: the ASGI channel of this request.
            status: of the answer.
            headers: all but `connection`, Content-Length included.
            body: the whole of it.
        """
        cycle = send.__self__
        if (
            cycle.response_started
            or cycle.disconnected
            or self.flow.write_paused
            or cycle.scope["method"] == "HEAD"
        ):
            return False
        cycle.response_started = cycle.response_complete = True
        cycle.waiting_for_100_continue = False
        pieces: list[bytes | memoryview] = [STATUS_LINE[status]]
        for name, value in cycle.default_headers:
            pieces += (name, b": ", value, b"\r\n")
        for name, value in headers:
            pieces += (name, b": ", value, b"\r\n")
        pieces.append(b"\r\n" if cycle.keep_alive else b"connection: close\r\n\r\n")
        if len(body) <= _JOIN_BYTES:
            pieces.append(body)
            self.transport.write(b"".join(pieces))
        else:
            self.transport.write(b"".join(pieces))
            self.transport.write(body)
        cycle.message_event.set()
        if not cycle.keep_alive:
            self.transport.close()
        cycle.on_response()
        return True

    # -- parser callbacks

    def on_message_begin(self) -> None:
        """A request begins, maybe behind another one in the same packet."""
        super().on_message_begin()
        if self._phase is not Phase.HEADER:
            self._enter(Phase.HEADER)
        extensions: dict[str, Any] = {CONNECTION_EXTENSION: self}
        self.scope["extensions"] = extensions

    def on_headers_complete(self) -> None:
        """Cap the headers, then let the application have the request."""
        if self._phase is Phase.LINGER:
            return
        size = len(self.url) + sum([len(name) + len(value) + 4 for name, value in self.headers])
        if size > self.guard.settings.header_bytes_max:
            self._refuse_headers()
            return
        if self.parser.should_upgrade():
            return  # `_feed` sees to it
        self._enter(Phase.BODY)
        super().on_headers_complete()
        self.headers = []  # trailers go where nobody reads them

    def on_body(self, body: bytes) -> None:
        """Count, and pass on."""
        if self._phase is not Phase.LINGER:
            self._body_bytes += len(body)
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is here; between this and the next one the connection owes us nothing."""
        if self._phase is not Phase.BODY:
            return
        is_answered = self.cycle.response_complete
        super().on_message_complete()
        self._enter(Phase.IDLE if is_answered else Phase.BUSY)

    def on_response_complete(self) -> None:
        """Start the next pipelined request, or wait for one."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            super()._start_asgi_task(*self.pipeline.pop())
        elif self._phase is Phase.BUSY:
            self._enter(Phase.IDLE)

    # -- starting

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        """Called by uvicorn when the headers are there; often the body is in the same piece."""
        self._starts = (cycle, app)

    def _start_what_was_read(self) -> None:
        """Begins the request whose headers are there: here, or in a task (see the module docstring)."""
        assert self._starts is not None
        (cycle, app), self._starts = self._starts, None
        guard = self.guard
        is_last, guard.last = guard.last is self, self
        if cycle.more_body or not is_last:
            super()._start_asgi_task(cycle, app)
            return
        course = cycle.run_asgi(app)
        guard.under_way.here = True
        try:
            waits_for = course.send(None)
        except StopIteration:
            return
        finally:
            guard.under_way.here = False
        task = self.loop.create_task(_go_on(course, waits_for))
        task.add_done_callback(self.tasks.discard)
        self.tasks.add(task)

    # -- guards

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self.parser.get_method() == b"CONNECT":
                self.refuse(400, "this is no proxy", "http.refused")
                return
            # We may ignore the wish (RFC 9110, 7.8), and must: Java's client asks for HTTP/2 with
            # every first request. The parser gives up at the body, so the same request without the
            # wish goes through a fresh one.
            lines = [self.parser.get_method(), b" ", self.url, b" HTTP/1.1\r\n"]
            for name, value in self.headers:
                if name not in (b"upgrade", b"connection"):
                    lines += (name, b": ", value, b"\r\n")
            self.parser = httptools.HttpRequestParser(self)
            self._feed(b"".join((*lines, b"\r\n", data[upgrade.args[0] :])))
        except httptools.HttpParserError as error:
            self.refuse(400, f"malformed HTTP: {error}", "http.refused")

    def refuse(self, status: int, text: str, code: str) -> None:
        """Answer by hand and close; used where no application runs yet."""
        if self._phase is Phase.LINGER or self.transport.is_closing():
            return
        self.guard.refused[f"{status} {code}"] += 1
        is_answering = self.cycle is not None and not self.cycle.response_complete
        self._enter(Phase.LINGER)
        self.flow.resume_reading()
        if is_answering and (self.cycle.response_started or not self.cycle.more_body):
            # An answer is on its way or being computed; a second one would only garble it.
            self.cycle.keep_alive = False
            return
        body = error_body(text, code)
        head = [
            STATUS_LINE[status],
            b"content-type: application/json\r\nconnection: close\r\n",
            b"content-length: %d\r\n" % len(body),
        ]
        if status == 503:
            head.append(b"retry-after: %d\r\n" % self.guard.settings.retry_after_s)
        self.transport.write(b"".join([*head, b"\r\n", body]))
        if is_answering:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def check_deadlines(self, now_s: float) -> None:
        """Called by the sweep: act on what took too long."""
        settings = self.guard.settings
        if self.transport.is_closing():
            # Closing waits until the client has read all; it may never do so.
            self._closing_s = self._closing_s or now_s
            if now_s - self._closing_s > settings.write_deadline_s:
                self.transport.abort()
            return
        if (
            self._write_paused_s is not None
            and now_s - self._write_paused_s > settings.write_deadline_s
        ):
            self.guard.refused["slow reader"] += 1
            self.transport.abort()
            return
        if self.flow.read_paused:  # we are the ones who make it wait
            self._since_s = now_s
            return
        waited_s = now_s - self._since_s
        if self._phase is Phase.HEADER:
            if waited_s > settings.header_deadline_s:
                self.refuse(
                    408,
                    f"no complete headers within {settings.header_deadline_s:g} s",
                    "deadline.exceeded",
                )
        elif self._phase is Phase.BODY:
            if waited_s > settings.body_deadline_s:
                if self.cycle.response_complete:  # refused before its body ended; we only drained
                    self.transport.close()
                else:
                    self.refuse(
                        408,
                        f"no complete body within {settings.body_deadline_s:g} s",
                        "deadline.exceeded",
                    )
        elif self._phase is Phase.IDLE:
            first = self.cycle is None
            if waited_s > (settings.header_deadline_s if first else settings.keep_alive_s):
                self.transport.close()
        elif (
            self._phase is Phase.LINGER and waited_s > settings.linger_s and not self._owes_answer()
        ):
            self.transport.close()

    def _owes_answer(self) -> bool:
        return (
            self.cycle is not None
            and not self.cycle.response_complete
            and not self.cycle.disconnected
        )

    def _enter(self, phase: Phase) -> None:
        if phase is Phase.HEADER or phase is Phase.LINGER:
            self._wire_bytes = 0
            self._body_bytes = 0
        self._phase = phase
        self._since_s = self.loop.time()

    def _refuse_headers(self) -> None:
        self.refuse(
            431,
            f"the headers exceed {self.guard.settings.header_bytes_max} bytes",
            "limit.exceeded",
        )

    def _check_framing(self) -> None:
        framing_bytes = self._wire_bytes - self._body_bytes
        if framing_bytes > _FRAMING_BYTES_MAX + self._body_bytes:
            self.refuse(400, "more chunk framing than body", "http.refused")
        elif self._body_bytes > 2 * self.guard.settings.body_bytes_max:
            self.transport.abort()  # refused long ago with 413, and it still sends


async def _go_on(course: Coroutine[Any, None, None], waits_for: Any) -> None:
    """The rest of a coroutine that was begun outside a task and waits for something."""
    await _resumed(course, waits_for)


@types.coroutine
def _resumed(course: Coroutine[Any, None, None], waits_for: Any) -> Generator[Any, Any, None]:
    """`yield from course`, but for what it has yielded already; a cancellation reaches it there too."""
    while True:
        try:
            yield waits_for
        except BaseException as error:
            try:
                waits_for = course.throw(error)
            except StopIteration:
                return
        else:
            yield from course
            return
