"""Whether two deltas of one id are the same delta: a hash of what the client meant."""

import os
from hashlib import sha256
from typing import Any

from graphopt.delta import Delta
from graphopt.graph import Constant
from graphopt.safe_file import Source

CHUNK_BYTES = 1 << 20


def delta_digest(delta: Delta) -> str:
    """The SHA-256 of a delta's edits and flags: constants by content, files by their bytes.

    Where it came from does not count.
    """
    hasher = sha256()
    _feed(hasher, (delta.graph, delta.allow_interface_change, delta.edits))
    return hasher.hexdigest()


def _feed(hasher: Any, value: Any) -> None:
    if isinstance(value, Constant):
        hasher.update(f"constant {value.digest} {value.is_param};".encode())
    elif isinstance(value, tuple | list):
        hasher.update(f"({len(value)};".encode())
        for item in value:
            _feed(hasher, item)
    elif isinstance(value, dict):
        for name, source in sorted(value.items()):
            hasher.update(f"file {name!r};".encode())
            _feed_file(hasher, source)
    elif hasattr(value, "__slots__") and hasattr(value, "__dataclass_fields__"):
        hasher.update(f"{type(value).__name__}(".encode())
        for name in value.__dataclass_fields__:
            if name != "label":  # how errors name a folder says nothing about what is in it
                _feed(hasher, getattr(value, name))
    else:
        hasher.update(f"{value!r};".encode())


def _feed_file(hasher: Any, source: Source) -> None:
    fd = (
        os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        if not isinstance(source, int)
        else os.dup(source)
    )
    try:
        offset = 0
        while chunk := os.pread(fd, CHUNK_BYTES, offset):
            hasher.update(chunk)
            offset += len(chunk)
    finally:
        os.close(fd)
