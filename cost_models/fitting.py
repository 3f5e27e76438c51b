"""From measured times to coefficients: non-negative least squares on the roofline.

The roofline is homogeneous of the first degree in its coefficients, so with the slopes at the last
guess it is linear in them (Euler's theorem), and a few rounds of linear fits reach the optimum. Rows
are divided by the measured time, so that each counts by its relative error. What the measurements do
not determine stays at the guess it began with.

Solver: Lawson and Hanson, "Solving Least Squares Problems", chapter 23. Deliberately absent:
measuring, and files.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cost_models.roofline import Array, smooth_max, work_arrays
from graphopt.costs.op_work import CLASSES
from graphopt.costs.work import Work

ROUNDS = 30
PULL = 0.03  # towards the guess: of a coefficient that is off by its own size, in relative errors
CALL_S, KERNEL_S, FACTOR = 5e-6, 2e-6, 1.5  # what a coefficient is before anything is known
ERROR_MIN = 0.03  # no fit is trusted further

N = len(CLASSES)


@dataclass(frozen=True, slots=True)
class Measured:
    """A median in seconds of something that is one or several calls, each with its work."""

    calls: tuple[Work, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Fit:
    """Coefficients of one backend at one thread count.

    Attributes:
        call_s: of a call.
        rates: seconds a kernel, compute factor and memory factor; a row for each of `CLASSES`.
        error: of the logarithm, one robust standard deviation over the measurements.
    """

    call_s: float
    rates: Array
    error: float


@dataclass(frozen=True, slots=True)
class _Row:
    """One measurement in arrays: of all its kernels, and how many calls they were."""

    calls: int
    kinds: NDArray[np.int64]
    tc: Array
    tm: Array


def fit(measured: Sequence[Measured], peak: float, bandwidth: Sequence[float], p: float) -> Fit:
    """Fits one backend at one thread count.

    Args:
        measured: at least one.
        peak: operations a second of the host.
        bandwidth: bytes a second at the footprint of each measurement.
        p: sharpness of the smooth maximum.
    """
    rows = [_row(each, peak, rate) for each, rate in zip(measured, bandwidth, strict=True)]
    times = np.array([each.seconds for each in measured])
    guess = np.concatenate([[CALL_S], np.tile([KERNEL_S, FACTOR, FACTOR], N)])
    found = guess.copy()
    used = _design(rows, found, p).any(axis=0)
    for round_ in range(ROUNDS):
        design = _design(rows, found, p) / times[:, None]
        weights = _robust(design @ found - 1.0)
        pull = np.diag(PULL / guess)
        matrix = np.vstack([design * weights[:, None], pull])
        target = np.concatenate([weights, np.full(len(guess), PULL)])
        scale = guess  # so that the unknowns are of one size
        step = nnls(matrix * scale, target) * scale
        share = 1.0 if round_ == 0 else 0.5
        found = np.where(used, (1 - share) * found + share * step, guess)
        found[1:] = np.maximum(found[1:], 1e-3 * guess[1:])  # a slope to come back by
    predicted = _predicted(rows, found, p)
    logs = np.log(times / predicted)
    error = max(ERROR_MIN, 1.4826 * float(np.median(np.abs(logs))), 0.7 * float(logs.std()))
    return Fit(float(found[0]), found[1:].reshape(N, 3), error)


def nnls(a: Array, b: Array) -> Array:
    """The x >= 0 that minimises |ax - b|."""
    n = a.shape[1]
    x, passive = np.zeros(n), np.zeros(n, bool)
    gradient = a.T @ (b - a @ x)
    tolerance = 1e-10 * float(np.abs(a.T @ b).max(initial=0.0))
    for _ in range(3 * n + 30):
        free = ~passive
        if not free.any() or gradient[free].max() <= tolerance:
            break
        passive[np.argmax(np.where(free, gradient, -np.inf))] = True
        while True:
            trial = np.zeros(n)
            trial[passive] = np.linalg.lstsq(a[:, passive], b, rcond=None)[0]
            negative = passive & (trial <= 0)
            if not negative.any():
                break
            share = float((x[negative] / (x[negative] - trial[negative])).min())
            x = x + share * (trial - x)
            passive &= x > 1e-15
            x[~passive] = 0.0
            if not passive.any():
                break
        x = trial if passive.any() else x
        gradient = a.T @ (b - a @ x)
    return x


def _row(measured: Measured, peak: float, bandwidth: float) -> _Row:
    parts = [work_arrays(work) for work in measured.calls]
    kinds = np.concatenate([part[0] for part in parts])
    ops = np.concatenate([part[1] for part in parts])
    sizes = np.concatenate([part[2] for part in parts])
    return _Row(len(parts), kinds, ops / peak, sizes / bandwidth)


def _design(rows: Sequence[_Row], x: Array, p: float) -> Array:
    """Slopes of each measurement's time in each coefficient, at `x`."""
    found = np.zeros((len(rows), len(x)))
    rates = x[1:].reshape(N, 3)
    for i, row in enumerate(rows):
        tc, tm = rates[row.kinds, 1] * row.tc, rates[row.kinds, 2] * row.tm
        both = smooth_max(tc, tm, p)
        safe = np.where(both > 0, both, 1.0)
        found[i, 0] = row.calls
        found[i, 1::3] = np.bincount(row.kinds, minlength=N)
        found[i, 2::3] = np.bincount(row.kinds, row.tc * (tc / safe) ** (p - 1), N)
        found[i, 3::3] = np.bincount(row.kinds, row.tm * (tm / safe) ** (p - 1), N)
    return found


def _predicted(rows: Sequence[_Row], x: Array, p: float) -> Array:
    return _design(rows, x, p) @ x


def _robust(errors: Array) -> Array:
    """Huber's weights, as square roots: a disturbed measurement counts less."""
    scale = max(0.05, 1.4826 * float(np.median(np.abs(errors))))
    weights: Array = np.sqrt(np.minimum(1.0, 2.0 * scale / np.maximum(np.abs(errors), 1e-12)))
    return weights
