"""The trial of the new steps of a plan alone: what it times, what it compares, and when it gives way."""

import dataclasses
import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scripted_plans import Clock

from graphopt.analysis.facts import analyse
from graphopt.executor.beginnings import Beginnings
from graphopt.executor.build import EagerBuilder, build_plan
from graphopt.executor.idle_trial import IdleTrial
from graphopt.executor.plan import Plan, Step
from graphopt.executor.publish import Slot
from graphopt.executor.step_trial import StepTrial, parting, stretches, unproven
from graphopt.executor.trial import ACCEPTANCE, Trial
from graphopt.graph import Graph, Node, Ref, Symbol
from graphopt.types import TensorType
from helpers.graphs import BATCH, Builder

LENGTH = 12
X = {"x": torch.tensor([-1.0, 2.0])}


def chain() -> Graph:
    b, x = Builder(), Ref("x")
    for i in range(LENGTH):
        x = b.node(f"step.{i}", "relu.default", x)
    return Graph.build("chain", b.nodes, [("x", TensorType("f32", (2,)))], [("y", x)], {})


BASE = build_plan(analyse(chain()), 1, EagerBuilder())


def plan(
    clock: Clock,
    seconds: dict[int, float],
    runs: dict[int, Callable] | None = None,
    base: Plan = BASE,
) -> Plan:
    """`base` with some steps that take so long, or do something else."""
    steps = list(base.steps)
    for i, took_s in seconds.items():
        run = (runs or {}).get(i, torch.relu)

        def timed(x, *_, run=run, took_s=took_s):
            clock.now_s += took_s
            return run(x)

        steps[i] = dataclasses.replace(steps[i], function=timed)
    return Plan(
        base.graph, 1, tuple(steps), base.digest + 1 + len(seconds) + hash(str(seconds)) % 999
    )


SETTINGS = dataclasses.replace(ACCEPTANCE, warmup_pairs=0)


def by_steps(clock: Clock, current: Plan, candidate: Plan, proven=frozenset()):
    trial, begun = Trial(current.id, candidate.id, SETTINGS), Beginnings(current, [X])
    return StepTrial(trial, begun, candidate, Slot(current, clock), clock, proven).run()


def by_requests(clock: Clock, current: Plan, candidate: Plan):
    trial = Trial(current.id, candidate.id, SETTINGS)
    return IdleTrial(trial, current, candidate, [X], Slot(current, clock), clock).run()


def layers(clock: Clock, seed: int = 0) -> Plan:
    """Every step takes 10 ms, give or take a quarter, as on a busy host."""
    noise = torch.Generator().manual_seed(seed)
    current = plan(clock, {})

    def busy(x, *_):
        clock.now_s += 0.01 * float(1 + 0.5 * torch.rand(1, generator=noise))
        return torch.relu(x)

    steps = tuple(dataclasses.replace(step, function=busy) for step in current.steps)
    return Plan(current.graph, 1, steps, current.digest + 7)


def test_one_layer_of_twelve_is_told_where_whole_requests_say_nothing() -> None:
    clock = Clock()
    current = layers(clock)
    candidate = plan(clock, {5: 0.006}, base=current)
    result = by_steps(clock, current, candidate)
    assert result is not None
    assert result.verdict == "better"
    assert result.ratio == pytest.approx(0.006 / 0.0125, rel=0.2)
    assert result.pairs < 12
    whole = by_requests(clock, current, candidate)
    assert whole is not None
    assert whole.ratio is not None
    assert whole.ratio > 0.9


def test_a_new_step_that_is_slower_is_worse() -> None:
    clock = Clock()
    current = layers(clock)
    result = by_steps(clock, current, plan(clock, {5: 0.03}, base=current))
    assert result is not None
    assert result.verdict == "worse"


def test_new_steps_that_answer_otherwise_fail() -> None:
    clock = Clock()
    current = layers(clock)
    wrong = plan(clock, {5: 0.001}, {5: lambda x: torch.relu(x) + 0.1}, base=current)
    result = by_steps(clock, current, wrong)
    assert result is not None
    assert (result.verdict, "differs" in result.reason) == ("failed", True)


