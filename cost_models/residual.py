"""What the roofline misses, learned from measured regions: a correction of the logarithm.

For each backend a Gaussian process over the residuals log(measured / roofline), with three parts: one
level for all regions of the backend, a level for each op class by its share of the time, and a smooth
function of what a region is made of (seconds by class, on a log scale, intensity, threads). With few
samples near a region its correction falls back to that of its classes, and then to that of the
backend, which is the shrinkage wanted; a region that was measured itself is predicted as measured.
Method: Rasmussen and Williams, "Gaussian Processes for Machine Learning", algorithm 2.1.

Repeatable: the same samples give the same corrections, in whatever order they came. Deliberately
absent: time. A host that slows down slows down everything; that is for a factor over all of it.
"""

import threading
from collections import OrderedDict
from dataclasses import dataclass
from math import log, sqrt

import numpy as np
from numpy.typing import NDArray

from cost_models.roofline import Roofline, Terms
from graphopt.costs.work import Work
from graphopt.executor.backend import Options

Array = NDArray[np.float64]

SAMPLES_MAX = 512  # of a backend: solving takes some 5 ms, behind a prediction now and then
LEVEL, CLASS, LOCAL = 0.3, 0.3, 0.35  # expected size of each part, in log seconds
REACH = 1.5  # within a factor of e^1.5 in its parts a region resembles another
NOISE = 0.04  # of a measured median on a quiet host
_FLOOR_S = 1e-6  # below it the seconds of a class tell no regions apart

Key = tuple[str, tuple[int, ...], int, str]


@dataclass(frozen=True, slots=True)
class Correction:
    """What is to be added to the logarithm of a prediction, and how uncertain the sum is."""

    mean: float
    deviation: float
    samples: int


@dataclass(frozen=True, slots=True)
class _Sample:
    work: Work
    options: Options
    seconds: float
    shares: Array
    place: Array
    residual: float


class Residual:
    """Corrections by backend. Any thread may call it."""

    def __init__(self) -> None:
        self._samples: dict[str, OrderedDict[Key, _Sample]] = {}
        self._solved: dict[str, _Solved] = {}
        self._lock = threading.Lock()

    def observe(
        self, work: Work, terms: Terms, backend: str, options: Options, seconds: float
    ) -> None:
        """A measured region; it replaces what was measured for the same one before.

        ValueError unless `seconds` is finite and above zero.
        """
        if not 0.0 < seconds < float("inf"):
            raise ValueError(f"a cost of {seconds} s")
        sample = _Sample(
            work, options, seconds, *features(work, terms), log(seconds / terms.seconds)
        )
        key = (work.key, work.sizes, options.threads, options.label)
        with self._lock:
            kept = self._samples.setdefault(backend, OrderedDict())
            kept.pop(key, None)
            kept[key] = sample
            if len(kept) > SAMPLES_MAX:
                kept.popitem(last=False)
            self._solved.pop(backend, None)

    def under(self, roofline: Roofline) -> "Residual":
        """The same measurements as corrections of another roofline."""
        other = Residual()
        with self._lock:
            kept = [(name, list(samples.values())) for name, samples in self._samples.items()]
        for backend, samples in kept:
            for each in samples:
                terms = roofline.terms(each.work, backend, each.options.threads)
                if terms is not None:
                    other.observe(each.work, terms, backend, each.options, each.seconds)
        return other

    def correction(self, work: Work, terms: Terms, backend: str) -> Correction:
        """The correction of a prediction; none, and the roofline's own error, without samples."""
        with self._lock:
            solved = self._solved.get(backend)
            kept = self._samples.get(backend)
            if not kept:
                return Correction(0.0, terms.error, 0)
            if solved is None:
                ordered = [kept[key] for key in sorted(kept)]
                solved = self._solved[backend] = _Solved(ordered)
        return solved.at(*features(work, terms), terms.error)


class _Solved:
    """The equations of one backend's samples, solved."""

    def __init__(self, samples: list[_Sample]) -> None:
        self._shares = np.array([each.shares for each in samples])
        self._places = np.array([each.place for each in samples])
        residuals = np.array([each.residual for each in samples])
        covariance = _covariance(self._shares, self._places, self._shares, self._places)
        covariance[np.diag_indices(len(samples))] += NOISE**2
        self._inverse = np.linalg.inv(covariance)
        self._weights = self._inverse @ residuals

    def at(self, shares: Array, place: Array, error: float) -> Correction:
        """Mean and deviation for one region; no more uncertain than `error` is without samples."""
        row = _covariance(shares[None], place[None], self._shares, self._places)[0]
        prior = LEVEL**2 + CLASS**2 * float(shares @ shares) + LOCAL**2
        variance = max(0.0, prior - float(row @ self._inverse @ row)) + NOISE**2
        return Correction(
            float(row @ self._weights), min(sqrt(variance), max(error, NOISE)), len(self._weights)
        )


def features(work: Work, terms: Terms) -> tuple[Array, Array]:
    """Shares of the classes in the time, and the place of a region among others."""
    times = np.array(terms.by_class)
    shares = times / max(terms.seconds, 1e-12)
    intensity = np.log(max(terms.compute_s, _FLOOR_S) / max(terms.memory_s, _FLOOR_S))
    place = np.log(np.maximum(times, _FLOOR_S))
    total = log(max(terms.seconds, _FLOOR_S))
    return shares, np.array([*place, total, 0.5 * intensity, 2.0 * terms.threads])


def _covariance(shares_a: Array, places_a: Array, shares_b: Array, places_b: Array) -> Array:
    squares = (places_a**2).sum(1)[:, None] + (places_b**2).sum(1) - 2 * places_a @ places_b.T
    near = np.exp(-0.5 * np.maximum(squares, 0.0) / REACH**2)
    found: Array = LEVEL**2 + CLASS**2 * (shares_a @ shares_b.T) + LOCAL**2 * near
    return found
