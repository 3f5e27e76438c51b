"""Tensors in system shared memory: the client names a region of /dev/shm instead of sending bytes.

Off unless asked for, because any client of the port could then name any region that this process
may open.

Regions are read and written with `pread` and `pwrite` on a descriptor, never through a mapping. A
client may shrink its file at any moment, also between a check and the copy, and a mapping would
then kill the process with SIGBUS where these calls come back short. The copy is wanted anyway: an
engine must not index with numbers a client can still change. And `multiprocessing.shared_memory` on
Python 3.11 deletes the client's region when the server exits.
"""

import os
import stat
from dataclasses import dataclass
from typing import Any, NoReturn, TypeGuard

from graphopt.errors import GraphoptError, LimitError, RequestError
from graphopt.limits import NAME_CHARS_MAX

SHM_FOLDER = "/dev/shm"


class RegionNotFoundError(GraphoptError):
    """No shared memory region of that name is registered."""

    code = "region.unknown"


@dataclass(frozen=True, slots=True)
class RegionRef:
    """A stretch of a registered region, in bytes."""

    name: str
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Region:
    """A registered stretch of a file in /dev/shm, in bytes."""

    name: str
    key: str
    offset: int
    size_bytes: int
    descriptor: int


class SharedMemory:
    """The registered regions. Used by the event loop and the codec thread; each call stands alone."""

    def __init__(self, regions_max: int, folder: str = SHM_FOLDER) -> None:
        self._regions: dict[str, Region] = {}
        self._regions_max = regions_max
        self._folder = folder

    def register(self, name: str, key: str, offset: int, size_bytes: int) -> None:
        """Open `key` below /dev/shm and keep it open under `name`.

        Raises:
            RequestError: the name is taken, the key is no plain name, or the file does not hold
                that stretch.
            LimitError: too many regions.
        """
        if name in self._regions:
            raise RequestError(
                f"region {name!r} is registered", where="region", remedy="unregister it first"
            )
        if len(self._regions) >= self._regions_max:
            raise LimitError(
                f"{self._regions_max} regions are registered",
                where="region",
                remedy="unregister some",
            )
        file_name = key.removeprefix("/")
        if (
            not file_name
            or len(file_name) > NAME_CHARS_MAX
            or "/" in file_name
            or "\0" in file_name
        ):
            _refuse_key(key, "is no name of a region")
        if file_name in (".", ".."):
            _refuse_key(key, "is no name of a region")
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            descriptor = os.open(os.path.join(self._folder, file_name), flags)
        except (OSError, ValueError) as error:
            _refuse_key(key, f"cannot be opened ({getattr(error, 'strerror', error)})")
        try:
            _check_extent(descriptor, offset + size_bytes, name)
        except BaseException:
            os.close(descriptor)
            raise
        self._regions[name] = Region(name, key, offset, size_bytes, descriptor)

    def unregister(self, name: str | None) -> None:
        """Forget one region, or all of them; an unknown name is no error, as with Triton."""
        names = list(self._regions) if name is None else [name]
        for each in names:
            region = self._regions.pop(each, None)
            if region is not None:
                os.close(region.descriptor)

    def status(self, name: str | None) -> list[dict[str, Any]]:
        """Registered regions as the protocol lists them.

        Raises:
            RegionNotFoundError: no region of that name.
        """
        regions = list(self._regions.values()) if name is None else [self._find(name)]
        return [
            {
                "name": region.name,
                "key": region.key,
                "offset": region.offset,
                "byte_size": region.size_bytes,
            }
            for region in regions
        ]

    def read(self, ref: RegionRef) -> bytearray:
        """A copy of the stretch.

        Raises:
            RegionNotFoundError: no region of that name.
            RequestError: the stretch lies outside the region, or the file has shrunk.
        """
        region = self._find(ref.name)
        start = _absolute(region, ref)
        buffer = bytearray(ref.size_bytes)
        view = memoryview(buffer)
        done = 0
        while done < ref.size_bytes:
            n_bytes = os.preadv(region.descriptor, [view[done:]], start + done)
            if n_bytes == 0:
                _refuse_shrunk(ref.name)
            done += n_bytes
        return buffer

    def write(self, ref: RegionRef, content: bytes | memoryview) -> None:
        """Write an output into the stretch.

        Raises:
            RegionNotFoundError: no region of that name.
            RequestError: the content is larger than the stretch, that lies outside the region, or
                the file has shrunk.
        """
        region = self._find(ref.name)
        start = _absolute(region, ref)
        if len(content) > ref.size_bytes:
            raise RequestError(
                f"the output takes {len(content)} bytes, the stretch has {ref.size_bytes}",
                where=f"region {ref.name}",
                remedy="give a larger shared_memory_byte_size",
            )
        _check_extent(region.descriptor, start + len(content), ref.name)
        view = memoryview(content)
        done = 0
        try:
            while done < len(view):
                done += os.pwrite(region.descriptor, view[done:], start + done)
        except OSError as error:
            raise RequestError(
                f"cannot write ({error.strerror})",
                where=f"region {ref.name}",
                remedy="check the region's owner and size",
            ) from None

    def _find(self, name: str) -> Region:
        region = self._regions.get(name)
        if region is None:
            raise RegionNotFoundError(
                "no such region", where=f"region {name}", remedy="register it first"
            )
        return region


def region_ref(
    parameters: dict[str, Any], where: str, memory: SharedMemory | None
) -> RegionRef | None:
    """The stretch that a tensor's parameters name; None when they name none.

    Raises:
        RequestError: they are malformed, or shared memory is off.
    """
    name = parameters.get("shared_memory_region")
    if name is None:
        return None
    if memory is None:
        raise RequestError(
            "shared memory is off",
            where=where,
            remedy="send the tensor as binary, or turn shared_memory on",
        )
    offset = parameters.get("shared_memory_offset", 0)
    size_bytes = parameters.get("shared_memory_byte_size")
    if not isinstance(name, str) or not is_count(offset) or not is_count(size_bytes):
        raise RequestError(
            "not a region name, an offset and a size in bytes",
            where=where,
            remedy="send shared_memory_region, shared_memory_offset and shared_memory_byte_size",
        )
    return RegionRef(name, offset, size_bytes)


def is_count(value: object) -> TypeGuard[int]:
    """True for an integer that can be a size or position in a file."""
    return type(value) is int and 0 <= value < 1 << 62


def _absolute(region: Region, ref: RegionRef) -> int:
    if ref.offset + ref.size_bytes > region.size_bytes:
        raise RequestError(
            f"bytes {ref.offset} to {ref.offset + ref.size_bytes} of {region.size_bytes} registered",
            where=f"region {ref.name}",
            remedy="stay within the region",
        )
    _check_extent(region.descriptor, region.offset + ref.offset + ref.size_bytes, ref.name)
    return region.offset + ref.offset


def _check_extent(descriptor: int, end: int, name: str) -> None:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise RequestError(
            "not a plain file", where=f"region {name}", remedy="create it with shm_open"
        )
    if status.st_size < end:
        _refuse_shrunk(name)


def _refuse_shrunk(name: str) -> NoReturn:
    raise RequestError(
        "the file is smaller than the region",
        where=f"region {name}",
        remedy="size it with ftruncate, then register it",
    )


def _refuse_key(key: str, why: str) -> NoReturn:
    raise RequestError(
        f"key {key[:NAME_CHARS_MAX]!r} {why}",
        where="key",
        remedy="name a region made with shm_open",
    )
