"""A few real requests, kept to prove and to try candidates on.

Request threads leave the inputs of their last requests in a short row, which costs one append. The
background sorts them into reservoirs, one for each shape bucket, so that rare shapes stay represented
when traffic is lively. The n-th request of a bucket takes a place with probability `PER_BUCKET` / n
(Vitter, "Random sampling with a reservoir", 1985, algorithm R): any is as likely to be kept as any
other, and the longer the traffic, the longer the same ones stay. What the builder has computed on them,
such as the values at the edge of a region, is good for the next delta too. Tensors are shared with
the request, not copied; nobody here writes to them.
"""

import random
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from graphopt.errors import RequestError
from graphopt.executor.latency import Bucket
from graphopt.executor.plan import Plan

RECENT_KEPT = 4  # requests between two looks of the background; each may hold megabytes
BUCKETS_KEPT = 8
PER_BUCKET = 2
BYTES_MAX = 64 << 20  # of all inputs kept in the reservoir

Inputs = Mapping[str, torch.Tensor]


class Captured:
    """The inputs of some requests of one model.

    Attributes:
        add: takes the inputs of a request that was answered; any thread may call it.
    """

    def __init__(self) -> None:
        self._recent: deque[Inputs] = deque(maxlen=RECENT_KEPT)
        self.add = self._recent.append
        self._by_bucket: OrderedDict[Bucket, _Reservoir] = OrderedDict()
        self._coin = random.Random(0)

    def collect(self, plan: Plan) -> dict[Bucket, list[Inputs]]:
        """The requests kept, by bucket; those that `plan` does not take any more are dropped.

        Call it from the background thread.
        """
        fresh = [self._recent.popleft() for _ in range(len(self._recent))]
        for reservoir in self._by_bucket.values():
            reservoir.kept = [each for each in reservoir.kept if _bucket(plan, each) is not None]
        for inputs in fresh:
            bucket = _bucket(plan, inputs)
            if bucket is not None:
                self._keep(bucket, inputs)
        return {bucket: list(each.kept) for bucket, each in self._by_bucket.items() if each.kept}

    def _keep(self, bucket: Bucket, inputs: Inputs) -> None:
        reservoir = self._by_bucket.setdefault(bucket, _Reservoir())
        reservoir.seen += 1
        place = self._coin.randrange(reservoir.seen)
        if len(reservoir.kept) < PER_BUCKET:
            reservoir.kept.append(inputs)
        elif place < PER_BUCKET:
            reservoir.kept[place] = inputs
        self._by_bucket.move_to_end(bucket)
        while len(self._by_bucket) > 1 and (
            len(self._by_bucket) > BUCKETS_KEPT or self._bytes() > BYTES_MAX
        ):
            self._by_bucket.popitem(last=False)

    def _bytes(self) -> int:
        rows = self._by_bucket.values()
        return sum(t.nbytes for each in rows for inputs in each.kept for t in inputs.values())


@dataclass(slots=True)
class _Reservoir:
    """Some requests of one bucket out of the `seen` that were looked at."""

    kept: list[Inputs] = field(default_factory=list)
    seen: int = 0


def _bucket(plan: Plan, inputs: Inputs) -> Bucket | None:
    """The shape bucket of a request; None when the interface has changed since it was captured."""
    try:
        _, symbols = plan.bind(inputs)
    except RequestError:
        return None
    return tuple(symbols.values())
