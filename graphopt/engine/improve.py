"""The better path of this tier: prepares `fused` steps in the background, proves them, publishes
them.

Blocks keep running `eager` until their candidate is verified on inputs of the model's own (the last
request's, or made up before the first). A candidate that fails is refused with its evidence and not
tried again for this region and these weights.
"""

from collections.abc import Iterator, Mapping

import torch

from graphopt.analysis.facts import Facts
from graphopt.engine.live import LiveModel
from graphopt.engine.shelf import Candidate, Key, Shelf
from graphopt.executor.build import weight_key
from graphopt.executor.fused import FusedBuilder
from graphopt.executor.plan import Plan, Step, bind_inputs, run_steps
from graphopt.executor.runs import eager_run, run_of, run_region
from graphopt.executor.samples import Sample, sample_inputs
from graphopt.executor.verify import verify_step

REFUSED_KEPT = 4_096  # (region, weights) pairs remembered as not worth another try

Run = tuple[str, ...]


class Improver:
    """Finds better steps for a model's runs of blocks; works on the background thread."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._fused = FusedBuilder()
        self._refused: dict[Key, str] = {}

    def why_not(self, facts: Facts, block: str) -> str:
        """Why `block` runs eager: not tried yet, or the reason its candidate was declined or
        refused.
        """
        return self._refused.get(_key(facts, run_of(facts, block)), "not prepared yet")

    def improve(self, model: LiveModel) -> None:
        """Prepares and verifies candidates for what changed since the last call, then publishes them.

        Gives up as soon as a delta makes another revision: that revision's own job follows.
        """
        old, facts, blocks = model.take_unproven()
        candidates: dict[str, Step] = {}
        concerned: set[str] = set()
        for run in _runs(facts, blocks):
            concerned.update(run)
            key = _key(facts, run)
            if key in self._refused or self._shelf.find(key) is not None:
                continue
            step = self._fused.prepare_run(facts, run)
            if model.arrangement is not old:
                return model.give_back(blocks)
            if step is None:
                self._refuse(key, self._fused.why_run(facts, run))
            else:
                candidates[run[0]] = step
        if candidates:
            for step, sample in _samples(model, old.base, facts, candidates):
                if model.arrangement is not old:
                    return model.give_back(blocks)
                self._judge(model, facts, step, sample)
        if not model.publish_base(old, facts, concerned):
            model.give_back(blocks)
        return None

    def _judge(self, model: LiveModel, facts: Facts, step: Step, sample: Sample) -> None:
        verdict = verify_step(facts, step.block, step, eager_run(facts, step.blocks), [sample])
        fields = {
            "graph": model.name, "revision": model.revision, "block": step.block, "tier": step.tier,
            "max_error": verdict.max_error, "allowed": verdict.allowed,
        }  # fmt: skip
        if not verdict.ok:
            self._refuse((step.key, step.weights), verdict.reason)
            model.settings.events("plan.refused", {**fields, "reason": verdict.reason})
            return
        constants = run_region(facts, step.blocks).consts
        size = sum(facts.graph.constants[name].tensor.nbytes for name in constants)
        self._shelf.put(
            (step.key, step.weights), Candidate(step.tier, step.function, step.constants, size)
        )
        model.settings.events("plan.verified", fields)

    def _refuse(self, key: Key, reason: str) -> None:
        if len(self._refused) >= REFUSED_KEPT:
            self._refused.pop(next(iter(self._refused)))
        self._refused[key] = reason


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
    env, symbols = _bind(model, plan, facts)
    left = len(candidates)
    with torch.no_grad():
        for row in plan.steps:
            candidate = candidates.get(row.blocks[0])
            if candidate is not None:
                yield candidate, Sample(tuple(env[key] for key in candidate.reads), symbols)
                left -= 1
                if not left:
                    return
            run_steps((row,), env, symbols)


def _bind(model: LiveModel, plan: Plan, facts: Facts) -> tuple[dict[str, object], dict[str, int]]:
    for kept in model.captured.collect(plan).values():
        return bind_inputs(plan, kept[-1])
    return bind_inputs(plan, sample_inputs(facts))


def _key(facts: Facts, run: Run) -> Key:
    region = run_region(facts, run)
    return (region.key, weight_key(facts.graph, region))
