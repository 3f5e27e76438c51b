"""What the planner chooses is the cheapest of all ways to part and place the blocks, and a plan that was
repaired along deltas is the plan from scratch.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from math import inf
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from graphopt.analysis.blocks import CONTEXT, START
from graphopt.analysis.facts import Facts, analyse, update
from graphopt.analysis.regions import Region, build_region
from graphopt.costs.model import Prediction
from graphopt.costs.work import Work
from graphopt.delta import AddNode, Delta, RemoveNode, Rewire, SetAttr, SetOutputs, apply_fully
from graphopt.dims import symbol
from graphopt.errors import GraphoptError
from graphopt.executor.backend import Options
from graphopt.executor.runs import joins
from graphopt.graph import Graph, Ref, Symbol
from graphopt.planner.block_table import CUT
from graphopt.planner.chain_tree import Leaf, Tree, grown, with_leaf, without
from graphopt.planner.layout import chain
from graphopt.planner.planning import Planned, Planner
from graphopt.planner.pricing import Pricing, Way, class_of
from graphopt.types import TensorType
from helpers.graphs import Builder, transformer
from strategies import draw_delta, draw_graph, randoms

LIVE = Options(2)
FEW = settings(
    max_examples=60, deadline=None, database=None, derandomize=True,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


class Runtime:
    """A backend of which only the planner's side exists; without an op of that name it runs all."""

    def __init__(self, name: str, without: str = "") -> None:
        self.name, self.without = name, without

    def unsupported(self, facts: Facts, region: Region) -> Mapping[str, str]:
        nodes = facts.graph.nodes
        return {id: "not mapped" for id in region.order if nodes[id].op == self.without}


@dataclass
class ByHash:
    """A cost model without rhyme or reason, so that every kind of plan is the cheapest somewhere."""

    seed: int = 0
    knows: Sequence[str] = ("eager", "fused", "a", "b")
    call_s: float = 2e-5

    def predict(self, work: Work, backend: str, options: Options) -> Prediction | None:
        if backend not in self.knows:
            return None
        text = f"{self.seed} {work.key} {backend} {work.footprint_bytes}"
        drawn = int.from_bytes(blake2b(text.encode(), digest_size=4).digest()) / 2**32
        seconds = self.call_s + (1e-4 * drawn if work.kernels else 0.0)
        return Prediction(seconds, seconds, seconds, seconds)


A, B = Runtime("a"), Runtime("b", without="aten.tanh.default")
WAYS = [Way(A, LIVE), Way(B, Options(1))]  # type: ignore[arg-type]


def draw_chain(random: Random, most: int = 6) -> Graph:
    """Ops one after the other: activations join the linears before them."""
    b, x = Builder(), Ref("x")
    for i in range(random.randrange(1, most + 1)):
        op = random.choice(("linear", "relu", "gelu", "tanh"))
        x = b.linear(f"n{i}", x, 8, 8) if op == "linear" else b.node(f"n{i}", f"{op}.default", x)
    rows = TensorType("f32", (symbol("batch"), 8))
    inputs, outputs = [("x", rows)], [("y", x)]
    symbols = [Symbol("batch", 1, 64)]
    return Graph.build("chain", b.nodes, inputs, outputs, b.constants, symbols=symbols)


def draw(random: Random, size: int) -> Graph:
    return draw_chain(random) if random.random() < 0.4 else draw_graph(random, size)


def pricing_of(facts: Facts, seed: int = 0, call_s: float = 2e-5) -> Pricing:
    sizes = {symbol.name: 3 for symbol in facts.graph.symbols}
    return Pricing(ByHash(seed, call_s=call_s), WAYS, LIVE, sizes)  # type: ignore[arg-type]


def cheapest(facts: Facts, pricing: Pricing, restless: frozenset[str]) -> float:
    """By trying everything."""
    regions = facts.regions
    class_ = class_of(sum(pricing.footprint(facts, each) for each in regions.values()))
    blocks = chain(facts)
    prices = {block: pricing.of(facts, region, class_) for block, region in regions.items()}
    is_joined = [joins(facts, facts.blocks.blocks[block].entry) for block in blocks]
    live, ways = -1, range(len(pricing.ways))
    least = inf
    for places in itertools.product((live, *ways), repeat=len(blocks)):
        for goes_on in itertools.product((False, True), repeat=max(0, len(blocks) - 1)):
            total, before = 0.0, None
            for i, (block, place) in enumerate(zip(blocks, places, strict=True)):
                each = prices[block]
                is_same_region = i > 0 and goes_on[i - 1]
                if is_same_region and (place != before or (place == live and not is_joined[i])):
                    break
                if is_joined[i] and not is_same_region:
                    break
                if place != live and block in restless:
                    break
                call_s = each.live_call_s if place == live else each.call_s[place]
                total += (0.0 if is_same_region else call_s) + (
                    each.live_s if place == live else each.body_s[place]
                )
                before = place
            else:
                least = min(least, total)
    context = prices.get(CONTEXT)
    if context is None:
        return least if blocks else 0.0
    least = (least if blocks else 0.0) + context.live_call_s + context.live_s
    if blocks and not restless:
        for k in ways:
            bodies = context.body_s[k] + sum(prices[block].body_s[k] for block in blocks)
            least = min(least, context.call_s[k] + bodies)
    return least


