"""Is the candidate plan faster than the current one? Asked of interleaved requests, stopped as soon as
the answer is sure.

Requests of one shape bucket are dealt to the two plans in blocks, ABBA or BAAB by a seeded coin, so
that drift of the host and cycles of the traffic fall on both alike. A block is two requests, more of a
quick model, and only the last is measured: after the other plan the first one finds caches and
spinning thread pools of that plan (an eager step beside a spinning runtime was measured at 13.1 ms
where it takes 7.9; an MLP on two threads at 58 us where it takes 45 in a row). The
measured requests of two neighbouring blocks make a pair; `signed_rank` judges the log ratios of the
pairs, bucket by bucket, weighted by traffic. A big difference ends the trial after 7 pairs; without
one it ends at `pairs_max` with the answer that nothing is gained.

Refusing costs less than accepting, so a candidate that is plainly slower, or hardly any faster, is
given up early. But for that, swapping the two plans mirrors the verdict.

Deliberately absent: the clock, threads, and what follows from a verdict (see `switch`).
"""

import itertools
import math
import random
import threading
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from graphopt.executor.latency import MAD_TO_SIGMA, TICK_S, Bucket, describe, median
from graphopt.executor.signed_rank import (
    PAIRS_MAX,
    Bounds,
    Spending,
    bounds_of,
    combine,
    pairs_needed,
)

BLOCK = 2  # requests in a row on one plan at least; the last is measured
BLOCK_S, BLOCK_MAX = (
    5e-4,
    16,
)  # or as many as take so long: a few MB of weights are in the caches then
# Of a trial without traffic. Most end within a tenth of it, won or given up; what looks like a gain on a
# busy host is worth the rest: otherwise it is lost until the next delta.
TRIAL_MAX_S = 20.0
PAIRS_MIN = 12  # with fewer only a difference of 2x could be told
FUTILE_LOSS, FUTILE_LOSS_PAIRS = 1.05, 4  # slower than this in each of the first pairs
FUTILE_PAIRS, FUTILE_SIGMA = 8, 1.28  # a gain worth having is 90% unlikely from so many pairs on
BUCKETS_MAX = 32  # shapes that take part in one trial; a request of another runs the current plan
LEFT_OUT_MAX = 0.1  # share of the traffic that may be too rare to be judged
LOSS_MAX = 1.10  # slower than this for any bucket that is judged, and the candidate is no gain
UNPAIRED_MAX = 512  # measured requests that wait for their partner; some never come: requests fail
LOOK_GROWTH = 1.25  # pairs from one look at the figures to the next
MEDIAN_ERROR = (
    1.2533  # sqrt(pi / 2): standard error of the median of a normal, times sqrt(n) / sigma
)
_COINS = 64  # quads until the dealing repeats

Verdict = Literal["better", "worse", "equal", "failed", "cancelled"]


@dataclass(frozen=True, slots=True)
class TrialSettings:
    """How a trial is judged.

    Attributes:
        margin: how much faster the candidate must be, with certainty, as a fraction of the time.
        alpha: probability that a bound is wrong at any look of one trial.
        pairs_max: pairs after which nothing more is asked (two blocks each), at most 128.
        warmup_pairs: first pairs of each bucket that do not count.
        seed: of the dealing.
        block: requests in a row on one plan.
        gives_up: whether a candidate that will hardly win is refused on less evidence than it
            would take to accept it.
        settles: whether a candidate that hardly is any slower is enough, on as little evidence.
    """

    margin: float = 0.02
    alpha: float = 0.05
    pairs_max: int = 60
    warmup_pairs: int = 1
    seed: int = 0
    block: int = BLOCK
    gives_up: bool = False
    settles: bool = False

    def for_requests_of(self, latency_s: float) -> "TrialSettings":
        """For a model whose requests take so long now: longer blocks, fewer pairs."""
        latency_s = max(latency_s, TICK_S)
        block = min(BLOCK_MAX, max(self.block, math.ceil(BLOCK_S / latency_s)))
        pairs_max = max(PAIRS_MIN, int(TRIAL_MAX_S / (2 * block * latency_s)))
        return replace(self, block=block, pairs_max=min(pairs_max, self.pairs_max))


ACCEPTANCE = TrialSettings(gives_up=True)
"""Of a candidate against the published plan."""

CONFIRMATION = TrialSettings(margin=0.05, alpha=0.10, pairs_max=22, warmup_pairs=0)
"""Of the last good plan against one under alarm: may end after 5 pairs, since the alarm is evidence
too and the last good plan is no risk; 5% is not worth a rollback."""


