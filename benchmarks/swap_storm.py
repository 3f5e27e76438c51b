"""Deltas one after another under four closed-loop clients: nothing fails, nothing is answered by a
mixture, nothing leaks.

A delta sets one of a few scales, so the right answer of every revision is known beforehand: each
answer is compared with the answer of its own revision, bitwise when its plan is the one the
expectation was computed on, within TOLERANCE of the reference otherwise. Requests that overlap a
swap are compared with the same clients undisturbed, in the same run: with all of their requests, and
with those that overlap moments drawn as the swaps were. A long request overlaps more moments than a
short one, so the second is what swaps that cost nothing would show.

    python -m benchmarks.swap_storm [--deltas 10000] [--clients 4]
"""

import argparse
import gc
import statistics
import sys
import tempfile
import threading
import time
import weakref
from array import array
from dataclasses import dataclass, field

import torch

import graphopt
from benchmarks.harness import percentile, report, rss_bytes
from graphopt.executor.plan import Plan

VARIANTS = 8
TOLERANCE = 1e-5  # of an output of order 1, fused against eager
UNDISTURBED_S = 10.0
SETTLE_S = 120.0


@dataclass
class Tally:
    """What one client saw."""

    # Flat: the tally must not look like a leak
    starts: "array[float]" = field(default_factory=lambda: array("d"))
    ends: "array[float]" = field(default_factory=lambda: array("d"))
    bitwise: int = 0
    within: int = 0
    wrong: int = 0
    failed: int = 0


class Net(torch.nn.Module):
    """Residual layers, wide enough that a request takes about a millisecond."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(256, 256) for _ in range(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Twelve residual layers."""
        for layer in self.layers:
            x = x + torch.relu(layer(x)) * 0.5
        return x


