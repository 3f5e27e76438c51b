"""Which runs are so quick that the event loop does them itself.

To hand a run to an executor thread and its result back costs about 60 us of CPU, most of it in the
kernel and in passing the GIL. A run that takes less than a few times that is cheaper done on the
event loop; a longer one would hold up everybody else. So a run has to earn it:

    unknown -one window of runs on executor threads, all quick-> inline
    inline -one run holds the loop too long or was another plan's, or the usual run is no longer
            quick-> resting
    resting -a number of windows on executor threads, twice as many each time-> as unknown

Each shape of the inputs has its own record, and a new plan starts with none. While a plan is on
trial, some requests are dealt to it unseen; the first of them that comes up here ends the spell, so a
plan on trial runs on executor threads but for one request now and then. On an executor thread a
run's wall time includes waiting for the GIL, which it would not do on the loop, and its CPU time
leaves out what other threads or devices do for it. The window's median CPU time or its least wall
time, whichever is longer, is the estimate of what it would take on the loop; once it runs there, wall
time says it.

Times are passed in; there is no clock here, and dwells are counted in runs.
"""

from collections.abc import Hashable
from math import inf
from statistics import median

# How long one run may hold the loop, as law 4 and the codec thread's thresholds have it: what a
# request on another connection can lose.
HELD_NS_MAX = 1_000_000
# The usual run of a model that may run here while no other request is under way. Above it, the two
# hand-overs are less than a third of the run, and the loop would answer nothing else meanwhile.
ALONE_NS_MAX = 200_000
# The same while other requests are under way, which may form a batch or run beside it. A batch shares
# its hand-overs and its run, but joining and splitting it costs each member time on the loop: with
# eight connections, runs of 10 to 20 us cost 100 us a request here and 129 in batches (medians of
# interleaved rounds), so that a run of about 40 us has nothing to gain.
AMONG_NS_MAX = 40_000

WINDOW_RUNS = 16  # judged together: enough for a median that one disturbed run does not move
_REST_WINDOWS_MIN = 4
# 4096 runs: then fewer than one run in four thousand holds the loop too long.
_REST_WINDOWS_MAX = 256
_SHAPES_MAX = 256  # records of one plan; a client that sends ever new shapes gains nothing by it


class _Record:
    """What is known of one shape.

    Attributes:
        usual_ns: estimate of what a run takes on the loop; infinite when it may not run there.
    """

    __slots__ = ("_least_wall_ns", "_next_rest", "_rest", "_served", "_times_ns", "usual_ns")

    def __init__(self) -> None:
        self.usual_ns = inf
        self._times_ns: list[int] = []
        self._least_wall_ns = inf
        self._rest = 0  # windows to go on executor threads
        self._next_rest = _REST_WINDOWS_MIN
        self._served = 0  # windows on the loop since the last rest

    def add_elsewhere(self, cpu_ns: int, wall_ns: int) -> None:
        if self.usual_ns < inf:
            return  # the loop knows better
        times_ns = self._times_ns
        times_ns.append(cpu_ns)
        self._least_wall_ns = min(self._least_wall_ns, wall_ns)
        if len(times_ns) < WINDOW_RUNS:
            return
        usual_ns = max(median(times_ns), self._least_wall_ns)
        is_quick = usual_ns <= ALONE_NS_MAX and max(times_ns) <= HELD_NS_MAX
        self._begin_window()
        if self._rest:
            self._rest -= 1
        else:
            self.usual_ns = usual_ns if is_quick else inf

    def add_here(self, wall_ns: int) -> None:
        times_ns = self._times_ns
        times_ns.append(wall_ns)
        if wall_ns > HELD_NS_MAX:
            self.retire()
        elif len(times_ns) >= WINDOW_RUNS:
            self.usual_ns = median(times_ns)
            self._begin_window()
            self._served += 1
            if self.usual_ns > ALONE_NS_MAX:
                self.retire()
            elif self._served >= self._next_rest:
                self._next_rest = _REST_WINDOWS_MIN

    def retire(self) -> None:
        self.usual_ns = inf
        self._rest = self._next_rest
        self._next_rest = min(2 * self._next_rest, _REST_WINDOWS_MAX)
        self._served = 0
        self._begin_window()

    def _begin_window(self) -> None:
        self._times_ns.clear()
        self._least_wall_ns = inf


class InlineGate:
    """The records of one model's current plan."""

    __slots__ = ("_plan_id", "_records")

    def __init__(self) -> None:
        self._plan_id = ""
        self._records: dict[Hashable, _Record] = {}

    def admits(self, plan_id: str, shape: Hashable, alone: bool) -> bool:
        """Whether a run of `shape` on `plan_id`, the current plan, should be done on the loop.

        Args:
            plan_id: the published plan. Another one than at the last call clears all records.
            shape: of the inputs; anything that is equal where their shapes are.
            alone: no other request is under way.
        """
        if plan_id != self._plan_id:
            self._plan_id = plan_id
            self._records.clear()
            return False
        record = self._records.get(shape)
        return record is not None and record.usual_ns <= (ALONE_NS_MAX if alone else AMONG_NS_MAX)

    def add_elsewhere(self, plan_id: str, shape: Hashable, cpu_ns: int, wall_ns: int) -> None:
        """A run on an executor thread took so long, waiting for the thread left out."""
        if plan_id != self._plan_id:
            return  # of a plan that was replaced meanwhile, or that `admits` has not seen yet
        record = self._records.get(shape)
        if record is None:
            if len(self._records) >= _SHAPES_MAX:
                self._records.clear()
            record = self._records[shape] = _Record()
        record.add_elsewhere(cpu_ns, wall_ns)

    def add_here(self, shape: Hashable, wall_ns: int, plan_id: str | None = None) -> None:
        """A run that `admits` let through held the loop so long.

        Args:
            shape: as `admits` had it.
            wall_ns: from start to end.
            plan_id: what ran; None when it failed and does not say.
        """
        record = self._records[shape]
        if plan_id is None or plan_id == self._plan_id:
            record.add_here(wall_ns)
        else:
            record.retire()
