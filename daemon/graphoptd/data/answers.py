"""Errors as HTTP: which status each has, and the one JSON shape they share.

`{"error": text, "code": code}` with exactly `application/json`: tritonclient and kserve read
`error`, programs read `code`. 201 and 204 are never sent: tritonclient takes anything but 200 for a
failure.
"""

import json

from graphopt.errors import (
    AccessDeniedError,
    BundleError,
    BusyError,
    DeadlineError,
    DeltaError,
    GraphoptError,
    ImportRefusedError,
    LimitError,
    ModelExistsError,
    ModelNotFoundError,
    RequestError,
)
from graphoptd.data.encode import JSON_TYPE, Answer
from graphoptd.data.lanes import VersionNotFoundError
from graphoptd.data.shm import RegionNotFoundError

_STATUS: tuple[tuple[type[GraphoptError], int], ...] = (
    (RequestError, 400),
    (ModelNotFoundError, 404),
    (VersionNotFoundError, 404),
    (RegionNotFoundError, 404),
    (BusyError, 503),
    (DeadlineError, 503),  # as Triton; 504 would blame a gateway
    (LimitError, 413),
    (AccessDeniedError, 403),
    (ModelExistsError, 400),
    (BundleError, 400),
    (ImportRefusedError, 400),
    (DeltaError, 400),
)


class HttpError(GraphoptError):
    """A request that HTTP itself refuses: no such route, wrong method, unknown coding."""

    code = "http.refused"

    def __init__(
        self,
        status: int,
        message: str,
        *headers: tuple[bytes, bytes],
        remedy: str = "",
        close: bool = False,
    ) -> None:
        super().__init__(message, remedy=remedy)
        self.status = status
        self.headers = headers
        self.close = close


class ClientGoneError(Exception):
    """The client went away; nobody reads an answer."""


def error_answer(error: GraphoptError, retry_after_s: int) -> Answer:
    """The answer to a typed error."""
    headers = [JSON_TYPE]
    if isinstance(error, HttpError):
        status = error.status
        headers += error.headers
    else:
        status = next((status for kind, status in _STATUS if isinstance(error, kind)), 500)
    if status == 503:
        headers.append((b"retry-after", b"%d" % retry_after_s))
    return Answer(status, headers, (error_body(str(error), error.code),))


def internal_answer() -> Answer:
    """The answer to an untyped error; its text stays in the log, it may hold paths or values."""
    text = "internal error; the server's log has the details"
    return Answer(500, [JSON_TYPE], (error_body(text, "internal"),))


def error_body(text: str, code: str) -> bytes:
    """The JSON of an error.

    The standard encoder writes lone surrogates, which names may hold, as escapes; orjson refuses.
    """
    return json.dumps({"error": text, "code": code}).encode()
