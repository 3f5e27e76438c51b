"""One call as the routes see it, and the reading of its body: capped, leased, inflated."""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from graphopt.errors import LimitError
from graphoptd.data.answers import ClientGoneError, HttpError
from graphoptd.data.budget import Lease
from graphoptd.data.compression import ACCEPTED, CODINGS, inflate
from graphoptd.data.routing import Route

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_INFLATE_HERE_BYTES = (
    1 << 10
)  # expands to 1 MiB at worst, about a millisecond; larger bodies go to the codec thread


@dataclass(slots=True)
class Call:
    """One HTTP request.

    Attributes:
        route: where its path leads.
        headers: by lower-case name.
        receive: the ASGI channel of its body.
        lease: bytes it holds of the global budget.
        connection: the guarded connection, when there is one; see `http.GuardedProtocol`.
        is_read: True once the whole body has been taken.
    """

    route: Route
    headers: dict[bytes, bytes]
    receive: Receive
    lease: Lease
    connection: Any = None
    is_read: bool = False


async def read_body(call: Call, limit_bytes: int, codec: ThreadPoolExecutor) -> bytes:
    """The body, decoded from its content coding.

    Raises:
        HttpError: 415 for a coding we do not have.
        LimitError: it is larger than `limit_bytes`, as sent or as decoded.
        RequestError: it is not what its coding says.
        BusyError: the byte budget is exhausted.
        ClientGoneError: the client closed before the end.
    """
    headers = call.headers
    coding = headers.get(b"content-encoding")
    if coding is not None:
        coding = coding.strip().lower()
        if coding not in CODINGS and coding not in (b"identity", b""):
            raise HttpError(
                415,
                f"Content-Encoding {coding[:64].decode('latin-1')!r} is not understood",
                (b"accept-encoding", ACCEPTED),
                remedy=f"send {ACCEPTED.decode()}",
            )
    body = await _read(call, headers.get(b"content-length"), limit_bytes)
    if coding not in CODINGS:
        return body
    if len(body) <= _INFLATE_HERE_BYTES:
        return inflate(body, coding, limit_bytes, call.lease)
    return await asyncio.get_running_loop().run_in_executor(
        codec, inflate, body, coding, limit_bytes, call.lease
    )


async def _read(call: Call, declared: bytes | None, limit_bytes: int) -> bytes:
    if declared is not None:  # the HTTP parser has proven it a number
        if int(declared) > limit_bytes:
            _refuse_size(limit_bytes)
        call.lease.grow(int(declared))
    parts: list[bytes] = []
    total = 0
    more = True
    while more:
        message = await call.receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        part: bytes = message.get("body", b"")
        more = message.get("more_body", False)
        total += len(part)
        if total > limit_bytes:
            _refuse_size(limit_bytes)
        if declared is None:
            call.lease.grow(len(part))
        if not more and not parts:
            call.is_read = True
            return part
        parts.append(part)
    call.is_read = True
    return b"".join(parts)


def _refuse_size(limit_bytes: int) -> None:
    raise LimitError(
        f"the body is larger than {limit_bytes} bytes",
        where="body",
        remedy="send less at once, or raise the limit",
    )
