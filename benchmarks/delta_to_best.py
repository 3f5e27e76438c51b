"""From a delta to the best plan: how long until what ran on a runtime runs on it again.

    python -m benchmarks.delta_to_best [--deltas 4] [--no-fresh]

BERT-base from config at 1x128, settled, then deltas of three kinds, each to another of the 12 layers: a
node inserted, a weight matrix replaced, a LoRA adapter attached. Between the kinds it is rolled back. A
layer that has deltas again and again within a minute is left on the live path on purpose.
`best` is the time from the call of `apply` to the store of a plan in which the touched layer is on
its runtime again; no client has requests meanwhile, so a core is free. Beside it the same runtime
given the whole edited graph, by our own build and load alone, and a fresh engine on the edited
graph, with no artifact at hand, to its first plan on a runtime (`--no-fresh` leaves it and the
comparison of latencies out).
"""

import argparse
import json
import math
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file

import graphopt
from benchmarks.delta_to_live import bert, example
from benchmarks.harness import percentile, report, table
from benchmarks.paired import bounds
from graphopt.analysis.blocks import CONTEXT
from graphopt.analysis.facts import analyse
from graphopt.executor.backend import Options, backends, passes_of
from graphopt.executor.runs import run_region
from graphopt.planner.layout import whole
from graphopt.rewrite import lower

MB = 1e6
REQUESTS = 30
REST_S = 1.0  # between deltas: they are no burst
SETTLE_S = 600.0
BETWEEN_S = 90.0
WAIT_S = 60.0
LOOK_S = 0.01
PAIRS = 41
RANK = 8
COVERED = 0.95  # of the nodes that ran on a runtime: by layers, what joins them may not

Row = dict[str, Any]


class Published:
    """Tells when a revision has as large a part on runtimes as before its delta."""

    def __init__(self) -> None:
        self.engine: graphopt.Engine | None = None
        self.wanted = 0
        self.reached = threading.Event()
        self.at_s = 0.0

    def expect(self, nodes: int) -> None:
        """From now on waits for a plan with at least so many nodes on runtimes."""
        self.wanted = nodes
        self.reached.clear()

    def __call__(self, name: str, fields: Mapping[str, Any]) -> None:
        """The event sink."""
        if name != "plan.published" or self.engine is None or self.reached.is_set():
            return
        if on_runtimes(self.engine) >= self.wanted:
            self.at_s = time.perf_counter()
            self.reached.set()


