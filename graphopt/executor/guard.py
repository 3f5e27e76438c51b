"""Has the published plan become slower than it was proven to be?

A one-sided CUSUM for each shape bucket (Page, "Continuous inspection schemes", 1954) on the logarithm
of latency over baseline. Scores are divided by the baseline's own robust spread and clipped on both
sides, so that one request that met a page fault says little and a noisy host must show a longer shift
than a quiet one. A mean shift of less than 10% is not looked for.

An alarm is a suspicion: a neighbour that slows this host slows every plan. What follows is a short
trial of the last good plan against the suspect, and only its verdict takes a plan back (`switch`).

Latencies and times come as arguments; nothing here reads a clock.
"""

import math
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

from graphopt.executor.latency import TICK_S, Bucket, Statistics, describe

SHIFT_MIN = 0.10  # relative: the least slow-down worth an alarm; it bounds the spread from below
ALLOWANCE = 0.5  # Page's reference value in spreads: half the shift of one spread looked for
THRESHOLD = 10.0  # in spreads; normal noise passes it once in about 10^5 requests (Siegmund 1985)
CLIP = 4.0  # in spreads; 2x on a quiet host is then an alarm after three requests, not one
BASELINE_MIN = 8  # requests a baseline must rest on
BUCKETS_MAX = 64  # watched for one plan; others run unwatched


@dataclass(frozen=True, slots=True)
class Baseline:
    """What a bucket's requests should take: median in seconds and relative spread."""

    median_s: float
    log_spread: float


@dataclass(frozen=True, slots=True)
class Alarm:
    """A bucket whose requests take longer than its baseline. `ratio` is of medians since the score
    left zero.
    """

    plan: str
    bucket: Bucket
    baseline_s: float
    observed_s: float
    ratio: float
    requests: int


def baseline_of(statistics: Statistics, ratio: float = 1.0) -> Baseline | None:
    """The baseline that `statistics` of a plan give another one that takes `ratio` of its time.

    None when they rest on too few requests.
    """
    if statistics.kept < BASELINE_MIN:
        return None
    return Baseline(statistics.median_s * ratio, statistics.log_spread)


class _Watch:
    __slots__ = ("baseline", "recent", "score")

    def __init__(self, baseline: Baseline) -> None:
        self.baseline = baseline
        self.score = 0.0
        self.recent: list[float] = []  # since the score left zero


class Guard:
    """Watches one published plan.

    A bucket without a baseline takes its first requests for one, and is named as a newcomer: whether
    they were slow already, only a comparison tells.
    """

    def __init__(self, plan: str, baselines: Mapping[Bucket, Baseline]) -> None:
        self.plan = plan
        self.requests = 0
        self._watches = {bucket: _Watch(known) for bucket, known in baselines.items()}
        self._learning: dict[Bucket, list[float]] = {}
        self._newcomers: list[Bucket] = []

    def observe(self, bucket: Bucket, latency_s: float) -> Alarm | None:
        """Takes one request of the plan; an alarm when the bucket has become too slow."""
        self.requests += 1
        watch = self._watches.get(bucket)
        if watch is None:
            self._learn(bucket, latency_s)
            return None
        baseline = watch.baseline
        spread = max(baseline.log_spread, math.log1p(SHIFT_MIN))
        shift = math.log(max(latency_s, TICK_S) / max(baseline.median_s, TICK_S)) / spread
        watch.score += max(-CLIP, min(shift, CLIP)) - ALLOWANCE
        if watch.score <= 0.0:
            watch.score = 0.0
            watch.recent.clear()
            return None
        watch.recent.append(latency_s)
        if watch.score <= THRESHOLD:
            return None
        observed = describe(watch.recent)
        self.rearm()
        return Alarm(
            self.plan,
            bucket,
            baseline.median_s,
            observed.median_s,
            observed.median_s / max(baseline.median_s, TICK_S),
            observed.kept,
        )

    def rearm(self) -> None:
        """Sets every score to zero."""
        for watch in self._watches.values():
            watch.score = 0.0
            watch.recent.clear()

    def rebase(self, baselines: Mapping[Bucket, Baseline]) -> None:
        """New baselines, as when a trial found that the host became slower and not the plan."""
        for bucket, baseline in baselines.items():
            self._watches[bucket] = _Watch(baseline)
        self.rearm()

    def _learn(self, bucket: Bucket, latency_s: float) -> None:
        """Without anything to compare with, only a later change can be seen."""
        if len(self._watches) + len(self._learning) >= BUCKETS_MAX and bucket not in self._learning:
            return
        seen = self._learning.setdefault(bucket, [])
        seen.append(latency_s)
        if len(seen) >= BASELINE_MIN:
            found = baseline_of(describe(self._learning.pop(bucket)))
            assert found is not None
            self._watches[bucket] = _Watch(found)
            self._newcomers.append(bucket)

    def take_newcomer(self) -> Bucket | None:
        """A shape that the plan has served for a while and never was compared in; each once."""
        return self._newcomers.pop(0) if self._newcomers else None


