"""Bounds of a median that hold for any distribution: order statistics and the binomial law."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

CONFIDENCE = 0.95  # of each bound by itself


@dataclass(frozen=True, slots=True)
class Bounds:
    """The median of paired values and its two one-sided bounds."""

    median: float
    low: float
    high: float


def bounds(values: Sequence[float]) -> Bounds:
    """The median of `values` between bounds that each hold with CONFIDENCE.

    The number of values below the true median follows Binomial(n, 1/2), whatever noise they have;
    so the k-th smallest value is a lower bound as long as P(fewer than k below) <= 1 - CONFIDENCE.
    With fewer than five values there is no such k: the bounds are infinite.
    """
    ordered, n = sorted(values), len(values)
    tail, k = 0.0, 0
    while tail + comb(n, k) / 2**n <= 1 - CONFIDENCE:
        tail += comb(n, k) / 2**n
        k += 1
    middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    if k == 0:
        return Bounds(middle, float("-inf"), float("inf"))
    return Bounds(middle, ordered[k - 1], ordered[n - k])
