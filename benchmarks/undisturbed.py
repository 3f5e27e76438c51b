"""What a running client notices of the builder: p99 beside a builder that works flat out, and alone.

    python -m benchmarks.undisturbed [--model bert-mini] [--other minilm] [--pairs 10] [--spell-s 3]

One engine serves `model` to closed-loop clients of one thread each: one fewer than there are cores
(`a core free`), then as many as cores (`every core busy`). A second model in the same engine gives
the builder work: new weights for one of its layers after the other, each as soon as the background
has nothing left to do, so everything the engine does in the background is in the figures: building,
verifying, loading, trials. Spells with and without it alternate and are compared pair by pair:
`ratio` is the median over pairs of p99 beside over p99 alone, `low` and `high` its one-sided 95%
bounds. `builder_cores` is what the builder process used, `deltas` what it was given: without work
for the builder the figures would mean nothing, so run it on a quiet machine, where the idle class
gets something. `unsettled` counts spells after which the background was still busy when the patience
ended: what follows them was not quite alone. The clients' model never changes. The GIL's switch interval is
the service's.

The rows called `bare` are the same spells beside a process of the idle class that multiplies matrices on
one thread and has nothing to do with graphopt: what this machine makes of any builder.
"""

import argparse
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from statistics import median
from typing import Any, Protocol

import torch

import graphopt
from benchmarks import zoo
from benchmarks.harness import percentile, report
from benchmarks.paired import bounds
from benchmarks.quiet import tree_cpu_s
from graphopt.engine import LiveModel

TARGETS = {"a core free": 1.10, "every core busy": 1.5}
WARM_CALLS = 50
CHANGE = 1e-3  # of a weight, by each delta: new contents, so that nothing built before fits


def main() -> None:
    """Measures both cases and prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="bert-mini")
    parser.add_argument("--other", default="minilm")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--spell-s", type=float, default=3.0)
    parser.add_argument("--settle-s", type=float, default=60.0, help="patience after each spell")
    parser.add_argument("--switch-interval-us", type=float, default=500.0, help="of the GIL")
    options = parser.parse_args()
    sys.setswitchinterval(options.switch_interval_us / 1e6)
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(1)
    settings = graphopt.EngineSettings(threads=cores, intra_op=1)
    rows = []
    with graphopt.Engine(zoo.build(options.model).graph(), settings) as engine:
        other = engine.host.load(zoo.build(options.other).graph(), "other")
        inputs = tuple(zoo.build(options.model).inputs(1).values())
        other_inputs = zoo.build(options.other).inputs(1)
        for _ in range(WARM_CALLS):
            engine(*inputs)
            other.run(other_inputs)
        engine.settle(options.settle_s)
        work = Work(engine, other, other_inputs, options.settle_s)
        for case, clients in {"a core free": cores - 1, "every core busy": cores}.items():
            if clients:
                rows.append(_row(case, lambda: engine(*inputs), clients, work, options))
                bare = _row(case, lambda: engine(*inputs), clients, Multiplier(), options)
                rows.append({**bare, "case": f"{case}, bare"})
    report("undisturbed", rows, model=options.model, other=options.other, cores=cores)


class Load(Protocol):
    """What runs beside the clients in every other spell."""

    deltas: int
    unsettled: int

    def start(self) -> None:
        """Begins."""

    def stop(self) -> None:
        """Ends, and returns when nothing of it is left."""


class Multiplier:
    """A process of the idle class that multiplies matrices on one thread."""

    deltas = unsettled = 0
    _SOURCE = """
import os, torch
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
torch.set_num_threads(1)
x = torch.rand(1024, 1024)
print(flush=True)
while True:
    x @ x
"""

    def start(self) -> None:
        """Returns when it multiplies."""
        command = [sys.executable, "-c", self._SOURCE]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self._process.stdout.readline()

    def stop(self) -> None:
        """Kills it."""
        self._process.kill()
        self._process.communicate()


class Work:
    """Work for the builder: layer after layer of a model gets new weights, until it is stopped."""

    def __init__(
        self, engine: graphopt.Engine, model: LiveModel, inputs: zoo.Inputs, settle_s: float
    ) -> None:
        self.settle_s = settle_s
        self.engine = engine
        self.model = model
        self.inputs = inputs
        self.deltas = 0
        self.unsettled = 0  # times the background was still busy when the patience ended
        self._layers = itertools.cycle(zoo.layer_weights(model.graph))
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begins to give work."""
        self._stop.clear()
        self._thread = threading.Thread(target=self._feed)
        self._thread.start()

    def stop(self) -> None:
        """Gives no more and waits until what was given is done."""
        assert self._thread is not None
        self._stop.set()
        self._thread.join()
        self.unsettled += not self.engine.settle(self.settle_s)

    def _feed(self) -> None:
        torch.set_num_threads(1)
        while not self._stop.is_set():
            graph = self.model.graph
            edits = [
                graphopt.PutConstant(name, graph.constants[name].tensor * (1 + CHANGE))
                for name in next(self._layers)
            ]
            self.model.apply(graphopt.Delta(edits))
            self.deltas += 1
            self.model.run(self.inputs)
            while not self._stop.is_set() and not self.engine.settle(0.1):
                pass


def _row(
    case: str, call: Callable[[], Any], clients: int, work: Load, options: argparse.Namespace
) -> dict[str, Any]:
    alone: list[list[float]] = []
    beside: list[list[float]] = []
    busy, deltas, unsettled = [], work.deltas, work.unsettled
    for i in range(options.pairs):
        print(f"{case}: pair {i + 1} of {options.pairs}", file=sys.stderr, flush=True)
        for is_disturbed in (False, True) if i % 2 else (True, False):
            if is_disturbed:
                work.start()
            times, cores = _spell(call, clients, options.spell_s)
            if is_disturbed:
                work.stop()
                busy.append(cores)
            (beside if is_disturbed else alone).append(times)
    pairs = zip(alone, beside, strict=True)
    ratio = bounds([percentile(new, 0.99) / percentile(old, 0.99) for old, new in pairs])
    target = TARGETS[case]
    return {
        "case": case,
        "clients": clients,
        **_latencies("alone", alone),
        **_latencies("beside", beside),
        "ratio": ratio.median,
        "low": ratio.low,
        "high": ratio.high,
        "target": target,
        "verdict": "yes" if ratio.high <= target else "NO" if ratio.low > target else "open",
        "builder_cores": median(busy),
        "deltas": work.deltas - deltas,
        "unsettled": work.unsettled - unsettled,
        "requests": sum(map(len, alone + beside)),
    }


def _spell(call: Callable[[], Any], clients: int, seconds: float) -> tuple[list[float], float]:
    """Latencies of all clients, and the cores that the builder process used meanwhile."""
    found: list[list[float]] = []

    def client() -> None:
        torch.set_num_threads(1)
        times: list[float] = []
        now = time.perf_counter()
        until = now + seconds
        while now < until:
            call()
            times.append(time.perf_counter() - now)
            now += times[-1]
        found.append(times)

    start, used = time.perf_counter(), tree_cpu_s(os.getpid(), without_root=True)
    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    builder_s = tree_cpu_s(os.getpid(), without_root=True) - used
    times = [each for times in found for each in times]
    return times, max(0.0, builder_s) / (time.perf_counter() - start)


def _latencies(label: str, spells: list[list[float]]) -> dict[str, float]:
    times = [each for spell in spells for each in spell]
    return {
        f"{label}_p50_ms": median(times) * 1e3,
        f"{label}_p99_ms": percentile(times, 0.99) * 1e3,
    }


if __name__ == "__main__":
    main()