# -- against flapping

DWELL_S = 10.0  # a plan stays at least that long before another may replace it for speed
BACKOFF_S = 60.0  # after a first failure on performance; doubles with each further one
BACKOFF_MAX_S = 24 * 3600.0
KEYS_MAX = 1_024  # candidates remembered, the least recently used given up first
REVERSAL_S = 600.0  # a switch undone within that time was wrong, and gamma doubles
GAMMA_MAX = 64.0
CALM_S = 3600.0  # without a reversal, after which gamma is halved again


@dataclass(slots=True)
class _Record:
    failures: int = 0
    not_before_s: float = -math.inf
    regret_s: float = 0.0


class Hysteresis:
    """When a candidate may be tried or take over, so that plans do not flap.

    *Regret* is the time that requests would have saved on a candidate; once it exceeds `gamma` times
    what the switch costs, the switch is due: the ski-rental rule, 2-competitive for one switch, and 3
    for a metrical task system of two states (Borodin, Linial and Saks, 1992). *Dwell* is the least
    time between two switches. *Back-off* keeps a candidate that failed on performance away, doubling
    up to a day. All times come as `now_s`, from one monotonic clock.
    """

    def __init__(self, dwell_s: float = DWELL_S, backoff_s: float = BACKOFF_S) -> None:
        self.gamma = 1.0
        self._dwell_s = dwell_s
        self._backoff_s = backoff_s
        self._records: OrderedDict[Hashable, _Record] = OrderedDict()
        self._switched_s = -math.inf
        self._gamma_s = -math.inf  # when gamma last changed

    def accrue(self, key: Hashable, saved_s: float) -> float:
        """Adds what requests would have saved on the candidate (negative: lost); returns its regret."""
        record = self._record(key)
        record.regret_s = max(0.0, record.regret_s + saved_s)
        return record.regret_s

    def is_due(self, key: Hashable, cost_s: float) -> bool:
        """Whether the regret for a candidate has outgrown a switch that costs `cost_s`."""
        return self._record(key).regret_s > self.gamma * cost_s

    def why_not(self, key: Hashable, now_s: float, *, dwells: bool = True) -> str:
        """Why the candidate may not be tried or published now; empty when it may.

        `dwells`: whether what is published has to stay its time.
        """
        self._calm(now_s)
        record = self._records.get(key)
        if record is not None and now_s < record.not_before_s:
            wait_s = record.not_before_s - now_s
            return f"failed on performance {record.failures} times, not again for {wait_s:.0f} s"
        if dwells and now_s < self._switched_s + self._dwell_s:
            return (
                f"the plan changed {now_s - self._switched_s:.1f} s ago, it stays {self._dwell_s} s"
            )
        return ""

    def is_away(self, key: Hashable, now_s: float) -> bool:
        """Whether the candidate is in its back-off."""
        record = self._records.get(key)
        return record is not None and now_s < record.not_before_s

    def switched(self, now_s: float) -> None:
        """Another plan was published for its speed: all regret starts over."""
        self._switched_s = now_s
        for record in self._records.values():
            record.regret_s = 0.0

    def failed(self, key: Hashable, now_s: float) -> float:
        """The candidate was no gain, or was taken back; returns for how long it is kept away, seconds."""
        record = self._record(key)
        delay_s = min(self._backoff_s * 2.0**record.failures, BACKOFF_MAX_S)
        record.failures = min(record.failures + 1, 64)
        record.not_before_s = now_s + delay_s
        record.regret_s = 0.0
        return delay_s

    def reversed(self, key: Hashable, now_s: float) -> float:
        """The candidate had been published and was taken back; returns as `failed`."""
        if now_s - self._switched_s < REVERSAL_S:
            self.gamma = min(2.0 * self.gamma, GAMMA_MAX)
            self._gamma_s = now_s
        self._switched_s = now_s
        return self.failed(key, now_s)

    def succeeded(self, key: Hashable) -> None:
        """The candidate proved good under watch: its failures are forgotten."""
        self._records.pop(key, None)

    def _calm(self, now_s: float) -> None:
        while self.gamma > 1.0 and now_s - self._gamma_s >= CALM_S:
            self.gamma = max(1.0, 0.5 * self.gamma)
            self._gamma_s += CALM_S

    def _record(self, key: Hashable) -> _Record:
        record = self._records.get(key)
        if record is None:
            record = self._records[key] = _Record()
            if len(self._records) > KEYS_MAX:
                self._records.popitem(last=False)
        else:
            self._records.move_to_end(key)
        return record
