"""Which blocks deltas keep editing, and which revision edited one last.

Whoever edits a model edits the same place again: a scale is tuned, a head is tried, an adapter
comes and goes. A region that holds such a block is dropped by every delta, and its other blocks
with it. So the planner is told of them, keeps them out of larger regions, and takes them in again
when they have been left alone for a while.
"""

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Set

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
        self._last: dict[str, int] = {}  # revision by block

    def note(self, revision: int, blocks: Set[str], gone: Set[str] = frozenset()) -> None:
        """The delta to `revision` changed what `blocks` compute, and took the others away.

        Costs a microsecond a block: it is on the live path.
        """
        with self._lock:
            if 0 < len(blocks) <= BLOCKS_NOTED_MAX:
                self._edits.append((self._now_s(), frozenset(blocks)))
            self._last.update(dict.fromkeys(blocks, revision))
            for block in gone:
                self._last.pop(block, None)

    def touched(self, blocks: Iterable[str]) -> int | None:
        """The last revision that changed any of these; None where none did in this process."""
        with self._lock:
            return max((self._last[block] for block in blocks if block in self._last), default=None)

    def restless(self) -> frozenset[str]:
        """The blocks that `RESTLESS_EDITS` deltas or more changed within the last `RESTLESS_S`."""
        since_s = self._now_s() - RESTLESS_S
        with self._lock:
            while self._edits and self._edits[0][0] < since_s:
                self._edits.popleft()
            recent = list(self._edits)
        counts = Counter(block for _, blocks in recent for block in blocks)
        return frozenset(block for block, count in counts.items() if count >= RESTLESS_EDITS)