def main() -> None:
    """Runs all parts and prints the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--deltas", type=int, default=4, choices=range(1, 5), help="of each kind")
    parser.add_argument("--no-fresh", action="store_true")
    options = parser.parse_args()
    shapes = {name: {0: "batch", 1: "seq"} for name in example()}
    graph = graphopt.from_torch(bert(), example(), dynamic_shapes=shapes, name="bert")
    published = Published()
    extra: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as state, tempfile.TemporaryDirectory() as adapters:
        settings = graphopt.EngineSettings(events=published)
        with graphopt.Engine(graph, settings, state_dir=state) as engine:
            published.engine = engine
            ask(engine)
            engine.settle(SETTLE_S)
            kinds = {
                "node inserted": lambda i: insert(engine, i),
                "weights replaced": lambda i: replace(engine, i),
                "adapter attached": lambda i: attach(engine, i, Path(adapters)),
            }
            rows = []
            for k, (name, make) in enumerate(kinds.items()):
                numbers = range(k * options.deltas, (k + 1) * options.deltas)
                rows.append(kind_row(name, engine, published, make, numbers))
                table(name, rows[-1:])
                engine.rollback(1)  # each kind meets the model as it was
                ask(engine)
                engine.settle(BETWEEN_S)
            engine.apply(insert(engine, 0))
            ask(engine)
            edited, reference = engine.model.graph, rows[0]["best_p50_s"]
            rows.append(anew_row(edited, reference))
            if not options.no_fresh:
                row, extra = fresh_row(engine, edited, reference)
                rows.append(row)
    report("delta_to_best", rows, **extra)
    if extra:
        print(json.dumps(extra))


def on_runtimes(engine: graphopt.Engine) -> int:
    """Nodes of the published plan that run on a runtime; not those of the context, which belongs to no
    layer: only a region of everything computes it.
    """
    plan, context = engine.model.slot.plan, engine.model.facts.regions.get(CONTEXT)
    beside = set(context.order) if context is not None else set()
    on = [step for step in plan.steps if step.tier not in ("eager", "fused")]
    return sum(id not in beside for step in on for id in step.nodes)


def ask(engine: graphopt.Engine, times: int = REQUESTS) -> None:
    """Some requests, so that a shape is hot."""
    for _ in range(times):
        engine.run(example())


def kind_row(
    name: str,
    engine: graphopt.Engine,
    published: Published,
    make: Callable[[int], Any],
    numbers: range,
) -> Row:
    """Deltas of one kind, by number, each to another layer."""
    best, live, cpu, reused, peak = [], [], [], [], []
    for i in numbers:
        time.sleep(REST_S)
        ask(engine, 3)
        delta, before = make(i), on_runtimes(engine)
        steps = {id(step) for step in engine.model.slot.plan.steps}
        published.expect(int(COVERED * before))
        with Watch() as watch:
            start_s = time.perf_counter()
            live.append(engine.apply(delta).live_s)
            is_back = published.reached.wait(WAIT_S)
        best.append(published.at_s - start_s if is_back else math.inf)
        cpu.append(watch.cpu_s)
        peak.append(watch.peak_mb)
        now = engine.model.slot.plan.steps
        reused.append(sum(id(step) in steps for step in now) / len(now))
    return {
        "what": name,
        "deltas": len(numbers),
        "live_p50_ms": statistics.median(live) * 1e3,
        "best_p50_s": statistics.median(best),
        "best_max_s": percentile(best, 1.0),
        "cpu_p50_s": statistics.median(cpu),
        "peak_extra_mb": max(peak),
        "regions_reused": statistics.median(reused),
        "times": 1.0,
    }


def layer_of(i: int) -> int:
    """Not neighbours one after the other, and none twice."""
    return (5 * i + 3) % 12


def insert(engine: graphopt.Engine, i: int) -> Any:
    """One node after a layer's activation."""
    stem = f"bert.encoder.layer.{layer_of(i)}."
    nodes = engine.model.graph.nodes
    target = next(n for n in nodes if n.startswith(stem) and nodes[n].op == "aten.gelu.default")
    node = {
        "value": f"${target}",
        "id": f"probe.{layer_of(i)}",
        "op": "aten.mul.Scalar",
        "args": [f"${target}", 1.01 + i / 1000],
    }
    return {"delta": 1, "edits": [{"insert_after": node}]}


def replace(engine: graphopt.Engine, i: int) -> Any:
    """New values for the widest matrix of a layer."""
    name = f"bert.encoder.layer.{layer_of(i)}.output.dense.weight"
    tensor = engine.model.graph.constants[name].tensor
    return graphopt.Delta([graphopt.PutConstant(name, tensor * (1.001 + i / 1000))])


def attach(engine: graphopt.Engine, i: int, folder: Path) -> Any:
    """A LoRA adapter for the queries of one layer, in PEFT's format."""
    layer, name = layer_of(i), f"adapter{i}"
    home = folder / name
    home.mkdir()
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": ["query"],
        "layers_to_transform": [layer],
    }
    (home / "adapter_config.json").write_text(json.dumps(config))
    stem = f"base_model.model.bert.encoder.layer.{layer}.attention.self.query"
    tensors = {
        f"{stem}.lora_A.weight": torch.randn(RANK, 768) * 0.02,
        f"{stem}.lora_B.weight": torch.randn(768, RANK) * 0.02,
    }
    save_file(tensors, home / "adapter_model.safetensors")
    path = folder / f"{name}.yaml"
    path.write_text(f"delta: 1\nedits:\n  - attach_adapter: {{name: {name}, path: {name}}}\n")
    return str(path)


