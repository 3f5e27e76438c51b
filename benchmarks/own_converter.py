"""What OpenVINO's own frontend gains where no rule of ours writes an op: whole plans, three ways.

    python -m benchmarks.own_converter [--networks unet,lstm] [--rounds N] [--threads N] [--batch N]

Networks whose blocks hold an op without a rule, weights of a fixed seed. `live` runs every block on the
tiers of the live path; `cut` lays OpenVINO regions over it as the planner cuts them without the
frontend, `spliced` with it. All three run in this process, in turns of 30 ms in rotating order; `gain`
is the median over rounds of the time of the quicker of `live` and `cut` (by median) over that of
`spliced`, `low` and `high` are its one-sided 95% bounds. Answers are compared with eager torch's.
`ask_ms` is what the planner waits for the frontend's verdicts in a fresh process.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import graphopt
from benchmarks.harness import report, take_turns
from benchmarks.paired import bounds
from graphopt.analysis.facts import Facts, analyse
from graphopt.executor.arrangement import Arrangement, Overlay
from graphopt.executor.backend import Options, passes_of
from graphopt.executor.backends.openvino import OpenVinoBackend
from graphopt.executor.backends.openvino_frontend import OpenVinoFrontend
from graphopt.executor.build import EagerBuilder, bind_run, build_plan
from graphopt.executor.fused import FusedBuilder
from graphopt.executor.plan import Plan, Step, run_plan
from graphopt.executor.runs import run_of, run_region
from graphopt.planner.layout import whole
from graphopt.planner.support import Support
from graphopt.rewrite import lower

ERROR_MAX = 1e-4  # of the scale; float32 in another order
Way = Callable[[], dict[str, Tensor]]


class CuttingBackend(OpenVinoBackend):
    """OpenVINO as it was before: an op without a rule cuts."""

    converter = None


class SplicingBackend(OpenVinoBackend):
    """With a frontend that nobody has asked yet."""

    converter = OpenVinoFrontend()


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    with torch.inference_mode():
        for name in options.networks.split(","):
            print(name, file=sys.stderr, flush=True)
            rows.append(row_of(name, options))
    gain = statistics.geometric_mean([row["gain"] for row in rows])
    report("own_converter", rows, threads=options.threads, batch=options.batch, geomean=gain)
    print(f"geomean of gain: {gain:.3f}")


def row_of(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One network, measured."""
    torch.manual_seed(0)
    module, shape = NETWORKS[name]()
    module.eval().requires_grad_(False)
    graph = graphopt.from_torch(module, torch.randn(2, *shape), "batch", name, share_memory=True)
    facts = analyse(graph)
    inputs = {graph.inputs[0][0]: torch.randn(options.batch, *shape)}
    base = _live(facts)
    with tempfile.TemporaryDirectory() as scratch:
        cut = _laid(facts, base, CuttingBackend(), options, Path(scratch) / "cut")
        begun = time.perf_counter()
        Support(facts, SplicingBackend().unsupported).pieces(whole(facts)[0])
        ask_ms = (time.perf_counter() - begun) * 1e3
        spliced = _laid(facts, base, SplicingBackend(), options, Path(scratch) / "spliced")
        ways = {
            key: lambda plan=plan: run_plan(plan, inputs)
            for key, plan in {"live": base, "cut": cut[0], "spliced": spliced[0]}.items()
        }
        expected = module(*inputs.values())
        for key, way in ways.items():
            _check(f"{name} {key}", way(), expected)
        times = take_turns(ways, options.rounds, pace="spliced")
    medians = {key: statistics.median(values) for key, values in times.items()}
    best = min(("live", "cut"), key=lambda key: medians[key])
    ratio = bounds([a / b for a, b in zip(times[best], times["spliced"], strict=True)])
    return {
        "network": name,
        "converted": ", ".join(f"{op} {n}" for op, n in Counter(spliced[1]).items()),
        **{f"{key}_ms": value * 1e3 for key, value in medians.items()},
        "regions": f"{cut[2]} -> {spliced[2]}",
        "best": best,
        "gain": ratio.median,
        "low": ratio.low,
        "high": ratio.high,
        "ask_ms": ask_ms,
    }


