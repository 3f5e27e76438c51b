"""Predictions from coefficients: each kernel takes as long as the slower of computing and moving.

    t = call + sum over kernels of (kernel + (tc^p + tm^p)^(1/p))
    tc = compute * operations / peak(threads)        tm = memory * bytes / bandwidth(threads, footprint)

`call`, `kernel`, `compute` and `memory` are coefficients of a backend at a thread count, the last
three of an op class; peak and bandwidth are the host's. The smooth maximum (p about 4) is that of
Yang et al., "Hierarchical roofline", softened so that a fit has slopes everywhere. Deliberately
absent: what the formula misses, which `residual.py` learns.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import log

import numpy as np
from numpy.typing import NDArray

from cost_models.coefficients import LEVELS, Coefficients
from graphopt.costs.op_work import CLASSES
from graphopt.costs.work import Work

Array = NDArray[np.float64]
_INDEX = {name: i for i, name in enumerate(CLASSES)}


@dataclass(frozen=True, slots=True)
class Terms:
    """A prediction in its parts, in seconds.

    Attributes:
        call_s: of the call alone.
        by_class: of each class of `CLASSES`, in that order.
        compute_s: operations at the class's rate, all together, were memory free.
        memory_s: bytes at the class's rate, likewise.
        error: of the logarithm, one standard deviation.
        threads: for which the coefficients are.
    """

    call_s: float
    by_class: tuple[float, ...]
    compute_s: float
    memory_s: float
    error: float
    threads: int

    @property
    def seconds(self) -> float:
        """Their sum."""
        return self.call_s + sum(self.by_class)


class Host:
    """Peak and bandwidth of the host at a thread count."""

    def __init__(self, coefficients: Coefficients, threads: int) -> None:
        known = coefficients.threads("host")
        near = nearest_threads(known, threads)
        name = f"threads_{near}"
        # What was measured with fewer threads: cores add operations, and bandwidth hardly.
        scale = threads / near if near and threads > near else 1.0
        self.peak = (coefficients.get("host", name, "peak") or 0.0) * scale
        sizes = [coefficients.get("host", "working_set", level) for level in LEVELS]
        rates = [coefficients.get("host", name, "bandwidth", level) for level in LEVELS]
        pairs = [(s, r) for s, r in zip(sizes, rates, strict=True) if s and r]
        self._sizes = [log(size) for size, _ in pairs]
        self._rates = [log(rate) for _, rate in pairs]

    @property
    def is_known(self) -> bool:
        """Whether there is anything to predict with."""
        return self.peak > 0 and bool(self._rates)

    def bandwidth(self, footprint_bytes: int) -> float:
        """Bytes a second where a run goes through so many bytes; between levels on a log scale."""
        at = float(np.interp(log(max(1, footprint_bytes)), self._sizes, self._rates))
        return float(np.exp(at))


class Roofline:
    """Predicts from one set of coefficients; keeps what it looked up."""

    def __init__(self, coefficients: Coefficients) -> None:
        self._coefficients = coefficients
        self.sharpness = coefficients.get("roofline", "sharpness") or 4.0
        self._tables = lru_cache(maxsize=256)(self._table)

    def terms(self, work: Work, backend: str, threads: int) -> Terms | None:
        """The prediction in its parts; None where the backend has no coefficients."""
        table = self._tables(backend, threads)
        if table is None:
            return None
        host, near, call_s, error, rates = table
        per_op = 1.0 / host.peak
        per_byte = 1.0 / host.bandwidth(work.footprint_bytes)
        kinds, ops, sizes = work_arrays(work)
        kernel_s, compute, memory = rates[kinds].T if len(kinds) else np.zeros((3, 0))
        tc, tm = compute * ops * per_op, memory * sizes * per_byte
        times = kernel_s + smooth_max(tc, tm, self.sharpness)
        by_class = np.bincount(kinds, times, len(CLASSES))
        return Terms(
            call_s, tuple(map(float, by_class)), float(tc.sum()), float(tm.sum()), error, near
        )

    def _table(self, backend: str, threads: int) -> tuple[Host, int, float, float, Array] | None:
        found, host = self._coefficients, Host(self._coefficients, threads)
        near = nearest_threads(found.threads("backends", backend), threads)
        if near is None or not host.is_known:
            return None
        trail = ("backends", backend, f"threads_{near}")
        rates = np.zeros((len(CLASSES), 3))
        for name, i in _INDEX.items():
            for j, part in enumerate(("kernel_s", "compute", "memory")):
                rates[i, j] = found.get(*trail, name, part) or 0.0
        call_s, error = found.get(*trail, "call_s"), found.get(*trail, "error")
        return host, near, call_s or 0.0, 1.0 if error is None else error, rates


def smooth_max(a: Array, b: Array, sharpness: float) -> Array:
    """The p-norm of two terms: their maximum where they differ much, 1.19 times it where equal (p=4)."""
    top = np.maximum(a, b)
    safe = np.where(top > 0, top, 1.0)
    norm: Array = top * ((a / safe) ** sharpness + (b / safe) ** sharpness) ** (1 / sharpness)
    return norm


def work_arrays(work: Work) -> tuple[NDArray[np.int64], Array, Array]:
    """Class number, operations and bytes of each kernel."""
    kernels = work.kernels
    kinds = np.fromiter((_INDEX[k.op_class] for k in kernels), np.int64, len(kernels))
    ops = np.fromiter((k.ops for k in kernels), np.float64, len(kernels))
    sizes = np.fromiter((k.bytes for k in kernels), np.float64, len(kernels))
    return kinds, ops, sizes


def nearest_threads(known: list[int], threads: int) -> int | None:
    """The count closest to `threads`, of equals the smaller; None where there is none."""
    return min(known, key=lambda count: (abs(count - threads), count), default=None)


def class_shares(terms: Terms) -> Mapping[str, float]:
    """The share of each class in the time, of those that take any."""
    total = terms.seconds or 1.0
    return {n: t / total for n, t in zip(CLASSES, terms.by_class, strict=True) if t}
