"""Open and read files that a stranger may have prepared: a regular file, bounded, never through a link.

A source is a path or an open descriptor. A descriptor (one that came by SCM_RIGHTS, say) is read
by position: it is neither closed nor moved. Deliberately absent: any decision about *where* a file
may lie; whoever names the path decides that. Symbolic links in the folders above a path are
followed, only the file itself may not be one.
"""

import errno
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from graphopt.errors import BundleError, LimitError

Source = int | str | os.PathLike[str]
"""A file: an open descriptor, or a path."""

_CHUNK_BYTES = (
    8 << 20
)  # one pread; large enough to amortise the call, small enough to stop soon on a short file


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A regular file that is open for reading.

    Attributes:
        descriptor: valid inside the `open_regular` block.
        size_bytes: size when it was opened; a later truncation shows as a short read.
        label: how errors name the file.
    """

    descriptor: int
    size_bytes: int
    label: str


@contextmanager
def open_regular(source: Source, *, label: str = "", one_link: bool = False) -> Iterator[OpenFile]:
    """Open `source` for reading and check that it is a plain file.

    Args:
        source: a path, or a descriptor, which stays open and keeps its position.
        label: the name used in errors; by default the path, or `descriptor N`.
        one_link: refuse a file with more than one name. A hard link lets a person who may not read a file
            hand it to a program that may.

    Raises:
        BundleError: absent, unreadable, a symbolic link, not a regular file, or linked more than once.
    """
    owned = not isinstance(source, int)
    if isinstance(source, int):
        label, descriptor = label or f"descriptor {source}", source
    else:
        label = label or os.fspath(source)
        # O_NONBLOCK: opening a FIFO must not wait for its writer.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            descriptor = os.open(source, flags)
        except OSError as fault:
            raise _open_error(fault, label) from None
    try:
        yield OpenFile(descriptor, _checked_size(descriptor, label, one_link), label)
    finally:
        if owned:
            os.close(descriptor)


def read_at(file: OpenFile, offset: int, buffer: memoryview) -> None:
    """Fill `buffer` with the bytes at `offset`.

    Raises:
        BundleError: the file ends before the buffer is full, or cannot be read.
    """
    done, total = 0, len(buffer)
    while done < total:
        part = buffer[done : done + _CHUNK_BYTES]
        try:
            count = os.preadv(file.descriptor, [part], offset + done)
        except OSError as fault:
            raise _read_error(fault, file.label) from None
        if count == 0:
            raise BundleError(
                f"the file ends at byte {offset + done}, {total - done} bytes too early",
                where=file.label,
                remedy="copy it again; it was cut off or changed while it was read",
            )
        done += count


def read_bounded(
    source: Source, bytes_max: int, *, label: str = "", one_link: bool = False
) -> bytes:
    """The whole content of a small file.

    Raises:
        LimitError: longer than `bytes_max`.
        BundleError: as `open_regular`.
    """
    with open_regular(source, label=label, one_link=one_link) as file:
        if file.size_bytes > bytes_max:
            raise LimitError(
                f"{file.size_bytes} bytes, at most {bytes_max} are read",
                where=file.label,
                remedy="make the file smaller",
            )
        content = bytearray(file.size_bytes)
        read_at(file, 0, memoryview(content))
        return bytes(content)


def parse_json_object(text: bytes, *, label: str) -> dict[str, object]:
    """Decode a JSON object strictly: UTF-8, no duplicate keys, no NaN or Infinity, no runaway nesting.

    Raises:
        BundleError: anything else.
    """
    try:
        value = json.loads(
            text.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as fault:
        reason = "nested too deeply" if isinstance(fault, RecursionError) else str(fault)
        raise BundleError(
            f"not valid JSON: {reason}", where=label, remedy="write the file again"
        ) from None
    if not isinstance(value, dict):
        raise BundleError(
            f"a JSON object was expected, not {type(value).__name__}",
            where=label,
            remedy="write the file again",
        )
    return value


def _checked_size(descriptor: int, label: str, one_link: bool) -> int:
    try:
        status = os.fstat(descriptor)
    except OSError as fault:
        raise _read_error(fault, label) from None
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(
            "not a regular file", where=label, remedy="name the file itself, not a folder or device"
        )
    if one_link and status.st_nlink != 1:
        raise BundleError(
            f"the file has {status.st_nlink} names (hard links), one is allowed",
            where=label,
            remedy="copy it and use the copy",
        )
    return status.st_size


def _open_error(fault: OSError, label: str) -> BundleError:
    if fault.errno == errno.ELOOP:
        return BundleError(
            "a symbolic link is not followed", where=label, remedy="name the file it points to"
        )
    return _read_error(fault, label)


def _read_error(fault: OSError, label: str) -> BundleError:
    return BundleError(
        f"cannot be read: {fault.strerror}",
        where=label,
        remedy="check the path and its permissions",
    )


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} appears twice")
    return found


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")
