"""Each system at its best: settings of which none is plainly the best are tried on this machine.

A system names its axes (static or dynamic shapes, the exporter, threads, spinning) and opens a
network at one setting. `choose` walks the axes one by one, calls the setting so far and the new one
in turns, and keeps what is faster; a setting that answers wrong is thrown out.
"""

import gc
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np

from benchmarks.quiet import wait_quiet

TOLERANCE = 1e-3  # of the largest value of eager float32's answer
TURN_S = 0.05  # of calls, before another setting is called
COMPARED_TURNS, COMPARED_S = 5, 3.0  # of two settings: so many, or as many as begin in that time
HOPELESS = 0.8  # times as fast in the first turn: no second one
DRIVEN_S = 0.6  # throughput: of one turn while settings are compared
GAIN_MIN = 1.01  # a setting that gains less is not told from noise: the earlier one stays

Client = Callable[[], Any]  # one request; answers a tensor or an array
Connect = Callable[[], Client]  # called in the thread that calls the client
Settings = dict[str, str]


class WrongAnswerError(Exception):
    """An answer that is not eager float32's."""


@dataclass(frozen=True, slots=True)
class Job:
    """One network at one batch, for one client (`clients` 0: latency) or several (throughput)."""

    model: str
    batch: int
    threads: int
    clients: int
    settle_s: float
    folder: Path
    inputs: dict[str, np.ndarray]
    sizes: dict[str, int]
    reference: np.ndarray


class System(Protocol):
    """One system; an object of it lives in a process of its own and opens one network."""

    packages: tuple[str, ...]

    def axes(self, job: Job) -> dict[str, list[str]]:
        """The settings to choose from, the most promising of each axis first."""

    def open(self, job: Job, settings: Settings) -> Connect:
        """The network, ready to be called."""

    def notes(self) -> str:
        """What else a reader of the figures should know."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """The best setting of a system, ready to be called."""

    connect: Connect
    settings: Settings
    tried: list[str]


def choose(system: System, job: Job, known: Settings | None = None) -> Chosen:
    """Opens `job` at every setting worth trying and keeps the best.

    `known` is what was best at another batch: its exporter is not chosen again. Raises what opening
    raised when no setting works.
    """
    axes = system.axes(job)
    if known and "export" in axes:
        axes["export"] = [known["export"]]
    best = {axis: options[0] for axis, options in axes.items()}
    tried: list[str] = []
    connect, first_error = _attempt(system, job, best, tried)
    for axis, options in axes.items():
        for option in options[1:]:
            other = {**best, axis: option}
            candidate, error = _attempt(system, job, other, tried)
            first_error = first_error or error
            if candidate is None:
                continue
            gain = GAIN_MIN if connect is None else _gain(connect, candidate, job)
            tried.append(f"{axis} {option} instead of {best[axis]}: {gain:.3f}x as fast")
            if gain >= GAIN_MIN:
                best, connect = other, candidate
            del candidate
            gc.collect()
    if connect is None:
        raise first_error or RuntimeError("no setting works")
    return Chosen(connect, best, tried)


def error_share(answer: Any, reference: np.ndarray) -> float:
    """The largest difference, as a share of the largest value; infinite for NaN and wrong shapes."""
    values = np.asarray(answer)
    if values.shape != reference.shape or not np.isfinite(values).all():
        return float("inf")
    return float(np.abs(values - reference).max() / np.abs(reference).max())


def drive(connect: Connect, clients: int, seconds: float) -> tuple[float, list[float]]:
    """Requests a second of closed-loop clients, each in its own thread, and all latencies."""
    start_line = threading.Barrier(clients)
    found: list[tuple[float, list[float]]] = []

    def work() -> None:
        client, times = connect(), []
        client()
        start_line.wait()
        start = now = time.perf_counter()
        while now - start < seconds:
            client()
            times.append(time.perf_counter() - now)
            now += times[-1]
        found.append((len(times) / (now - start), times))

    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(found) < clients:
        raise RuntimeError("a client failed")
    return sum(rate for rate, _ in found), [time for _, times in found for time in times]


def turn(client: Client, calls: int) -> list[float]:
    """Seconds of each of `calls` calls."""
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        client()
        times.append(time.perf_counter() - start)
    return times


def _attempt(
    system: System, job: Job, settings: Settings, tried: list[str]
) -> tuple[Connect | None, Exception | None]:
    try:
        connect = system.open(job, settings)
        share = error_share(connect()(), job.reference)
        if share > TOLERANCE:
            raise WrongAnswerError(f"differs from eager float32 by {share:.2g} of its scale")
    except Exception as error:
        label = ", ".join(settings.values())
        tried.append(f"{label}: {type(error).__name__}: {str(error).strip()[:200]}")
        return None, error
    return connect, None


def _gain(connect: Connect, candidate: Connect, job: Job) -> float:
    """How many times as fast the candidate is."""
    if job.clients:
        rates = [[drive(c, job.clients, DRIVEN_S)[0] for c in (connect, candidate)] for _ in "ab"]
        return sum(new for _, new in rates) / sum(old for old, _ in rates)
    ratios: list[float] = []
    start = time.perf_counter()
    while len(ratios) < COMPARED_TURNS and time.perf_counter() - start < COMPARED_S:
        pair = {}
        for which in ("old", "new") if len(ratios) % 2 else ("new", "old"):
            wait_quiet()
            client = connect() if which == "old" else candidate()
            warm = turn(client, 1)[0]
            pair[which] = median(turn(client, max(1, int(TURN_S / warm))))
        ratios.append(pair["old"] / pair["new"])
        if ratios[0] < HOPELESS:
            break
    return median(ratios)
