"""Whether the host is itself: nobody waits for a processor, and a fixed piece of work takes as long as ever.

A neighbour in this system shows in the time that threads are ready and not run. One that shares a core
or the memory bus from outside, as on most rented hosts, shows only in that the same arithmetic and the
same copy take longer; bursts of half a second at half the speed were seen. Deliberately absent: what to
do about it.
"""

import time
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

WAITED_MAX = 0.03  # of a stretch: beyond that somebody else had the processor
SLOWER_MAX = 1.12  # times the quickest so far; repeats on an idle host lie within 1.05
TRIES = 3  # of each piece of work; the quickest counts
PAUSE_S = 0.02  # until a host that is not calm is looked at again

_TEXT = bytes(range(256)) * 128  # 32 KiB: 40 us of arithmetic in the first cache
_BLOCK = bytes(1 << 20)  # 1 MiB: copied through the second


class Calm:
    """Looks at the host; for one thread. `patience_s` is what all waiting together may take."""

    def __init__(self, patience_s: float) -> None:
        self.patience_s = patience_s
        self._quickest = [float("inf"), float("inf")]

    def wait(self) -> bool:
        """Waits until the host is calm; False when it is not and there is no patience left."""
        while not self.is_calm():
            if self.patience_s <= 0:
                return False
            time.sleep(PAUSE_S)
            self.patience_s -= PAUSE_S
        return True

    def is_calm(self) -> bool:
        """Whether arithmetic and copying take about as long as they ever did. Some 0.3 ms."""
        took = [_quickest(_arithmetic), _quickest(_copy)]
        self._quickest = [min(pair) for pair in zip(self._quickest, took, strict=True)]
        return all(now <= SLOWER_MAX * ever for now, ever in zip(took, self._quickest, strict=True))


def waited_s() -> float:
    """Seconds that the threads of this process were ready and had no processor; 0 where the kernel
    does not count that (Linux does: the second figure of schedstat).
    """
    total_ns = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError, ValueError, IndexError):
            total_ns += int(path.read_text().split()[1])
    return total_ns * 1e-9


def _arithmetic() -> object:
    return blake2b(_TEXT).digest()


def _copy() -> object:
    return bytearray(_BLOCK)


def _quickest(work: object) -> float:
    assert callable(work)
    best = float("inf")
    for _ in range(TRIES):
        begun = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - begun)
    return best
