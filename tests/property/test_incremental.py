"""Incremental equals from scratch (law 3): facts and plans after any sequence of deltas, valid or
refused, forwards and back.
"""

import os
from random import Random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from graphopt.analysis.check import check_facts
from property.live import LiveGraph
from strategies import draw_graph, randoms

SOAK_RUNS = int(os.environ.get("GRAPHOPT_SOAK_RUNS", "2000"))


class LiveGraphMachine(RuleBasedStateMachine):
    """`LiveGraph` with Hypothesis at the wheel: it looks for the shortest failing sequence."""

    @initialize(random=randoms)
    def begin(self, random: Random) -> None:
        self.live = LiveGraph(draw_graph(random, 8))

    @rule(random=randoms)
    def apply_a_delta(self, random: Random) -> None:
        self.live.apply(random)

    @rule(random=randoms)
    def apply_a_delta_and_undo_it(self, random: Random) -> None:
        self.live.apply_and_undo(random)

    @rule(random=randoms)
    def roll_back(self, random: Random) -> None:
        self.live.roll_back(random)

    def teardown(self) -> None:
        if hasattr(self, "live"):
            check_facts(self.live.facts)


LiveGraphMachine.TestCase.settings = settings(
    max_examples=15,
    stateful_step_count=8,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
TestFactsAndPlansOfALiveGraphAreThoseOfANewOne = LiveGraphMachine.TestCase


def run_seed(seed: int, steps: int) -> LiveGraph:
    random = Random(seed)
    live = LiveGraph(draw_graph(random, 16))
    for _ in range(steps):
        random.choice((live.apply, live.apply, live.apply_and_undo, live.roll_back))(random)
    check_facts(live.facts)
    return live


@pytest.mark.parametrize("seed", range(8))
def test_long_edit_histories_stay_equal_to_scratch(seed: int) -> None:
    live = run_seed(seed, 25)
    assert min(live.accepted, live.refused) > 0


@pytest.mark.soak
def test_thousands_of_edit_histories_stay_equal_to_scratch() -> None:
    for seed in range(1000, 1000 + SOAK_RUNS):
        run_seed(seed, 40)