def _live(facts: Facts) -> Plan:
    builder, eager = FusedBuilder(), EagerBuilder()

    def make(facts: Facts, block: str) -> Step:
        run = run_of(facts, block)
        found = builder.prepare_run(facts, run) if run[0] == block else None
        return found or builder.prepare(facts, block) or eager(facts, block)

    return build_plan(facts, 1, make)


def _laid(
    facts: Facts, base: Plan, backend: OpenVinoBackend, options: argparse.Namespace, folder: Path
) -> tuple[Plan, tuple[str, ...], int]:
    """The plan with the backend's regions over `base`, what it converted, and the number of regions."""
    overlays: list[Overlay] = []
    converted: tuple[str, ...] = ()
    for run in Support(facts, backend.unsupported).pieces(whole(facts)[0]):
        region = run_region(facts, run)
        piece = folder / str(len(overlays))
        piece.mkdir(parents=True)
        sizes = tuple(options.batch for _ in region.symbols)
        choice = backend.choices(facts, region, Options(options.threads, 1, sizes))[0]
        lowered = lower(facts, region, passes_of(backend))
        backend.build(lowered.facts, lowered.region, choice, piece)
        constants = [facts.graph.constants[name].tensor for name in region.consts]
        loaded = backend.load(piece, constants, choice)
        converted += loaded.converted
        step = bind_run(facts, run, region, backend.name, loaded.function, ())
        overlays.append(Overlay(step, ()))
    laid = Arrangement.of(base, overlays)
    return laid.plan, converted, len(laid.overlays)


def _check(what: str, given: Mapping[str, Tensor], expected: Tensor) -> None:
    (value,) = given.values()
    error = float((value - expected).abs().max() / expected.abs().max())
    if not error <= ERROR_MAX:
        raise SystemExit(f"{what}: the answer differs by {error:.2g} of its scale")


# -- networks: a module and the shape of one input without its batch


class UNet(nn.Module):
    """Ronneberger et al., arXiv:1505.04597, three levels; bilinear upsampling."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        sizes = [width, 2 * width, 4 * width]
        self.down = nn.ModuleList(map(self._pair, [3, *sizes[:-1]], sizes))
        ups = [(sizes[2] + sizes[1], sizes[1]), (sizes[1] + sizes[0], sizes[0])]
        self.up = nn.ModuleList(self._pair(*pair) for pair in ups)
        self.head = nn.Conv2d(width, 2, 1)

    @staticmethod
    def _pair(n_in: int, n_out: int) -> nn.Module:
        parts: list[nn.Module] = []
        for size in (n_in, n_out):
            parts += [nn.Conv2d(size, n_out, 3, padding=1), nn.BatchNorm2d(n_out), nn.ReLU()]
        return nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        x = self.down[0](x)
        skips = [x]
        for down in self.down[1:]:
            x = down(F.max_pool2d(x, 2))
            skips.append(x)
        for up, skip in zip(self.up, skips[-2::-1], strict=True):
            x = F.interpolate(x, scale_factor=2, mode="bilinear")
            x = up(torch.cat([x, skip], 1))
        return self.head(x)


class Residual(nn.Module):
    """`x + inner(x)`."""

    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*inner)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return x + self.inner(x)


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.function(x)


class EinsumAttention(nn.Module):
    """Attention as papers write it, two einsums a layer."""

    def __init__(self, size: int = 256, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.scale = heads, (size // heads) ** -0.5
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        mix = (torch.einsum("bihd,bjhd->bhij", q, k) * self.scale).softmax(-1)
        return self.out(torch.einsum("bhij,bjhd->bihd", mix, v).flatten(2))


class Recurrent(nn.Module):
    """An LSTM and a head."""

    def __init__(self, size: int = 128) -> None:
        super().__init__()
        self.lstm = nn.LSTM(size, size, 2, batch_first=True)
        self.head = nn.Linear(size, 16)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.head(F.relu(self.lstm(x)[0]))


class Transformed(nn.Module):
    """Jaderberg et al., arXiv:1506.02025: features sampled on a grid that the image moves."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 2, 1))
        ys, xs = torch.meshgrid(torch.linspace(-1, 1, 96), torch.linspace(-1, 1, 96), indexing="ij")
        self.register_buffer("grid", torch.stack([xs, ys], -1)[None])
        self.features = nn.Sequential(
            nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        grid = self.grid + self.offset(x).permute(0, 2, 3, 1).tanh() * 0.1
        return self.features(F.grid_sample(x, grid, align_corners=False))


Made = tuple[nn.Module, tuple[int, ...]]


def _generator() -> Made:
    parts: list[nn.Module] = [nn.ConvTranspose2d(64, 256, 4)]
    for n_in, n_out in ((256, 128), (128, 64), (64, 32)):
        parts += [nn.BatchNorm2d(n_in), nn.ReLU(), nn.ConvTranspose2d(n_in, n_out, 4, 2, 1)]
    return nn.Sequential(*parts, nn.Conv2d(32, 3, 3, padding=1), nn.Tanh()), (64, 1, 1)


def _style() -> Made:
    def block() -> nn.Module:
        def half() -> list[nn.Module]:
            return [nn.Conv2d(48, 48, 3, padding=1), nn.InstanceNorm2d(48, affine=True)]

        return Residual(*half(), nn.ReLU(), *half())

    stem, head = nn.Conv2d(3, 48, 3, padding=1), nn.Conv2d(48, 3, 3, padding=1)
    return nn.Sequential(stem, *(block() for _ in range(4)), head), (3, 64, 64)


def _gate() -> nn.Module:
    return Residual(nn.LayerNorm(256), nn.Linear(256, 1024), nn.GLU(), nn.Linear(512, 256))


def _gated() -> Made:
    return nn.Sequential(*(_gate() for _ in range(6)), nn.LayerNorm(256)), (64, 256)


def _between(middle: nn.Module) -> Made:
    """Two large regions without `middle`, one with it."""

    def side() -> list[nn.Module]:
        norm, up, down = nn.LayerNorm(256), nn.Linear(256, 512), nn.Linear(512, 256)
        return [Residual(norm, up, nn.GELU(), down)] * 4

    return nn.Sequential(*side(), middle, *side()), (64, 256)


def _bicubic() -> Made:
    stem, head = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 3, 3, padding=1)
    up = nn.Upsample(scale_factor=2, mode="bicubic")
    return nn.Sequential(stem, nn.ReLU(), up, nn.ReLU(), head), (3, 64, 64)