def main() -> None:
    """Runs the storm and prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--deltas", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--per-second", type=float, default=0.0, help="deltas; 0: back to back")
    parser.add_argument("--switch-interval-us", type=float, default=5000.0, help="of the GIL")
    options = parser.parse_args()
    sys.setswitchinterval(options.switch_interval_us / 1e6)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    graph = graphopt.from_torch(Net(), (torch.randn(8, 256),), name="net")
    plans: weakref.WeakSet[Plan] = weakref.WeakSet()
    with (
        tempfile.TemporaryDirectory() as state,
        graphopt.Engine(graph, graphopt.EngineSettings(intra_op=1), state_dir=state) as engine,
    ):
        row = storm(engine, options.deltas, options.clients, options.per_second, plans)
    report("swap_storm", [row])


def storm(
    engine: graphopt.Engine,
    n_deltas: int,
    n_clients: int,
    per_second: float,
    plans: "weakref.WeakSet[Plan]",
) -> dict[str, float]:
    """Expectations, an undisturbed spell, the storm."""
    node = next(id for id, n in engine.graph.nodes.items() if n.op == "aten.mul.Tensor")
    inputs = {engine.graph.inputs[0][0]: torch.randn(8, 256)}
    name = engine.graph.outputs[0][0]
    expected = {}
    for variant in range(VARIANTS):
        engine.apply(_delta(node, variant))
        expected[variant] = engine.run(inputs).outputs[name].clone()
    variant_of = {engine.revision: VARIANTS - 1}
    engine.settle(SETTLE_S)  # else the undisturbed spell is that of a worse plan
    quiet = _spell(
        engine, inputs, name, expected, variant_of, n_clients, lambda: time.sleep(UNDISTURBED_S)
    )
    publishes: list[float] = []
    swaps: list[tuple[float, float]] = []
    rss: list[int] = []
    live_max = 0

    def swap_all() -> None:
        nonlocal live_max
        for i in range(n_deltas):
            variant_of[engine.revision + 1] = i % VARIANTS
            start = time.perf_counter()
            engine.apply(_delta(node, i % VARIANTS))
            swaps.append((start, time.perf_counter()))
            publishes.append(engine.model.slot.publish_s)
            plans.add(engine.model.slot.plan)
            if per_second:
                time.sleep(max(0.0, start + 1 / per_second - time.perf_counter()))
            if i % 500 == 0:
                live_max = max(live_max, len(plans))
                rss.append(rss_bytes())

    stormy = _spell(engine, inputs, name, expected, variant_of, n_clients, swap_all)
    engine.settle(60)
    gc.collect()
    overlapped = _overlapping(stormy, swaps)
    as_drawn = _overlapping(quiet, _moved(swaps, min(t.starts[0] for t in quiet), UNDISTURBED_S))
    calm = [
        end - start for tally in quiet for start, end in zip(tally.starts, tally.ends, strict=True)
    ]
    return {
        "deltas": n_deltas,
        "per_second": per_second or n_deltas / (swaps[-1][1] - swaps[0][0]),
        "switch_us": sys.getswitchinterval() * 1e6,
        "answers": sum(len(t.ends) for t in stormy),
        "failed": sum(t.failed for t in stormy),
        "wrong": sum(t.wrong for t in stormy),
        "bitwise": sum(t.bitwise for t in stormy),
        "within_tolerance": sum(t.within for t in stormy),
        "calm_p50_ms": statistics.median(calm) * 1e3,
        "calm_p99_ms": percentile(calm, 0.99) * 1e3,
        "calm_as_drawn_p99_ms": percentile(as_drawn, 0.99) * 1e3,
        "overlap_p50_ms": statistics.median(overlapped) * 1e3,
        "overlap_p99_ms": percentile(overlapped, 0.99) * 1e3,
        "publish_p50_us": statistics.median(publishes) * 1e6,
        "publish_p99_us": percentile(publishes, 0.99) * 1e6,
        "publish_max_us": max(publishes) * 1e6,
        "live_p50_ms": statistics.median(e - s for s, e in swaps) * 1e3,
        "rss_growth_mb": (rss[-1] - rss[len(rss) // 10]) / 1e6,
        "plans_alive_max": live_max,
        "plans_alive_after": len(plans),
    }


def _delta(node: str, variant: int) -> graphopt.Delta:
    return graphopt.Delta([graphopt.SetAttr(node, "other", 0.5 + variant / 64)])


def _spell(engine, inputs, name, expected, variant_of, n_clients, work) -> list[Tally]:  # type: ignore[no-untyped-def]
    stop = threading.Event()
    tallies = [Tally() for _ in range(n_clients)]
    clients = [
        threading.Thread(
            target=_client, args=(engine, inputs, name, expected, variant_of, stop, tally)
        )
        for tally in tallies
    ]
    for client in clients:
        client.start()
    work()
    stop.set()
    for client in clients:
        client.join()
    return tallies


def _client(engine, inputs, name, expected, variant_of, stop, tally) -> None:  # type: ignore[no-untyped-def]
    torch.set_num_threads(1)
    while not stop.is_set():
        start = time.perf_counter()
        try:
            result = engine.run(inputs)
        except graphopt.GraphoptError:
            tally.failed += 1
            continue
        tally.starts.append(start)
        tally.ends.append(time.perf_counter())
        wanted = expected[variant_of[result.revision]]
        if torch.equal(result.outputs[name], wanted):
            tally.bitwise += 1
        elif torch.allclose(result.outputs[name], wanted, rtol=TOLERANCE, atol=TOLERANCE):
            tally.within += 1
        else:
            tally.wrong += 1


def _moved(
    swaps: list[tuple[float, float]], start_s: float, length_s: float
) -> list[tuple[float, float]]:
    """The first swaps, as they followed each other, moved into the spell that begins at `start_s`."""
    shift_s = start_s - swaps[0][0]
    moved = [(start + shift_s, end + shift_s) for start, end in swaps]
    return [window for window in moved if window[1] < start_s + length_s]


def _overlapping(tallies: list[Tally], swaps: list[tuple[float, float]]) -> list[float]:
    """Latencies of the requests that were running while a delta was being applied."""
    found = []
    for tally in tallies:
        i = 0
        for start, end in zip(tally.starts, tally.ends, strict=True):
            while i < len(swaps) and swaps[i][1] < start:
                i += 1
            if i < len(swaps) and swaps[i][0] < end:
                found.append(end - start)
    return found


if __name__ == "__main__":
    main()