@dataclass(frozen=True, slots=True)
class BucketFigures:
    """One bucket of a trial. Times are medians in seconds; `ratio` is candidate over current.

    `low` and `high` bound the ratio; None where there were too few pairs for a bound. `spread` is the
    relative one (`Statistics.log_spread`) of the noisier plan.
    """

    bucket: Bucket
    pairs: int
    weight: float
    current_s: float
    candidate_s: float
    ratio: float
    low: float | None
    high: float | None
    spread: float


@dataclass(frozen=True, slots=True)
class TrialResult:
    """What a trial found. `ratio` (candidate over current, weighted by traffic) is None before pairs.

    `low` and `high` bound it, each at the trial's `alpha`; None where there is no bound yet, or where the
    candidate was given up.
    """

    verdict: Verdict
    current: str
    candidate: str
    pairs: int
    margin: float
    ratio: float | None
    low: float | None
    high: float | None
    buckets: tuple[BucketFigures, ...]
    reason: str

    @property
    def is_no_slower(self) -> bool:
        """Whether the candidate is better, or as good as the current plan in all that was measured."""
        if self.verdict != "equal":
            return self.verdict == "better"
        bound = 1.0 + self.margin
        ratios = [self.ratio, *(figures.ratio for figures in self.buckets)]
        return all(ratio is not None and ratio <= bound for ratio in ratios)


class _Lane:
    """The pairs of one bucket."""

    __slots__ = ("candidate_s", "current_s", "differences", "requests", "warm")

    def __init__(self) -> None:
        self.differences: list[float] = []
        self.current_s: list[float] = []
        self.candidate_s: list[float] = []
        self.requests = 0
        self.warm = 0


