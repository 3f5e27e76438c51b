"""A delta document and its open files, packed for one call."""

import os
from collections.abc import Sequence
from typing import Any

from graphoptd.control.opening import Opened

INLINE_BYTES_MAX = 256 << 10  # a longer document goes as a file: escapes may grow it sixfold


def as_call(
    text: bytes, format_: str, source: str, opened: Sequence[Opened]
) -> tuple[dict[str, Any], list[int], Opened]:
    """Parameters, descriptors in order, and what was opened here on top (close it afterwards)."""
    own = Opened("", {})
    params: dict[str, Any] = {
        "format": format_,
        "source": source,
        "files": [{"path": each.path, "names": list(each.files)} for each in opened] or None,
    }
    try:
        document = text.decode() if len(text) <= INLINE_BYTES_MAX else None
    except UnicodeDecodeError:
        document = None  # the service says which byte is wrong
    if document is None:
        own.files["document"] = _memory_file(text)
    else:
        params["document"] = document
    files = [*own.files.values(), *(fd for each in opened for fd in each.files.values())]
    return params, files, own


def _memory_file(text: bytes) -> int:
    descriptor = os.memfd_create("document", os.MFD_CLOEXEC)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(text)
    return descriptor