def test_new_steps_that_raise_fail() -> None:
    clock = Clock()
    current = layers(clock)

    def broken(x):
        raise RuntimeError("no such device")

    result = by_steps(clock, current, plan(clock, {5: 0.001}, {5: broken}, base=current))
    assert result is not None
    assert (result.verdict, "no such device" in result.reason) == ("failed", True)


@given(st.sets(st.integers(0, LENGTH - 1)))
def test_what_lies_outside_the_parting_is_shared(changed: set[int]) -> None:
    clock = Clock()
    other = plan(clock, dict.fromkeys(changed, 0.0))
    first, last = parting(BASE.steps, other.steps)
    assert all(BASE.steps[i] is other.steps[i] for i in range(first))
    assert all(BASE.steps[-1 - i] is other.steps[-1 - i] for i in range(last))
    assert (first, last) == (
        (min(changed), LENGTH - 1 - max(changed)) if changed else (LENGTH, 0)
    )  # fmt: skip


def joined(steps: tuple[Step, ...]) -> Step:
    """One step over all blocks of `steps`, as a region of a runtime is."""
    blocks = tuple(block for step in steps for block in step.blocks)
    return dataclasses.replace(steps[-1], blocks=blocks, tier="runtime")


def laid(bounds: set[int], replaced: set[int] = frozenset()) -> tuple[Step, ...]:
    """The base cut at `bounds`; what is longer than one step, and what is `replaced`, is a new step."""
    cuts = sorted({0, LENGTH, *bounds})
    runs = [BASE.steps[a:b] for a, b in itertools.pairwise(cuts)]
    return tuple(
        run[0] if len(run) == 1 and i not in replaced else joined(run) for i, run in enumerate(runs)
    )


CUTS = st.sets(st.integers(1, LENGTH - 1))


@given(CUTS, CUTS, st.sets(st.integers(0, LENGTH)))
def test_stretches_are_the_smallest_that_make_one_plan_of_the_other(a, b, replaced) -> None:
    old, new = laid(a), laid(b, replaced)
    made, at = [], 0
    for stretch in stretches(old, new):
        made += old[at : stretch.first]
        made += stretch.new
        at = stretch.first + len(stretch.old)
        assert old[stretch.first : at] == stretch.old
        ends = [list(itertools.accumulate(len(s.blocks) for s in part)) for part in stretch[1:]]
        assert ends[0][-1] == ends[1][-1]
        assert set(ends[0][:-1]).isdisjoint(ends[1][:-1])  # nowhere inside do both begin anew
    assert tuple(made) + old[at:] == new


def test_a_stretch_is_timed_once_for_each_kind_and_not_where_its_steps_have_won() -> None:
    keyed = [dataclasses.replace(step, key=f"key.{i % 3}") for i, step in enumerate(BASE.steps)]
    new = [dataclasses.replace(step, tier="runtime") for step in keyed]
    assert [each.first for each in unproven(keyed, new, frozenset())] == [0, 1, 2]
    won = {("runtime", f"key.{i}") for i in range(3)}
    assert [each.first for each in unproven(keyed, new, won - {("runtime", "key.1")})] == [1]
    assert unproven(keyed, new, won) == []


def test_what_won_on_a_runtime_has_not_won_on_the_live_path() -> None:
    """A region that does not load any more: its blocks fall back to steps of the same structure."""
    old = [dataclasses.replace(step, tier="runtime", key=step.block) for step in BASE.steps]
    new = [dataclasses.replace(old[0], tier="eager"), *old[1:]]
    assert [each.first for each in unproven(old, new, {("runtime", old[0].key)})] == [0]


