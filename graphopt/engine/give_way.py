"""Giving way: a delta does its work in short stretches while quick requests run.

Only one thread runs Python at a time. A request of many short kernels asks for its turn again after
each of them, and gets it when the delta beside it sleeps, not before: the request takes as long as the
delta. So after `WORK_S` of work the delta sleeps for `PAUSE_S`, which is a request or a good part of
one. Nothing is lost where nobody is served, or where requests are long and ask for a turn rarely.

A thread that wakes may be given the core of a request although another is free: with a third of two cores
idle, a client was interrupted 200 times a second. So from its first sleep on the delta's thread is a
batch thread to the kernel (`SCHED_BATCH` in sched(7)): it has the same share and interrupts nobody.

Measured with `python -m benchmarks.swap_storm`; the figures are in `benchmarks/README.md`.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from weakref import WeakKeyDictionary

from graphopt.executor.publish import Slot

WORK_S = 150e-6  # a stretch: what a request that comes in between waits for
PAUSE_S = (
    500e-6  # a quick request, or a good part of one; shorter ones are mostly spent on waking up
)
PAUSES_MOST_S = 10e-3  # of one delta: it has to be live some time
QUICK_S = 5e-3  # a longer request does not feel the stretches that it waits for

Between = Callable[[], None]
"""Called between two pieces of work, as often as one likes: 0.1 us."""


def go_on() -> None:
    """Gives way to nobody."""


def alone() -> AbstractContextManager[Between]:
    """A delta that gives way to nobody."""
    return nullcontext(go_on)


class GiveWay:
    """What one writer has noticed of the requests beside it."""

    def __init__(
        self,
        slots: Callable[[], Iterable[Slot]],
        monotonic_s: Callable[[], float],
        pause: Callable[[float], None],
    ) -> None:
        """`slots` are those of every live model of the process; `pause` sleeps for seconds."""
        self._slots = slots
        self._now_s = monotonic_s
        self._pause = pause
        self._seen: WeakKeyDictionary[Slot, object] = WeakKeyDictionary()
        self._took_s: WeakKeyDictionary[Slot, float] = WeakKeyDictionary()

    @contextmanager
    def start(self) -> Iterator[Between]:
        """One delta of this thread; yields what is to be called between the pieces of its work."""
        left_s, since_s, is_batch = PAUSES_MOST_S, self._now_s(), False

        def between() -> None:
            nonlocal left_s, since_s, is_batch
            now_s = self._now_s()
            if now_s - since_s < WORK_S or left_s <= 0.0:
                return
            if self._are_quick_requests():
                is_batch = is_batch or _set_policy(os.SCHED_OTHER, os.SCHED_BATCH)
                self._pause(PAUSE_S)
                before_s, now_s = now_s, self._now_s()
                left_s -= now_s - before_s
            since_s = now_s

        try:
            yield between
        finally:
            if is_batch:
                _set_policy(os.SCHED_BATCH, os.SCHED_OTHER)

    def _are_quick_requests(self) -> bool:
        """Whether a quick request runs, or was answered since this was asked last."""
        found = False
        for slot in self._slots():
            newest = slot.latencies.newest()
            is_new = newest is not None and newest is not self._seen.get(slot)
            if newest is not None:
                self._seen[slot] = newest
                self._took_s[slot] = newest[2]
            is_quick = self._took_s.get(slot, 0.0) < QUICK_S
            found |= is_quick and (is_new or slot.is_busy())
        return found


def _set_policy(old: int, new: int) -> bool:
    """Has this thread scheduled by `new` if `old` is how it is now; whether it was done."""
    with suppress(OSError):  # a sandbox may refuse it
        if os.sched_getscheduler(0) == old:
            os.sched_setscheduler(0, new, os.sched_param(0))
            return True
    return False
