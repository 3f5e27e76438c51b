"""How long a host takes: peak, bandwidth, and one small graph on every tier that is there.

All candidates of a graph are called in turns, some calls each, and the lower quartile over the rounds
counts: a neighbour that comes and goes meets all of them, and can only make a round slower. Rounds in
which the host was not calm (`calm.py`) are tried again. Runs in a process of its own, because runtimes
must not share one with requests while they are measured. Deliberately absent: what to make of it.
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from cost_models.calm import WAITED_MAX, Calm, waited_s
from graphopt.analysis.facts import Facts, analyse
from graphopt.costs.plan_cost import as_given
from graphopt.costs.work import Sizes, Work, work_of
from graphopt.executor.backend import Backend, BackendMissingError, Options, backends, passes_of
from graphopt.executor.build import EagerBuilder, build_plan
from graphopt.executor.fused import FusedBuilder
from graphopt.executor.plan import Plan, Step, run_steps, value_key
from graphopt.executor.runs import run_of, run_region
from graphopt.graph import Graph
from graphopt.rewrite import lower
from graphopt.types import TensorType

ROUNDS = 6
PATIENCE = 2  # times as many rounds are tried where some are disturbed
REST_S = 2e-3  # before a turn: the threads of the candidate before spin for a while after its call
TURN_S = 2e-3  # of one candidate in one round
TURN_CALLS = 3  # and at least so many calls
SEED = 7

PEAK_SIDE = 768  # of square matrices: 7 MB, and enough work for every core
WORKING_SETS = {"near": 1 << 18, "middle": 8 << 20, "far": 128 << 20}
FUSED, EAGER = "fused", "eager"
Call = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to run a graph: a call to be timed, and the work of the calls it makes inside."""

    backend: str
    threads: int
    calls: tuple[Work, ...]
    call: Call


@dataclass(frozen=True, slots=True)
class Timed:
    """What a candidate took: the lower quartile of its rounds in seconds."""

    backend: str
    threads: int
    calls: tuple[Work, ...]
    seconds: float