def check_covers(planned: Planned) -> None:
    """The regions are the chain, in order, and each is one that may be."""
    facts = planned.facts
    blocks = [block for region in planned.regions for block in region.blocks if block != CONTEXT]
    assert tuple(blocks) == chain(facts)
    for region in planned.regions:
        entry = facts.blocks.blocks[next(b for b in region.blocks if b != CONTEXT)].entry
        assert entry == START or not joins(facts, entry)
        if region.way is not None:
            assert planned.restless.isdisjoint(region.blocks)
            for block in region.blocks:
                assert not region.way.backend.unsupported(facts, facts.regions[block])


@FEW
@given(random=randoms)
def test_the_plan_is_the_cheapest_there_is(random: Random) -> None:
    facts = analyse(draw(random, 6))
    blocks = chain(facts)
    if len(blocks) > 6:
        return
    restless = frozenset(block for block in blocks if random.random() < 0.2)
    pricing = pricing_of(facts, random.randrange(99), random.choice((1e-6, 2e-5, 1e-4)))
    planned = Planner(pricing).plan(facts, restless)
    assert planned.seconds == pytest.approx(cheapest(facts, pricing, restless))
    check_covers(planned)


def test_each_kind_of_plan_is_the_cheapest_somewhere() -> None:
    """Else the law above would hold for a planner that knows one kind only."""
    kinds = set[str]()
    for seed in range(60):
        facts = analyse(draw(Random(seed), 12))
        planned = Planner(pricing_of(facts, seed, (1e-6, 2e-5, 1e-4)[seed % 3])).plan(facts)
        ways = {region.way for region in planned.regions}
        kinds.add("whole" if planned.whole else f"{len(ways - {None})} ways")
        kinds.update("live" for way in ways if way is None)
        kinds.update("joined" for region in planned.regions for block in region.blocks[1:]
                     if joins(facts, facts.blocks.blocks[block].entry))  # fmt: skip
    assert kinds == {"whole", "0 ways", "1 ways", "2 ways", "live", "joined"}


@FEW
@given(random=randoms)
def test_a_repaired_plan_is_the_plan_from_scratch(random: Random) -> None:
    graph = draw(random, 10)
    facts, restless = analyse(graph), frozenset[str]()
    pricing = pricing_of(facts, random.randrange(99))
    planned = Planner(pricing).plan(facts)
    planner = Planner(pricing)
    for _ in range(6):
        try:
            applied = apply_fully(facts.graph, draw_delta(random, facts.graph, facts))
            step = update(facts, applied.graph, applied.change)
        except GraphoptError:
            continue
        facts = step.facts
        if {symbol.name for symbol in facts.graph.symbols} - pricing.sizes.keys():
            return
        planned = planner.after(planned, step)
        if random.random() < 0.3:
            restless = frozenset(b for b in chain(facts) if random.random() < 0.2)
            planned = planner.around(planned, restless)
        check_same(planned, Planner(pricing_of_same(pricing, facts)).plan(facts, restless))
        check_covers(planned)


def pricing_of_same(pricing: Pricing, facts: Facts) -> Pricing:
    model = pricing._model
    assert isinstance(model, ByHash)
    return pricing_of(facts, model.seed, model.call_s)


def check_same(planned: Planned, scratch: Planned) -> None:
    assert planned.seconds == scratch.seconds  # to the last bit
    assert planned.whole == scratch.whole
    assert planned.regions == scratch.regions
    assert planned.footprint_class == scratch.footprint_class


def edits_of_a_transformer(count: int, n_layers: int) -> Iterator[tuple[Facts, object]]:
    """Insertions, attributes and removals at random layers."""
    random = Random(1)
    facts = analyse(transformer(n_layers))
    yield facts, None
    for i in range(count):
        layer = f"layer.{random.randrange(n_layers)}"
        gelu = Ref(f"{layer}/gelu")
        scaled = Ref(f"scaled.{i}")
        readers = tuple(facts.graph.users[gelu.id])
        choices = [
            Delta([AddNode(scaled.id, "aten.mul.Tensor", (gelu, 1.5)), Rewire(gelu, scaled, readers)]),
            Delta([SetAttr(gelu.id, "approximate", random.choice(("tanh", "none")))]),
        ]  # fmt: skip
        there = [id for id in facts.graph.nodes if id.startswith("scaled.")]
        if there:
            id = random.choice(there)
            source = facts.graph.nodes[id].refs[0]
            choices.append(Delta([Rewire(Ref(id), source), RemoveNode(id)]))
        applied = apply_fully(facts.graph, random.choice(choices))
        step = update(facts, applied.graph, applied.change)
        facts = step.facts
        yield facts, step


