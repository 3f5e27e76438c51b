"""A few real requests, kept to prove and to try candidates on.

Request threads leave the inputs of their last requests in a short row, which costs one append. The
background sorts them into a reservoir by shape bucket, so that rare shapes stay represented when
traffic is lively. Tensors are shared with the request, not copied; nobody here writes to them.
"""

from collections import OrderedDict, deque
from collections.abc import Mapping

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
        self._by_bucket: OrderedDict[Bucket, deque[Inputs]] = OrderedDict()

    def collect(self, plan: Plan) -> dict[Bucket, list[Inputs]]:
        """The requests kept, by bucket; those that `plan` does not take any more are dropped.

        Call it from the background thread.
        """
        fresh = [self._recent.popleft() for _ in range(len(self._recent))]
        kept = [inputs for row in self._by_bucket.values() for inputs in row]
        self._by_bucket.clear()
        for inputs in (*kept, *fresh):
            try:
                _, symbols = plan.bind(inputs)
            except RequestError:  # the interface has changed since that request
                continue
            self._keep(tuple(symbols.values()), inputs)
        return {bucket: list(row) for bucket, row in self._by_bucket.items()}

    def _keep(self, bucket: Bucket, inputs: Inputs) -> None:
        row = self._by_bucket.setdefault(bucket, deque(maxlen=PER_BUCKET))
        row.append(inputs)
        self._by_bucket.move_to_end(bucket)
        while len(self._by_bucket) > 1 and (
            len(self._by_bucket) > BUCKETS_KEPT or self._bytes() > BYTES_MAX
        ):
            self._by_bucket.popitem(last=False)

    def _bytes(self) -> int:
        rows = self._by_bucket.values()
        return sum(t.nbytes for row in rows for inputs in row for t in inputs.values())
