"""The fused tier against the eager one, whole plans, six imported families, interleaved runs.

What an engine without runtimes settles on, which is `fused` steps but for those that it found slower
than `eager`, beside `eager` and beside all steps that the tier offers.

    python -m benchmarks.fused_tier [--families minilm,vit-tiny] [--rounds 30] [--threads 1] [--tokens 64]
    python -m benchmarks.fused_tier --linears     # what the thresholds of fused_emit come from

Networks of the zoo, batch 1, 64 tokens or one 224x224 image. `blocks` fuses inside blocks only,
`offered` also across cuts, `settled` is the engine's. `speedup` is the median over rounds of eager time
over the time of `settled` in the same round, which a noisy machine disturbs less than a quotient of
medians.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks import zoo
from benchmarks.harness import report
from graphopt.analysis.facts import Facts, analyse
from graphopt.engine.engine import Engine
from graphopt.engine.records import EngineSettings
from graphopt.executor.build import EagerBuilder, build_plan
from graphopt.executor.fused import FusedBuilder
from graphopt.executor.plan import Plan, Step, run_plan
from graphopt.executor.runs import eager_run, run_of
from graphopt.executor.verify import capture_boundaries, sample_inputs, verify_step
from graphopt.graph import Graph

TOKENS = 64
FAMILIES = ("minilm", "vit-tiny", "resnet-18", "mobilenet-v2", "gpt2-small", "llama-mini")
SETTLE_S = 300.0
TARGET_GEOMEAN, TARGET_LEAST = 1.25, 1.0
LINEARS = (  # rows, in, out: on both sides of each threshold
    (64, 128, 128), (64, 192, 192), (197, 192, 192), (1, 256, 256), (2, 256, 256), (4, 256, 256),
    (64, 256, 256), (197, 256, 256), (1, 192, 768), (2, 192, 768), (8, 192, 768), (64, 192, 768),
    (1, 768, 768), (2, 768, 768), (8, 768, 768), (64, 768, 768), (1, 768, 3072), (2, 768, 3072),
)  # fmt: skip


def main() -> None:
    """Measures, prints the table and writes it as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--linears", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    with torch.no_grad():
        if options.linears:
            report("fused_linears", linear_rows(), threads=options.threads)
            return
        rows = [
            family_row(name, options.rounds, options.tokens) for name in options.families.split(",")
        ]
    speedups = [row["speedup"] for row in rows]
    summary = {
        "geomean": statistics.geometric_mean(speedups),
        "geomean_offered": statistics.geometric_mean([row["speedup_offered"] for row in rows]),
        "geomean_blocks": statistics.geometric_mean([row["speedup_blocks"] for row in rows]),
        "least": min(speedups),
    }
    report(
        f"fused_tier_{options.threads}_threads",
        rows,
        threads=options.threads,
        tokens=options.tokens,
        summary=summary,
    )
    print({name: round(value, 3) for name, value in summary.items()})
    reached = summary["geomean"] >= TARGET_GEOMEAN and summary["least"] >= TARGET_LEAST
    print(
        f"target {TARGET_GEOMEAN}x geomean, none below {TARGET_LEAST}x: {'yes' if reached else 'NO'}"
    )


def family_row(name: str, rounds: int, tokens: int) -> dict[str, Any]:
    """One line of the table."""
    network = zoo.build(name)
    facts = analyse(network.graph())
    inputs = {key: _cut(value, tokens) for key, value in network.inputs(1).items()}
    builder, eager = FusedBuilder(), EagerBuilder()

    def make_run(facts: Facts, block: str) -> Step:
        run = run_of(facts, block)
        found = builder.prepare_run(facts, run) if run[0] == block else None
        return found or eager(facts, block)

    start = time.perf_counter()
    offered = build_plan(facts, 1, make_run)
    prepare_ms = (time.perf_counter() - start) * 1e3
    blocks = build_plan(facts, 1, lambda f, block: builder.prepare(f, block) or eager(f, block))
    start = time.perf_counter()
    share = verify(facts, offered)
    verify_ms = (time.perf_counter() - start) * 1e3
    start = time.perf_counter()
    settled = settle(network.graph(), inputs)
    settle_s = time.perf_counter() - start
    plans = {
        "eager": build_plan(facts, 1, eager), "blocks": blocks, "offered": offered, "settled": settled,
    }  # fmt: skip
    times = interleaved({k: lambda p=p: run_plan(p, inputs) for k, p in plans.items()}, rounds)
    return {
        "family": name,
        **{f"{key}_ms": statistics.median(values) * 1e3 for key, values in times.items()},
        "speedup": paired(times["eager"], times["settled"]),
        "speedup_offered": paired(times["eager"], times["offered"]),
        "speedup_blocks": paired(times["eager"], times["blocks"]),
        "fused_steps": settled.tiers().get("fused", 0),
        "fused_offered": offered.tiers().get("fused", 0),
        "steps": len(settled.steps),
        "settle_s": settle_s,
        "prepare_ms": prepare_ms,
        "verify_ms": verify_ms,
        "error_share": share,
    }


