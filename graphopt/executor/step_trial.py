"""Are the new steps of a plan faster than those they replace? Asked of these steps alone.

A plan with one new layer of twelve differs from the published one by a few percent: less than a trial
of whole requests can tell on a busy host. Here both plans start from the values at which they part,
computed once, and what is timed ends where they meet again; the pairs, the judge and the way to a
request's side are those of an idle trial.

Deliberately absent: what a whole request takes, which the watch learns from requests.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from graphopt.executor.idle_trial import IdleTrial, Inputs, Traffic
from graphopt.executor.plan import Plan, Step, run_steps
from graphopt.executor.trial import Trial


class StepTrial(IdleTrial):
    """An idle trial of the steps in which two plans of one revision differ."""

    def __init__(
        self,
        trial: Trial,
        current: Plan,
        candidate: Plan,
        inputs: Sequence[Inputs],
        traffic: Traffic,
        monotonic_s: Callable[[], float],
    ) -> None:
        super().__init__(trial, current, candidate, inputs, traffic, monotonic_s)
        self._first, last = parting(current.steps, candidate.steps)
        self._steps = tuple(
            plan.steps[self._first : len(plan.steps) - last] for plan in (current, candidate)
        )
        rest = current.steps[len(current.steps) - last :]
        self._read_later = {key for _, key in current.outputs}.union(*(step.reads for step in rest))
        self._starts: dict[int, tuple[Mapping[str, Any], Mapping[str, int]]] = {}

    def _time(self, is_candidate: bool, captured: Inputs) -> tuple[float, dict[str, Any]]:
        with torch._C._InferenceMode(True):
            start, symbols = self._start(captured)
            env = dict(start)
            start_s = self._now_s()
            run_steps(self._steps[is_candidate], env, symbols)
            took_s = self._now_s() - start_s
        return took_s, {
            key: value
            for key, value in env.items()
            if key in self._read_later and key not in start and isinstance(value, torch.Tensor)
        }

    def _start(self, captured: Inputs) -> tuple[Mapping[str, Any], Mapping[str, int]]:
        """The values at which the plans part, on one input; kept, because they are the same each time."""
        found = self._starts.get(
            id(captured)
        )  # the driver holds the inputs, so the id stays theirs
        if found is None:
            current = self._plans[False]
            env, symbols = current.bind(captured)
            run_steps(current.steps[: self._first], env, symbols)
            found = self._starts[id(captured)] = (env, symbols)
        return found


def parting(old: Sequence[Step], new: Sequence[Step]) -> tuple[int, int]:
    """How many steps two plans share at their beginning, and how many at their end."""
    shortest = min(len(old), len(new))
    first = next((i for i in range(shortest) if old[i] is not new[i]), shortest)
    rest = shortest - first
    last = next((i for i in range(rest) if old[-1 - i] is not new[-1 - i]), rest)
    return first, last
