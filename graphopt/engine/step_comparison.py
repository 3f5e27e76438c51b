"""Two plans compared by the steps in which they differ, while no request runs.

A generator of the background thread, as a campaign is: beside requests of other models it takes a
small share of the time, and where requests of its own model leave it none it gives up.

What follows from a plan that won before, but for a few regions: where these take as long as what runs in
their place, the plan is as good as it was, and the regions of later deltas have theirs to go by; that
they gain nothing is no reason to take the others away. Where requests came, these decide, in a trial.
"""

from collections.abc import Callable, Generator, Set
from dataclasses import replace
from typing import Any

from graphopt.engine.improve import Waiting
from graphopt.engine.live import LiveModel
from graphopt.executor.beginnings import Beginnings
from graphopt.executor.idle_trial import ALONE_S, BESIDE_SHARE
from graphopt.executor.plan import Plan
from graphopt.executor.step_trial import StepTrial, TierAndKey, unproven
from graphopt.executor.trial import ACCEPTANCE, Trial, TrialResult, TrialSettings

PATIENCE_S = 2.0  # without another pair: then requests decide, in a trial
RETRY_S = 0.002  # until the next look at it, where a request came
# The steps have run when they were warmed. As many pairs as a layer of 20 ms fits into the patience:
# each that is allowed for makes the first look a harder one.
SETTINGS = replace(ACCEPTANCE, warmup_pairs=0, pairs_max=24)
NO_SLOWER = replace(SETTINGS, settles=True)

OthersServe = Callable[[LiveModel], bool]
Clock = Callable[[], float]


def compare_steps(
    model: LiveModel,
    beginnings: Beginnings,
    new: Plan,
    proven: Set[TierAndKey],
    others_serve: OthersServe,
    now_s: Clock,
) -> Waiting:
    """Why the plan `new` needs no trial; empty when its new steps are slower, or requests came.

    Takes what `result_of` takes.
    """
    if not unproven(beginnings.plan.steps, new.steps, proven):
        return "it won with regions of these kinds before"
    result = yield from result_of(model, beginnings, new, proven, others_serve, now_s, NO_SLOWER)
    if result is None or not result.is_no_slower:
        return ""
    return f"it won with most of its regions before, and its new steps take {result.reason}"


def result_of(
    model: LiveModel,
    beginnings: Beginnings,
    new: Plan,
    proven: Set[TierAndKey],
    others_serve: OthersServe,
    now_s: Clock,
    settings: TrialSettings = SETTINGS,
    *,
    everywhere: bool = False,
) -> Generator[float, Any, TrialResult | None]:
    """What the steps of `new` take against those of the published plan; None when requests came.

    Args:
        model: whose plans they are.
        beginnings: of the published plan, on one input of each shape.
        new: warm.
        proven: of steps that won before; at least one other differs.
        others_serve: whether models other than the one it is given have requests.
        now_s: monotonic clock.
        settings: of the trial.
        everywhere: whether steps of one kind are all timed.
    """
    trial = Trial(beginnings.plan.id, new.id, settings)
    driver = StepTrial(trial, beginnings, new, model.slot, now_s, proven, everywhere=everywhere)
    pairs, paired_s = 0, now_s()
    while now_s() < paired_s + PATIENCE_S:
        is_beside, begun_s = others_serve(model), now_s()
        result = driver.run(0.0 if is_beside else ALONE_S)
        if result is not None:
            return result
        spent_s = now_s() - begun_s
        if trial.pairs > pairs:
            pairs, paired_s = trial.pairs, now_s()
        yield max(RETRY_S, spent_s * (1 / BESIDE_SHARE - 1) if is_beside else 0.0)
    return None