def test_a_transformer_under_a_thousand_edits_keeps_the_plan_from_scratch() -> None:
    edits = edits_of_a_transformer(1000, 8)
    facts, _ = next(edits)
    pricing = pricing_of(facts)
    planner = Planner(pricing)
    planned = planner.plan(facts)
    for i, (facts, step) in enumerate(edits):
        planned = planner.after(planned, step)  # type: ignore[arg-type]
        if i % 20 == 0:
            check_same(planned, Planner(pricing).plan(facts))
    check_same(planned, Planner(pricing_of(facts)).plan(facts))


def test_an_edit_prices_what_it_touched_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    edits = edits_of_a_transformer(30, 12)
    facts, _ = next(edits)
    planner = Planner(pricing_of(facts))
    planned = planner.plan(facts)
    asked: list[str] = []
    leaf = Planner._leaf

    def counting(self: Planner, facts: Facts, block: str, *rest: object) -> Leaf:
        asked.append(block)
        return leaf(self, facts, block, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Planner, "_leaf", counting)
    counts = list[int]()
    for _, step in edits:
        asked.clear()
        planned = planner.after(planned, step)  # type: ignore[arg-type]
        counts.append(len(asked))
    assert 1 <= max(counts) <= 4
    check_same(planned, Planner(pricing_of(planned.facts)).plan(planned.facts))


def test_another_class_of_footprint_prices_everything_anew() -> None:
    facts = analyse(draw_chain(Random(0)))
    pricing = pricing_of(facts)
    planner = Planner(pricing)
    planned = planner.plan(facts)
    seen, last = {planned.footprint_class}, facts.graph.outputs[0][1]
    for i in range(12):
        added = Ref(f"more.{i}")
        edit = Delta([AddNode(added.id, "aten.exp.default", (last,)), Rewire(last, added)])
        applied = apply_fully(facts.graph, edit)
        step = update(facts, applied.graph, applied.change)
        facts, last = step.facts, added
        planned = planner.after(planned, step)
        check_same(planned, Planner(pricing).plan(facts))
        seen.add(planned.footprint_class)
    assert len(seen) > 1


def test_blocks_that_change_places_change_them_in_the_plan() -> None:
    b, x = Builder(), Ref("x")
    for i in range(4):
        x = b.linear(f"n{i}", x, 8, 8)
    rows = TensorType("f32", (symbol("batch"), 8))
    symbols = [Symbol("batch", 1, 64)]
    graph = Graph.build("c", b.nodes, [("x", rows)], [("y", x)], b.constants, symbols=symbols)
    facts = analyse(graph)
    n1, n3 = Ref("n1"), Ref("n3")
    turned = Delta(
        [Rewire(n1, Ref("x"), ("n2",)), Rewire(Ref("x"), n3, ("n0",)), SetOutputs((("y", n1),))]
    )
    applied = apply_fully(graph, turned)
    step = update(facts, applied.graph, applied.change)
    assert step.moved == {"n1", "n3"}
    for seed in range(5):
        planner = Planner(pricing_of(facts, seed))
        planned = planner.after(planner.plan(facts), step)
        check_same(planned, Planner(pricing_of(facts, seed)).plan(step.facts))
        check_covers(planned)


def test_context_values_are_priced_anew_when_they_change() -> None:
    facts = analyse(transformer(2))
    planner = Planner(pricing_of(facts))
    planned = planner.plan(facts)
    value = facts.regions[CONTEXT].exits[-1]
    added = Ref("more")
    edit = Delta([AddNode(added.id, "aten.clone.default", (value,)), Rewire(value, added)])
    applied = apply_fully(facts.graph, edit)
    step = update(facts, applied.graph, applied.change)
    assert CONTEXT in step.regions_changed
    check_same(planner.after(planned, step), planner.plan(step.facts))
    assert planner.plan(step.facts).seconds != planned.seconds


