"""Whether a request that goes through two runtimes is quicker than one that stays in the better of them.

Each network is parted in two at six places along its blocks; each half is a region of its own on each
runtime, on the values that cross there, timed in turns with the whole network on each. The sums are
kind to parting: a half that is timed alone finds its weights in the caches.

    python -m benchmarks.several_runtimes [--networks NAME ...]
"""

import argparse
import gc
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import report, take_turns
from benchmarks.zoo import build
from cost_models.measuring import Call, candidates_of_run
from graphopt.analysis.facts import Facts, analyse
from graphopt.executor.backend import backends
from graphopt.executor.build import EagerBuilder, build_plan
from graphopt.executor.plan import run_steps
from graphopt.planner.layout import Run, chain, whole

NETWORKS = ("resnet-18", "mobilenet-v2", "resnet-50", "vit-tiny")
RUNTIMES = ("openvino", "onnxruntime")
PLACES = (0.15, 0.3, 0.45, 0.6, 0.75, 0.9)  # of the blocks
THREADS = 2
ROUNDS = 9


def main() -> None:
    """Measures each network and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    rows = []
    for name in parser.parse_args().networks:
        rows.append(_row(name))
        gc.collect()
    report("several_runtimes", rows)


def _row(name: str) -> dict[str, Any]:
    torch.set_num_threads(THREADS)
    network = build(name)
    facts, sizes, inputs = analyse(network.graph()), network.sizes(1), network.inputs(1)
    values = _values(facts, inputs)
    blocks = chain(facts)
    places = [round(len(blocks) * share) for share in PLACES]
    runs: dict[str, Run] = {"whole": whole(facts)[0]}
    for place in places:
        runs |= {f"first {place}": blocks[:place], f"rest {place}": blocks[place:]}
    calls: dict[str, Call] = {}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for runtime in RUNTIMES:
            offered = {runtime: backends()[runtime]}
            for label, run in runs.items():
                for found in candidates_of_run(
                    facts, run, sizes, offered, [THREADS], Path(folder), values
                ):
                    calls[f"{runtime} {label}"] = found.call
        times = take_turns(calls, ROUNDS, f"{RUNTIMES[0]} whole")
    took = {label: sorted(each)[ROUNDS // 4] for label, each in times.items()}
    mixed, alike = [], []
    for first in RUNTIMES:
        for second in RUNTIMES:
            for place in places:
                parts = [f"{first} first {place}", f"{second} rest {place}"]
                if all(part in took for part in parts):
                    sums = mixed if first != second else alike
                    sums.append((sum(took[part] for part in parts), place, first))
    best = min(took[f"{runtime} whole"] for runtime in RUNTIMES)
    return {
        "network": name,
        **{f"{runtime}_ms": took[f"{runtime} whole"] * 1e3 for runtime in RUNTIMES},
        "two_runtimes_ms": min(mixed)[0] * 1e3,
        "first": f"{min(mixed)[2]}, {min(mixed)[1]} of {len(blocks)} blocks",
        "one_parted_ms": min(alike)[0] * 1e3,
        "gain": best / min(mixed)[0],
        "gain_of_parting": best / min(alike)[0],
    }


def _values(facts: Facts, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Everything that crosses from one step to another, by name."""
    plan = build_plan(facts, 0, EagerBuilder())
    env, symbols = plan.bind(inputs)
    values = dict(env)
    with torch.inference_mode():
        for step in plan.steps:
            run_steps((step,), env, symbols)
            values |= env
    return values


if __name__ == "__main__":
    main()
