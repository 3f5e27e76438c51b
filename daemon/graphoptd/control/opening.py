"""Opening the files that a delta names: by the client as its user, by the spool inside a unit.

No link is followed below the folder that the document lies in, and a file has one name: what is
opened is what the path says. Nothing is read here but the document itself.
"""

import errno
import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphopt.errors import DocumentError, GraphoptError, LimitError
from graphopt.limits import DOCUMENT_BYTES_MAX
from graphoptd.control.sendable import (
    BUNDLE_NAME,
    DELTA_SUFFIXES,
    FILE_BYTES_MAX,
    REFUSED_BY_READER,
    check_name,
    check_size,
)
from graphoptd.control.wire import DESCRIPTORS_CALL_MAX

_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_FOLDER_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_DIRECTORY
_COPY = "copy it and use the copy (cp -rL follows links)"


@dataclass(frozen=True, slots=True)
class Opened:
    """A path of a document with its open files by name."""

    path: str
    files: dict[str, int]


def read_document(path: str) -> bytes:
    """The text of a delta document.

    Raises:
        DocumentError: it cannot be read, or is no document.
        LimitError: too large.
        BundleError: it is a pickle or an archive.
    """
    check_name(Path(path).name or path, where=path)
    try:
        if os.path.isdir(path):
            raise DocumentError(
                "a folder is no delta",
                where=path,
                remedy="graphoptctl attach takes an adapter's folder, load a bundle's",
            )
        with open(path, "rb") as file:
            text = file.read(DOCUMENT_BYTES_MAX + 1)
    except OSError as error:
        raise DocumentError(
            f"cannot be read: {error.strerror}", where=path, remedy="check the path"
        ) from None
    if len(text) > DOCUMENT_BYTES_MAX:
        raise LimitError(
            f"more than {DOCUMENT_BYTES_MAX} bytes",
            where=path,
            remedy="tensors belong in safetensors files beside the document",
        )
    return text


def named_paths(text: bytes, format_: str) -> list[str]:
    """Every `path:` of the edits. Of a faulty document none: the service says what is wrong."""
    from graphopt.documents import load_json, load_yaml  # PyYAML: a third of the start-up time

    try:
        document: Any = (load_json if format_ == "json" else load_yaml)(text).value
    except GraphoptError:
        return []
    edits = document.get("edits") if isinstance(document, dict) else None
    found = []
    for edit in edits if isinstance(edits, list) else ():
        for body in edit.values() if isinstance(edit, dict) else ():
            path = body.get("path") if isinstance(body, dict) else None
            if isinstance(path, str) and path:
                found.append(path)
    return list(dict.fromkeys(found))


def open_paths(
    paths: Sequence[str], folder: str, *, label: str = "", confined: bool = False
) -> list[Opened]:
    """The files at `paths`, counted from `folder`; a folder's are those that deltas read.

    `label` is the document that names them, for errors. `confined` keeps to what is below `folder`,
    for paths that another user wrote.

    Raises:
        DocumentError: a link, an absent or unreadable file, no regular file, or several names.
        LimitError: too large, or too many.
        BundleError: a format that is never read.
    """
    opened: list[Opened] = []
    try:
        for path in paths:
            opened.append(Opened(path, {}))
            _open_path(path, folder, confined, opened[-1].files)
            _check_count(sum(len(each.files) for each in opened), path)
    except GraphoptError as error:
        close_opened(opened)
        if label:
            error.where = f"{label}: {error.where}"
        raise
    except BaseException:
        close_opened(opened)
        raise
    return opened


def open_bundle(path: str) -> Opened:
    """The files of the bundle in the folder `path`. Raises as `open_paths`."""
    opened = Opened(path, {})
    if not os.path.isdir(path):
        check_name(Path(path).name or path, where=path)
    folder = _open_at(None, path, _FOLDER_FLAGS, path)
    try:
        names = sorted(name for name in os.listdir(folder) if BUNDLE_NAME.fullmatch(name))
        if "manifest.json" not in names:
            raise DocumentError(
                "no bundle: manifest.json is missing",
                where=path,
                remedy="make one with graphopt import SOURCE -o BUNDLE",
            )
        _check_count(len(names), path)
        for name in names:
            opened.files[name] = _open_file(folder, name, f"{path}/{name}")
    except BaseException:
        close_opened([opened])
        raise
    finally:
        os.close(folder)
    return opened