def _einsum() -> Made:
    def layer() -> list[nn.Module]:
        inner = [nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256)]
        attention = Residual(nn.LayerNorm(256), EinsumAttention())
        return [attention, Residual(nn.LayerNorm(256), *inner)]

    return nn.Sequential(*(part for _ in range(4) for part in layer())), (64, 256)


def _points() -> Made:
    parts: list[nn.Module] = []
    for n_in, n_out in ((3, 64), (64, 128), (128, 512)):
        parts += [nn.Conv1d(n_in, n_out, 1), nn.BatchNorm1d(n_out), nn.ReLU()]
    most = Apply(lambda x: torch.max(x, 2)[0])
    return nn.Sequential(*parts, most, nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 40)), (
        3,
        1024,
    )


def _tokens() -> Made:
    fold = [nn.Unfold(3, padding=1, stride=2), Apply(lambda x: x.transpose(1, 2))]
    inner = [nn.LayerNorm(192), nn.Linear(192, 384), nn.GELU(), nn.Linear(384, 192)]
    stem = [nn.Conv2d(3, 16, 7, 2, 3), nn.ReLU()]
    return nn.Sequential(*stem, *fold, nn.Linear(144, 192), Residual(*inner)), (3, 96, 96)


def _video() -> Made:
    parts: list[nn.Module] = [nn.Conv3d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool3d(2)]
    for _ in range(2):
        parts += [Residual(nn.Conv3d(32, 32, 3, padding=1), nn.BatchNorm3d(32), nn.ReLU())]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(32, 10)), (
        3, 8, 48, 48,
    )  # fmt: skip


NETWORKS: Mapping[str, Callable[[], Made]] = {
    "unet": lambda: (UNet(), (3, 128, 128)),
    "generator": _generator,
    "style": _style,
    "gated": _gated,
    "einsum": _einsum,
    "points": _points,
    "tokens": _tokens,
    "grid": lambda: (Transformed(), (3, 96, 96)),
    "video": _video,
    "lstm": lambda: (Recurrent(), (32, 128)),
    "one_gate": lambda: _between(_gate()),
    "one_sort": lambda: _between(Apply(lambda x: x.sort(-1)[0])),
    "one_log1p": lambda: _between(Apply(lambda x: x.abs().log1p())),
    "bicubic": _bicubic,
}

if __name__ == "__main__":
    main()
