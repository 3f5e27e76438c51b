"""What the live models of a process cost: predicted, measured, and what a delta would change.

Measured figures are taken while no request runs, kept with the artifacts (`measured.py`), and teach
the cost model. Deliberately absent: choosing by them.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from importlib.metadata import version
from typing import Any

from graphopt.analysis.facts import Facts
from graphopt.costs.model import CostModel
from graphopt.costs.plan_cost import Piece, PlanCost, StepCost, Works, price, total
from graphopt.engine.fingerprint import host_fingerprint
from graphopt.engine.live import LiveModel
from graphopt.engine.measured import CostKey
from graphopt.engine.records import Foreseen, ModelLimits
from graphopt.engine.supply import Supply
from graphopt.engine.traffic import hot_shapes
from graphopt.executor.arrangement import Arrangement, Overlay, is_adjacent
from graphopt.executor.backend import Options, options_of
from graphopt.executor.plan import Step
from graphopt.executor.runs import run_region
from graphopt.executor.step_times import time_steps

MEASURE_S = (
    0.3  # of timing steps, after a campaign; beyond that a model is too slow to be timed idly
)

Sizes = Mapping[str, int]


class Costs:
    """Prices plans. `measure` is called on the background thread, everything else on any."""

    def __init__(
        self,
        model: CostModel | None,
        supply: Supply,
        limits: Callable[[str], ModelLimits],
        now_s: Callable[[], float],
    ) -> None:
        """`limits` of a model by its name, for steps that need no build; `model` None predicts
        nothing.
        """
        self.model = model
        self._supply = supply
        self._limits = limits
        self._now_s = now_s
        self._host = host_fingerprint()
        self._torch = version("torch")
        self._works = Works()

    def steps(self, facts: Facts, arrangement: Arrangement, sizes: Sizes) -> list[StepCost] | None:
        """What each step of a plan takes, in order; None where a size is not known."""
        try:
            return price(self.model, self._pieces(facts, arrangement, sizes))
        except KeyError:
            return None

    def plan(self, facts: Facts, arrangement: Arrangement, sizes: Sizes) -> PlanCost | None:
        """What a request takes; None where that cannot be told."""
        found = self.steps(facts, arrangement, sizes)
        return total(found) if found else None

    def document(self, model: LiveModel, facts: Facts) -> dict[str, Any] | None:
        """What the planner predicts by: coefficients, what was measured of the steps that run, and the
        sizes that it is all about. None where there is no model, or a size is not known.
        """
        if self.model is None:
            return None
        sizes, arrangement = sizes_of(model), model.arrangement_of(facts)
        if any(symbol.name not in sizes for symbol in facts.graph.symbols):
            return None
        samples = []
        for step in arrangement.plan.steps:
            key, options = self._key(step, arrangement, sizes)
            known = self._supply.cost(key)
            if known is not None:
                samples.append([list(step.blocks), step.tier, options.document(), known.median_s])
        values = {each.name: each.value for each in self.model.effective()}
        return {"coefficients": values, "sizes": sizes, "samples": samples}

    def foresee(
        self, model: LiveModel, facts: Facts, before: Arrangement, new: Facts, after: Arrangement
    ) -> Foreseen:
        """What going from one revision to the next changes, in the shape that `model` runs most."""
        sizes = sizes_of(model)
        known = self.plan(facts, before, sizes)
        live = self.plan(new, after, sizes)
        settled = live
        gone = [o for o in before.overlays if not any(o is kept for kept in after.overlays)]
        if gone:
            settled = self._rebuilt(new, after, gone, sizes)
        return Foreseen(sizes, known, live, settled)

    def measure(self, model: LiveModel, facts: Facts, arrangement: Arrangement) -> None:
        """Times the steps of what is published, unless requests come, and learns from it."""
        slot = model.slot
        for inputs in model.inputs_to_try()[:1]:
            begun = slot.mark()
            with suppress(Exception):  # a made-up input may be one that the model cannot take
                found = time_steps(
                    arrangement.plan, inputs, self._now_s,
                    lambda: slot.is_busy() or slot.mark() is not begun, MEASURE_S,  # noqa: B023
                )  # fmt: skip
                if found is not None:
                    self._note(facts, arrangement, *found)

    def learn(self, facts: Facts, arrangement: Arrangement, sizes: Sizes) -> None:
        """Teaches the model what was measured before, in this process or an earlier one."""
        if self.model is None:
            return
        with suppress(KeyError):
            pieces = list(self._pieces(facts, arrangement, sizes))
            footprint = sum(piece.work.footprint_bytes for piece in pieces)
            for piece in pieces:
                if piece.measured_s is not None:
                    work = piece.work.within(footprint)
                    self.model.observe(work, piece.backend, piece.options, piece.measured_s)

    # -- helpers

    def _note(
        self, facts: Facts, arrangement: Arrangement, took: list[float], sizes: Sizes, rounds: int
    ) -> None:
        for step, seconds in zip(arrangement.plan.steps, took, strict=True):
            key = self._key(step, arrangement, sizes)[0]
            if seconds > 0:
                self._supply.note_cost(key, seconds, rounds)
        self.learn(facts, arrangement, sizes)

    def _pieces(self, facts: Facts, arrangement: Arrangement, sizes: Sizes) -> Iterator[Piece]:
        for step in arrangement.plan.steps:
            key, options = self._key(step, arrangement, sizes)
            known = self._supply.cost(key)
            work = self._works.of(facts, run_region(facts, step.blocks), sizes, step.tier)
            yield Piece(work, step.tier, options, known.median_s if known else None)

    def _rebuilt(
        self, facts: Facts, after: Arrangement, gone: list[Overlay], sizes: Sizes
    ) -> PlanCost | None:
        """`after` with the regions in `gone` back on their runtimes, as they would be built."""
        again = [o for o in gone if all(block in facts.regions for block in o.step.blocks)]
        again = [o for o in again if is_adjacent(facts, o.step.blocks)]
        if len(again) < len(gone):
            return None  # other blocks: where the planner will cut is not known yet
        try:
            covered = {block for overlay in again for block in overlay.step.blocks}
            pieces = [
                piece
                for step, piece in zip(
                    after.plan.steps, self._pieces(facts, after, sizes), strict=True
                )
                if covered.isdisjoint(step.blocks)
            ]
            for overlay in again:
                tier, region = overlay.step.tier, run_region(facts, overlay.step.blocks)
                options = options_of(json.loads(_artifact(overlay, sizes, overlay.step)[4]))
                pieces.append(
                    Piece(self._works.of(facts, region, sizes, tier), tier, options, None)
                )
        except KeyError:
            return None
        return total(price(self.model, pieces))

    def _key(self, step: Step, arrangement: Arrangement, sizes: Sizes) -> tuple[CostKey, Options]:
        overlay = next((each for each in arrangement.overlays if each.step is step), None)
        if overlay is None:
            budget = self._limits(arrangement.plan.graph.name).budget
            options, library = Options(budget.each, budget.workers), self._torch
            text = json.dumps(options.document(), separators=(",", ":"))
        else:
            artifact = _artifact(overlay, sizes, step)
            library, text = artifact[3], artifact[4]
            options = options_of(json.loads(text))
        bucket = tuple(sizes[name] for name in step.symbols)
        return CostKey(step.key, bucket, step.tier, library, text, self._host), options


def sizes_of(model: LiveModel) -> dict[str, int]:
    """The sizes of a model's symbols in the shape that takes most of its time; made up without
    requests, and empty where even that fails.
    """
    hot = hot_shapes(model.slot).buckets
    if hot:
        return dict(hot[0])
    with suppress(Exception):  # inputs made up may be none the model can take
        _, symbols = model.slot.plan.bind(model.inputs_to_try()[0])
        return dict(symbols)
    return {}


def _artifact(overlay: Overlay, sizes: Sizes, step: Step) -> tuple[str, ...]:
    """The artifact that runs at these sizes: that of the shape, else the one for every shape."""
    wanted = tuple(sizes[name] for name in step.symbols)
    for key in overlay.artifacts:
        if options_of(json.loads(key[4])).sizes == wanted:
            return key
    return overlay.artifacts[0]
