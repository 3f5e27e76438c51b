"""How well costs are predicted: a calibration, then regions of six networks that it has not seen.

Regions are the layers of a network and its blocks of two nodes or more, each structure once, at batch
1 on every tier there is, each in turns with the others. Every region is timed twice, minutes apart:
predictions are held against the second time, and what a model learns from is the first, so that the
error of measuring is in the figures.

    calibrated    coefficients alone
    network out   and 200 samples of the other networks
    region out    and 200 samples of other regions, whatever their network
    200 samples   and 200 samples of all of them, as a service has after a while
    time again    what the first time says about the second: no prediction can be better

    python -m benchmarks.cost_model [--networks NAME ...] [--repeat]

`--repeat` calibrates twice and compares the two.
"""

import argparse
import random
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import percentile, report
from benchmarks.zoo import build
from cost_models.calibration import calibrate, thread_counts, write_layer
from cost_models.calm import Calm
from cost_models.host_model import HostModel
from cost_models.measuring import (
    Candidate,
    Timed,
    available,
    candidates_of_run,
    candidates_of_steps,
    time_in_turns,
)
from graphopt.analysis.facts import Facts, analyse
from graphopt.costs.work import Work
from graphopt.engine.thread_budget import usable_cpus
from graphopt.errors import GraphoptError
from graphopt.executor.backend import Backend, Options
from graphopt.executor.build import EagerBuilder, build_plan
from graphopt.executor.fused import FusedBuilder
from graphopt.executor.plan import run_steps
from graphopt.executor.runs import eager_run, run_region
from graphopt.planner.layout import chain, layers

NETWORKS = ("bert-mini", "minilm", "resnet-18", "mobilenet-v2", "vit-tiny", "llama-mini")
NODES_MIN = 2
SAMPLES = 200
ROUNDS = 4
PATIENCE_S = 40.0
SEED = 5
CLOSE, GAP = 0.10, 0.10


@dataclass(frozen=True, slots=True)
class Row:
    """One region on one backend: what it is, and the two times it was timed."""

    network: str
    region: str
    backend: str
    threads: int
    work: Work
    first_s: float
    second_s: float


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--repeat", action="store_true", help="calibrate twice")
    options = parser.parse_args()
    counts, offered = thread_counts(usable_cpus()), available()
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{turn}.yaml" for turn in range(1 + options.repeat)]
        for path in paths:
            write_layer(path, calibrate(counts, offered, lambda *_: None), "benchmark")
        rows = collect(options.networks, offered, counts, Path(folder))
        model = HostModel(paths[0])
        table = evaluate(rows, paths[0])
        extra: dict[str, Any] = {"choices": choices(rows, model)}
        if options.repeat:
            extra["repeat"] = repeatability(rows, model, HostModel(paths[1]))
    report("cost_model", table, regions=len({row.work.key for row in rows}), **extra)
    for name, value in extra.items():
        print(f"{name}: {value}")


def collect(
    networks: Iterable[str], offered: Mapping[str, Backend], threads: Sequence[int], folder: Path
) -> list[Row]:
    """Times every region of the networks twice on everything that takes it."""
    rows: list[Row] = []
    seen: set[str] = set()
    calm = Calm(PATIENCE_S)
    for name in networks:
        network = build(name)
        facts, sizes = analyse(network.graph()), network.sizes(1)
        values = environment(facts, network.inputs(1), sizes)
        pending: list[tuple[str, list[Candidate]]] = []
        for run in regions(facts):
            region = run_region(facts, run)
            if region.key not in seen:
                seen.add(region.key)
                found = candidates(facts, run, sizes, offered, threads, folder, values)
                pending.append((region.key, found))
        first = [time_in_turns(found, calm, ROUNDS) for _, found in pending]
        second = [time_in_turns(found, calm, ROUNDS) for _, found in pending]
        for (key, _), old, new in zip(pending, first, second, strict=True):
            rows += [_row(name, key, a, b) for a, b in zip(old, new, strict=True)]
        print(f"{name}: {len(pending)} regions", flush=True)
    return rows


def regions(facts: Facts) -> list[tuple[str, ...]]:
    """The runs of a network: its layers, and its blocks by themselves."""
    runs = [*layers(facts), *((block,) for block in chain(facts))]
    return [run for run in runs if len(run_region(facts, run).order) >= NODES_MIN]


def candidates(
    facts: Facts, run: tuple[str, ...], sizes: Mapping[str, int], offered: Mapping[str, Backend],
    threads: Sequence[int], folder: Path, values: Mapping[str, torch.Tensor],
) -> list[Candidate]:  # fmt: skip
    """Every way to run a region."""
    found: list[Candidate] = []
    steps = {"eager": eager_run(facts, run), "fused": FusedBuilder().prepare_run(facts, run)}
    for tier, step in steps.items():
        if step is not None:
            found += candidates_of_steps(facts, (step,), tier, sizes, threads, values)
    for name, backend in offered.items():
        try:
            one = {name: backend}
            found += candidates_of_run(facts, run, sizes, one, threads, folder, values)
        except GraphoptError as error:
            print(f"{name}: {error}")
    return found


