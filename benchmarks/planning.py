"""What planning alone takes after a delta, against planning from scratch, and whether both agree.

A thousand random deltas on encoders of 1,000 and 5,000 nodes: nodes inserted, each with a number of its
own, so that the block has a structure that was never priced, nodes taken out, attributes and weights
set, in any layer. Timed is what stands between the facts of the new revision and the list of regions
with their places; facts are made on the live path and timed there (`analysis_scaling`). `from scratch`
knows nothing but the coefficients; `prices known` is a plan from scratch with every structure priced.

    python -m benchmarks.planning [--deltas 1000] [--layer FILE]

Targets: p50 at most 5 ms and p99 at most 25 ms at 1,000 nodes, at 5,000 at least 20 times sooner than
from scratch, and a predicted cost within 1% of the one from scratch on every delta looked at.

`proposals` is all that the builder does for a delta before it builds: the plan repaired, and the list of
what is worth building made of it, with each region's key, what the runtimes can run of it and the
variants; again against doing so with nothing known.
"""

import argparse
import gc
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import percentile, report
from cost_models.calibration import calibrate, thread_counts, write_layer
from cost_models.host_model import HostModel
from cost_models.measuring import available
from graphopt.analysis.facts import Facts, Update, analyse, update
from graphopt.costs.work import work_of
from graphopt.delta import AddNode, Delta, PutConstant, RemoveNode, Rewire, SetAttr, apply_fully
from graphopt.engine.thread_budget import usable_cpus
from graphopt.executor import runs
from graphopt.executor.backend import Options, backends
from graphopt.graph import Ref
from graphopt.planner import foresee, propose, support, variants
from graphopt.planner.forecast import Forecast
from graphopt.planner.layout import chain
from graphopt.planner.planning import Planned, Planner
from graphopt.planner.pricing import Pricing, Way
from tests.helpers.graphs import transformer

SIZES = (1_000, 5_000)
NODES_PER_LAYER = 19
TARGETS = {"p50_ms": 5.0, "p99_ms": 25.0, "sooner": 20.0, "apart_pct": 1.0}
RUNTIMES = ("openvino", "onnxruntime")
SAMPLES = 200
SCRATCH_EACH = 25  # deltas between two plans from scratch
DIM_SIZE = 8


def main() -> None:
    """Measures both sizes and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--deltas", type=int, default=1000)
    parser.add_argument("--layer", type=Path, help="a calibration of this host; measured without")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        layer = arguments.layer or _calibrated(Path(folder) / "host.yaml")
        rows = [_row(HostModel(layer), size, arguments.deltas) for size in SIZES]
    report("planning", rows, targets=TARGETS)


def _calibrated(path: Path) -> Path:
    values = calibrate(thread_counts(usable_cpus()), available(), lambda *_: None)
    write_layer(path, values, "for a benchmark")
    return path


def _row(model: HostModel, size: int, count: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    n_layers = max((size - 17) // NODES_PER_LAYER, 1)
    facts = analyse(transformer(n_layers))
    ways = [Way(backends()[name], Options(2)) for name in RUNTIMES]
    sizes = {symbol.name: DIM_SIZE for symbol in facts.graph.symbols}

    def planner() -> Planner:
        return Planner(Pricing(model, ways, Options(2), sizes))

    _teach(model, facts, sizes, ways)
    kept = planner()
    planned = kept.plan(facts)
    gc.collect()
    gc.freeze()
    times: list[float] = []
    scratch: list[float] = []
    priced: list[float] = []
    apart = 0.0
    document = {
        "backends": list(RUNTIMES), "threads": 2, "streams": 1, "buckets": [sizes],
        "buckets_share": 1.0, "restless": [], "latency_s": 2e-3 * n_layers,
        "costs": {
            "coefficients": {each.name: each.value for each in model.effective()},
            "sizes": sizes, "samples": [],
        },
    }  # fmt: skip
    proposing = _Proposing(document)
    proposing.after(facts)
    proposed: list[float] = []
    anew_s: list[float] = []
    choose = random.Random(0)
    for number in range(count):
        edit = _edit(choose, planned.facts, n_layers, number)
        applied = apply_fully(planned.facts.graph, edit)
        step = update(planned.facts, applied.graph, applied.change)
        before = planned
        planned, took_s = _timed(lambda: kept.after(before, step))  # noqa: B023
        times.append(took_s)
        proposed.append(_seconds(lambda: proposing.after(step.facts, step)))  # noqa: B023
        if number % SCRATCH_EACH == 0:
            anew_s.append(_seconds(_Proposing(document).forgetful, step.facts))
            new = planner()
            anew, took_s = _timed(lambda: new.plan(step.facts))  # noqa: B023
            scratch.append(took_s)
            priced.append(_timed(lambda: new.plan(step.facts))[1])  # noqa: B023
            apart = max(apart, abs(anew.seconds / planned.seconds - 1))
    p50, whole = statistics.median(times), statistics.median(scratch)
    return {
        "nodes": len(facts.graph),
        "blocks": len(chain(facts)),
        "deltas": count,
        "p50_ms": p50 * 1e3,
        "p99_ms": percentile(times, 0.99) * 1e3,
        "scratch_ms": whole * 1e3,
        "sooner": whole / p50,
        "priced_ms": statistics.median(priced) * 1e3,
        "sooner_priced": statistics.median(priced) / p50,
        "apart_pct": 100 * apart,
        "regions": len(planned.regions),
        "proposals_p50_ms": statistics.median(proposed) * 1e3,
        "proposals_p99_ms": percentile(proposed, 0.99) * 1e3,
        "proposals_scratch_ms": statistics.median(anew_s) * 1e3,
        "proposals_sooner": statistics.median(anew_s) / statistics.median(proposed),
    }


class _Proposing:
    """What the builder keeps between proposals for one model."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._document = document
        self._forecast: Forecast | None = None

    def after(self, facts: Facts, *changes: Update) -> None:
        """Proposes for the revision that `changes` led to."""
        standing = (self._forecast, changes) if self._forecast is not None else None
        self._forecast = foresee(facts, self._document, standing)
        assert propose(facts, self._document, forecast=self._forecast)["plans"]

    def forgetful(self, facts: Facts) -> None:
        """Proposes with nothing known of any run, structure or price, and puts what was back."""
        known = [
            (cache, dict(cache)) for cache in (support._VERDICTS, variants._CHOICES, runs._KNOWN)
        ]
        for cache, _ in known:
            cache.clear()  # type: ignore[attr-defined]
        self.after(facts)
        for cache, kept in known:
            cache.update(kept)  # type: ignore[attr-defined]


