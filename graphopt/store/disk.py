"""What durability rests on: complete writes, syncs believed only once, and the state after one failed.

Linux marks pages clean after a failed sync, so a second `fsync` that succeeds proves nothing
(Rebello et al., USENIX ATC 2020, found no widely used store fully safe here). One failed sync
therefore ends the life of the store in this
process: `Health` remembers the reason and every later write is refused. A write that found no space
is different: nothing was claimed, nothing was kept, and it may be tried again.

Absent on purpose: retries, and any way back from the failed state but a new process.
"""

import errno
import os
from pathlib import Path

from graphopt.errors import StateError, StateFailedError, StateFullError

# EFBIG is RLIMIT_FSIZE and the file systems' own file limit; EDQUOT a quota. All three pass when
# room is made.
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class Health:
    """Whether a state folder may still acknowledge writes; shared by its journal and its blobs."""

    def __init__(self, where: Path) -> None:
        self._where = where
        self.reason = ""

    @property
    def failed(self) -> bool:
        """True from the first failed sync or commit until the process ends."""
        return bool(self.reason)

    def fail(self, reason: str) -> StateFailedError:
        """Enter the failed state and return the error to raise; the first reason is kept."""
        self.reason = self.reason or reason
        return self._error()

    def check(self) -> None:
        """Raise `StateFailedError` in the failed state."""
        if self.reason:
            raise self._error()

    def _error(self) -> StateFailedError:
        return StateFailedError(
            f"the store takes no more writes: {self.reason}",
            where=str(self._where),
            remedy="end this process, see to the disk, and start again: what was acknowledged is there",
        )


def sync(fd: int, where: Path, health: Health) -> None:
    """Make `fd` durable, or enter the failed state and raise `StateFailedError`."""
    try:
        os.fsync(fd)
    except OSError as error:
        raise health.fail(f"fsync of {where} failed: {error.strerror}") from error


def sync_directory(path: Path, health: Health) -> None:
    """Make the names in `path` durable, or enter the failed state and raise `StateFailedError`."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        sync(fd, path, health)
    finally:
        os.close(fd)


def write_all(fd: int, data: memoryview) -> None:
    """Write every byte of `data` (one byte an element); a short write is carried on.

    A full tmpfs was seen to take part of a buffer without an error, so the count must be looked at.
    """
    while data:
        data = data[os.write(fd, data) :]


def refusal(error: OSError, where: Path) -> StateError:
    """The typed error of a write that did not happen: `StateFullError` when space ran out."""
    if error.errno in _NO_SPACE:
        return StateFullError(
            f"no space: {error.strerror}", where=str(where), remedy="free space and try again"
        )
    return StateError(f"cannot write: {error.strerror}", where=str(where), remedy="see to the disk")
