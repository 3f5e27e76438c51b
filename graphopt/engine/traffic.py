"""What the recorded latencies say about a model's traffic: which shapes are hot, how long a request takes."""

from dataclasses import dataclass

from graphopt.executor.plan import bucket_symbols
from graphopt.executor.publish import Slot

HOT_MAX = 4  # shapes with artifacts of their own: each costs a build and packed weights
HOT_REQUESTS_MIN = 16
HOT_SHARE_MIN = 0.1  # of the requests remembered


@dataclass(frozen=True, slots=True)
class HotShapes:
    """The shapes that most requests have.

    Attributes:
        buckets: sizes of the dynamic dims by name, hottest first; empty for a model without any.
        share: of the requests that have one of these shapes.
    """

    buckets: tuple[dict[str, int], ...] = ()
    share: float = 0.0


def hot_shapes(slot: Slot) -> HotShapes:
    """What the recorded requests say."""
    names = bucket_symbols(slot.plan)
    counts = {
        bucket: n for bucket, n in slot.latencies.traffic().items() if len(bucket) == len(names)
    }
    total = sum(counts.values())
    hot = [
        bucket
        for bucket, n in sorted(counts.items(), key=lambda item: -item[1])
        if names and n >= HOT_REQUESTS_MIN and n >= HOT_SHARE_MIN * total
    ]
    hot = hot[:HOT_MAX]
    share = sum(counts[bucket] for bucket in hot) / total if total else 0.0
    return HotShapes(tuple(dict(zip(names, bucket, strict=True)) for bucket in hot), share)


def request_seconds(slot: Slot) -> float | None:
    """The median of a request of the published plan in the shape it has run most; None without one."""
    found = slot.latencies.by_bucket(slot.plan.id).values()
    return max(found, key=lambda each: each.requests).median_s if found else None
