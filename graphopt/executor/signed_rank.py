"""How much faster, and how sure: location and bounds from paired log ratios.

One stratum: the Hodges-Lehmann estimate (median of the Walsh averages) with the bounds that invert
Wilcoxon's signed-rank test, from its exact null distribution (Wilcoxon, "Individual comparisons by
ranking methods", 1945; Hodges and Lehmann, "Estimates of location based on rank tests", 1963). They
need no normal noise, only differences that are symmetric about the true log ratio, which the
differences of two arms under the same noise are, however skewed or heavy-tailed it is.

Several strata: the weighted sum of their estimates, its bounds recovered from theirs (Zou and
Donner, "Construction of confidence limits about effect measures", 2008, the MOVER method). For one
stratum that is the exact bound again.

Looking many times: each look spends a part of the error (Lan and DeMets, "Discrete sequential
boundaries for clinical trials", 1983, their Pocock-like function), and the parts are summed as by
Bonferroni, so the total holds whatever the dependence between looks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from graphopt.executor.latency import median

PAIRS_MAX = 128  # of one stratum; the null distribution and the Walsh averages grow with the square


@dataclass(frozen=True, slots=True)
class Bounds:
    """A log ratio with its one-sided bounds, infinite where there are too few pairs for any.

    `attained` is the error probability of each bound, at most the level that was asked for.
    """

    estimate: float
    low: float
    high: float
    attained: float


def bounds_of(differences: Sequence[float], level: float) -> Bounds:
    """The location of `differences`, at least one and at most `PAIRS_MAX`.

    Each bound is wrong with a probability of at most `level`.
    """
    values = tuple(differences)
    count = len(values)
    walsh = sorted(0.5 * (a + b) for i, a in enumerate(values) for b in values[i:])
    tail = _tail(count)
    cut = -1  # the largest rank sum that is improbable enough
    while cut + 1 < len(tail) and tail[cut + 1] <= level:
        cut += 1
    estimate = median(walsh)
    if cut < 0:
        return Bounds(estimate, -math.inf, math.inf, 0.0)
    cut = min(cut, (len(walsh) - 1) // 2)
    return Bounds(estimate, walsh[cut], walsh[len(walsh) - 1 - cut], tail[cut])


def combine(parts: Sequence[tuple[float, Bounds]]) -> Bounds:
    """The weighted mean of independent strata, given as (weight, bounds)."""
    total = sum(weight for weight, _ in parts)
    shares = [(weight / total, bounds) for weight, bounds in parts]
    estimate = sum(share * b.estimate for share, b in shares)
    below = math.sqrt(sum((share * (b.estimate - b.low)) ** 2 for share, b in shares))
    above = math.sqrt(sum((share * (b.high - b.estimate)) ** 2 for share, b in shares))
    attained = max(b.attained for _, b in shares)
    return Bounds(estimate, estimate - below, estimate + above, attained)


def pairs_needed(level: float) -> int:
    """The fewest pairs of a stratum that give a bound at `level`: all of one sign."""
    return max(1, math.ceil(-math.log2(level))) if level > 0.0 else PAIRS_MAX + 1


class Spending:
    """An error probability `alpha` handed out over the looks at one experiment."""

    def __init__(self, alpha: float) -> None:
        self._alpha = alpha
        self._spent = 0.0

    def level(self, fraction: float) -> float:
        """What a look may use when `fraction` (0 to 1) of the pairs there will be at most are in."""
        allowed = self._alpha * math.log(1.0 + (math.e - 1.0) * min(fraction, 1.0))
        return max(allowed - self._spent, 0.0)

    def spend(self, attained: float) -> None:
        """Books what a look has used."""
        self._spent += attained


@cache
def _counts(count: int) -> tuple[int, ...]:
    """In how many ways the ranks 1 to `count` have subsets of each sum."""
    if count == 0:
        return (1,)
    shorter = _counts(count - 1)
    padding = (0,) * count
    return tuple(map(int.__add__, shorter + padding, padding + shorter))


@cache
def _tail(count: int) -> tuple[float, ...]:
    """P(rank sum <= w) for w from 0, under symmetry about zero."""
    if count > PAIRS_MAX:
        raise ValueError(f"{count} pairs, at most {PAIRS_MAX} are compared")
    total, below, tail = 2**count, 0, []
    for ways in _counts(count):
        below += ways
        if 2 * below > total:
            break
        tail.append(below / total)
    return tuple(tail)
