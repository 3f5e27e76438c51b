"""Seats: how many callers run at once, without letting any of them wait while others pass by.

A free seat goes to whoever asks next, which is quickest while seats are plenty. A caller who has
waited for `STARVED_S` gets the next one handed over, in the order of arrival: an ordinary semaphore
lets the thread that just gave its seat back take it again, and others wait for seconds (the two
modes of Go's `sync.Mutex`, issue 13086 of that language).
"""

import threading
from collections import deque
from collections.abc import Callable

STARVED_S = 1e-3  # as in Go: well above a switch of threads, well below what a client notices


class _Waiter:
    """One caller without a seat; what is not `wake` is guarded by the lock of the seats."""

    __slots__ = ("has_seat", "is_told", "since_s", "wake")

    def __init__(self, since_s: float) -> None:
        self.since_s = since_s
        self.has_seat = False
        self.is_told = False
        self.wake = threading.Lock()
        self.wake.acquire()


class Seats:
    """`count` seats. Any thread takes one with `take` and gives it back with `give`, 0.1 us each
    while one is free.
    """

    __slots__ = ("_free", "_lock", "_now_s", "_waiting")

    def __init__(self, count: int, monotonic_s: Callable[[], float]) -> None:
        self._free: deque[None] = deque([None] * count)
        self._waiting: deque[_Waiter] = deque()
        self._lock = threading.Lock()
        self._now_s = monotonic_s

    @property
    def free(self) -> int:
        """Seats that nobody has."""
        return len(self._free)

    @property
    def waiting(self) -> int:
        """Callers without a seat."""
        return len(self._waiting)

    def take(self) -> None:
        """Returns when the caller has a seat."""
        try:
            self._free.pop()  # atomic, as `append` and the length of a deque are
        except IndexError:
            self._wait()

    def give(self) -> None:
        """Gives a seat back."""
        if not self._waiting:
            self._free.append(None)
            # Who found no seat a moment ago enters himself before he looks again, so either he has
            # seen this one or he is seen here.
            if not self._waiting:
                return
            try:
                self._free.pop()
            except IndexError:  # somebody has it, and will look for those who wait when he is done
                return
        with self._lock:
            self._hand_on()

    def _wait(self) -> None:
        waiter = _Waiter(self._now_s())
        with self._lock:
            self._waiting.append(waiter)
            if self._sits_down(waiter):
                return
        try:
            while True:
                waiter.wake.acquire()
                with self._lock:
                    waiter.is_told = False
                    if waiter.has_seat or self._sits_down(waiter):
                        return
        except BaseException:  # as KeyboardInterrupt, while it waits
            with self._lock:
                if waiter.has_seat:
                    self._hand_on()
                else:
                    self._waiting.remove(waiter)
                    self._tell_first()
            raise

    def _sits_down(self, waiter: _Waiter) -> bool:
        try:
            self._free.pop()
        except IndexError:
            return False
        self._waiting.remove(waiter)
        self._tell_first()  # there may be more seats than callers were told of
        return True

    def _hand_on(self) -> None:
        """Passes the seat of this caller to the first who waits, or frees it for whoever is quicker."""
        first = self._waiting[0] if self._waiting else None
        if first is not None and self._now_s() - first.since_s >= STARVED_S:
            self._waiting.popleft()
            first.has_seat = True
            if not first.is_told:
                first.wake.release()
            return
        self._free.append(None)
        self._tell_first()

    def _tell_first(self) -> None:
        if self._free and self._waiting and not self._waiting[0].is_told:
            self._waiting[0].is_told = True
            self._waiting[0].wake.release()
