"""Deltas one after another under four closed-loop clients: nothing fails, nothing is answered by a
mixture, nothing leaks.

A delta sets one of a few scales, so the right answer of every revision is known beforehand: each
answer is compared with the answer of its own revision, bitwise when its plan is the one the
expectation was computed on, within TOLERANCE of the reference otherwise. Spells of deltas alternate
with spells of the same clients undisturbed, because a shared host is twice as slow in one second as in
the next: what a swap costs is the median over rounds of what requests that overlap one take over the
calm ones of their round. A long request overlaps more moments than a short one, so the calm ones are
also those that overlap moments drawn as the swaps were, which is what swaps that cost nothing would
show.

    python -m benchmarks.swap_storm [--deltas 10000] [--clients 4] [--rounds 40]
"""

import argparse
import gc
import sys
import tempfile
import threading
import time
import weakref
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import graphopt
from benchmarks.harness import percentile, report, rss_bytes
from benchmarks.paired import bounds
from graphopt.executor.plan import Plan

VARIANTS = 8
TOLERANCE = 1e-5  # of an output of order 1, fused against eager
SETTLE_S = 120.0
CALM_S = 2.0
BETWEEN_S = (
    3.0  # for what the last deltas left to do; more of it would leave the block restless no more
)


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
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--per-second", type=float, default=0.0, help="deltas; 0: back to back")
    parser.add_argument("--switch-interval-us", type=float, default=5000.0, help="of the GIL")
    parser.add_argument(
        "--threads",
        type=int,
        default=2,
        help="requests at once, each on one CPU; 2 as for throughput",
    )
    options = parser.parse_args()
    sys.setswitchinterval(options.switch_interval_us / 1e6)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    graph = graphopt.from_torch(Net(), (torch.randn(8, 256),), name="net")
    plans: weakref.WeakSet[Plan] = weakref.WeakSet()
    with (
        tempfile.TemporaryDirectory() as state,
        graphopt.Engine(
            graph, graphopt.EngineSettings(options.threads, intra_op=1), state_dir=state
        ) as engine,
    ):
        storm = Storm(engine, options.clients, options.per_second, plans)
        for _ in range(options.rounds):
            storm.round(options.deltas // options.rounds)
        row = {"threads": options.threads, **storm.row()}
    report("swap_storm", [row])


class Storm:
    """Rounds of a calm spell and one of deltas on one engine, and what they showed."""

    def __init__(
        self,
        engine: graphopt.Engine,
        clients: int,
        per_second: float,
        plans: "weakref.WeakSet[Plan]",
    ) -> None:
        """Learns the right answers and waits for the best plan, else calm spells are those of a worse one."""
        self._engine, self._clients, self._per_second, self._plans = (
            engine, clients, per_second, plans
        )  # fmt: skip
        self._node = next(id for id, n in engine.graph.nodes.items() if n.op == "aten.mul.Tensor")
        self._inputs = {engine.graph.inputs[0][0]: torch.randn(8, 256)}
        self._output = engine.graph.outputs[0][0]
        self._first = engine.revision + 1
        self._right: list[torch.Tensor] = []
        for _ in range(VARIANTS):
            self._apply()
            self._right.append(engine.run(self._inputs).outputs[self._output].clone())
        engine.settle(SETTLE_S)
        # Flat: what is noted must not look like a leak
        self._calm, self._drawn, self._over = array("d"), array("d"), array("d")
        self._swaps, self._publish_s = array("d"), array("d")
        self._costs: list[dict[str, float]] = []
        self._rss = array("q")
        self._alive_max = 0
        self._totals: Counter[str] = Counter()
        self._stormy_s = 0.0

    def round(self, deltas: int) -> None:
        """A calm spell and one of `deltas`."""
        self._engine.settle(BETWEEN_S)
        calm = self._spell(lambda: time.sleep(CALM_S))
        swaps: list[tuple[float, float]] = []

        def swap_all() -> None:
            for _ in range(deltas):
                start_s = time.perf_counter()
                self._apply()
                swaps.append((start_s, time.perf_counter()))
                self._publish_s.append(self._engine.model.slot.publish_s)
                self._plans.add(self._engine.model.slot.plan)
                self._alive_max = max(self._alive_max, len(self._plans))
                if self._per_second:
                    due_s = start_s + 1 / self._per_second
                    time.sleep(max(0.0, due_s - time.perf_counter()))

        stormy = self._spell(swap_all)
        drawn = _overlapping(calm, _moved(swaps, min(t.starts[0] for t in calm), CALM_S))
        over = _overlapping(stormy, swaps)
        plain = [e - s for tally in calm for s, e in zip(tally.starts, tally.ends, strict=True)]
        for kept, values in ((self._calm, plain), (self._drawn, drawn), (self._over, over)):
            kept.extend(values)
        self._swaps.extend(end - start for start, end in swaps)
        noted = (self._calm, self._drawn, self._over, self._swaps, self._publish_s)
        self._rss.append(rss_bytes() - sum(8 * len(each) for each in noted))
        self._stormy_s += swaps[-1][1] - swaps[0][0]
        p50, p99 = (percentile(over, q) * 1e3 for q in (0.5, 0.99))
        self._costs.append(
            {
                "p50": p50 - percentile(plain, 0.5) * 1e3,
                "p99": p99 - percentile(plain, 0.99) * 1e3,
                "drawn p99": p99 - percentile(drawn, 0.99) * 1e3,
            }
        )
        for tally in (*calm, *stormy):
            for name in ("failed", "wrong", "bitwise", "within"):
                self._totals[name] += getattr(tally, name)

    def row(self) -> dict[str, Any]:
        """What came of it."""
        self._engine.settle(SETTLE_S)
        gc.collect()
        p50, p99, drawn = (
            bounds([cost[name] for cost in self._costs]) for name in ("p50", "p99", "drawn p99")
        )
        early = self._rss[len(self._rss) // 10]
        return {
            "deltas": len(self._swaps),
            "per_second": len(self._swaps) / self._stormy_s,
            "switch_us": sys.getswitchinterval() * 1e6,
            "answers": sum(self._totals.values()) - self._totals["failed"],
            **self._totals,
            "calm_p50_ms": percentile(self._calm, 0.5) * 1e3,
            "calm_p99_ms": percentile(self._calm, 0.99) * 1e3,
            "drawn_p99_ms": percentile(self._drawn, 0.99) * 1e3,
            "overlap_p50_ms": percentile(self._over, 0.5) * 1e3,
            "overlap_p99_ms": percentile(self._over, 0.99) * 1e3,
            "over_calm_p50_ms": p50.median,
            "over_calm_p99_ms": p99.median,
            "over_calm_p99_low_ms": p99.low,
            "over_calm_p99_high_ms": p99.high,
            "over_drawn_p99_ms": drawn.median,
            "publish_p50_us": percentile(self._publish_s, 0.5) * 1e6,
            "publish_max_us": max(self._publish_s) * 1e6,
            "live_p50_ms": percentile(self._swaps, 0.5) * 1e3,
            "rss_growth_mb": (self._rss[-1] - early) / 1e6,
            "plans_alive_max": self._alive_max,
            "plans_alive_after": len(self._plans),
            "costs": self._costs,
        }

    def _apply(self) -> None:
        scale = 0.5 + self._variant(self._engine.revision + 1) / 64
        self._engine.apply(graphopt.Delta([graphopt.SetAttr(self._node, "other", scale)]))

    def _variant(self, revision: int) -> int:
        return (revision - self._first) % VARIANTS

    def _spell(self, work: Callable[[], None]) -> list[Tally]:
        stop = threading.Event()
        tallies = [Tally() for _ in range(self._clients)]
        clients = [threading.Thread(target=self._client, args=(stop, each)) for each in tallies]
        for client in clients:
            client.start()
        work()
        stop.set()
        for client in clients:
            client.join()
        return tallies

    def _client(self, stop: threading.Event, tally: Tally) -> None:
        torch.set_num_threads(1)
        while not stop.is_set():
            start_s = time.perf_counter()
            try:
                result = self._engine.run(self._inputs)
            except graphopt.GraphoptError:
                tally.failed += 1
                continue
            tally.starts.append(start_s)
            tally.ends.append(time.perf_counter())
            answer, right = (
                result.outputs[self._output],
                self._right[self._variant(result.revision)],
            )
            if torch.equal(answer, right):
                tally.bitwise += 1
            elif torch.allclose(answer, right, rtol=TOLERANCE, atol=TOLERANCE):
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
