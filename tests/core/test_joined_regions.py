"""The region of a run of blocks: its key says what the run computes and nothing else."""

from random import Random

import pytest
from hypothesis import HealthCheck, given, settings

from graphopt.analysis.blocks import CONTEXT
from graphopt.analysis.facts import Facts, analyse, update
from graphopt.analysis.regions import Region, build_region, join_regions
from graphopt.delta import AddNode, Delta, Rewire, apply_fully
from graphopt.dims import symbol
from graphopt.executor.runs import run_region
from graphopt.graph import Graph, Ref, Symbol
from graphopt.planner.layout import chain, layers, whole
from graphopt.types import TensorType
from helpers.graphs import Builder, transformer
from strategies import draw_graph, randoms

ROWS = TensorType("f32", (symbol("rows"), 8))


def graph_of(b: Builder, out: Ref) -> Graph:
    symbols = [Symbol("rows", 1, 64)]
    return Graph.build("g", b.nodes, [("x", ROWS)], [("y", out)], b.constants, symbols=symbols)


def pair(*, is_shared: bool) -> Facts:
    """Two linears in a row, of one weight or of two."""
    b = Builder()
    first, second = b.weight("a", 8, 8), b.weight("b", 8, 8)
    one = b.node("one", "linear.default", Ref("x"), first)
    two = b.node("two", "linear.default", one, first if is_shared else second)
    return analyse(graph_of(b, two))


def by_walking(facts: Facts, run: tuple[str, ...]) -> Region:
    """The region as one walk over its nodes finds it."""
    inside = set(run)
    exits = run_region(facts, run).exits
    return build_region(facts.graph, facts.type_of, exits, lambda id: facts.home_of(id) in inside)


@settings(
    max_examples=60, deadline=None, database=None, derandomize=True,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(random=randoms)
def test_a_run_takes_computes_and_hands_out_what_its_nodes_do(random: Random) -> None:
    facts = analyse(draw_graph(random, 14))
    blocks = chain(facts)
    if len(blocks) < 2:
        return
    first = random.randrange(len(blocks) - 1)
    run = blocks[first : random.randrange(first + 2, len(blocks) + 1)]
    for each in (run, whole(facts)[0]):
        if len(each) < 2:
            continue
        region, walked = run_region(facts, each), by_walking(facts, each)
        assert set(region.reads) == set(walked.reads)
        assert set(region.consts) == set(walked.consts)
        assert set(region.symbols) == set(walked.symbols)
        assert sorted(region.order) == sorted(walked.order)
        seen = set(region.order)
        for id in reversed(region.order):  # operands first
            seen.remove(id)
            assert not {ref.id for ref in facts.graph.nodes[id].refs} & set(region.order) - seen


def test_the_layers_of_an_encoder_share_a_key_and_an_edit_leaves_the_others() -> None:
    facts = analyse(transformer(5))
    runs = layers(facts)
    keys = [run_region(facts, run).key for run in runs]
    assert len(set(keys[1:-1])) == 1
    up, added = Ref("layer.1/up"), Ref("more")
    edit = Delta([AddNode(added.id, "aten.relu.default", (up,)), Rewire(up, added)])
    applied = apply_fully(facts.graph, edit)
    edited = update(facts, applied.graph, applied.change).facts
    after = [run_region(edited, run).key for run in layers(edited)]
    assert [a == b for a, b in zip(keys, after, strict=True)].count(False) == 1
    assert run_region(edited, whole(edited)[0]).key != run_region(facts, whole(facts)[0]).key


def test_one_weight_in_two_places_is_told_from_two() -> None:
    shared, apart = (run_region(pair(is_shared=each), ("one", "two")) for each in (True, False))
    assert len(shared.consts) == 1
    assert len(apart.consts) == 2
    assert shared.key != apart.key


@pytest.mark.parametrize("mutant", ["reads", "exits", "symbols"])
def test_where_a_value_comes_from_and_goes_to_is_in_the_key(mutant: str) -> None:
    facts = analyse(transformer(2))
    context, *blocks = whole(facts)[0]
    assert context == CONTEXT
    parts = [facts.regions[block] for block in (context, *blocks)]
    exits = (parts[-1].exits[0],)
    key = join_regions(parts, exits).key
    if mutant == "exits":
        assert join_regions(parts, (parts[-2].exits[0],)).key != key
        return
    at = next(i for i, part in enumerate(parts) if i and len(getattr(part, mutant)) >= 2)
    part = parts[at]
    turned = {"reads": part.reads, "symbols": part.symbols, mutant: getattr(part, mutant)[::-1]}
    parts[at] = Region(
        part.key, part.order, turned["reads"], part.consts, turned["symbols"], part.exits
    )
    assert join_regions(parts, exits).key != key
