"""Freed memory on its way back to the system: when glibc is told to look for it.

Runtimes leave holes of their weights' size in the heap, which the next artifact of that size fills
again. `malloc_trim` returns them, but holds the lock of one arena after the other meanwhile: a request
whose thread allocates from it waits, up to 25 ms here. So it is called while no request runs, and where
requests never end only for large holes and seldom.
"""

import ctypes
from collections.abc import Callable

# Bytes that may stay while requests run: about what a few deltas' layers weigh
HOLES_MAX = 64 << 20
EVERY_S = 30.0  # between two calls that requests may notice


class Heap:
    """The holes of one process. Called on one thread."""

    def __init__(
        self, monotonic_s: Callable[[], float], trim: Callable[[int], object] | None = None
    ) -> None:
        """`trim`: in the place of the C library's `malloc_trim`, which not every one has."""
        self._now_s = monotonic_s
        self._trim = trim or getattr(ctypes.CDLL(None), "malloc_trim", None)
        self._noticed_s = -EVERY_S  # when a call was last made beside requests
        self.holes = 0

    def freed(self, n_bytes: int) -> None:
        """So much was let go of since."""
        self.holes += n_bytes

    def give_back(self, *, is_quiet: bool) -> bool:
        """Returns the holes to the system, if it is time. `is_quiet`: no request runs."""
        if not self.holes or self._trim is None:
            return False
        if not is_quiet:
            now_s = self._now_s()
            if self.holes < HOLES_MAX or now_s - self._noticed_s < EVERY_S:
                return False
            self._noticed_s = now_s
        self.holes = 0
        self._trim(0)  # the GIL is free meanwhile
        return True
