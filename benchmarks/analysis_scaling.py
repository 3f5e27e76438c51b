"""What an edit costs as the graph grows: apply, facts and plan of one-node deltas on encoders of
1,000 to 50,000 nodes.

The delta inserts a shape-preserving node in one layer, the other takes it out again; a third swaps
a weight. All three stages run as they do on the live path, without the journal. Sizes are
interleaved round by round, medians over all rounds; `from scratch` is one analysis and one plan of
the whole graph for comparison. Target: from 1,000 to 50,000 nodes the time grows by at most 1.5x,
at most 2% of nodes re-inferred.

    python -m benchmarks.analysis_scaling [--rounds 40]
"""

import argparse
import gc
import random
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.harness import report
from graphopt.analysis.facts import Facts, analyse, update
from graphopt.delta import AddNode, Delta, PutConstant, RemoveNode, Rewire, apply_fully
from graphopt.executor.build import EagerBuilder, build_plan, replan
from graphopt.executor.plan import Plan
from graphopt.graph import Ref
from tests.helpers.graphs import transformer

SIZES = (1_000, 5_000, 20_000, 50_000)
NODES_PER_LAYER = 19
TARGET_GROWTH = 1.5
TARGET_INFERRED_PCT = 2.0
STAGES = ("apply", "facts", "plan")
KINDS = ("insert", "remove", "weights")


@dataclass(slots=True)
class Subject:
    """One graph with its facts and plan, and the times measured on it."""

    facts: Facts
    plan: Plan
    make: EagerBuilder
    scratch_s: float
    n_layers: int
    times_s: dict[str, dict[str, list[float]]] = field(
        default_factory=lambda: {k: {s: [] for s in STAGES} for k in KINDS}
    )
    inferred: list[int] = field(default_factory=list)

    def run(self, kind: str, delta: Delta) -> None:
        """Applies the delta and keeps the times of its stages."""
        start = time.perf_counter()
        applied = apply_fully(self.facts.graph, delta)
        middle = time.perf_counter()
        done = update(self.facts, applied.graph, applied.change)
        planned = time.perf_counter()
        plan, _ = replan(self.plan, done, self.plan.revision + 1, self.make)
        end = time.perf_counter()
        self.facts, self.plan = done.facts, plan
        for stage, seconds in zip(
            STAGES, (middle - start, planned - middle, end - planned), strict=True
        ):
            self.times_s[kind][stage].append(seconds)
        self.inferred.append(len(done.reran.get("type", ())))


def main() -> None:
    """Measures every size and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    subjects = [subject(size) for size in SIZES]
    gc.collect()
    gc.freeze()
    gc.disable()  # as the serving process does after start-up
    choose = random.Random(0)
    weight = [torch.full((16, 8), float(i)) for i in range(2)]
    for number in range(rounds + 3):
        for each in subjects:
            layer = f"layer.{choose.randrange(each.n_layers)}"
            up, gate = Ref(f"{layer}/up"), Ref("gate")
            each.run(
                "insert", Delta([AddNode("gate", "aten.sigmoid.default", (up,)), Rewire(up, gate)])
            )
            each.run("remove", Delta([Rewire(gate, up), RemoveNode("gate")]))
            each.run("weights", Delta([PutConstant(f"{layer}/up.weight", weight[number % 2])]))
            if number < 3:  # warm-up
                each.inferred.clear()
                for stages in each.times_s.values():
                    for times in stages.values():
                        times.clear()
    report("analysis_scaling", rows(subjects))


def subject(size: int) -> Subject:
    """An encoder of about `size` nodes, analysed and planned."""
    n_layers = max((size - 17) // NODES_PER_LAYER, 1)
    graph, make = transformer(n_layers), EagerBuilder()
    analyse(transformer(1))  # the memo of inferred nodes is warm in a running daemon
    start = time.perf_counter()
    facts = analyse(graph)
    plan = build_plan(facts, 1, make)
    return Subject(facts, plan, make, time.perf_counter() - start, n_layers)


def rows(subjects: list[Subject]) -> list[dict[str, Any]]:
    """One row a size and kind; `growth` is against the smallest size."""
    found: list[dict[str, Any]] = []
    for kind in KINDS:
        totals = []
        for each in subjects:
            stages = each.times_s[kind]
            total = statistics.median(map(sum, zip(*stages.values(), strict=True)))
            totals.append(total)
            found.append(
                {
                    "edit": kind,
                    "nodes": len(each.facts.graph),
                    "total_ms": total * 1e3,
                    **{f"{stage}_ms": statistics.median(stages[stage]) * 1e3 for stage in STAGES},
                    "p99_ms": sorted(map(sum, zip(*stages.values(), strict=True)))[
                        int(0.99 * (len(stages["apply"]) - 1))
                    ]
                    * 1e3,
                    "growth": total / totals[0],
                    "target": TARGET_GROWTH,
                    "inferred_pct": 100 * max(each.inferred) / len(each.facts.graph),
                    "inferred_target_pct": TARGET_INFERRED_PCT,
                    "scratch_ms": each.scratch_s * 1e3,
                }
            )
    return found


if __name__ == "__main__":
    main()
