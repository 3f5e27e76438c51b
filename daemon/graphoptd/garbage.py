"""Garbage collection by appointment: when nobody waits, or when it must be.

CPython collects whenever enough containers were allocated, in the middle of a request, for up to a
hundred milliseconds once torch is loaded. So what start-up made is frozen (never looked at again),
the collector is off, and the service calls `tick` when it has time. With the collector off CPython
still counts container allocations less deallocations, so growth is known for free. Reference
counting frees nearly everything; what is left are cycles, in exceptions and closures mostly.
"""

import gc

IDLE_GROWTH_MIN = 2_000  # containers; collecting so many young ones takes about 0.2 ms
BUSY_GROWTH_MAX = 100_000  # about 10 MB of cycles at worst, then requests wait some 5 ms for it
FULL_EVERY = 50  # collections of the young, all in idle moments, to one of everything not frozen


class Garbage:
    """The process's garbage; one instance a process."""

    def __init__(self) -> None:
        self._since_full = 0

    def begin(self) -> None:
        """Call once everything is loaded and warm."""
        gc.disable()
        gc.freeze()

    def tick(self, is_idle: bool) -> bool:
        """Collect if it is worth it or overdue; whether it did."""
        growth = gc.get_count()[0]
        if growth < (IDLE_GROWTH_MIN if is_idle else BUSY_GROWTH_MAX):
            return False
        is_full = is_idle and self._since_full >= FULL_EVERY
        gc.collect(2 if is_full else 0)
        self._since_full = 0 if is_full else self._since_full + 1
        return True