class Trial:
    """One comparison of two plans of one revision, named by id.

    `take`, `is_candidate`, `add` and `fail` may be called from any thread, `judge` and `add_pair`
    from one.
    """

    def __init__(
        self,
        current: str,
        candidate: str,
        settings: TrialSettings = ACCEPTANCE,
        weights: Mapping[Bucket, float] | None = None,
    ) -> None:
        """`weights` are shares of the traffic by bucket; by default those the trial sees itself.

        ValueError when `pairs_max` is beyond what can be judged.
        """
        if not 1 <= settings.pairs_max <= PAIRS_MAX:
            raise ValueError(f"pairs_max is {settings.pairs_max}, at most {PAIRS_MAX} are judged")
        self.current = current
        self.candidate = candidate
        self.settings = settings
        self.result: TrialResult | None = None
        self._weights = weights
        self._spending = Spending(settings.alpha)
        # The first look that could decide: all pairs of one sign.
        self._next_look = next(
            (
                count
                for count in range(1, settings.pairs_max)
                if count >= pairs_needed(self._spending.level(count / settings.pairs_max))
            ),
            settings.pairs_max,
        )
        self._lanes: dict[Bucket, _Lane] = {}
        self._positions: dict[Bucket, itertools.count[int]] = {}
        self._fresh: deque[tuple[Bucket, int, float]] = deque(maxlen=4 * UNPAIRED_MAX)
        self._unpaired: dict[tuple[Bucket, int], float] = {}
        self._ended: tuple[Verdict, str] | None = None
        self._ending = threading.Lock()
        coin = random.Random(settings.seed)
        arms: list[bool] = []
        for _ in range(_COINS):
            first = coin.random() < 0.5
            quad = (first, not first, not first, first)
            arms += [arm for arm in quad for _ in range(settings.block)]
        self._arms = tuple(arms)

    # -- live requests

    def take(self, bucket: Bucket) -> int:
        """The place of the next request of `bucket` in the dealing; -1 when it takes no part."""
        counter = self._positions.get(bucket)
        if counter is None:
            if len(self._positions) >= BUCKETS_MAX:
                return -1
            counter = self._positions.setdefault(bucket, itertools.count())
        return next(counter)

    def is_candidate(self, position: int) -> bool:
        """Whether the request at `position` runs the candidate."""
        return position >= 0 and self._arms[position % len(self._arms)]

    def add(self, bucket: Bucket, position: int, latency_s: float) -> None:
        """What the request at `position` took, once it is answered."""
        self._fresh.append((bucket, position, latency_s))

    def fail(self, reason: str) -> None:
        """Ends the trial: the candidate raised, or answered what it must not."""
        self._end("failed", reason)

    @property
    def is_over(self) -> bool:
        """Whether it has ended, so that nothing measured from now on counts."""
        return self._ended is not None

    def cancel(self, reason: str) -> None:
        """Ends the trial without a verdict, as when a delta made another revision."""
        self._end("cancelled", reason)

    # -- judging

    def add_pair(self, bucket: Bucket, current_s: float, candidate_s: float) -> None:
        """A pair that was measured outside the traffic, oldest first."""
        lane = self._lanes.setdefault(bucket, _Lane())
        if lane.warm < self.settings.warmup_pairs:
            lane.warm += 1
        elif self.pairs < self.settings.pairs_max:
            lane.current_s.append(current_s)
            lane.candidate_s.append(candidate_s)
            lane.differences.append(math.log(max(candidate_s, TICK_S) / max(current_s, TICK_S)))

    @property
    def pairs(self) -> int:
        """Pairs that count so far."""
        return sum(len(lane.differences) for lane in self._lanes.values())

    def share(self, bucket: Bucket) -> float:
        """The pairs of `bucket` relative to its weight: the lowest one lacks pairs most."""
        lane = self._lanes.get(bucket)
        done = 0 if lane is None else lane.warm + len(lane.differences)
        weight = self._weights.get(bucket, 0.0) if self._weights is not None else 1.0
        return done / max(weight, 1e-6)

    def judge(self) -> TrialResult | None:
        """The verdict, once there is one; the same one from then on."""
        if self.result is not None:
            return self.result
        self._pair_up()
        pairs, overall, found = self.pairs, None, {}
        for early, is_asked in (
            (self._settled, self.settings.settles),
            (self._futility, self.settings.gives_up),
        ):
            verdict, reason = early() if is_asked and self._ended is None else (None, "")
            if verdict is not None:
                self._end(verdict, reason)
        if self._ended is None:
            if pairs < min(self._next_look, self.settings.pairs_max):
                return None
            self._next_look = max(pairs + 1, math.ceil(LOOK_GROWTH * pairs))
            level = self._spending.level(pairs / self.settings.pairs_max)
            found = self._bounds(level)
            overall = self._overall(found, level)
            verdict, reason = self._decide(overall, found)
            if overall is not None:
                self._spending.spend(overall.attained)
            if verdict is None:
                return None
            self._end(verdict, reason)
        self.result = self._report(overall, found)
        return self.result

    # -- helpers

    def _pair_up(self) -> None:
        for _ in range(len(self._fresh)):
            try:
                bucket, position, latency_s = self._fresh.popleft()
            except IndexError:  # a full deque lost it to a younger one meanwhile
                return
            lane = self._lanes.setdefault(bucket, _Lane())
            lane.requests += 1
            block, offset = divmod(position, self.settings.block)
            if offset != self.settings.block - 1:
                continue
            partner = self._unpaired.pop((bucket, block ^ 1), None)
            if partner is None:
                self._unpaired[bucket, block] = latency_s
                if len(self._unpaired) > UNPAIRED_MAX:
                    self._unpaired.pop(next(iter(self._unpaired)))
            elif self.is_candidate(position):
                self.add_pair(bucket, partner, latency_s)
            else:
                self.add_pair(bucket, latency_s, partner)

    def _bounds(self, level: float) -> dict[Bucket, Bounds]:
        return {
            bucket: bounds_of(lane.differences, level)
            for bucket, lane in self._lanes.items()
            if lane.differences
        }

    def _overall(self, found: Mapping[Bucket, Bounds], level: float) -> Bounds | None:
        """Over all buckets; those too rare for bounds of their own stand together as one stratum.

        None when more than `LEFT_OUT_MAX` of the traffic can not be judged yet.
        """
        need = pairs_needed(level)
        weight = self._shares()
        parts: list[tuple[float, Bounds]] = []
        rare: list[float] = []
        rare_weight = 0.0
        for bucket, bounds in found.items():
            if len(self._lanes[bucket].differences) >= need:
                parts.append((weight[bucket], bounds))
            else:
                rare += self._lanes[bucket].differences
                rare_weight += weight[bucket]
        if len(rare) >= need:
            parts.append((rare_weight, bounds_of(rare, level)))
        parts = [(share, bounds) for share, bounds in parts if share > 0.0]
        if sum(share for share, _ in parts) < 1.0 - LEFT_OUT_MAX:
            return None
        return combine(parts)

    def _decide(
        self, overall: Bounds | None, found: Mapping[Bucket, Bounds]
    ) -> tuple[Verdict | None, str]:
        """What the bounds say; None to go on."""
        limit, loss = -math.log(1.0 - self.settings.margin), math.log(LOSS_MAX)
        is_last = self.pairs >= self.settings.pairs_max
        if overall is None:
            return ("equal", "too few pairs for a bound") if is_last else (None, "")
        figures = (
            f"{math.exp(overall.estimate):.3f} of the current plan's time, "
            f"{math.exp(overall.low):.3f} to {math.exp(overall.high):.3f}"
        )
        if overall.high < -limit:
            lost = [bucket for bucket, bounds in found.items() if bounds.low > loss]
            return (
                ("equal", f"{figures}, but slower for {lost[0]}") if lost else ("better", figures)
            )
        if overall.low > limit:
            won = [bucket for bucket, bounds in found.items() if bounds.high < -loss]
            return ("equal", f"{figures}, but faster for {won[0]}") if won else ("worse", figures)
        if is_last or (overall.low > -limit and overall.high < limit):
            return "equal", figures
        return None, ""

    def _futility(self) -> tuple[Verdict | None, str]:
        """Whether the candidate will hardly win, by all pairs without regard to buckets.

        Their median against its standard error from the MAD.
        """
        found = self._differences()
        if len(found) >= FUTILE_LOSS_PAIRS and found[0] > math.log(FUTILE_LOSS):
            least = math.exp(found[0])
            return (
                "worse",
                f"{least:.2f} of the current plan's time or more in all {len(found)} pairs",
            )
        if len(found) < FUTILE_PAIRS:
            return None, ""
        middle, error = _middle(found)
        limit = -math.log(1.0 - self.settings.margin)
        if middle - FUTILE_SIGMA * error <= -limit:
            return None, ""
        reason = f"{math.exp(middle):.3f} of the current plan's time in {len(found)} pairs: no gain"
        return ("worse" if middle > 2 * FUTILE_SIGMA * error else "equal"), reason

    def _settled(self) -> tuple[Verdict | None, str]:
        """The mirror of `_futility`: whether the candidate is hardly any slower."""
        found = self._differences()
        if len(found) >= FUTILE_LOSS_PAIRS and found[-1] < -math.log(FUTILE_LOSS):
            most = math.exp(found[-1])
            return (
                "better",
                f"{most:.2f} of the current plan's time or less in all {len(found)} pairs",
            )
        if len(found) < FUTILE_PAIRS:
            return None, ""
        middle, error = _middle(found)
        if middle + FUTILE_SIGMA * error > math.log(1.0 + self.settings.margin):
            return None, ""
        return (
            "equal",
            f"{math.exp(middle):.3f} of the current plan's time in {len(found)} pairs: no slower",
        )

    def _differences(self) -> list[float]:
        """The log ratios of all pairs, in order of size."""
        return sorted(d for lane in self._lanes.values() for d in lane.differences)

    def _shares(self) -> dict[Bucket, float]:
        seen: Mapping[Bucket, float] = self._weights or {}
        if not any(seen.get(bucket, 0.0) for bucket in self._lanes):
            seen = Counter({bucket: lane.requests for bucket, lane in self._lanes.items()})
        if not any(seen.values()):  # captured inputs only: nothing is known about the traffic
            seen = {bucket: len(lane.differences) for bucket, lane in self._lanes.items()}
        total = sum(seen.get(bucket, 0.0) for bucket in self._lanes) or 1.0
        return {bucket: seen.get(bucket, 0.0) / total for bucket in self._lanes}

    def _report(self, overall: Bounds | None, found: Mapping[Bucket, Bounds]) -> TrialResult:
        assert self._ended is not None
        verdict, reason = self._ended
        shares, lines = self._shares(), []
        for bucket, lane in self._lanes.items():
            if lane.differences:
                bounds = found.get(bucket)
                old, new = describe(lane.current_s), describe(lane.candidate_s)
                lines.append(
                    BucketFigures(
                        bucket,
                        len(lane.differences),
                        shares[bucket],
                        old.median_s,
                        new.median_s,
                        math.exp(bounds.estimate if bounds else median(sorted(lane.differences))),
                        _ratio(bounds.low if bounds else -math.inf),
                        _ratio(bounds.high if bounds else math.inf),
                        max(old.log_spread, new.log_spread),
                    )
                )
        return TrialResult(
            verdict,
            self.current,
            self.candidate,
            sum(line.pairs for line in lines),
            self.settings.margin,
            self._ratio(overall),
            None if overall is None else _ratio(overall.low),
            None if overall is None else _ratio(overall.high),
            tuple(lines),
            reason,
        )

    def _ratio(self, overall: Bounds | None) -> float | None:
        if overall is not None:
            return math.exp(overall.estimate)
        found = self._differences()
        return math.exp(median(found)) if found else None

    def _end(self, verdict: Verdict, reason: str) -> tuple[Verdict, str]:
        """The first verdict stands, whichever thread it came from."""
        with self._ending:
            if self._ended is None:
                self._ended = (verdict, reason)
            return self._ended


def _middle(found: list[float]) -> tuple[float, float]:
    """The median of sorted values, and its standard error."""
    middle = median(found)
    spread = MAD_TO_SIGMA * median(sorted(abs(each - middle) for each in found))
    return middle, MEDIAN_ERROR * spread / math.sqrt(len(found))


def _ratio(log: float) -> float | None:
    return math.exp(log) if math.isfinite(log) else None
