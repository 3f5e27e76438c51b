"""Are the new steps of a plan faster than those they replace? Asked of these steps alone.

A plan with one new layer of twelve differs from the published one by a few percent: less than a trial
of whole requests can tell on a busy host. Here every stretch in which the two plans differ starts from
the values that it reads in a request, computed once, and is timed by itself; the pairs, the judge and
the way to a request's side are those of an idle trial. A stretch that occurs in several places is
timed in one, unless all are asked for, and one of steps that have won before in none. What is not timed
is not compared here either: it was verified where it was built.

Deliberately absent: what a whole request takes, which the watch learns from requests.
"""

from collections.abc import Callable, Iterator, Sequence, Set
from functools import partial
from typing import Any, NamedTuple

import torch

from graphopt.executor.beginnings import Beginnings
from graphopt.executor.idle_trial import IdleTrial, Inputs, Traffic
from graphopt.executor.plan import Plan, Step, run_steps
from graphopt.executor.trial import Trial

TierAndKey = tuple[str, str]
"""What a step that has won is told by: a structure that won on a runtime has not won on another tier."""


class Stretch(NamedTuple):
    """Steps of two plans that compute the same blocks. `first` is the position among the old ones."""

    first: int
    old: tuple[Step, ...]
    new: tuple[Step, ...]


class StepTrial(IdleTrial):
    """An idle trial of the steps in which two plans of one revision differ."""

    def __init__(
        self,
        trial: Trial,
        beginnings: Beginnings,
        candidate: Plan,
        traffic: Traffic,
        monotonic_s: Callable[[], float],
        proven: Set[TierAndKey] = frozenset(),
        *,
        everywhere: bool = False,
    ) -> None:
        """Does not run anything yet.

        Args:
            trial: to be driven.
            beginnings: of the published plan, on the inputs to be run.
            candidate: the plan on trial.
            traffic: the requests, which come first.
            monotonic_s: clock.
            proven: of steps that have nothing to show any more. Without a stretch left to be timed
                there is nothing to run.
            everywhere: to time a stretch wherever it occurs, one after the other: each finds its weights
                where a request does, and not in the caches.
        """
        current = beginnings.plan
        super().__init__(trial, current, candidate, beginnings.inputs, traffic, monotonic_s)
        self._beginnings = beginnings
        find = stretches if everywhere else partial(unproven, proven=proven)
        self.stretches = list(find(current.steps, candidate.steps))
        outputs = {key for _, key in current.outputs}
        self._read_later = [
            outputs.union(*(step.reads for step in current.steps[each.first + len(each.old) :]))
            for each in self.stretches
        ]

    def _time(self, is_candidate: bool, captured: Inputs) -> tuple[float, dict[str, Any]]:
        took_s, answers = 0.0, {}
        for stretch, later in zip(self.stretches, self._read_later, strict=True):
            env, symbols = self._beginnings.at(captured, stretch.first)
            before = set(env)
            with torch._C._InferenceMode(True):
                start_s = self._now_s()
                run_steps(stretch.new if is_candidate else stretch.old, env, symbols)
                took_s += self._now_s() - start_s
            for key in env.keys() & later - before:
                if isinstance(env[key], torch.Tensor):
                    answers[key] = env[key]
        return took_s, answers


def unproven(old: Sequence[Step], new: Sequence[Step], proven: Set[TierAndKey]) -> list[Stretch]:
    """The stretches in which the plans differ and some new step has not won yet, each kind once."""
    found: dict[tuple[tuple[str, ...], ...], Stretch] = {}
    for stretch in stretches(old, new):
        if any((step.tier, step.key) not in proven for step in stretch.new):
            kind = tuple(
                (step.key, step.tier, step.options) for step in (*stretch.old, *stretch.new)
            )
            found.setdefault(kind, stretch)
    return list(found.values())


def stretches(old: Sequence[Step], new: Sequence[Step]) -> Iterator[Stretch]:
    """The smallest stretches that begin and end at the same blocks in both plans, and differ."""
    i = j = 0
    while i < len(old):
        first, begin = i, j
        ahead = 0  # blocks that the new steps have computed beyond the old ones
        while ahead or i == first:
            if ahead > 0:
                ahead -= len(old[i].blocks)
                i += 1
            else:
                ahead += len(new[j].blocks)
                j += 1
        if (i - first, j - begin) != (1, 1) or old[first] is not new[begin]:
            yield Stretch(first, tuple(old[first:i]), tuple(new[begin:j]))


def parting(old: Sequence[Step], new: Sequence[Step]) -> tuple[int, int]:
    """How many steps two plans share at their beginning, and how many at their end."""
    shortest = min(len(old), len(new))
    first = next((i for i in range(shortest) if old[i] is not new[i]), shortest)
    rest = shortest - first
    last = next((i for i in range(rest) if old[-1 - i] is not new[-1 - i]), rest)
    return first, last
