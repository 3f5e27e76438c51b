"""Which blocks deltas keep editing.

Whoever edits a model edits the same place again: a scale is tuned, a head is tried, an adapter
comes and goes. A region that holds such a block is dropped by every delta, and its other blocks
with it. So the planner is told of them, keeps them out of larger regions, and takes them in again
when they have been left alone for a while.
"""

import threading
from collections import Counter, deque
from collections.abc import Callable, Set

RESTLESS_EDITS = 3  # the second edit of a block may be the correction of the first
RESTLESS_S = 60.0  # a few times what building and trying a plan takes
BLOCKS_NOTED_MAX = 64  # a delta that changes more is no edit of a place
DELTAS_NOTED_MAX = 1024


class Churn:
    """The recent edits of one model. Any thread may call it."""

    def __init__(self, monotonic_s: Callable[[], float]) -> None:
        self._now_s = monotonic_s
        self._lock = threading.Lock()
        self._edits: deque[tuple[float, frozenset[str]]] = deque(maxlen=DELTAS_NOTED_MAX)

    def note(self, blocks: Set[str]) -> None:
        """A delta changed what `blocks` compute. Costs a microsecond: it is on the live path."""
        if 0 < len(blocks) <= BLOCKS_NOTED_MAX:
            with self._lock:
                self._edits.append((self._now_s(), frozenset(blocks)))

    def restless(self) -> frozenset[str]:
        """The blocks that `RESTLESS_EDITS` deltas or more changed within the last `RESTLESS_S`."""
        since_s = self._now_s() - RESTLESS_S
        with self._lock:
            while self._edits and self._edits[0][0] < since_s:
                self._edits.popleft()
            recent = list(self._edits)
        counts = Counter(block for _, blocks in recent for block in blocks)
        return frozenset(block for block, count in counts.items() if count >= RESTLESS_EDITS)
