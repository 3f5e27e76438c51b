"""What goes over the control socket: one JSON object a line, both ways.

    {"id": 1, "method": "rollback", "params": {"model": "minilm", "revision": 3}}
    {"id": 1, "ok": true, "revision": 5, "result": {"affected_nodes": 2, "revision": 5}}

A bare word is a call without parameters, so `socat - UNIX:run/graphoptd.sock` is a client. A call
with `more: true` may get several replies, all but the last with `continues: true`. A call that
brings open files says how many in `descriptors`; they travel by SCM_RIGHTS with the bytes of its
line. Parameters nobody knows are refused, and clients ignore reply fields that they do not know.

Client and service share this module, and the client is quick because little is imported here.
Deliberately absent: strict reading of calls (`calls`), the socket itself (`connection`), and what
the methods mean (`methods`).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from graphopt.errors import GraphoptError, ProtocolError

API_MIN, API_MAX = 1, 1  # versions of this protocol that the service speaks

LINE_BYTES_MAX = 1 << 20  # a call or reply; larger documents go as a file, larger answers in parts
PART_BYTES = 256 << 10  # of an answer in parts: well below a line, and quickly encoded
DESCRIPTORS_MESSAGE_MAX = 253  # SCM_MAX_FD of Linux
DESCRIPTORS_CALL_MAX = 1024  # a bundle of 2 TB in shards of 2 GB; a service has 65,536 in all

_DETAIL_MAX = 100  # faults of one error; as `documents.FAULTS_MAX`
_TEXT_CHARS_MAX = 2_000  # of one text in an error: a hundred of them stay within a line

CallId = str | int | None


@dataclass(frozen=True, slots=True)
class Call:
    """One request.

    Attributes:
        id: repeated in each reply; None when the client does not care.
        more: whether the answer may come in parts.
        descriptors: how many open files came with it.
    """

    method: str
    params: Mapping[str, Any] = field(default_factory=dict)
    id: CallId = None
    more: bool = False
    descriptors: int = 0


def call_line(call: Call) -> bytes:
    """The line of a call, newline included. ProtocolError when it is longer than a line may be."""
    message: dict[str, Any] = {"method": call.method}
    if call.id is not None:
        message["id"] = call.id
    if call.params:
        message["params"] = call.params
    if call.more:
        message["more"] = True
    if call.descriptors:
        message["descriptors"] = call.descriptors
    line = dump_line(message)
    if len(line) > LINE_BYTES_MAX:
        raise ProtocolError(
            f"the call takes {len(line)} bytes, at most {LINE_BYTES_MAX} go into one",
            where=call.method,
            remedy="send large texts as files",
        )
    return line


def result_line(
    call: Call, result: Mapping[str, Any], revision: int | None, *, continues: bool = False
) -> bytes:
    """The line of a good answer, or of a part of one."""
    message: dict[str, Any] = {"id": call.id, "ok": True}
    if revision is not None:
        message["revision"] = revision
    message["result"] = result
    if continues:
        message["continues"] = True
    return dump_line(message)


def error_line(id_: CallId, error: GraphoptError, revision: int | None = None) -> bytes:
    """The line of a refusal."""
    message: dict[str, Any] = {"id": id_, "ok": False}
    if revision is not None:
        message["revision"] = revision
    message["error"] = error_body(error)
    return dump_line(message)


def error_body(error: GraphoptError) -> dict[str, Any]:
    """What a reply says of an error."""
    faults = error.detail[:_DETAIL_MAX]
    return {
        "code": error.code,
        "message": _cut(error.message),
        "retryable": error.retryable,
        "detail": [{"path": _cut(path), "reason": _cut(reason)} for path, reason in faults],
        "where": _cut(error.where),
        "remedy": _cut(error.remedy),
    }


def dump_line(message: Mapping[str, Any]) -> bytes:
    """JSON in one line of ASCII, so that any text survives any terminal. NaN is a ValueError."""
    return json.dumps(message, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def _cut(text: str) -> str:
    return text if len(text) <= _TEXT_CHARS_MAX else text[:_TEXT_CHARS_MAX] + "..."