def test_a_block_that_deltas_keep_editing_is_in_no_region() -> None:
    """Nor is everything one region then, however much that would save."""
    facts = analyse(transformer(2))
    planner = Planner(pricing_of(facts, call_s=1.0))
    planned = planner.plan(facts)
    assert planned.whole is not None
    block = chain(facts)[4]
    around = planner.plan(facts, {block})
    assert around.whole is None
    (region,) = [region for region in around.regions if block in region.blocks]
    assert region.way is None
    check_same(planner.around(planned, {block}), around)
    check_same(planner.around(around, frozenset()), planned)


def test_without_coefficients_of_the_live_path_there_is_no_plan() -> None:
    facts = analyse(transformer(1))
    sizes = {symbol.name: 3 for symbol in facts.graph.symbols}
    blind = Pricing(ByHash(knows=("a",)), WAYS, LIVE, sizes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="calibrate"):
        Planner(blind)


def test_one_structure_at_two_sizes_has_two_prices() -> None:
    """A key tells which dims are alike, not which dims of the graph they are."""
    b = Builder()
    out = b.node("few", "exp.default", Ref("x")), b.node("many", "exp.default", Ref("y"))
    inputs = [(n, TensorType("f32", (symbol(d), 8))) for n, d in (("x", "few"), ("y", "many"))]
    symbols = [Symbol("few", 1, 64), Symbol("many", 1, 64)]
    outputs = [("a", out[0]), ("b", out[1])]
    facts = analyse(Graph.build("g", b.nodes, inputs, outputs, {}, symbols=symbols))
    parts = [
        build_region(facts.graph, facts.type_of, (ref,), lambda id, ref=ref: id == ref.id)  # type: ignore[misc]
        for ref in out
    ]
    assert parts[0].key == parts[1].key
    model = ByWork()
    for first, second in (parts, parts[::-1]):
        pricing = Pricing(model, WAYS, LIVE, {"few": 2, "many": 32})  # type: ignore[arg-type]
        prices = {part: pricing.of(facts, part, 40).body_s[0] for part in (first, second)}
        assert prices[parts[1]] == pytest.approx(16 * prices[parts[0]])


@dataclass
class ByWork:
    """A cost model of bytes alone."""

    def predict(self, work: Work, backend: str, options: Options) -> Prediction | None:
        seconds = 1e-9 * sum(each.bytes for each in work.kernels)
        return Prediction(seconds, seconds, seconds, seconds)


def test_a_way_that_the_model_does_not_know_is_left_out() -> None:
    facts = analyse(transformer(1))
    sizes = {symbol.name: 3 for symbol in facts.graph.symbols}
    pricing = Pricing(ByHash(knows=("eager", "fused", "b")), WAYS, LIVE, sizes)  # type: ignore[arg-type]
    assert [way.backend.name for way in pricing.ways] == ["b"]


# -- the tree


def leaf_of(name: str, random: Random, count: int = 4) -> Leaf:
    table = torch.rand(
        count, count, generator=torch.Generator().manual_seed(random.randrange(1 << 30))
    )
    return Leaf(name, table.double().numpy(), 1, (1.0,) * (count - 2), random.randrange(99))


@FEW
@given(random=randoms)
def test_a_tree_is_the_same_however_it_came_about(random: Random) -> None:
    names = [f"block.{i:03}" for i in range(random.randrange(1, 40))]
    leaves = {name: leaf_of(name, random) for name in names}
    kept = sorted(random.sample(names, random.randrange(1, len(names) + 1)))
    tree: Tree | None = None
    for name in random.sample(names, len(names)):
        tree = with_leaf(tree, leaves[name], lambda other, name=name: other < name)  # type: ignore[misc]
    for name in random.sample(names, len(names)):
        if name not in kept:
            tree = without(tree, name, lambda other, name=name: other < name)  # type: ignore[misc]
    built = grown(leaves[name] for name in kept)
    assert tree is not None
    assert built is not None
    assert shape(tree) == shape(built)
    assert tree.product.tobytes() == built.product.tobytes()
    assert tree.chosen(CUT, CUT) == built.chosen(CUT, CUT)
    assert [leaf.block for leaf in tree] == kept
    assert tree.footprint_bytes == sum(leaves[name].footprint_bytes for name in kept)


def shape(tree: Tree | None) -> object:
    return tree and (tree.leaf.block, shape(tree.before), shape(tree.behind))


def test_taking_out_what_is_not_there_shares_everything() -> None:
    random = Random(0)
    tree = grown(leaf_of(f"{i:03}", random) for i in range(20))
    assert without(tree, "absent", lambda other: other < "010") is tree


def test_a_tree_is_as_deep_as_a_logarithm() -> None:
    random = Random(0)
    one = leaf_of("x", random)
    tree = grown(replace(one, block=f"layer.{i}/add") for i in range(4096))

    def depth(part: Tree | None) -> int:
        return 1 + max(depth(part.before), depth(part.behind)) if part else 0

    assert depth(tree) <= 40
