"""A graph under edits, with its facts and its plan carried from one revision to the next and
checked at every one.
"""

from random import Random

from graphopt.analysis.check import check_facts, compare_facts
from graphopt.analysis.facts import Facts, analyse, update
from graphopt.delta import Delta, apply_fully, difference, invert
from graphopt.errors import GraphoptError
from graphopt.executor.build import EagerBuilder, build_plan, replan
from graphopt.executor.plan import Plan, Step, run_plan
from graphopt.graph import Graph
from helpers.graphs import feeds_of, reference, same_outputs
from strategies import draw_delta

HISTORY_KEPT = 5

make_step = EagerBuilder()


class LiveGraph:
    """The system under test; every method draws what it does from `random`."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.facts = analyse(graph)
        self.plan = build_plan(self.facts, 1, make_step)
        self.history = [graph]
        self.accepted = self.refused = 0

    def apply(self, random: Random) -> None:
        """A random delta, valid or not."""
        self.advance(draw_delta(random, self.graph, self.facts))

    def apply_and_undo(self, random: Random) -> None:
        """A random delta and its inverse: the same graph again."""
        before = self.graph
        delta = draw_delta(random, before, self.facts)
        if self.advance(delta):
            assert self.advance(invert(delta, before)), "an inverse is never refused"
            assert self.graph.hash == before.hash

    def roll_back(self, random: Random) -> None:
        """To one of the graphs before."""
        target = random.choice(self.history)
        assert self.advance(difference(self.graph, target)), "a rollback is never refused"
        assert self.graph.hash == target.hash

    def advance(self, delta: Delta) -> bool:
        """One revision on, or everything as it was."""
        before = (self.graph.hash, str(self.graph), self.facts, self.plan.id)
        try:
            applied = apply_fully(self.graph, delta)
            step = update(self.facts, applied.graph, applied.change)
        except GraphoptError:
            assert before == (self.graph.hash, str(self.graph), self.facts, self.plan.id)
            self.refused += 1
            return False
        plan, _ = replan(self.plan, step, self.plan.revision + 1, make_step)
        check(step.facts, plan)
        self.graph, self.facts, self.plan = applied.graph, step.facts, plan
        self.history = [*self.history, self.graph][-HISTORY_KEPT:]
        self.accepted += 1
        return True


def check(facts: Facts, plan: Plan) -> None:
    """Facts and plan are those of a graph never seen before, and the plan computes what the graph
    means, bit for bit.
    """
    check_facts(facts, sizes=())
    scratch = analyse(facts.graph)
    compare_facts(facts, scratch)
    built = build_plan(scratch, plan.revision, make_step)
    assert plan.id == built.id
    assert [row(step) for step in plan.steps] == [row(step) for step in built.steps]
    sizes = {symbol.name: symbol.min + 2 for symbol in facts.graph.symbols}
    feeds = feeds_of(facts.graph, sizes, plan.revision)
    try:
        expected = reference(facts.graph, feeds)
    except (
        IndexError
    ):  # an embedding asked for a row it does not have: contents, which no type knows
        return
    assert same_outputs(run_plan(plan, feeds), expected)


def row(step: Step) -> tuple[object, ...]:
    """What a step does, its constants by identity."""
    return (
        step.block,
        step.tier,
        step.key,
        step.weights,
        step.digest,
        step.function,
        step.reads,
        [id(c) for c in step.constants],
        step.symbols,
        step.writes,
        set(step.frees),
        step.nodes,
    )