def host_figures(threads: Iterable[int], calm: Calm) -> dict[str, float]:
    """Peak float32 operations and bandwidth, as coefficients by name."""
    found: dict[str, float] = {}
    for level, size in WORKING_SETS.items():
        found[f"host.working_set.{level}"] = float(size)
    for count in threads:
        torch.set_num_threads(count)
        name = f"host.threads_{count}"
        a, b = torch.ones(PEAK_SIDE, PEAK_SIDE), torch.ones(PEAK_SIDE, PEAK_SIDE)
        out = torch.empty_like(a)
        seconds = _alone(partial(torch.mm, a, b, out=out), calm)
        found[f"{name}.peak"] = 2.0 * PEAK_SIDE**3 / seconds
        for level, size in WORKING_SETS.items():
            x, y, z = (torch.ones(size // 12) for _ in range(3))
            seconds = _alone(partial(torch.add, x, y, out=z), calm)
            found[f"{name}.bandwidth.{level}"] = 12.0 * (size // 12) / seconds
    return found


def available(names: Iterable[str] | None = None) -> dict[str, Backend]:
    """The backends whose libraries are there, but for those that take minutes to build."""
    found = {}
    for name, backend in backends().items():
        if getattr(backend, "last_resort", False) or (names is not None and name not in names):
            continue
        try:
            backend.version()
        except BackendMissingError:
            continue
        found[name] = backend
    return found


def time_graph(
    graph: Graph, sizes: Sizes, offered: Mapping[str, Backend], threads: Iterable[int],
    folder: Path, calm: Calm,
) -> list[Timed]:  # fmt: skip
    """Times the whole of `graph` on every tier; what a tier cannot run is left out."""
    facts = analyse(graph)
    found = list(_candidates(facts, sizes, offered, threads, folder))
    return time_in_turns(found, calm)


def time_in_turns(candidates: list[Candidate], calm: Calm, rounds: int = ROUNDS) -> list[Timed]:
    """The lower quartile of each over rounds in which all have a turn."""
    good: list[list[float]] = [[] for _ in candidates]
    bad: list[list[float]] = [[] for _ in candidates]
    with torch.inference_mode():
        for turn in range(rounds * PATIENCE):
            order = range(len(candidates))
            for i in order if turn % 2 else reversed(order):
                if len(good[i]) < rounds:
                    torch.set_num_threads(candidates[i].threads)
                    took_s, is_calm = _turn(candidates[i].call, calm)
                    (good if is_calm else bad)[i].append(took_s)
            if all(len(figures) >= rounds for figures in good):
                break
    return [
        Timed(each.backend, each.threads, each.calls, _quartile(g if len(g) > 1 else g + b))
        for each, g, b in zip(candidates, good, bad, strict=True)
    ]


def candidates_of_run(
    facts: Facts, run: tuple[str, ...], sizes: Sizes, offered: Mapping[str, Backend],
    threads: Iterable[int], folder: Path, reads: Mapping[str, torch.Tensor],
) -> Iterator[Candidate]:  # fmt: skip
    """One run of blocks as one region on every backend that takes it, for given values."""
    region = run_region(facts, run)
    args = [reads[value_key(ref)] for ref in region.reads]
    values = tuple(sizes[name] for name in region.symbols)
    constants = tuple(facts.graph.constants[name].tensor for name in region.consts)
    for name, backend in offered.items():
        if backend.unsupported(facts, region):
            continue
        for count in threads:
            options = Options(count, 1, values)
            choice = next(iter(backend.choices(facts, region, options)), options)
            lowered = lower(facts, region, passes_of(backend))
            place = Path(tempfile.mkdtemp(dir=folder))
            try:
                backend.build(lowered.facts, lowered.region, choice, place)
                function = backend.load(place, constants, choice).function
            finally:
                shutil.rmtree(place, ignore_errors=True)
            work = as_given(facts, region, sizes, name)
            yield Candidate(name, count, (work,), partial(function, *args, *values))


def candidates_of_steps(
    facts: Facts, steps: tuple[Step, ...], tier: str, sizes: Sizes, threads: Iterable[int],
    reads: Mapping[str, torch.Tensor],
) -> Iterator[Candidate]:  # fmt: skip
    """A row of steps that need no build, for given values."""
    works = [work_of(facts, run_region(facts, step.blocks), sizes) for step in steps]
    footprint = sum(work.footprint_bytes for work in works)
    calls = tuple(work.within(footprint) for work in works)
    for count in threads:
        yield Candidate(tier, count, calls, lambda: run_steps(steps, dict(reads), sizes))


def rows_of_steps(facts: Facts, fused: FusedBuilder, eager: EagerBuilder) -> dict[str, Plan]:
    """The plans of a graph on the tiers that need no build; `fused` only where it has a step."""

    def make(facts: Facts, block: str) -> Step:
        run = run_of(facts, block)
        return (fused.prepare_run(facts, run) if run[0] == block else None) or eager(facts, block)

    plans = {EAGER: build_plan(facts, 0, eager), FUSED: build_plan(facts, 0, make)}
    if FUSED not in plans[FUSED].tiers():
        del plans[FUSED]
    return plans


def values_of(facts: Facts, sizes: Sizes) -> dict[str, torch.Tensor]:
    """Inputs of a graph by name, the same every time."""
    generator = torch.Generator().manual_seed(SEED)
    found = {}
    for name, type_ in facts.graph.inputs:
        assert isinstance(type_, TensorType)
        shape = [dim if isinstance(dim, int) else sizes[str(dim)] for dim in type_.shape]
        if type_.is_float:
            found[name] = torch.randn(*shape, generator=generator)
        else:
            found[name] = torch.randint(0, 2, shape, generator=generator)
    return found


def _candidates(
    facts: Facts, sizes: Sizes, offered: Mapping[str, Backend], threads: Iterable[int], folder: Path
) -> Iterator[Candidate]:
    reads, counts = values_of(facts, sizes), list(threads)
    for tier, plan in rows_of_steps(facts, FusedBuilder(), EagerBuilder()).items():
        row = plan.steps
        if tier == FUSED and plan.tiers().get(EAGER):
            continue  # of a mixture, the share of each is unknown
        yield from candidates_of_steps(facts, row, tier, sizes, counts, reads)
    blocks = tuple(
        block for step in build_plan(facts, 0, EagerBuilder()).steps for block in step.blocks
    )
    yield from candidates_of_run(facts, blocks, sizes, offered, counts, folder, reads)


def _turn(call: Call, calm: Calm) -> tuple[float, bool]:
    """The median of a turn's calls, after one that does not count; and whether the host was calm
    before and behind it, and no thread waited for a processor meanwhile.
    """
    time.sleep(REST_S)
    is_calm = calm.wait()
    call()
    took: list[float] = []
    before_s = waited_s()
    start = now = time.perf_counter()
    while len(took) < TURN_CALLS or now - start < TURN_S:
        before = now
        call()
        now = time.perf_counter()
        took.append(now - before)
    is_calm = is_calm and waited_s() - before_s <= WAITED_MAX * (now - start)
    return median(took), is_calm and calm.is_calm()


def _alone(call: Call, calm: Calm) -> float:
    turns = [_turn(call, calm) for _ in range(ROUNDS)]
    return _quartile([took_s for took_s, is_calm in turns if is_calm] or [t for t, _ in turns])


def _quartile(figures: Sequence[float]) -> float:
    """The lower quartile; of four or fewer the second smallest."""
    ordered = sorted(figures)
    return ordered[min(len(ordered) - 1, max(1, len(ordered) // 4))] if ordered else 0.0
