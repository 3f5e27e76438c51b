"""The routes that change something: loading and unloading models, registering shared memory.

A browser page of another site can make its visitor's browser POST to a service on loopback. Every
such request bears an `Origin` header and no client of ours does, so these routes refuse it.
"""

import re
from typing import Any

from graphopt.errors import AccessDeniedError, RequestError
from graphopt.limits import NAME_CHARS_MAX
from graphoptd.data import jsontext
from graphoptd.data.body import Call
from graphoptd.data.shm import SharedMemory, is_count

# One folder or file name inside `repository:`; never a path, never hidden.
_BUNDLE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+@-]*")


def check_control(call: Call, is_on: bool, setting: str) -> None:
    """Nothing when this call may change something; else raises AccessDeniedError."""
    if b"origin" in call.headers:
        raise AccessDeniedError(
            "a request with an Origin header comes from a web page",
            where=call.route.name,
            remedy="call from a program that sends none",
        )
    if not is_on:
        raise AccessDeniedError(
            f"{setting} is off",
            where=call.route.name,
            remedy=f"set data.{setting}, or use graphoptctl",
        )


def read_object(body: bytes, limit_bytes: int) -> dict[str, Any]:
    """A small JSON object; an empty body is an empty object.

    Raises:
        RequestError: it is no strict JSON object.
    """
    if not body.strip():
        return {}
    document, n_arrays = jsontext.parse(body, limit_bytes)
    if not isinstance(document, dict) or n_arrays:
        raise RequestError(
            "not an object of names", where="body", remedy="send a JSON object, or nothing"
        )
    return document


def parameters_of(document: dict[str, Any]) -> dict[str, Any]:
    """The `parameters` object; raises RequestError."""
    parameters = document.get("parameters", {})
    if not isinstance(parameters, dict):
        raise RequestError("not an object", where="parameters", remedy="send a JSON object")
    return parameters


def bundle_to_load(name: str, document: dict[str, Any]) -> str:
    """The bundle a load request means: its `bundle` parameter, else the model's own name.

    Raises:
        RequestError: it overrides the configuration or carries files, or names no bundle inside the
            repository.
    """
    parameters = parameters_of(document)
    for key in parameters:
        if key == "config" or key.startswith("file:"):
            raise RequestError(
                "a model is loaded as it is in the repository",
                where=f"parameters.{key[:64]}",
                remedy="put a bundle into the repository, or apply a delta",
            )
    bundle = parameters.get("bundle", name)
    for text, where in ((name, "model"), (bundle, "parameters.bundle")):
        if (
            not isinstance(text, str)
            or len(text) > NAME_CHARS_MAX
            or not _BUNDLE_NAME.fullmatch(text)
        ):
            raise RequestError(
                f"{str(text)[:64]!r} is no name inside the repository",
                where=where,
                remedy="use letters, digits and . _ + @ -, beginning with a letter or digit",
            )
    return str(bundle)


def only_ready(document: dict[str, Any]) -> bool:
    """The `ready` filter of an index request; raises RequestError."""
    value = document.get("ready", False)
    if not isinstance(value, bool):
        raise RequestError("not true or false", where="ready", remedy="send a boolean")
    return value


def register_region(memory: SharedMemory, name: str, document: dict[str, Any]) -> None:
    """Register a region as the request says; raises RequestError or LimitError."""
    key, offset, size_bytes = (
        document.get("key"),
        document.get("offset", 0),
        document.get("byte_size"),
    )
    if (
        not isinstance(key, str)
        or not is_count(offset)
        or not is_count(size_bytes)
        or size_bytes == 0
    ):
        raise RequestError(
            "not a key, an offset and a size in bytes",
            where="body",
            remedy="send key, offset and byte_size",
        )
    if len(name) > NAME_CHARS_MAX:
        raise RequestError(
            "the name is too long", where="region", remedy=f"at most {NAME_CHARS_MAX} characters"
        )
    memory.register(name, key, offset, size_bytes)
