"""What `engine(x)` costs beside calling the torch module: a 16-op MLP, where the call is most of
the time.

Interleaved rounds in one process, one torch thread, both under inference mode; medians and the
median of paired ratios. Target <= 1.15.

    python -m benchmarks.call_overhead
"""

import statistics
import time
from collections.abc import Callable

import torch

import graphopt
from benchmarks.harness import report

ROUNDS = 60
CALLS = 200
TARGET_RATIO = 1.15


def main() -> None:
    """Measures widths from launch-bound to compute-bound."""
    torch.set_num_threads(1)
    rows = []
    for width in (16, 64, 256):
        torch.manual_seed(0)
        layers = [
            layer for _ in range(8) for layer in (torch.nn.Linear(width, width), torch.nn.ReLU())
        ]
        module = torch.nn.Sequential(*layers).eval()
        x = torch.randn(1, width)
        graph = graphopt.from_torch(
            module, (torch.randn(2, width),), dynamic_shapes="batch", name="mlp"
        )
        with (
            graphopt.Engine(graph, graphopt.EngineSettings(intra_op=1)) as engine,
            torch.inference_mode(),
        ):
            assert engine.settle(60)
            assert torch.allclose(engine(x), module(x), atol=1e-5)
            ours, theirs = [], []
            for _ in range(ROUNDS):
                ours.append(_round(engine, x))
                theirs.append(_round(module, x))
            ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
            rows.append(
                {
                    "width": width,
                    "module_us": statistics.median(theirs) * 1e6,
                    "engine_us": statistics.median(ours) * 1e6,
                    "ratio": ratio,
                    "target": TARGET_RATIO,
                    "tiers": str(engine.model.slot.plan.tiers()),
                }
            )
    report("call_overhead", rows)


def _round(call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        call(x)
    return (time.perf_counter() - start) / CALLS


if __name__ == "__main__":
    main()
