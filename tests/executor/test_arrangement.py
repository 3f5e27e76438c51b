"""Overlays stand exactly as long as nothing they are made of changed, and the plan they make with the
base computes what the graph means.
"""

from itertools import pairwise
from random import Random

import pytest
import torch

from graphopt.analysis.blocks import CONTEXT
from graphopt.analysis.facts import Facts, analyse, update
from graphopt.constants import constant_of
from graphopt.delta import AddNode, Delta, PutConstant, Rewire, apply_fully, invert
from graphopt.errors import GraphoptError
from graphopt.executor.arrangement import Arrangement, Overlay, is_adjacent
from graphopt.executor.build import EagerBuilder, bind_run, build_plan, position_of, weight_key
from graphopt.executor.plan import Plan, run_plan
from graphopt.executor.runs import eager_run, run_region
from graphopt.graph import Ref
from graphopt.planner.layout import chain, layers, whole
from helpers.graphs import feeds_of, reference, same_outputs, transformer
from strategies import draw_delta, draw_graph

make = EagerBuilder()


def overlay(facts: Facts, run: tuple[str, ...]) -> Overlay:
    """A stand-in for a runtime's region: the eager function of the whole run."""
    step = eager_run(facts, run)
    region = run_region(facts, run)
    bound = bind_run(facts, run, region, "runtime", step.function, step.constants)
    return Overlay(bound, ((region.key, weight_key(facts.graph, region)),))


def arranged(facts: Facts, runs: list[tuple[str, ...]]) -> Arrangement:
    return Arrangement.of(build_plan(facts, 1, make), [overlay(facts, run) for run in runs])


def advance(arrangement: Arrangement, facts: Facts, delta: Delta) -> tuple[Arrangement, Facts]:
    applied = apply_fully(facts.graph, delta)
    new = update(facts, applied.graph, applied.change)
    after, _ = arrangement.after(new, arrangement.plan.revision + 1, make)
    return after, new.facts


def assert_means(plan: Plan, facts: Facts) -> None:
    sizes = {symbol.name: symbol.min + 2 for symbol in facts.graph.symbols}
    feeds = feeds_of(facts.graph, sizes, 3)
    try:
        expected = reference(facts.graph, feeds)
    except (RuntimeError, IndexError):  # e.g. an id out of a random table's range
        return
    assert same_outputs(run_plan(plan, feeds), expected)


def test_layers_are_found_and_parted_at_the_same_block():
    facts = analyse(transformer(4))
    runs = layers(facts)
    assert sum(runs, ()) == chain(facts)
    keys = [run_region(facts, run).key for run in runs]
    assert len(set(keys[1:-1])) == 1
    assert len(keys) - 2 >= 3


def test_an_edit_drops_the_overlay_of_its_layer_alone():
    graph = transformer(4)
    facts = analyse(graph)
    runs = layers(facts)
    before = arranged(facts, runs)
    assert {step.tier for step in before.plan.steps if step.block != CONTEXT} == {"runtime"}
    weight = constant_of(torch.randn(8, 8))
    after, new = advance(before, facts, Delta([PutConstant("layer.2/out.weight", weight)]))
    gone = [o for o in before.overlays if o not in after.overlays]
    assert len(gone) == 1
    assert "layer.2/norm" in gone[0].step.blocks or "layer.2/attention/norm" in gone[0].step.blocks
    assert_means(after.plan, new)


def test_a_run_of_everything_computes_the_context_by_itself():
    facts = analyse(transformer(3))
    arrangement = arranged(facts, whole(facts))
    assert len(arrangement.plan.steps) == 1
    assert arrangement.plan.steps[0].blocks[0] == CONTEXT
    assert set(arrangement.plan.steps[0].reads) == {"input_ids", "attention_mask"}
    assert_means(arrangement.plan, facts)
    delta = Delta(
        [
            AddNode("extra", "aten.tanh.default", (Ref("pooler/tanh"),)),
            Rewire(Ref("pooler/tanh"), Ref("extra"), ("classifier",)),
        ]
    )
    after, new = advance(arrangement, facts, delta)
    assert after.overlays == ()
    assert after.plan.steps[0].block == CONTEXT
    assert_means(after.plan, new)
    back, facts = advance(after, new, invert(delta, facts.graph))
    assert_means(back.plan, facts)


@pytest.mark.parametrize("seed", range(60))
def test_overlays_stand_exactly_while_nothing_of_theirs_changed(seed: int):
    random = Random(seed)
    facts = analyse(draw_graph(random, 14))
    arrangement = Arrangement.of(build_plan(facts, 1, make))
    for _ in range(6):
        arrangement = Arrangement.of(arrangement.base, random_overlays(random, facts))
        assert_means(arrangement.plan, facts)
        try:
            after, new = advance(arrangement, facts, draw_delta(random, facts.graph, facts))
        except GraphoptError:
            continue
        check(arrangement, after, new)
        arrangement, facts = after, new


def random_overlays(random: Random, facts: Facts) -> list[Overlay]:
    if random.random() < 0.3:
        return [overlay(facts, run) for run in whole(facts) if run]
    blocks = chain(facts)
    bounds = sorted({0, len(blocks), *(random.randint(0, len(blocks)) for _ in range(3))})
    runs = [blocks[a:b] for a, b in pairwise(bounds)]
    return [overlay(facts, run) for run in runs if run and random.random() < 0.7]


def check(before: Arrangement, after: Arrangement, facts: Facts) -> None:
    assert after.plan.digest == sum(step.digest for step in after.plan.steps)
    kept = {o.step.blocks: o for o in after.overlays}
    for old in before.overlays:
        blocks = old.step.blocks
        stands = is_adjacent(facts, blocks) and all(block in facts.regions for block in blocks)
        if stands:
            region = run_region(facts, blocks)
            same = (region.key, weight_key(facts.graph, region)) == old.artifacts[0]
            parts_a_step = not any(
                step.blocks == blocks or set(step.blocks) <= set(blocks)
                for step in after.base.steps
            )
            if blocks in kept:
                assert same
                fresh = overlay(facts, blocks).step
                assert (kept[blocks].step.reads, kept[blocks].step.writes) == (
                    fresh.reads,
                    fresh.writes,
                )
                assert kept[blocks].step.frees == fresh.frees
            else:
                assert not same or parts_a_step or touched(old, facts)
        else:
            assert blocks not in kept
    assert_means(after.plan, facts)


def touched(old: Overlay, facts: Facts) -> bool:
    """Whether a block of the run computes something else although the run as a whole does not."""
    names = eager_run(facts, old.step.blocks)
    return (names.reads, names.writes, names.nodes) != (
        old.step.reads,
        old.step.writes,
        old.step.nodes,
    )


def test_every_step_is_found_by_its_first_block_and_nothing_else_is() -> None:
    facts = analyse(transformer(3))
    plan = arranged(facts, layers(facts)[:1]).plan
    assert [position_of(plan, step.blocks[0]) for step in plan.steps] == [*range(len(plan.steps))]
    firsts = {step.blocks[0] for step in plan.steps}
    others = [block for block in (*facts.regions, "no such block") if block not in firsts]
    assert {position_of(plan, block) for block in others} == {len(plan.steps)}


def test_without_overlays_the_plan_is_the_base_itself() -> None:
    base = build_plan(analyse(transformer(1)), 1, make)
    assert Arrangement.of(base).plan is base
