"""Plans of different tiers published one after another under four closed-loop clients.

Every runtime that is there runs the network once, kept to it by a pin, and so do `eager` and `fused`;
then their plans take turns, each published between two requests. Every answer is compared with what
its own plan answers alone (equal bit for bit, else within TOLERANCE of it: runtimes may choose other
kernels beside other threads). Memory is looked at from the first tenth on.

    python -m benchmarks.tier_swaps [--model mlp] [--swaps 10000] [--clients 4] [--per-second 200]
"""

import argparse
import gc
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import torch

import graphopt
from benchmarks import zoo
from benchmarks.harness import percentile, report, rss_bytes
from graphopt.executor.arrangement import Arrangement
from graphopt.executor.plan import run_plan

TOLERANCE = 1e-4  # of the largest value
SETTLE_S = 180.0
PIN_S = 3600.0


@dataclass
class Tally:
    """What one client saw."""

    answers: Counter[str] = field(default_factory=Counter)  # by plan
    bitwise: int = 0
    within: int = 0
    wrong: int = 0
    failed: int = 0


def main() -> None:
    """Runs the swaps and prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="mlp")
    parser.add_argument("--swaps", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--per-second", type=float, default=200.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    net = zoo.build(options.model)
    inputs = net.inputs(1)
    with graphopt.Engine(net.graph(), graphopt.EngineSettings(intra_op=1)) as engine:
        plans = arrangements(engine, inputs)
        row = swap(engine, plans, inputs, options)
    report("tier_swaps", [{"model": options.model, "swaps": options.swaps} | row])


def arrangements(
    engine: graphopt.Engine, inputs: dict[str, torch.Tensor]
) -> dict[str, Arrangement]:
    """What the model settles on where only one tier is allowed, by tier."""
    found: dict[str, Arrangement] = {}
    better, name = engine.host.better, engine.model.name
    for tier in ("eager", "fused", *better.supply.versions()):
        better.pin(name, "benchmark", "one tier at a time", PIN_S, ("eager", tier))
        for _ in range(3):
            engine.run(inputs)
            if not engine.settle(SETTLE_S):
                raise SystemExit(f"not settled on {tier} after {SETTLE_S:.0f} s")
        arrangement = engine.model.arrangement
        if tier in arrangement.plan.tiers():
            found[tier] = arrangement
    return found


def swap(
    engine: graphopt.Engine,
    plans: dict[str, Arrangement],
    inputs: dict[str, torch.Tensor],
    options: argparse.Namespace,
) -> dict[str, object]:
    """The swaps, under clients."""
    model = engine.model
    name = engine.graph.outputs[0][0]
    expected = {each.plan.id: run_plan(each.plan, inputs)[name].clone() for each in plans.values()}
    expected[model.slot.plan.id] = run_plan(model.slot.plan, inputs)[name].clone()
    stop = threading.Event()
    tallies = [Tally() for _ in range(options.clients)]
    clients = [
        threading.Thread(target=_client, args=(engine, inputs, name, expected, stop, tally))
        for tally in tallies
    ]
    for client in clients:
        client.start()
    row, lost, rss, publishes = list(plans.values()), 0, [], []
    for i in range(options.swaps):
        start = time.perf_counter()
        if not model.publish(model.arrangement, row[i % len(row)]):
            lost += 1
        publishes.append(model.slot.publish_s)
        if i % 100 == 0:
            rss.append(rss_bytes())
        time.sleep(max(0.0, start + 1 / options.per_second - time.perf_counter()))
    stop.set()
    for client in clients:
        client.join()
    gc.collect()
    seen: Counter[str] = sum((tally.answers for tally in tallies), Counter())
    by_id = {each.plan.id: tier for tier, each in plans.items()}
    return {
        "tiers": ", ".join(f"{by_id.get(plan, plan)} {count}" for plan, count in seen.items()),
        "answers": seen.total(),
        "failed": sum(tally.failed for tally in tallies),
        "wrong": sum(tally.wrong for tally in tallies),
        "bitwise": sum(tally.bitwise for tally in tallies),
        "within_tolerance": sum(tally.within for tally in tallies),
        "lost_swaps": lost,
        "publish_p99_us": percentile(publishes, 0.99) * 1e6,
        "rss_growth_mb": (rss[-1] - rss[len(rss) // 10]) / 1e6,
    }


def _client(engine, inputs, name, expected, stop, tally) -> None:  # type: ignore[no-untyped-def]
    torch.set_num_threads(1)
    while not stop.is_set():
        try:
            result = engine.run(inputs)
        except graphopt.GraphoptError:
            tally.failed += 1
            continue
        tally.answers[result.plan_id] += 1
        got, wanted = result.outputs[name], expected.get(result.plan_id)
        if wanted is None:
            tally.wrong += 1
        elif torch.equal(got, wanted):
            tally.bitwise += 1
        elif float((got - wanted).abs().max()) <= TOLERANCE * float(wanted.abs().max()):
            tally.within += 1
        else:
            tally.wrong += 1


if __name__ == "__main__":
    main()
