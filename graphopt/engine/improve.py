"""The better path of this tier: prepares `fused` steps in the background, proves them, publishes them.

Blocks keep running `eager` until their candidate is verified on inputs of the model's own (the last request's, or made up before the first).
A candidate that fails is refused with its evidence and not tried again for these weights.
"""

from collections.abc import Mapping
from typing import Any

import torch

from graphopt.analysis.facts import Facts
from graphopt.engine.live import LiveModel
from graphopt.engine.shelf import Candidate, Shelf
from graphopt.executor.build import EagerBuilder, weight_key
from graphopt.executor.fused import FusedBuilder
from graphopt.executor.plan import Step
from graphopt.executor.verify import capture_boundaries, sample_inputs, verify_step

REFUSED_KEPT = 4_096  # (region, weights) pairs remembered as not worth another try


class Improver:
    """Finds better steps for a model's blocks; runs on the background thread."""

    def __init__(self, eager: EagerBuilder, shelf: Shelf) -> None:
        self._eager = eager
        self._shelf = shelf
        self._fused = FusedBuilder()
        self._refused: dict[tuple[str, str], str] = {}

    def why_not(self, facts: Facts, block: str) -> str:
        """Why `block` runs eager: not tried yet, or the reason its candidate was declined or refused."""
        return self._refused.get(_key(facts, block), "not prepared yet")

    def improve(self, model: LiveModel) -> None:
        """Prepares and verifies a candidate for every eager block of the current revision, then publishes them together."""
        plan, facts = model.slot.plan, model.facts
        revision = plan.revision
        if facts.graph is not plan.graph:
            return  # a delta came in between; its own job follows
        waiting = [
            step.block
            for step in plan.steps
            if step.tier == "eager" and _key(facts, step.block) not in self._refused
        ]
        if not waiting:
            return
        values = self._boundaries(model, facts, waiting)
        for block in waiting:
            if model.revision != revision:
                return
            self._try(model, facts, block, values)
        model.publish_better(plan, facts)

    def _try(self, model: LiveModel, facts: Facts, block: str, values: Mapping[str, Any]) -> None:
        key = _key(facts, block)
        if self._shelf.find(key) is not None:
            return
        step = self._fused.prepare(facts, block)
        if step is None:
            self._refuse(key, self._fused.why(facts, block))
            return
        verdict = verify_step(facts, block, step, self._eager(facts, block), [values[block]])
        fields = {
            "graph": model.name,
            "revision": model.revision,
            "block": block,
            "tier": step.tier,
        }
        measured = {"max_error": verdict.max_error, "allowed": verdict.allowed}
        if not verdict.ok:
            self._refuse(key, verdict.reason)
            model.settings.events("plan.refused", {**fields, **measured, "reason": verdict.reason})
            return
        size = sum(
            facts.graph.constants[name].tensor.nbytes for name in facts.regions[block].consts
        )
        self._shelf.put(key, Candidate(step.tier, step.function, step.constants, size))
        model.settings.events("plan.verified", {**fields, **measured})

    def _boundaries(self, model: LiveModel, facts: Facts, blocks: list[str]) -> Mapping[str, Any]:
        inputs = model.recent_inputs
        if inputs is None or not _fits(facts, inputs):
            inputs = sample_inputs(facts)
        steps: list[Step] = [self._eager(facts, step.block) for step in model.slot.plan.steps]
        return capture_boundaries(model.slot.plan, steps, inputs, set(blocks))

    def _refuse(self, key: tuple[str, str], reason: str) -> None:
        if len(self._refused) >= REFUSED_KEPT:
            self._refused.pop(next(iter(self._refused)))
        self._refused[key] = reason


def _key(facts: Facts, block: str) -> tuple[str, str]:
    region = facts.regions[block]
    return (region.key, weight_key(facts.graph, region))


def _fits(facts: Facts, inputs: Mapping[str, torch.Tensor]) -> bool:
    return {name for name, _ in facts.graph.inputs} == set(inputs)
