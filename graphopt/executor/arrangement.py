"""A plan in two layers: a row of steps that need no build, and runtime regions laid over it.

The *base* has a step for every block on the tiers of the live path, and every delta keeps it up to
date in work proportional to the change. An *overlay* is one step of a runtime over a run of adjacent
blocks. A delta takes away exactly the overlays that hold a block it changed; the base shows through
there at once, and the other overlays stay the same objects. So a plan never has to be made anew
because one region of it, however large, is gone.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from graphopt.analysis.blocks import CONTEXT, START
from graphopt.analysis.facts import Facts, Update
from graphopt.executor.build import MakeStep, bind_run, position_of, replan
from graphopt.executor.plan import Plan, Step
from graphopt.executor.runs import run_region

ArtifactKey = tuple[str, ...]
Runs = tuple[tuple[tuple[str, ...], ArtifactKey], ...]
"""The artifact of each run of blocks, in order; a run has several where it has some for single shapes."""


@dataclass(frozen=True, slots=True)
class Overlay:
    """A step over a run of blocks, and the artifacts it runs."""

    step: Step
    artifacts: tuple[ArtifactKey, ...]


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Base, overlays and the plan they make together; an immutable value."""

    base: Plan
    overlays: tuple[Overlay, ...]
    plan: Plan

    @classmethod
    def of(cls, base: Plan, overlays: Iterable[Overlay] = ()) -> "Arrangement":
        """`base` with `overlays` over it; one that would part a step of the base is left out.

        O(overlays * log(steps)) beside the steps under them and one copy of the row.
        """
        digest, kept = base.digest, []
        taken: list[tuple[int, int, Step]] = []  # from, up to, and what lies there
        for overlay in overlays:
            step = overlay.step
            first = position_of(base, step.blocks[0])
            last = _last_of(base.steps, first, step.blocks)
            if last is None or any(first < end and begin < last for begin, end, _ in taken):
                continue
            digest += step.digest - sum(under.digest for under in base.steps[first:last])
            taken.append((first, last, step))
            kept.append(overlay)
        if not kept:
            return cls(base, (), base)
        steps: list[Step] = []
        done = 0
        for first, last, step in sorted(taken, key=lambda each: each[0]):
            steps += base.steps[done:first]
            steps.append(step)
            done = last
        steps += base.steps[done:]
        return cls(base, tuple(kept), Plan(base.graph, base.revision, tuple(steps), digest))

    def after(self, update: Update, revision: int, make: MakeStep) -> tuple["Arrangement", int]:
        """The arrangement of the next revision, and how many blocks of the base were planned anew."""
        base, replanned = replan(self.base, update, revision, make)
        kept = (standing(overlay, update) for overlay in self.overlays)
        return Arrangement.of(base, [overlay for overlay in kept if overlay]), replanned

    def runs(self) -> Runs:
        """What runs on artifacts, to be put together again later."""
        return tuple([(o.step.blocks, key) for o in self.overlays for key in o.artifacts])

    def covered(self) -> frozenset[str]:
        """The blocks that run on overlays."""
        return frozenset(block for overlay in self.overlays for block in overlay.step.blocks)


def standing(overlay: Overlay, update: Update) -> Overlay | None:
    """The overlay in the graph after `update`: the same object where nothing it is made of changed.

    None when one of its blocks computes something else, has other weights or is gone, or when the
    blocks do not follow each other any more. Bound anew when other reads can be let go after it.
    """
    step, facts = overlay.step, update.facts
    for touched in (update.regions_changed, update.weights_changed, update.regions_gone):
        if not touched.isdisjoint(step.blocks):
            return None
    if not is_adjacent(facts, step.blocks):
        return None
    if update.released.isdisjoint(step.blocks):
        return overlay
    region = run_region(facts, step.blocks)
    rebound = bind_run(
        facts, step.blocks, region, step.tier, step.function, step.constants, step.options
    )
    return Overlay(rebound, overlay.artifacts)


def is_adjacent(facts: Facts, blocks: tuple[str, ...]) -> bool:
    """Whether `blocks` follow each other; a run that computes the context must hold every block."""
    following = facts.blocks.next
    if blocks[0] == CONTEXT and len(blocks) > 1:
        is_all = following.get(START) == blocks[1] and facts.blocks.tail == blocks[-1]
        if CONTEXT not in facts.regions or not is_all:
            return False
        blocks = blocks[1:]
    return all(following.get(a) == b for a, b in pairwise(blocks))


def _last_of(steps: tuple[Step, ...], first: int, blocks: tuple[str, ...]) -> int | None:
    """The position behind the steps from `first` on that hold exactly `blocks`, or None."""
    covered: list[str] = []
    for i in range(first, len(steps)):
        covered += steps[i].blocks
        if len(covered) >= len(blocks):
            return i + 1 if tuple(covered) == blocks else None
    return None
