"""Content-addressed files: `blobs/<sha256>`, durable before their name is returned.

A blob is written under a temporary name, synced, renamed, and its directory synced, so a final name
always means a whole file. Digests are checked when bytes are read (`read`, `verify`), not when a
file is opened: a weight file is mapped, and hashing it on each open would cost more than reading
it.

Who keeps a blob alive. A digest returned by `put` is *held* until the journal commits a row that
names it, or until `release`. From that commit on it is *fresh* until a set of references that is as
young as the row arrives in `collect`. So neither a put that runs beside a collection, nor a blob
whose row is still to come, nor a row committed after the references were computed loses its blob.

Absent on purpose: compression, and blobs in several directories (a host has thousands of them, not
    millions).
"""

import hashlib
import os
import re
import secrets
import stat
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from graphopt.errors import LimitError, ProtocolError, StateCorruptError, StateError
from graphopt.store.disk import Health, refusal, sync, sync_directory, write_all

_CHUNK_BYTES = 1 << 20  # large enough to hide call costs; hashing and copying it release the GIL
_TEMPORARY = "tmp-"
_DIGEST = re.compile(r"[0-9a-f]{64}")

Bytes = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class References:
    """The digests that journal rows up to `as_of_seq` name."""

    as_of_seq: int
    digests: frozenset[str]


