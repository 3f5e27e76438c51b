"""Real plans over a real graph whose steps take as long as a script says, and noise to script with."""

import dataclasses
import math
import random
from collections.abc import Callable

import torch

from graphopt.analysis.facts import analyse
from graphopt.executor.build import EagerBuilder, build_plan
from graphopt.executor.plan import Plan
from graphopt.executor.trial import BLOCK, Trial, TrialResult, TrialSettings
from graphopt.graph import Graph, Ref, Symbol
from graphopt.types import TensorType
from helpers.graphs import BATCH, Builder

Noise = Callable[[], float]


class Clock:
    """A clock that only moves when a step runs."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def graph() -> Graph:
    b = Builder()
    out = b.node("out", "relu.default", Ref("x"))
    inputs = [("x", TensorType("f32", (BATCH, 4)))]
    return Graph.build(
        "tiny", b.nodes, inputs, [("y", out)], b.constants, None, [Symbol("batch", 1, 64)]
    )


GRAPH = graph()
FACTS = analyse(GRAPH)
X = {"x": torch.tensor([[-1.0, 0.0, 1.0, 2.0]])}
Y = torch.tensor([[0.0, 0.0, 1.0, 2.0]])


def plan(
    number: int = 0, run: Callable[[torch.Tensor], torch.Tensor] | None = None, revision: int = 1
) -> Plan:
    """A plan of its own id for each `number`; `run` is what its step does."""
    base = build_plan(FACTS, revision, EagerBuilder())
    if run is None:
        return Plan(base.graph, revision, base.steps, base.digest + number)
    steps = []
    for step in base.steps:
        if "out" in step.nodes:
            step = dataclasses.replace(step, function=lambda x, *rest: run(x), symbols=())
        steps.append(step)
    return Plan(base.graph, revision, tuple(steps), base.digest + number)


def timed(number: int, clock: Clock, latency_s: Noise, revision: int = 1) -> Plan:
    """A plan whose requests take what `latency_s` says."""

    def run(x: torch.Tensor) -> torch.Tensor:
        clock.now_s += latency_s()
        return torch.relu(x)

    return plan(number, run, revision)


def failing(number: int, error: Exception, after: int = 0) -> Plan:
    """A plan that raises from its request number `after` on."""
    left = [after]

    def run(x: torch.Tensor) -> torch.Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise error
        return torch.relu(x)

    return plan(number, run)


# -- noise around one millisecond


def lognormal(seed: int, sigma: float) -> Noise:
    draw = random.Random(seed)
    return lambda: 1e-3 * math.exp(draw.gauss(0.0, sigma))


def heavy_tailed(seed: int, sigma: float = 0.1) -> Noise:
    """One request in twenty meets something that takes three times as long or, by Pareto, any more."""
    draw = random.Random(seed)

    def noise() -> float:
        spike = 2.0 * draw.paretovariate(1.2) if draw.random() < 0.05 else 0.0
        return 1e-3 * math.exp(draw.gauss(0.0, sigma)) * (1.0 + spike)

    return noise


def bursts(seed: int, sigma: float = 0.05) -> Noise:
    """A neighbour that slows some ten requests in a row to 2.5 times, every fifty or so."""
    draw, left = random.Random(seed), [0]

    def noise() -> float:
        if left[0]:
            left[0] -= 1
            return 2.5e-3 * math.exp(draw.gauss(0.0, sigma))
        if draw.random() < 0.02:
            left[0] = draw.randrange(3, 12)
        return 1e-3 * math.exp(draw.gauss(0.0, sigma))

    return noise


def simulate(noise: Noise, ratio: float, settings: TrialSettings) -> tuple[TrialResult, int]:
    """The result of a live trial of a candidate that takes `ratio` of the time, and its requests."""
    trial = Trial("current", "candidate", settings)
    for requests in range(1, 10_000):
        position = trial.take(())
        trial.add((), position, noise() * (ratio if trial.is_candidate(position) else 1.0))
        if requests % (2 * BLOCK) == 0 and (result := trial.judge()) is not None:
            return result, requests
    raise AssertionError("the trial does not end")
