"""Which queued calls may run now, where models share the CPUs unequally.

    enter -> parked, while its share has as many calls under way as it may
          -> in line, first come, first served -> started

A call takes as many CPUs as its share has threads inside one call, and the calls that run never take
more than there are. Who has waited longest for CPUs gets the next ones whatever he needs: wide calls
would else wait for ever beside narrow ones. Who is parked waits for his own share and stands in
nobody's way.
"""

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Share:
    """The part of the CPUs that the calls of one model have.

    Attributes:
        workers: calls that run at once at most.
        each: threads inside each of them.
    """

    __slots__ = ("each", "parked", "under_way", "workers")

    def __init__(self, workers: int, each: int) -> None:
        self.workers = workers
        self.each = each
        # Both guarded by the lock of the admission that the calls enter:
        self.under_way = 0  # in line or running
        self.parked: deque[Any] = deque()


class Admission(Generic[T]):
    """The line for `cpus` CPUs; `start` is handed each call when it may run, and must not block."""

    def __init__(self, cpus: int, start: Callable[[T], None]) -> None:
        self._cpus = cpus
        self._free = cpus
        self._start = start
        self._line: deque[tuple[Share, T]] = deque()
        self._n_waiting = 0  # in line or parked
        self._changed = threading.Condition(threading.Lock())

    def enter(self, share: Share, call: T) -> None:
        """Starts `call` now, or when its share and the CPUs have room."""
        with self._changed:
            self._n_waiting += 1
            if share.under_way >= share.workers:
                share.parked.append(call)
                return
            share.under_way += 1
            self._line.append((share, call))
            self._start_those_that_fit()

    def leave(self, share: Share) -> None:
        """A call of `share` that was started is over."""
        with self._changed:
            self._free += self._need(share)
            if share.parked:
                self._line.append((share, share.parked.popleft()))
            else:
                share.under_way -= 1
            self._start_those_that_fit()

    def wait_started(self) -> None:
        """Returns when every call that entered was started."""
        with self._changed:
            self._changed.wait_for(lambda: self._n_waiting == 0)

    def _start_those_that_fit(self) -> None:
        while self._line and self._need(self._line[0][0]) <= self._free:
            share, call = self._line.popleft()
            self._free -= self._need(share)
            self._n_waiting -= 1
            self._start(call)
        if not self._n_waiting:
            self._changed.notify_all()

    def _need(self, share: Share) -> int:
        return min(share.each, self._cpus)  # with more than there are it would wait for ever
