"""One state folder: a lock, a journal, blobs.

    STATE/lock             flock; holds the pid of the process that has the folder
    STATE/journal.sqlite3  the rows (and `-wal` while open)
    STATE/journal.head     the witness of the youngest row
    STATE/blobs/           content-addressed files

The journal is the truth for what is loaded and at which revision. The artifact cache lies beside it
and is not the store's: it may be deleted at any time.
"""

import fcntl
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from graphopt.errors import StateError, StateInUseError
from graphopt.store.blobs import Blobs
from graphopt.store.disk import Health, sync_directory
from graphopt.store.journal import Journal


class StateFolder:
    """An open state folder, held by this process alone. Close it, or use it as a context manager.

    Attributes:
        path: The folder.
        blobs: Content-addressed files.
        journal: The rows.
        health: Tells whether a sync failed; then end the process.
    """

    def __init__(
        self, path: Path, blobs: Blobs, journal: Journal, health: Health, lock_fd: int
    ) -> None:
        """Not called directly: see `open`."""
        self.path = path
        self.blobs = blobs
        self.journal = journal
        self.health = health
        self._lock_fd: int | None = lock_fd

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, wall_ns: Callable[[], int]) -> Self:
        """Create the folder (mode 0700) or open it, verify the journal, remove what interrupted puts left.

        Args:
            path: The folder.
            wall_ns: The wall clock, nanoseconds since the epoch; noted in rows, never used for
                order.

        Raises:
            StateInUseError: Another process has it; the message names its pid.
            StateNewerError: A newer program wrote it.
            StateCorruptError: The journal is not what was written.
            StateError: It cannot be created or written.
        """
        folder = Path(path).absolute()
        health = Health(folder)
        with ExitStack() as undo:
            try:
                _make(folder, health)
                lock_fd = _lock(folder)
                undo.callback(_unlock, lock_fd, health)
                _make(folder / "blobs", health)
                blobs = Blobs(folder / "blobs", health)
                journal = Journal(
                    folder / "journal.sqlite3", folder / "journal.head", blobs, health, wall_ns
                )
                undo.callback(journal.close)
                sync_directory(folder, health)  # the names of files just made
            except OSError as error:
                raise StateError(f"cannot open: {error.strerror}", where=str(folder)) from error
            undo.pop_all()
        return cls(folder, blobs, journal, health, lock_fd)

    def compact(self, reach: Mapping[str, int] | None = None) -> int:
        """`Journal.compact`, then delete the blobs nobody names any more; returns the bytes of blobs freed.

        Call off the live path, from one thread at a time: appends wait while the journal is
            compacted.
        """
        return self.blobs.collect(self.journal.compact(reach))

    def close(self) -> None:
        """Close and unlock; after a failed sync the lock stays: only a new process may recover."""
        if self._lock_fd is None:
            return
        self.journal.close()
        _unlock(self._lock_fd, self.health)
        self._lock_fd = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _make(folder: Path, health: Health) -> None:
    """Create `folder` and its missing parents, each name durable."""
    if folder.is_dir():
        return
    if not folder.parent.is_dir():
        _make(folder.parent, health)
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        if not folder.is_dir():
            raise
    sync_directory(folder.parent, health)


def _unlock(lock_fd: int, health: Health) -> None:
    if not health.failed:
        os.close(lock_fd)


def _lock(folder: Path) -> int:
    fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        pid = os.read(fd, 32).decode("ascii", "replace").strip() or "unknown"
        os.close(fd)
        raise StateInUseError(
            f"in use by the process with pid {pid}",
            where=str(folder),
            remedy="stop that process, or use another state folder",
        ) from error
    with suppress(OSError):  # the lock holds without the note; a full disk must not prevent a start
        os.ftruncate(fd, 0)
        os.pwrite(fd, b"%d\n" % os.getpid(), 0)
    return fd
