"""What each exact rewrite gains on each runtime: the same region with and without it.

    python -m benchmarks.rewrites [--models a,b] [--backends openvino,onnxruntime] [--rounds N] [--adapter]

The whole network is one region at batch 1, built on the runtime as the builder builds it: without any
rewrite, with each pass alone that finds something to do, and with all that the runtime takes. All
variants run in this process, in turns of 30 ms in rotating order; `speed_up` is the median over rounds
of the time without rewrites over the time with, `low` and `high` its one-sided 95% bounds. Every
variant's answer is compared with the module's. `--adapter` measures the networks with a rank 8 LoRA
adapter on the query and value projections attached.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import graphopt
from benchmarks import zoo
from benchmarks.harness import report, take_turns
from benchmarks.paired import bounds
from graphopt.analysis.facts import Facts, analyse
from graphopt.analysis.regions import Region
from graphopt.executor.backend import Backend, Options, backends, passes_of
from graphopt.executor.runs import eager_run, run_region
from graphopt.planner.layout import whole
from graphopt.rewrite import PASSES, Lowered, lower

ERROR_MAX = 1e-4  # of the scale; float32 in another order
RANK, ALPHA = 8, 16
ADAPTED = ("query", "value", "q_proj", "v_proj")
Function = Callable[[], torch.Tensor]


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", default=",".join(zoo.NETWORKS))
    parser.add_argument("--backends", default="openvino,onnxruntime")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--adapter", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for name in options.models.split(","):
        network = zoo.build(name)
        graph = _adapted(network.graph()) if options.adapter else network.graph()
        for backend in options.backends.split(","):
            print(f"{name} on {backend}", file=sys.stderr, flush=True)
            rows += _rows(network, graph, backends()[backend], options)
    report("rewrites", rows, threads=options.threads, adapter=options.adapter)


def _rows(
    network: zoo.Network, graph: graphopt.Graph, backend: Backend, options: argparse.Namespace
) -> list[dict[str, Any]]:
    facts = analyse(graph)
    region = run_region(facts, whole(facts)[0])
    taken = passes_of(backend)
    variants = {"none": lower(facts, region, {}), "taken": lower(facts, region, taken)}
    for name, run in PASSES.items():
        alone = lower(facts, region, {name: run})
        if sum(step.edits for step in alone.steps):
            variants[name] = alone
    functions: dict[str, Function] = {}
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        expected = _eager(network, facts, region)()
        for name, lowered in variants.items():
            folder = Path(scratch) / name
            functions[name] = _built(network, facts, region, lowered, backend, options, folder)
            _check(name, functions[name](), expected)
        times = take_turns(functions, options.rounds, pace="none")
    rows = []
    for name in functions:
        pairs = zip(times["none"], times[name], strict=True)
        ratio = bounds([without / with_ for without, with_ in pairs])
        steps = variants[name].steps
        rows.append(
            {
                "model": network.name,
                "backend": backend.name,
                "passes": name,
                "is_taken": name in taken or name == "taken",
                "edits": sum(step.edits for step in steps),
                "nodes": len(variants[name].region.order),
                "ms": sorted(times[name])[len(times[name]) // 2] * 1e3,
                "speed_up": ratio.median,
                "low": ratio.low,
                "high": ratio.high,
            }
        )
    return rows


def _sizes(network: zoo.Network, region: Region) -> tuple[int, ...]:
    sizes = network.sizes(1)
    return tuple(sizes[name] for name in region.symbols)


def _reads(network: zoo.Network, region: Region) -> list[torch.Tensor]:
    inputs = network.inputs(1)
    return [inputs[ref.id] for ref in region.reads]


def _eager(network: zoo.Network, facts: Facts, region: Region) -> Function:
    step = eager_run(facts, whole(facts)[0])
    arguments = (*_reads(network, region), *step.constants, *_sizes(network, region))
    return lambda: step.function(*arguments)


def _built(
    network: zoo.Network,
    facts: Facts,
    region: Region,
    lowered: Lowered,
    backend: Backend,
    options: argparse.Namespace,
    folder: Path,
) -> Function:
    folder.mkdir()
    wanted = Options(options.threads, 1, _sizes(network, region))
    choice = backend.choices(facts, region, wanted)[0]
    backend.build(lowered.facts, lowered.region, choice, folder)
    constants = [facts.graph.constants[name].tensor for name in region.consts]
    function = backend.load(folder, constants, choice).function
    arguments = (*_reads(network, region), *_sizes(network, region))
    return lambda: function(*arguments)


def _check(name: str, given: torch.Tensor, expected: torch.Tensor) -> None:
    error = float((given - expected).abs().max() / expected.abs().max())
    if not error <= ERROR_MAX:
        raise SystemExit(f"{name}: the answer differs by {error:.2g} of its scale")


def _adapted(graph: graphopt.Graph) -> graphopt.Graph:
    """The graph with a LoRA adapter attached, as `graphoptctl attach` does it."""
    random = torch.Generator().manual_seed(1)
    tensors = {}
    for name in sorted(graph.constants):
        layer, _, kind = name.rpartition(".")
        if kind == "weight" and layer.rpartition(".")[2] in ADAPTED:
            rows, columns = graph.constants[name].tensor.shape
            prefix = f"base_model.model.{layer}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, columns, generator=random) * 0.02
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, RANK, generator=random) * 0.02
    if not tensors:
        raise SystemExit(f"{graph.name} has no projections called {', '.join(ADAPTED)}")
    targets = sorted({name.split(".")[-3] for name in tensors})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": targets}
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, f"{folder}/adapter_model.safetensors")
        Path(folder, "adapter_config.json").write_text(json.dumps(config))
        edit = graphopt.AttachAdapter("measured", folder)
        return graphopt.apply(graph, graphopt.Delta([edit]))


if __name__ == "__main__":
    main()
