"""A second account of the journal's head, so that a lost tail is noticed.

SQLite drops the end of a write-ahead log whose checksums are wrong: right after a crash, when that
end was never acknowledged, and silently wrong when the cause is bit rot. The hash chain cannot tell
either, because a shorter chain is a good chain. So after each commit the head is written to a file
of its own, without a sync: it is never ahead of what was durable, and a journal that ends before it
has lost acknowledged rows. The file survives a killed process; after a power loss it may be old,
which only makes it say less. A damaged one says nothing.
"""

import hashlib
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_BYTES = 20 + 1 + 64 + 1 + 64 + 1


@dataclass(frozen=True, slots=True)
class Head:
    """The youngest row: its sequence number and its sha in hex."""

    seq: int
    sha: str


class Witness:
    """The file beside the journal that names its head."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)

    def read(self) -> Head | None:
        """The head last written, or None when the file is empty or damaged."""
        line = os.pread(self._fd, _BYTES + 1, 0)
        with suppress(ValueError):
            seq, sha, _check = line.decode("ascii").split()
            head = Head(int(seq), sha)
            return head if line == _line(head) else None
        return None

    def write(self, head: Head) -> None:
        """Note a durable head. A failure is ignored: an older witness is weaker, not wrong."""
        with suppress(OSError):
            os.pwrite(self._fd, _line(head), 0)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def _line(head: Head) -> bytes:
    text = b"%020d %s" % (head.seq, head.sha.encode())
    return b"%s %s\n" % (text, hashlib.sha256(text).hexdigest().encode())
