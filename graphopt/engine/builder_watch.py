"""The eye on one builder process: the share of the host that it gets, and what it takes too long for.

Bounds count time in which the builder did not wait for a core, so a job that starves is not taken for
one that hangs; real time may pass a bound by `PATIENCE`.
"""

from collections.abc import Callable

from graphopt.builder.pace import Pacer, apply_level, read_threads
from graphopt.engine.builder_jobs import BuilderSettings
from graphopt.engine.records import EventSink

TICK_S = 0.25  # between looks at a builder that works: a file read a thread, about 0.1 ms in all
PATIENCE = 10.0  # the share of a core that the floor leaves a builder is a tenth


class BuilderWatch:
    """Watches the process `pid`. One thread."""

    def __init__(
        self, pid: int, clock: Callable[[], float], settings: BuilderSettings, events: EventSink
    ) -> None:
        self._pid, self._clock = pid, clock
        self._settings, self._events = settings, events
        self._pacer: Pacer | None = None
        self._looked_s = float("-inf")
        self._marks: dict[str, tuple[float, float]] = {}  # what runs out -> active and real start
        self.share_pct: float | None = None
        self.is_starved = False
        self.mark("start")

    @property
    def policy(self) -> str | None:
        """How it is scheduled, once it has said so."""
        return self._pacer.policy if self._pacer else None

    def settle(self, policy: str) -> None:
        """The builder has said how it is scheduled."""
        self._pacer = Pacer(policy, self._settings.floor_pct)
        self._observe(None)

    def begin(self, *bounds: str) -> None:
        """From now on these run out, and no others."""
        self._marks.clear()
        for name in bounds:
            self.mark(name)

    def mark(self, name: str) -> None:
        """`start`, `job` or `silence` runs from now on."""
        self._marks[name] = (self._active_s(), self._clock())

    def first_share_pct(self) -> float | None:
        """What the process got of what it wanted while it started; ends the start's bound."""
        self.begin()
        self._observe(None)
        return self._pacer.base_share_pct if self._pacer else None

    def pause(self) -> None:
        """Nothing is at work."""
        if self._pacer is not None:
            self._pacer.pause()
        self.is_starved = False
        self.share_pct = None

    def look(self, job: int | None) -> str | None:
        """Paces the process, at most once a tick; the name of what has run out."""
        now_s = self._clock()
        if now_s - self._looked_s >= TICK_S:
            self._looked_s = now_s
            self._observe(job)
        for name, (from_active_s, from_real_s) in self._marks.items():
            bound_s: float = getattr(self._settings, f"{name}_s")
            is_over = self._active_s() - from_active_s > bound_s
            if is_over or self._clock() - from_real_s > PATIENCE * bound_s:
                return name
        return None

    def _active_s(self) -> float:
        return self._pacer.active_s if self._pacer else 0.0

    def _observe(self, job: int | None) -> None:
        if self._pacer is None:
            return
        before = self._pacer.level
        pace = self._pacer.observe(self._clock(), read_threads(self._pid))
        if pace is None:
            return
        is_lifted = pace.level > 0 or before > 0
        if is_lifted and not apply_level(self._pacer.policy, self._pid, pace.level):
            self._pacer.refused(pace.level)
        self.share_pct = pace.share_pct
        if pace.is_starved and not self.is_starved:
            fields = {
                "pid": self._pid, "job": job, "share_pct": round(pace.share_pct, 2),
                "floor_pct": self._settings.floor_pct,
            }  # fmt: skip
            self._events("builder.starved", fields)
        self.is_starved = pace.is_starved
