"""Content codings of bodies: gzip and deflate (the zlib format), with a bound on what they expand to.

A few kilobytes can expand a thousandfold, so inflation goes in small steps and leases every step
before it keeps it. zlib releases the GIL inside a step. Not here: brotli, zstd, raw deflate,
several codings on one body.
"""

import zlib
from collections.abc import Iterable

from graphopt.errors import LimitError, RequestError
from graphoptd.data.budget import Lease

CODINGS = {
    b"gzip": 31,
    b"deflate": 15,
}  # zlib's wbits; both clients we know send zlib format as "deflate"
ACCEPTED = b"gzip, deflate, identity"

_STEP_IN_BYTES = 64 << 10  # fed at once: zlib copies what it did not use on every call
_STEP_OUT_BYTES = 256 << 10  # kept at once: what a bomb can take before the next check
_LEVEL = 1  # tensors of floats hardly compress; higher levels cost 5 to 20 times the CPU for a few percent


def inflate(body: bytes, coding: bytes, limit_bytes: int, lease: Lease) -> bytes:
    """The decoded body.

    Raises:
        RequestError: it is not what `coding` says, is cut short, or has bytes after its end.
        LimitError: it would expand beyond `limit_bytes`.
        BusyError: the byte budget is exhausted.
    """
    name = coding.decode()
    stream = zlib.decompressobj(CODINGS[coding])
    parts: list[bytes] = []
    total = 0
    try:
        for start in range(0, len(body), _STEP_IN_BYTES):
            piece = body[start : start + _STEP_IN_BYTES]
            while piece and not stream.eof:
                part = stream.decompress(piece, _STEP_OUT_BYTES)
                piece = stream.unconsumed_tail
                total += len(part)
                if total > limit_bytes:
                    raise LimitError(
                        f"the {name} body expands beyond {limit_bytes} bytes",
                        where="body",
                        remedy="send a smaller request, or raise body_bytes_max",
                    )
                lease.grow(len(part))
                parts.append(part)
            if stream.eof and (stream.unused_data or start + _STEP_IN_BYTES < len(body)):
                raise RequestError(
                    f"bytes follow the end of the {name} data",
                    where="body",
                    remedy="compress the whole body as one stream",
                )
    except zlib.error as error:
        raise RequestError(
            f"Content-Encoding says {name}, but the body is not {name} ({error})",
            where="body",
            remedy="compress the body, or drop the header",
        ) from None
    if not stream.eof:
        raise RequestError(f"the {name} body is cut short", where="body", remedy="send all of it")
    return parts[0] if len(parts) == 1 else b"".join(parts)


def deflate(parts: Iterable[bytes | memoryview], coding: bytes) -> bytes:
    """The parts, joined and encoded."""
    stream = zlib.compressobj(_LEVEL, wbits=CODINGS[coding])
    out = [stream.compress(part) for part in parts]
    out.append(stream.flush())
    return b"".join(out)


def wished_coding(accept_encoding: bytes) -> bytes | None:
    """The coding an answer should have.

    Only a header with one single token is taken as a wish: every httpx client sends `gzip, deflate`
    without wanting either, and would pay CPU on both sides for each answer.
    """
    token = accept_encoding.strip().lower()
    return token if token in CODINGS else None
