"""The first stage of the better path: `fused` steps for blocks that no runtime region covers.

Blocks keep running `eager` until their candidate is verified, by the builder process where there is
one, else here, on values of a real request or made-up ones. A candidate that fails is refused with
its evidence and not tried again for this region and these weights.
"""

from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import torch

from graphopt.analysis.facts import Facts
from graphopt.builder.records import UNDECIDED, Answer, finite
from graphopt.engine.builder_link import BuilderLink
from graphopt.engine.kinds import kind_of
from graphopt.engine.live import LiveModel
from graphopt.engine.shelf import Candidate, Key, Shelf
from graphopt.executor.build import weight_key
from graphopt.executor.fused import FusedBuilder
from graphopt.executor.plan import Plan, Step, run_steps
from graphopt.executor.runs import eager_run, run_of, run_region
from graphopt.executor.samples import Sample, sample_inputs
from graphopt.executor.verify import verify_step
from graphopt.kept import Kept

AT_ONCE = 32  # proofs asked for at a time: a part of the builder's queue
REFUSED_KEPT = 4_096  # (region, weights) pairs remembered as not worth another try
KINDS_KEPT = 4_096

Run = tuple[str, ...]
Waiting = Generator["Future[Any] | float | None", Any, Any]
"""A coroutine of the background thread: it waits for a future, for seconds, or to be called again."""


class FusedStage:
    """Finds `fused` steps for a model's runs of blocks; works on the background thread."""

    def __init__(self, shelf: Shelf, link: BuilderLink | None) -> None:
        self._shelf = shelf
        self._link = link
        self._fused = FusedBuilder()
        self._refused: Kept[Key, str] = Kept(REFUSED_KEPT)
        # Why steps of a kind gave way to eager ones; empty where they stand
        self._compared: Kept[str, str] = Kept(KINDS_KEPT)

    def why_not(self, facts: Facts, block: str) -> str:
        """Why `block` runs eager: not tried yet, or the reason its candidate was declined or
        refused.
        """
        run = run_of(facts, block)
        return (
            self._refused.get(_key(facts, run))
            or self._compared.get(kind_of(facts, run))
            or "not prepared yet"
        )

    def course(self, model: LiveModel) -> Waiting:
        """Prepares and proves candidates for what changed since the last call, then publishes them.

        Closing the coroutine, as when a delta makes another revision, gives back what was not done.
        """
        old, facts, blocks = model.take_unproven()
        is_done = False
        asked: list[tuple[Step, Future[Answer]]] = []
        try:
            candidates, concerned = self._prepare(facts, blocks)
            if candidates and self._link is not None:
                steps = list(candidates.values())
                for first in range(0, len(steps), AT_ONCE):
                    asked = [
                        (step, self._link.verify_fused(model.name, old.plan.revision, step.blocks))
                        for step in steps[first : first + AT_ONCE]
                    ]
                    for step, future in asked:
                        answer = yield future
                        if answer.stage in UNDECIDED:
                            return
                        self._take(model, facts, step, answer)
            else:
                for step, sample in _samples(model, old.base, facts, candidates):
                    self._take(model, facts, step, _verdict(facts, step, sample))
                    yield None
            is_done = model.publish_base(old, facts, concerned)
        finally:
            for _, future in asked:
                future.cancel()
            if not is_done:
                model.give_back(blocks)

    def compared(self, kind: str) -> str | None:
        """Why steps of this kind give way to `eager`; empty where they stand, None when not asked yet."""
        return self._compared.get(kind)

    def note_compared(self, kind: str, reason: str) -> None:
        """What came of timing a step of this kind beside `eager`, as `compared` returns it."""
        self._compared[kind] = reason

    def forget(self, step: Step) -> None:
        """A step that gives way is not to go live again."""
        self._shelf.drop((step.key, step.weights))

    def _prepare(self, facts: Facts, blocks: set[str]) -> tuple[dict[str, Step], set[str]]:
        """Steps that are not proven yet, by their first block, and all blocks looked at."""
        candidates: dict[str, Step] = {}
        concerned: set[str] = set()
        for run in _runs(facts, blocks):
            concerned.update(run)
            key = _key(facts, run)
            if key in self._refused or self._shelf.find(key) is not None:
                continue
            if self._compared.get(kind_of(facts, run)):
                continue
            step = self._fused.prepare_run(facts, run)
            if step is None:
                self._refused[key] = self._fused.why_run(facts, run)
            else:
                candidates[run[0]] = step
        return candidates, concerned

    def _take(self, model: LiveModel, facts: Facts, step: Step, answer: Answer) -> None:
        fields = {
            "graph": model.name, "revision": model.revision, "block": step.block, "tier": step.tier,
            "max_error": answer.max_error, "allowed": answer.allowed,
        }  # fmt: skip
        if not answer.ok:
            self._refused[step.key, step.weights] = answer.reason
            model.settings.events(
                "plan.refused", {**fields, "stage": answer.stage, "reason": answer.reason}
            )
            return
        constants = run_region(facts, step.blocks).consts
        size = sum(facts.graph.constants[name].tensor.nbytes for name in constants)
        self._shelf.put(
            (step.key, step.weights), Candidate(step.tier, step.function, step.constants, size)
        )
        model.settings.events("plan.verified", fields)


def _verdict(facts: Facts, step: Step, sample: Sample) -> Answer:
    """As the builder would answer."""
    found = verify_step(facts, step.block, step, eager_run(facts, step.blocks), [sample])
    return Answer(
        found.ok, "done" if found.ok else "verify", found.reason,
        max_error=finite(found.max_error), allowed=finite(found.allowed),
    )  # fmt: skip


def _runs(facts: Facts, blocks: set[str]) -> list[Run]:
    """The runs that hold any of `blocks`, those that are gone left out."""
    return list(dict.fromkeys(run_of(facts, block) for block in blocks if block in facts.regions))


def _samples(
    model: LiveModel, plan: Plan, facts: Facts, candidates: Mapping[str, Step]
) -> Iterator[tuple[Step, Sample]]:
    """Each candidate with the values that cross into it in one request, in the order of the plan.

    The request runs on the published plan, whose steps are proven, no further than the last
    candidate.
    """
    if not candidates:
        return
    env, symbols = _bind(model, plan, facts)
    left = len(candidates)
    for row in plan.steps:
        candidate = candidates.get(row.blocks[0])
        if candidate is not None:
            yield candidate, Sample(tuple(env[key] for key in candidate.reads), symbols)
            left -= 1
            if not left:
                return
        with torch.no_grad():
            run_steps((row,), env, symbols)


def _bind(model: LiveModel, plan: Plan, facts: Facts) -> tuple[dict[str, object], dict[str, int]]:
    for kept in model.captured.collect(plan).values():
        return plan.bind(kept[-1])
    return plan.bind(sample_inputs(facts))


def _key(facts: Facts, run: Run) -> Key:
    region = run_region(facts, run)
    return (region.key, weight_key(facts.graph, region))