def anew_row(graph: graphopt.Graph, reference_s: float) -> Row:
    """The whole edited graph by the same runtime: lowered, built and loaded, nothing else."""
    facts = analyse(graph)
    region = run_region(facts, whole(facts)[0])
    backend = backends()["openvino"]
    sizes = tuple({"batch": 1, "seq": example()["input_ids"].shape[1]}[s] for s in region.symbols)
    options = Options(psutil.cpu_count() or 1, 1, sizes)
    constants = [graph.constants[name].tensor for name in region.consts]
    took, cpu = [], []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as folder, Watch() as watch:
            start_s = time.perf_counter()
            lowered = lower(facts, region, passes_of(backend))
            backend.build(lowered.facts, lowered.region, options, Path(folder))
            backend.load(Path(folder), constants, options)
            took.append(time.perf_counter() - start_s)
        cpu.append(watch.cpu_s)
    best_s = statistics.median(took)
    return {
        "what": "whole graph anew, same runtime",
        "deltas": len(took),
        "best_p50_s": best_s,
        "best_max_s": max(took),
        "cpu_p50_s": statistics.median(cpu),
        "times": best_s / reference_s,
    }


def fresh_row(
    engine: graphopt.Engine, graph: graphopt.Graph, reference_s: float
) -> tuple[Row, dict[str, Any]]:
    """A fresh engine on the edited graph, and how its settled plan compares with that of `engine`."""
    published = Published()
    settings = graphopt.EngineSettings(events=published)
    engine.settle(SETTLE_S)
    with tempfile.TemporaryDirectory() as state, Watch() as watch:
        start_s = time.perf_counter()
        fresh = graphopt.Engine(graph, settings, state_dir=state)
        published.expect(on_runtimes(engine) // 2)
        published.engine = fresh
        ask(fresh)
        is_there = published.reached.wait(SETTLE_S)
        best_s = published.at_s - start_s if is_there else float("nan")
    row = {
        "what": "fresh engine, no artifact at hand",
        "deltas": 1,
        "best_p50_s": best_s,
        "best_max_s": best_s,
        "cpu_p50_s": watch.cpu_s,
        "peak_extra_mb": watch.peak_mb,
        "times": best_s / reference_s,
    }
    with fresh:
        fresh.settle(SETTLE_S)
        ratios = []
        for i in range(PAIRS):
            took = {}
            for each in (engine, fresh) if i % 2 else (fresh, engine):
                each.run(example())
                start_s = time.perf_counter()
                each.run(example())
                took[each is engine] = time.perf_counter() - start_s
            ratios.append(took[True] / took[False])
        plans = {
            "incremental": engine.model.slot.plan.tiers(),
            "from_scratch": fresh.model.slot.plan.tiers(),
        }
    found = bounds(ratios)
    latency = {"incremental_over_from_scratch": [found.median, found.low, found.high]}
    return row, {**latency, "plans": plans}


class Watch:
    """CPU seconds and peak extra memory of this process and its children, while it is open."""

    def __enter__(self) -> "Watch":
        self._me = psutil.Process()
        self._stop = threading.Event()
        self._start_cpu_s, self._start_bytes = self._cpu_s(), self._bytes()
        self._most_bytes = self._start_bytes
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.cpu_s = self._cpu_s() - self._start_cpu_s
        self._stop.set()
        self._thread.join()
        self.peak_mb = (self._most_bytes - self._start_bytes) / MB

    def _look(self) -> None:
        while not self._stop.wait(LOOK_S):
            self._most_bytes = max(self._most_bytes, self._bytes())

    def _all(self) -> list[psutil.Process]:
        return [self._me, *self._me.children(recursive=True)]

    def _cpu_s(self) -> float:
        return sum(sum(self._of(p, "cpu_times")[:2]) for p in self._all())

    def _bytes(self) -> int:
        return sum(self._of(p, "memory_info")[0] for p in self._all())

    @staticmethod
    def _of(process: psutil.Process, what: str) -> Any:
        try:
            return getattr(process, what)()
        except psutil.Error:  # it has ended
            return (0, 0)


if __name__ == "__main__":
    main()