def close_opened(opened: Sequence[Opened]) -> None:
    """Closes them; the service has its own."""
    for each in opened:
        for descriptor in each.files.values():
            with suppress(OSError):
                os.close(descriptor)
        each.files.clear()


def _open_path(path: str, folder: str, confined: bool, files: dict[str, int]) -> None:
    parent, name = _parent(path, folder, confined)
    try:
        if not _is_folder(parent, name):
            check_name(name, where=path)
            files[name] = _open_file(parent, name, path)
            return
        inner = _open_at(parent, name, _FOLDER_FLAGS, path)
        try:
            for entry in sorted(os.listdir(inner)):
                if entry.endswith(DELTA_SUFFIXES) or entry == REFUSED_BY_READER:
                    files[entry] = _open_file(inner, entry, f"{path}/{entry}")
                    _check_count(len(files), path)
        finally:
            os.close(inner)
        if not files:
            raise DocumentError(
                "the folder holds no safetensors or JSON file",
                where=path,
                remedy="name the folder that holds adapter_model.safetensors or the weights",
            )
    finally:
        os.close(parent)


def _parent(path: str, folder: str, confined: bool) -> tuple[int, str]:
    """The folder of the last component of `path`, open, and that component."""
    expanded = path if confined else os.path.expanduser(path)
    is_absolute = expanded.startswith("/")
    parts = [part for part in expanded.split("/") if part not in ("", ".")] or ["."]
    if confined and (is_absolute or ".." in parts):
        raise DocumentError(
            "the path leads out of the folder",
            where=path,
            remedy="put the files beside the document and name them relative to it",
        )
    start = "/" if is_absolute else folder
    # An absolute path's upper folders are the system's: /home may well be a link.
    flags = _FOLDER_FLAGS & ~os.O_NOFOLLOW if is_absolute else _FOLDER_FLAGS
    at = _open_at(None, start, _FOLDER_FLAGS & ~os.O_NOFOLLOW, path)
    for part in parts[:-1]:
        try:
            inner = _open_at(at, part, flags, path)
        finally:
            os.close(at)
        at = inner
    return at, parts[-1]


def _is_folder(parent: int, name: str) -> bool:
    try:
        return stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
    except OSError:
        return False  # opening it says why


def _open_file(parent: int, name: str, shown: str) -> int:
    descriptor = _open_at(parent, name, _FILE_FLAGS, shown)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise DocumentError("not a regular file", where=shown, remedy="name the file itself")
        if found.st_nlink != 1:
            raise DocumentError(
                f"the file has {found.st_nlink} names (hard links), one is allowed",
                where=shown,
                remedy=_COPY,
            )
        check_size(found.st_size, FILE_BYTES_MAX, shown)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _open_at(parent: int | None, name: str, flags: int, shown: str) -> int:
    try:
        return os.open(name, flags, dir_fd=parent)
    except OSError as error:
        is_link = error.errno == errno.ELOOP or (
            error.errno == errno.ENOTDIR and _is_link(parent, name)
        )
        if is_link:
            raise DocumentError(
                "a symbolic link is not followed", where=shown, remedy=_COPY
            ) from None
        raise DocumentError(
            f"cannot be opened: {error.strerror}",
            where=shown,
            remedy="check the path; it counts from the folder of the document",
        ) from None
    except ValueError:  # a NUL in the name
        raise DocumentError("no file can have this name", where=repr(shown)) from None


def _is_link(parent: int | None, name: str) -> bool:
    try:
        return stat.S_ISLNK(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
    except OSError:
        return False


def _check_count(count: int, where: str) -> None:
    if count > DESCRIPTORS_CALL_MAX:
        raise LimitError(
            f"more than {DESCRIPTORS_CALL_MAX} files",
            where=where,
            remedy="send fewer at once",
        )