def environment(
    facts: Facts, inputs: Mapping[str, torch.Tensor], sizes: Mapping[str, int]
) -> dict[str, torch.Tensor]:
    """All values that cross between blocks, for one request."""
    steps = build_plan(facts, 0, EagerBuilder()).steps
    env: dict[str, Any] = dict(inputs)
    with torch.inference_mode():
        run_steps(tuple(replace(step, frees=()) for step in steps), env, sizes)
    return env


def evaluate(rows: Sequence[Row], calibration: Path) -> list[dict[str, Any]]:
    """A line for each backend and thread count, and one for all, in each way of learning."""
    found = {
        "calibrated": {row: predict(HostModel(calibration), row) for row in rows},
        "network out": _each(rows, calibration, lambda row: row.network),
        "region out": _each(rows, calibration, lambda row: row.region),
        "200 samples": _all(rows, calibration),
        "time again": {row: row.first_s for row in rows},
    }
    lines = []
    for how, predicted in found.items():
        groups: dict[str, list[Row]] = {"all": list(rows)}
        for row in rows:
            groups.setdefault(f"{row.backend} {row.threads}", []).append(row)
        lines += [_line(how, group, members, predicted) for group, members in groups.items()]
    return lines


def learn(model: HostModel, rows: Sequence[Row]) -> HostModel:
    """`model` after 200 samples drawn from `rows`."""
    drawn = random.Random(SEED).sample(list(rows), min(SAMPLES, len(rows)))
    for row in drawn:
        model.observe(row.work, row.backend, Options(row.threads), row.first_s)
    return model


def predict(model: HostModel, row: Row) -> float:
    """Seconds."""
    found = model.predict(row.work, row.backend, Options(row.threads))
    return found.seconds if found is not None else float("nan")


def pairwise(rows: Sequence[Row], predicted: Mapping[Row, float]) -> tuple[float, int]:
    """The share of pairs of ways to run one region, more than a tenth apart, put in right order."""
    by_region: dict[str, list[Row]] = {}
    for row in rows:
        by_region.setdefault(row.region, []).append(row)
    pairs = [
        (a, b)
        for members in by_region.values()
        for a, b in combinations(members, 2)
        if max(a.second_s, b.second_s) > (1 + GAP) * min(a.second_s, b.second_s)
    ]
    right = sum((predicted[a] < predicted[b]) == (a.second_s < b.second_s) for a, b in pairs)
    return right / max(1, len(pairs)), len(pairs)


def choices(rows: Sequence[Row], model: HostModel) -> dict[str, float]:
    """What choosing by prediction costs over choosing by the clock."""
    return {"regret_pct": 100 * _regret(rows, {row: predict(model, row) for row in rows})}


def repeatability(rows: Sequence[Row], one: HostModel, other: HostModel) -> dict[str, float]:
    """How far two calibrations differ, and what the choices of each take by the clock."""
    ratios = [abs(np.log(predict(one, row) / predict(other, row))) for row in rows]
    took = [
        sum(_chosen(rows, {row: predict(model, row) for row in rows}).values())
        for model in (one, other)
    ]
    return {
        "median_difference_pct": 100 * float(np.median(ratios)),
        "chosen_differ_pct": 100 * abs(took[0] - took[1]) / min(took),
    }


def _regret(rows: Sequence[Row], predicted: Mapping[Row, float]) -> float:
    chosen = _chosen(rows, predicted)
    best = _chosen(rows, {row: row.second_s for row in rows})
    return sum(chosen.values()) / sum(best.values()) - 1


def _chosen(rows: Sequence[Row], predicted: Mapping[Row, float]) -> dict[str, float]:
    best: dict[str, Row] = {}
    for row in rows:
        if row.region not in best or predicted[row] < predicted[best[row.region]]:
            best[row.region] = row
    return {region: row.second_s for region, row in best.items()}


def _line(
    how: str, group: str, rows: Sequence[Row], predicted: Mapping[Row, float]
) -> dict[str, Any]:
    errors = [abs(predicted[row] / row.second_s - 1) for row in rows]
    line: dict[str, Any] = {
        "how": how, "tier, threads": group, "regions": len(rows),
        "within_10_pct": 100 * sum(error <= CLOSE for error in errors) / len(errors),
        "within_25_pct": 100 * sum(error <= 0.25 for error in errors) / len(errors),
        "error_p50_pct": 100 * percentile(errors, 0.5),
        "error_p90_pct": 100 * percentile(errors, 0.9),
    }  # fmt: skip
    if group == "all":
        share, count = pairwise(rows, predicted)
        line |= {"pairs": count, "pairs_right_pct": 100 * share}
        line["regret_pct"] = 100 * _regret(rows, predicted)
    return line


def _each(rows: Sequence[Row], calibration: Path, of: Any) -> dict[Row, float]:
    """Predictions of each group's rows by a model that learned from the others."""
    found: dict[Row, float] = {}
    for group in dict.fromkeys(map(of, rows)):
        model = learn(HostModel(calibration), [row for row in rows if of(row) != group])
        found |= {row: predict(model, row) for row in rows if of(row) == group}
    return found


def _all(rows: Sequence[Row], calibration: Path) -> dict[Row, float]:
    model = learn(HostModel(calibration), rows)
    return {row: predict(model, row) for row in rows}


def _row(network: str, region: str, first: Timed, second: Timed) -> Row:
    (work,) = first.calls
    return Row(network, region, first.backend, first.threads, work, first.seconds, second.seconds)


if __name__ == "__main__":
    main()
