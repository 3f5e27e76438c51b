"""Open files that came with a call: checked, copied, and handed to the readers of deltas.

The service never opens a path that a client names; it gets the files themselves. They stay the
client's, who may cut or rewrite them at any moment, so a delta's files are first copied into
anonymous memory: what is hashed, checked and applied is then one and the same. Bundles are too
large for that; their reader copies each tensor once and holds it against its digest.
"""

import os
from collections.abc import Callable, Iterator, Mapping, MutableSequence, Sequence
from contextlib import contextmanager, suppress

from graphopt.engine.host import Host
from graphopt.errors import BundleError, DocumentError, ProtocolError, nearest
from graphopt.graph import Constant
from graphopt.safe_file import Source, open_regular
from graphoptd.control.sendable import (
    BUNDLE_BYTES_MAX,
    BUNDLE_NAME,
    DELTA_BYTES_MAX,
    FILE_BYTES_MAX,
    check_name,
    check_size,
)

_CHUNK_BYTES = 8 << 20  # of one sendfile call, so that a copy can be told from a hang

FilesByPath = Mapping[str, Mapping[str, int]]


class SentFiles:
    """`Resources` of a delta document over what came with it: no file system behind it.

    Args:
        files: for each path as the document writes it, descriptors by name.
        constants: finds a constant by content hash; see `find_constant`.
    """

    def __init__(self, files: FilesByPath, constants: Callable[[str], Constant | None]) -> None:
        self._files = files
        self._constants = constants

    def files(self, path: str) -> Mapping[str, Source]:
        """The descriptors that were sent for `path`."""
        found = self._files.get(path)
        if found is None:
            raise DocumentError(
                f"no file was sent for {path!r}",
                where=path,
                remedy=nearest(path, self._files) or "graphoptctl apply sends what the delta names",
            )
        return dict(found)

    def constant(self, digest: str) -> Constant | None:
        """The constant of that content, where it is at hand."""
        return self._constants(digest)


def find_constant(host: Host, digest: str) -> Constant | None:
    """The constant of that content in any loaded model."""
    for model in host.models().values():
        for constant in model.graph.constants.values():
            if constant.digest == digest:
                return constant
    return None


def by_path(
    declared: Sequence[tuple[str, Sequence[str]]], descriptors: Sequence[int]
) -> FilesByPath:
    """Which descriptor is which file, as the call declares.

    Raises:
        ProtocolError: the counts differ, or a name or path appears twice.
        BundleError: a file in a format that is never read.
    """
    names = [(path, name) for path, names in declared for name in names]
    if len(names) != len(descriptors):
        raise ProtocolError(
            f"{len(names)} files are declared and {len(descriptors)} descriptors came",
            where="files",
            remedy="declare every descriptor, in order",
        )
    if len(set(names)) != len(names) or len({path for path, _ in declared}) != len(declared):
        raise ProtocolError("a path or name is declared twice", where="files")
    found: dict[str, dict[str, int]] = {path: {} for path, _ in declared}
    for (path, name), descriptor in zip(names, descriptors, strict=True):
        check_name(name, where=path if path == name else f"{path}/{name}")
        found[path][name] = descriptor
    return found


@contextmanager
def staged(files: FilesByPath) -> Iterator[FilesByPath]:
    """Copies in anonymous memory, gone when the block ends.

    Raises:
        BundleError: not a regular file with one name, or it became shorter while it was copied.
        LimitError: too large.
    """
    copies: dict[str, dict[str, int]] = {}
    total_bytes = 0
    try:
        for path, entries in files.items():
            copies[path] = {}
            for name, descriptor in entries.items():
                with open_regular(descriptor, label=name, one_link=True) as file:
                    total_bytes += file.size_bytes
                    check_size(total_bytes, DELTA_BYTES_MAX, "files")
                    copies[path][name] = _copy(file.descriptor, file.size_bytes, name)
        yield copies
    finally:
        close_all([copy for entries in copies.values() for copy in entries.values()])


def bundle_parts(names: Sequence[str], descriptors: Sequence[int]) -> dict[str, int]:
    """The parts of a bundle for `load_bundle`.

    Raises:
        BundleError: a name that no bundle has, a link, or no regular file.
        LimitError: too large.
    """
    parts = by_path([("bundle", names)], descriptors)["bundle"]
    total_bytes = 0
    for name, descriptor in parts.items():
        if not BUNDLE_NAME.fullmatch(name):
            raise BundleError(
                f"{name!r} is no file of a bundle",
                where=name,
                remedy="make one with graphopt import, and load its folder",
            )
        with open_regular(descriptor, label=name, one_link=True) as file:
            check_size(file.size_bytes, FILE_BYTES_MAX, name)
            total_bytes += file.size_bytes
    check_size(total_bytes, BUNDLE_BYTES_MAX, "bundle")
    return dict(parts)


def close_all(descriptors: MutableSequence[int]) -> None:
    """Closes what was received, and empties the list: doing it twice must not hit a stranger's."""
    while descriptors:
        with suppress(OSError):  # a file that nobody reads any more
            os.close(descriptors.pop())


def _copy(descriptor: int, size_bytes: int, name: str) -> int:
    copy = os.memfd_create(name[:200], os.MFD_CLOEXEC)
    offset = 0
    try:
        while offset < size_bytes:
            count = os.sendfile(copy, descriptor, offset, min(_CHUNK_BYTES, size_bytes - offset))
            if count == 0:
                raise BundleError(
                    f"the file ends at byte {offset}, {size_bytes - offset} bytes too early",
                    where=name,
                    remedy="send it again once nothing writes to it",
                )
            offset += count
    except OSError as error:
        os.close(copy)
        raise BundleError(
            f"cannot be copied: {error.strerror}", where=name, remedy="open it for reading"
        ) from None
    except BaseException:
        os.close(copy)
        raise
    return copy
