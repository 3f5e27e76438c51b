"""What the recorded latencies say about a model's traffic: which shapes are hot, how long a request takes."""

from contextlib import suppress
from dataclasses import dataclass

from graphopt.engine.findings import Findings
from graphopt.engine.live import LiveModel
from graphopt.executor.binding import bucket_symbols
from graphopt.executor.publish import Slot

HOT_MAX = 4  # shapes with artifacts of their own: each costs a build and packed weights
HOT_REQUESTS_MIN = 16
HOT_SHARE_MIN = 0.1  # of the time that the requests took: a batch of eight counts for eight


@dataclass(frozen=True, slots=True)
class HotShapes:
    """The shapes that most of the time goes to.

    Attributes:
        buckets: sizes of the dynamic dims by name, hottest first; empty for a model without any.
        share: of the time that goes to requests of one of these shapes.
    """

    buckets: tuple[dict[str, int], ...] = ()
    share: float = 0.0


def hot_shapes(slot: Slot) -> HotShapes:
    """What the recorded requests say."""
    names = bucket_symbols(slot.plan.graph.inputs)
    found = {b: t for b, t in slot.latencies.traffic().items() if len(b) == len(names)}
    total_s = sum(each.busy_s for each in found.values())
    hot = [
        bucket
        for bucket, each in sorted(found.items(), key=lambda item: -item[1].busy_s)
        if names and each.requests >= HOT_REQUESTS_MIN and each.busy_s >= HOT_SHARE_MIN * total_s
    ]
    hot = hot[:HOT_MAX]
    share = sum(found[bucket].busy_s for bucket in hot) / total_s if total_s else 0.0
    return HotShapes(tuple(dict(zip(names, bucket, strict=True)) for bucket in hot), share)


def request_seconds(slot: Slot) -> float | None:
    """The median of a request of the published plan in the shape it has run most; None without one."""
    found = slot.latencies.by_bucket(slot.plan.id).values()
    return max(found, key=lambda each: each.requests).median_s if found else None


def latency_of(model: LiveModel, findings: Findings) -> float | None:
    """What a request takes, in seconds: of the plan that runs, else of the last one that was tried."""
    found, chosen = request_seconds(model.slot), findings.chosen
    if found is None and chosen is not None:
        found = chosen.latency_s
    if found is None and not model.slot.is_busy():
        with suppress(Exception):  # a made-up input may be one that the model cannot take
            found = model.time_once(model.inputs_to_try()[0])
    return found