class Blobs:
    """The blob files of one state folder. Every method may be called from any thread."""

    def __init__(self, directory: Path, health: Health) -> None:
        """Remove what an interrupted put left, and make the names of all present blobs durable."""
        self._directory = directory
        self._health = health
        self._lock = (
            threading.Lock()
        )  # guards the four below and the step from "unused" to "deleted"
        self._held: Counter[str] = Counter()
        self._fresh: dict[str, int] = {}  # digest -> seq of the youngest row that names it
        self._unsettled: Counter[str] = Counter()  # renamed, directory not yet synced
        self._collected_seq = 0
        for leftover in directory.glob(f"{_TEMPORARY}*"):
            leftover.unlink()
        sync_directory(directory, health)

    def put(self, content: Bytes | Iterable[Bytes]) -> str:
        """Store bytes, or the concatenation of chunks, and return their sha256 in hex; durable on return.

        Raises:
            StateFullError: No space. Nothing was kept; try again when there is some.
            StateFailedError: A sync failed, now or before.
            StateError: Another write error. Nothing was kept.
        """
        if isinstance(content, bytes | bytearray | memoryview):
            digest = hashlib.sha256(content).hexdigest()
            if self._take_existing(digest, memoryview(content).nbytes):
                return digest
            content = (content,)
        return self._write(content)

    def put_fd(self, fd: int, size_bytes_max: int) -> str:
        """Copy the regular file behind `fd` from its first byte and return the digest.

        The position of `fd` is neither used nor moved: the process that sent the descriptor shares
        it. `fd` stays open.

        Raises:
            LimitError: The file holds more than `size_bytes_max` bytes.
            ProtocolError: `fd` is not a regular file.
            StateError: As `put`.
        """
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ProtocolError("the descriptor is not a regular file", remedy="pass a plain file")
        if status.st_size > size_bytes_max:
            raise _too_large(size_bytes_max)
        return self._write(_chunks_of(fd, size_bytes_max))

    def path(self, digest: str) -> Path:
        """Where the blob lies, whether or not it exists."""
        if not _DIGEST.fullmatch(digest):
            raise ValueError(f"not a sha256 in lower-case hex: {digest!r}")
        return self._directory / digest

    def open(self, digest: str) -> FileIO:
        """The blob as an unbuffered binary file, unverified; `StateCorruptError` when it is missing."""
        try:
            return FileIO(self.path(digest))
        except FileNotFoundError as error:
            raise _corrupt(self.path(digest), "the blob is missing") from error

    def read(self, digest: str) -> bytes:
        """The blob's bytes, verified; `StateCorruptError` when they are not the ones that were put."""
        with self.open(digest) as file:
            content = file.readall()
        if hashlib.sha256(content).hexdigest() != digest:
            raise _corrupt(self.path(digest), "the blob's bytes do not match its name")
        return content

    def verify(self, digest: str) -> None:
        """Hash the blob again; `StateCorruptError` naming it when it is missing or altered."""
        with self.open(digest) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != digest:
            raise _corrupt(self.path(digest), "the blob's bytes do not match its name")

    def release(self, digests: Iterable[str]) -> None:
        """Give up one put of each digest whose row will not come (the delta was refused)."""
        with self._lock:
            self._release(digests)

    def collect(self, keep: References) -> int:
        """Delete the blobs that neither `keep` nor a put nor a younger row names; returns the bytes freed.

        References must be used in the order they were made.

        Raises:
            StateFailedError: The store has failed; what the journal holds on disk is not known.
        """
        self._health.check()
        with self._lock:
            if keep.as_of_seq < self._collected_seq:
                raise ValueError(
                    f"references of seq {keep.as_of_seq} are older than those last used"
                )
            self._collected_seq = keep.as_of_seq
            self._fresh = {d: seq for d, seq in self._fresh.items() if seq > keep.as_of_seq}
        freed_bytes = 0
        for name in os.listdir(self._directory):
            if name in keep.digests or not _DIGEST.fullmatch(name):
                continue
            with self._lock, suppress(FileNotFoundError):
                if not self._held[name] and name not in self._fresh:
                    size_bytes = os.stat(self._directory / name).st_size
                    os.unlink(self._directory / name)
                    freed_bytes += size_bytes
        return freed_bytes

    @contextmanager
    def pinned(self, digests: Iterable[str]) -> Iterator[None]:
        """Keep `digests` from collection meanwhile; `StateCorruptError` naming one that is not there."""
        digests = tuple(digests)
        with self._lock:
            self._held.update(digests)
        try:
            for digest in digests:
                if not self.path(digest).exists():
                    raise _corrupt(self.path(digest), "a row names a blob that was not put")
            yield
        finally:
            self.release(digests)

    def settle(self, digests: Iterable[str], seq: int) -> None:
        """Called by the journal: row `seq` is durable and names `digests`; their puts need no hold now."""
        digests = tuple(digests)
        with self._lock:
            self._fresh.update(dict.fromkeys(digests, seq))
            self._release(digests)

    def _write(self, chunks: Iterable[Bytes]) -> str:
        self._health.check()
        temporary = self._directory / f"{_TEMPORARY}{secrets.token_hex(8)}"
        hasher = hashlib.sha256()
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400)
        except OSError as error:
            raise refusal(error, temporary) from error
        try:
            for chunk in chunks:
                hasher.update(chunk)
                _write_chunk(fd, chunk, temporary)
            digest = hasher.hexdigest()
            if not self._take_existing(digest, os.fstat(fd).st_size):
                sync(fd, temporary, self._health)
                self._publish(temporary, digest)
        finally:
            os.close(fd)
            with suppress(FileNotFoundError):
                temporary.unlink()
        return digest

    def _publish(self, temporary: Path, digest: str) -> None:
        """Give a synced file its final name, durably, and hold it."""
        with self._lock:
            self._held[digest] += 1
            self._unsettled[digest] += 1
        try:
            os.rename(temporary, self._directory / digest)
            sync_directory(self._directory, self._health)
        except OSError as error:
            self.release((digest,))
            raise refusal(error, self._directory / digest) from error
        finally:
            with self._lock:
                self._unsettled[digest] -= 1
                self._unsettled += Counter()  # drops zeros

    def _take_existing(self, digest: str, size_bytes: int) -> bool:
        """Hold the blob if it is there. One of another size is rot; the caller's copy then replaces it."""
        self._health.check()
        with self._lock:
            self._held[digest] += 1
            unsettled = self._unsettled[digest] > 0
        try:
            if os.stat(self._directory / digest).st_size == size_bytes:
                if unsettled:
                    sync_directory(self._directory, self._health)
                return True
        except FileNotFoundError:
            pass
        self.release((digest,))
        return False

    def _release(self, digests: Iterable[str]) -> None:
        for digest in digests:
            self._held[digest] -= 1
            if self._held[digest] <= 0:
                del self._held[digest]


def _chunks_of(fd: int, size_bytes_max: int) -> Iterator[memoryview]:
    """The file's content in chunks that are valid until the next one is asked for."""
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    offset = 0
    while True:
        try:
            count = os.preadv(fd, [buffer], offset)
        except OSError as error:
            raise ProtocolError(f"the passed file cannot be read: {error.strerror}") from error
        if not count:
            return
        offset += count
        if offset > size_bytes_max:  # it grew while it was copied
            raise _too_large(size_bytes_max)
        yield buffer[:count]


def _write_chunk(fd: int, chunk: Bytes, where: Path) -> None:
    try:
        write_all(fd, memoryview(chunk).cast("B"))
    except OSError as error:
        raise refusal(error, where) from error


def _too_large(size_bytes_max: int) -> LimitError:
    return LimitError(
        f"the file holds more than {size_bytes_max} bytes", remedy="pass a smaller file"
    )


def _corrupt(path: Path, reason: str) -> StateError:
    return StateCorruptError(
        reason, where=str(path), remedy="restore this file or the state folder from a backup"
    )