def test_what_won_before_is_left_out_of_the_comparison() -> None:
    """Five layers that are slower today, and one that is new and quicker."""
    clock = Clock()
    base = Plan(
        BASE.graph, 1,
        tuple(dataclasses.replace(s, key=f"key.{i}") for i, s in enumerate(BASE.steps)), BASE.digest,
    )  # fmt: skip
    current = plan(clock, dict.fromkeys(range(LENGTH), 0.01), base=base)
    candidate = plan(clock, {**dict.fromkeys(range(5), 0.05), 7: 0.005}, base=current)
    result = by_steps(clock, current, candidate, {("eager", f"key.{i}") for i in range(5)})
    assert result is not None
    assert (result.verdict, result.ratio) == ("better", pytest.approx(0.5))


def test_where_a_stretch_begins_is_computed_once_and_stays_as_it_was() -> None:
    clock = Clock()
    current = plan(clock, dict.fromkeys(range(LENGTH), 0.01))
    begun = Beginnings(current, [X])
    env, _ = begun.at(X, 5)
    assert clock.now_s == pytest.approx(0.05)
    env.clear()
    again, symbols = begun.at(X, 7)
    assert clock.now_s == pytest.approx(0.07)  # on from the nearest
    assert dict(symbols) == {}
    assert sorted(again) == ["step.6"]
    assert sorted(begun.at(X, 5)[0]) == ["step.4"]
    assert clock.now_s == pytest.approx(0.07)


def test_a_run_behind_its_own_plan_needs_no_other_to_warm_up() -> None:
    """Two runs a block, but of pairs ABBA the middle is one stretch of B."""
    clock, runs = Clock(), []
    current = plan(clock, {5: 0.01}, {5: lambda x: runs.append("a") or torch.relu(x)})
    candidate = plan(clock, {5: 0.01}, {5: lambda x: runs.append("b") or torch.relu(x)})
    settings = dataclasses.replace(SETTINGS, pairs_max=2, gives_up=False)
    trial = Trial(current.id, candidate.id, settings)
    StepTrial(trial, Beginnings(current, [X]), candidate, Slot(current, clock), clock).run()
    assert "".join(runs) in ("aabbbaa", "bbaaabb")


def test_a_run_in_another_shape_warms_nothing_up() -> None:
    """Of four pairs that take turns in two shapes, each block is of two runs."""
    graph = Graph.build(
        "chain", [Node("y", "aten.relu.default", (Ref("x"),))],
        [("x", TensorType("f32", (BATCH,)))], [("y", Ref("y"))], {}, None, (Symbol("batch"),),
    )  # fmt: skip
    base, clock, runs = build_plan(analyse(graph), 1, EagerBuilder()), Clock(), []

    def arm(name: str) -> Plan:
        def run(x: torch.Tensor, *_: int) -> torch.Tensor:
            runs.append((name, len(x)))
            clock.now_s += 0.01
            return torch.relu(x)

        steps = (dataclasses.replace(base.steps[-1], function=run),)
        return Plan(graph, 1, (*base.steps[:-1], *steps), base.digest + ord(name))

    current, candidate = arm("a"), arm("b")
    trial = Trial(
        current.id, candidate.id, dataclasses.replace(SETTINGS, pairs_max=4, gives_up=False)
    )
    inputs = [{"x": torch.ones(3)}, {"x": torch.ones(5)}]
    IdleTrial(trial, current, candidate, inputs, Slot(current, clock), clock).run()
    blocks = [(key, len(list(group))) for key, group in itertools.groupby(runs)]
    assert len(blocks) == 8
    assert {length for _, length in blocks} == {2}


def test_everywhere_means_each_place_of_one_kind() -> None:
    clock = Clock()
    current = plan(clock, dict.fromkeys(range(LENGTH), 0.01))
    candidate = plan(clock, dict.fromkeys((2, 5, 8), 0.005), base=current)
    for everywhere, seconds in ((False, 0.01), (True, 0.03)):
        trial = Trial(current.id, candidate.id, SETTINGS)
        driver = StepTrial(
            trial, Beginnings(current, [X]), candidate, Slot(current, clock), clock, everywhere=everywhere
        )  # fmt: skip
        result = driver.run()
        assert result is not None
        assert result.buckets[0].current_s == pytest.approx(seconds)
        assert result.buckets[0].candidate_s == pytest.approx(seconds / 2)