def settle(graph: Graph, inputs: Mapping[str, torch.Tensor]) -> Plan:
    """What an engine without runtimes settles on for requests like this one."""
    settings = EngineSettings(intra_op=torch.get_num_threads(), builder=False)
    with Engine(graph, settings) as engine:
        engine.run(inputs)
        assert engine.settle(SETTLE_S)
        return engine.model.slot.plan


def verify(facts: Facts, plan: Plan) -> float:
    """Proves every fused step; the largest share of its allowed error that one uses up."""
    references = [eager_run(facts, step.blocks) for step in plan.steps]
    blocks = {step.block for step in plan.steps}
    samples = capture_boundaries(plan, references, sample_inputs(facts), blocks)
    worst = 0.0
    for step, reference in zip(plan.steps, references, strict=True):
        if step.tier == "fused":
            verdict = verify_step(facts, step.block, step, reference, [samples[step.block]])
            assert verdict.ok, verdict
            worst = max(worst, verdict.max_error / verdict.allowed if verdict.allowed else 0.0)
    return worst


def linear_rows() -> list[dict[str, Any]]:
    """Ordinary against packed linears with their epilogues, microseconds."""
    linear, nn = torch._C._nn.linear, torch._C._nn
    packed = torch.ops.mkldnn._linear_pointwise.default._op
    binary = torch.ops.mkldnn._linear_pointwise.binary._op
    rows = []
    for n_rows, n_in, n_out in LINEARS:
        x, w, b = torch.randn(1, n_rows, n_in), torch.randn(n_out, n_in), torch.randn(n_out)
        p, other = torch.ops.mkldnn._reorder_linear_weight(w, None), torch.randn(1, n_rows, n_out)
        calls: dict[str, Callable[[], Any]] = {
            "bare": lambda x=x, w=w, b=b: linear(x, w, b),
            "bare_packed": lambda x=x, p=p, b=b: packed(x, p, b, "none", [], ""),
            "relu": lambda x=x, w=w, b=b: torch.relu(linear(x, w, b)),
            "relu_packed": lambda x=x, p=p, b=b: packed(x, p, b, "relu", [], ""),
            "add": lambda x=x, w=w, b=b, o=other: torch.add(linear(x, w, b), o),
            "add_packed": lambda x=x, p=p, b=b, o=other: binary(x, o, p, b, "add"),
            "gelu": lambda x=x, w=w, b=b: nn.gelu(linear(x, w, b)),
            "gelu_packed": lambda x=x, p=p, b=b: packed(x, p, b, "gelu", [], "none"),
        }
        times = interleaved(calls, 200)
        medians = {f"{key}_us": statistics.median(t) * 1e6 for key, t in times.items()}
        rows.append({"size": f"{n_rows}x{n_in}x{n_out}", "macs": n_rows * n_in * n_out, **medians})
    return rows


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, one of each in every round, each round beginning with another."""
    names = list(calls)
    for _ in range(3):
        for call in calls.values():
            call()
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - start)
    return times


def paired(base: list[float], other: list[float]) -> float:
    """The median over rounds of base time over other time."""
    return statistics.median(a / b for a, b in zip(base, other, strict=True))


def _cut(example: torch.Tensor, tokens: int) -> torch.Tensor:
    """As many tokens of the example, where it holds tokens."""
    return example if example.is_floating_point() else example[:, :tokens].clone()


if __name__ == "__main__":
    main()