def _seconds(make: Callable[..., None], *arguments: Any) -> float:
    gc.disable()
    begun = time.perf_counter()
    make(*arguments)
    took_s = time.perf_counter() - begun
    gc.enable()
    return took_s


def _timed(make: Callable[[], Planned]) -> tuple[Planned, float]:
    gc.disable()
    begun = time.perf_counter()
    found = make()
    assert found.regions
    took_s = time.perf_counter() - begun
    gc.enable()
    return found, took_s


def _teach(model: HostModel, facts: Facts, sizes: dict[str, int], ways: list[Way]) -> None:
    """As many samples as a service has after a while; what they say does not matter here."""
    choose = random.Random(1)
    regions = [facts.regions[block] for block in chain(facts)]
    found = {region.key: work_of(facts, region, sizes) for region in regions}
    for number in range(SAMPLES):
        work = choose.choice(list(found.values()))
        other = type(work)(f"{work.key} {number}", work.sizes, work.kernels, work.footprint_bytes)
        for name in ("eager", "fused", *(way.backend.name for way in ways)):
            said = model.predict(other, name, Options(2))
            if said is not None:
                model.observe(other, name, Options(2), said.seconds * choose.uniform(0.9, 1.1))


def _edit(choose: random.Random, facts: Facts, n_layers: int, number: int) -> Delta:
    layer = f"layer.{choose.randrange(n_layers)}"
    there = [id for id in facts.graph.nodes if id.startswith("more.")] if number % 4 == 1 else []
    if there:
        id = choose.choice(there)
        return Delta([Rewire(Ref(id), facts.graph.nodes[id].refs[0]), RemoveNode(id)])
    if number % 4 == 2:
        now = facts.graph.nodes[f"{layer}/gelu"].bound().get("approximate", "none")
        other = "tanh" if now == "none" else "none"
        return Delta([SetAttr(f"{layer}/gelu", "approximate", other)])
    if number % 4 == 3:
        shape = facts.graph.constants[f"{layer}/up.weight"].tensor.shape
        return Delta([PutConstant(f"{layer}/up.weight", torch.full(shape, float(number)))])
    source = Ref(choose.choice([f"{layer}/up", f"{layer}/gelu"]))
    readers = tuple(facts.graph.users[source.id])
    added = AddNode(f"more.{number}", "aten.mul.Tensor", (source, 1.0 + number / 1000))
    return Delta([added, Rewire(source, Ref(added.id), readers)])


if __name__ == "__main__":
    main()
