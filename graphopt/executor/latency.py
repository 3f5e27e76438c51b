"""What a plan's requests took, by shape bucket.

A request thread appends one tuple to a bounded deque: a single C call, atomic under the GIL, no lock
(0.1 us). The background thread drains it into one ring per plan and bucket and computes statistics
when asked. Robust ones (Hampel, "The influence curve and its role in robust estimation", 1974): a
median and a MAD stay put while up to half of the requests meet a noisy neighbour.

Plans are named by id here, never held: a sample must not keep a retired plan in memory. Deliberately
absent: the clock (latencies come as arguments), and any judgement; see `trial` and `guard`.
"""

import math
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

Bucket = tuple[int, ...]
"""The values of a request's symbols in the order its inputs bind them; `()` for a static model."""

Sample = tuple[str, Bucket, float]
"""Plan id, bucket, seconds."""

Noted = tuple[str, Mapping[str, int], float]
"""Plan id, the request's symbols (its bucket once drained: a tuple costs the request 0.1 us), seconds."""

FRESH_MAX = (
    256  # between two drains: more of them fall out of the CPU caches, and a request pays 0.2 us
)
RING_SAMPLES = 512  # of one plan and bucket: enough for a p99, and young enough to follow the host
RINGS_MAX = 256  # plans times buckets remembered, the least recently used given up first
# Requests after which all that is known of the traffic counts half: shapes that have gone out of use
# are forgotten within a few thousand requests.
TRAFFIC_REQUESTS_MAX = 4096
MAD_TO_SIGMA = 1.4826  # 1 / the third quartile of the standard normal: the MAD of a normal is sigma


class Traffic(NamedTuple):
    """Requests of one shape and the seconds they took, those of long ago for less."""

    requests: float
    busy_s: float


NO_TRAFFIC = Traffic(0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Statistics:
    """What the kept requests of one plan and bucket took.

    Attributes:
        requests: seen since the plan was first run in this bucket.
        kept: of them, those the figures below are of (the youngest).
        median_s: seconds.
        p99_s: seconds; the largest kept one while fewer than 100 are kept.
        mad_s: median absolute deviation, seconds.
        log_spread: 1.4826 times the MAD of the natural logarithms: a relative standard deviation
            that outliers do not move.
    """

    requests: int
    kept: int
    median_s: float
    p99_s: float
    mad_s: float
    log_spread: float


class _Ring:
    __slots__ = ("latencies", "requests")

    def __init__(self) -> None:
        self.latencies: deque[float] = deque(maxlen=RING_SAMPLES)
        self.requests = 0


class Latencies:
    """Samples of one model's requests.

    Attributes:
        add: takes a `Noted`; any thread may call it at any time. Beyond `FRESH_MAX` samples that
            nobody drained the oldest are lost.
    """

    def __init__(self) -> None:
        self._fresh: deque[Noted] = deque(maxlen=FRESH_MAX)
        self.add = self._fresh.append
        self._rings: OrderedDict[tuple[str, Bucket], _Ring] = OrderedDict()
        self._traffic: dict[Bucket, Traffic] = {}
        self._n_traffic = 0.0

    def newest(self) -> Noted | None:
        """The youngest sample that was not drained yet; another object after another request."""
        try:
            return self._fresh[-1]
        except IndexError:
            return None

    def drain(self) -> list[Sample]:
        """Takes what came since the last call into the statistics; returns it, oldest first.

        Call it, and all that follows, from one thread.
        """
        taken: list[Sample] = []
        for _ in range(len(self._fresh)):
            try:
                plan_id, symbols, latency_s = self._fresh.popleft()
            except IndexError:  # a full deque lost it to a younger one meanwhile
                break
            sample = (plan_id, tuple(symbols.values()), latency_s)
            taken.append(sample)
            self._keep(sample)
        return taken

    def statistics(self, plan_id: str, bucket: Bucket) -> Statistics | None:
        """The figures of one plan and bucket; None when no request is known."""
        ring = self._rings.get((plan_id, bucket))
        if ring is None:
            return None
        return describe(tuple(ring.latencies), ring.requests)

    def by_bucket(self, plan_id: str) -> dict[Bucket, Statistics]:
        """The figures of every bucket the plan is known to have run."""
        return {
            bucket: describe(tuple(ring.latencies), ring.requests)
            for (known, bucket), ring in self._rings.items()
            if known == plan_id
        }

    def traffic(self) -> dict[Bucket, Traffic]:
        """What recent requests had which shape, whatever plan ran them; old ones count less."""
        return dict(self._traffic)

    def forget(self, plan_id: str) -> None:
        """Drops what is known of a plan, as when it is published again after another host state."""
        for key in [key for key in self._rings if key[0] == plan_id]:
            del self._rings[key]

    def _keep(self, sample: Sample) -> None:
        plan_id, bucket, latency_s = sample
        ring = self._rings.get((plan_id, bucket))
        if ring is None:
            ring = self._rings[plan_id, bucket] = _Ring()
            if len(self._rings) > RINGS_MAX:
                self._rings.popitem(last=False)
        else:
            self._rings.move_to_end((plan_id, bucket))
        ring.latencies.append(latency_s)
        ring.requests += 1
        requests, busy_s = self._traffic.get(bucket, NO_TRAFFIC)
        self._traffic[bucket] = Traffic(requests + 1, busy_s + latency_s)
        self._n_traffic += 1
        if self._n_traffic > TRAFFIC_REQUESTS_MAX:
            halves = ((b, Traffic(n / 2, s / 2)) for b, (n, s) in self._traffic.items())
            self._traffic = {bucket: half for bucket, half in halves if half.requests >= 1}
            self._n_traffic = sum(half.requests for half in self._traffic.values())


def describe(latencies: Sequence[float], requests: int | None = None) -> Statistics:
    """Statistics of at least one latency in seconds; `requests` defaults to their number."""
    ordered = sorted(latencies)
    middle = median(ordered)
    logs = [math.log(max(value, TICK_S)) for value in ordered]
    log_middle = median(logs)
    return Statistics(
        len(ordered) if requests is None else requests,
        len(ordered),
        middle,
        ordered[min(int(0.99 * len(ordered)), len(ordered) - 1)],
        median(sorted(abs(value - middle) for value in ordered)),
        MAD_TO_SIGMA * median(sorted(abs(value - log_middle) for value in logs)),
    )


TICK_S = 1e-9  # the clock's resolution: what a request that took no time is taken for


def median(ordered: Sequence[float]) -> float:
    """The median of values that are sorted already; of an even number the mean of the middle two."""
    half, odd = divmod(len(ordered), 2)
    return ordered[half] if odd else 0.5 * (ordered[half - 1] + ordered[half])
