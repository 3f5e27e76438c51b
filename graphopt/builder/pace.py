"""How the builder is scheduled: behind everything else, but never left without a floor.

The base is SCHED_IDLE in the engine's own session: a wakeup of the server preempts it at once.
Against busy neighbours that can mean 0.3% of a core, so the engine watches from outside (a starved
process that holds its own GIL could not watch itself) how long the builder's threads ran and how
long they waited for a core (`/proc/PID/task/*/schedstat`). Below the floor they are lifted step by
step: to nice 10, 5 and 0, which beside one busy thread a core are worth about 10, 25 and 50 % of it. As
soon as they no longer wait they fall back.

Leaving SCHED_IDLE takes CAP_SYS_NICE or RLIMIT_NICE (`LimitNICE=+0` in a unit). Without it the
builder gets a session of its own where the kernel groups sessions (autogroup): there the group's
nice value, which needs no privilege, does the same. Without that too it stays at nice 10.

Deliberately absent: SIGSTOP duty cycles: stopped slices also stop the heartbeat, and the engine would
have to wake fifty times a second.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

IDLE, AUTOGROUP, NICE = "idle", "autogroup", "nice"
_LADDERS: Mapping[str, tuple[int, ...]] = {  # nice values; the first is the base
    IDLE: (19, 10, 5, 0),
    AUTOGROUP: (19, 10, 5, 0),
    NICE: (10,),
}
WAITING = 0.5  # of the time in a queue: below it, whoever runs little wants little
STARVING = 0.8  # of the floor: nice 10 beside one busy thread is worth 9.7%
CALM = 0.2  # of the time in a queue: above it somebody else wants the cores too
PATIENCE = 2  # observations in a row before a step up
RELIEF = 4  # observations in a row before a step down, or the end of a starved episode
_NICE_MOST = 19

Threads = Mapping[int, tuple[float, float]]
"""Seconds run and seconds waited for a core, by thread."""


@dataclass(frozen=True, slots=True)
class Pace:
    """What one observation says. `share_pct` of a core; `wanted_pct` counts the waiting in."""

    level: int
    share_pct: float
    wanted_pct: float
    is_starved: bool


class Pacer:
    """Decides the level of one builder process from what its threads got. Reads no clock."""

    def __init__(self, policy: str, floor_pct: float) -> None:
        self.policy = policy
        self.floor_pct = floor_pct
        self.level = 0
        self.top = len(_LADDERS[policy]) - 1
        self.active_s = 0.0  # passed without waiting for a core: what deadlines count
        self._base = [0.0, 0.0]  # seconds run and waited at the base level
        self._hungry = self._calm = self._fed = 0  # observations in a row
        self._is_starved = False
        self._last: tuple[float, Threads] | None = None

    @property
    def base_share_pct(self) -> float | None:
        """What it got of what it wanted at the base level; None before anything was observed."""
        ran, waited = self._base
        return 100 * ran / (ran + waited) if ran + waited else None

    def observe(self, now_s: float, threads: Threads) -> Pace | None:
        """The level to run at from now on; None for the first of a series and for no time passed."""
        last, self._last = self._last, (now_s, threads)
        if last is None or now_s <= last[0]:
            return None
        passed_s, before = now_s - last[0], last[1]
        ran = [_since(before, threads, tid, 0) for tid in threads]
        waits = [_since(before, threads, tid, 1) for tid in threads]
        ran_s, waited_s = sum(ran), min(passed_s, sum(waits))
        self.active_s += passed_s - min(passed_s, max(waits, default=0.0))
        share, waiting = ran_s / passed_s, waited_s / passed_s
        if self.level == 0:
            self._base[0] += ran_s
            self._base[1] += waited_s
        is_hungry = waiting > WAITING and share * 100 < STARVING * self.floor_pct
        is_sated = waiting < CALM or share * 100 > 2 * self.floor_pct
        self._hungry = self._hungry + 1 if is_hungry else 0
        self._calm = self._calm + 1 if is_sated else 0
        self._fed = 0 if is_hungry else self._fed + 1
        if self._hungry >= PATIENCE and self.level == self.top:
            self._is_starved = True
        elif self._fed >= RELIEF or self.level < self.top:
            self._is_starved = False
        if self._hungry >= PATIENCE and self.level < self.top:
            self.level, self._hungry = self.level + 1, 0
        elif self.level and waiting < CALM:
            self.level, self._is_starved = 0, False
        elif self.level and self._calm >= RELIEF:
            self.level, self._calm = self.level - 1, 0
        return Pace(self.level, 100 * share, 100 * (share + waiting), self._is_starved)

    def pause(self) -> None:
        """Ends a series: what passes until the next observation counts for nothing."""
        self._last = None
        self._hungry = self._calm = self._fed = 0
        self._is_starved = False

    def refused(self, level: int) -> None:
        """The host does not let the builder go to `level`: it and those above it are off."""
        self.top = max(0, level - 1)
        self.level = min(self.level, self.top)


def read_threads(pid: int) -> Threads:
    """The time of every thread of a process; empty when it is gone or the kernel does not tell."""
    found = {}
    for tid in _tids(pid):
        with suppress(OSError, ValueError):
            ran, waited, _ = Path(f"/proc/{pid}/task/{tid}/schedstat").read_text().split()
            found[tid] = (int(ran) / 1e9, int(waited) / 1e9)
    return found


def apply_level(policy: str, pid: int, level: int) -> bool:
    """Brings every thread of `pid` to `level`; False when the host refuses."""
    nice = _relative(_LADDERS[policy][level])
    try:
        if policy == AUTOGROUP:
            # Changes within 100 ms of another one are refused for now (EAGAIN): the next tick repeats it
            with suppress(BlockingIOError, FileNotFoundError):
                Path(f"/proc/{pid}/autogroup").write_text(str(nice))
        elif policy == IDLE:
            for tid in _tids(pid):
                with suppress(ProcessLookupError):
                    _place(tid, nice, is_idle=level == 0)
    except PermissionError:
        return False
    return True


def settle_down(candidates: Sequence[str] = (IDLE, AUTOGROUP)) -> str:
    """Puts this process, which has one thread still, behind everything else; returns the policy."""
    for policy in candidates:
        if policy == IDLE and _may_return():
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
            return IDLE
        if policy == AUTOGROUP and _is_grouped():
            os.setsid()
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
            apply_level(AUTOGROUP, os.getpid(), 0)
            return AUTOGROUP
    os.setpriority(os.PRIO_PROCESS, 0, _relative(_LADDERS[NICE][0]))
    return NICE


def _place(tid: int, nice: int, *, is_idle: bool) -> None:
    if is_idle:
        os.sched_setscheduler(tid, os.SCHED_IDLE, os.sched_param(0))
        return
    if os.getpriority(os.PRIO_PROCESS, tid) != nice:
        os.setpriority(os.PRIO_PROCESS, tid, nice)
    if os.sched_getscheduler(tid) != os.SCHED_OTHER:
        os.sched_setscheduler(tid, os.SCHED_OTHER, os.sched_param(0))


def _may_return() -> bool:
    """Whether a process of ours may leave SCHED_IDLE; tried out, because user namespaces lie."""
    pid = os.fork()
    if pid == 0:
        status = 1
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
            _place(0, _relative(_LADDERS[IDLE][1]), is_idle=False)
            status = 0
        os._exit(status)
    return os.waitpid(pid, 0)[1] == 0


def _is_grouped() -> bool:
    """Whether the kernel shares the cores among sessions here: autogroup on, and no cpu cgroup."""
    try:
        if Path("/proc/sys/kernel/sched_autogroup_enabled").read_text().strip() != "1":
            return False
        groups = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return False
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if "cpu" in controllers.split(",") and path != "/":
            return False
        if not controllers:
            folder = Path("/sys/fs/cgroup") / path.lstrip("/")
            if any((each / "cpu.weight").exists() for each in (folder, *folder.parents)):
                return False
    return os.getpid() != os.getpgid(0)  # setsid is refused to a group leader


def _relative(nice: int) -> int:
    """`nice` steps below the engine's own priority."""
    own = 0 if nice == _NICE_MOST else max(0, os.getpriority(os.PRIO_PROCESS, os.getpid()))
    return min(_NICE_MOST, own + nice)


def _since(before: Threads, after: Threads, tid: int, which: int) -> float:
    return max(0.0, after[tid][which] - before.get(tid, (0.0, 0.0))[which])


def _tids(pid: int) -> list[int]:
    with suppress(OSError):
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    return []
