"""A plan that won before, but for a few regions: are these any slower than what runs in their place?

Where they take as long, the plan is as good as it was, and the regions of later deltas have theirs to
go by; that they gain nothing is no reason to take the others away.

A generator of the background thread, as a campaign is: beside requests of other models it takes a
small share of the time, and where requests of its own model leave it none it gives up, so that these
decide, in a trial.
"""

from collections.abc import Callable, Set
from dataclasses import replace

from graphopt.engine.improve import Waiting
from graphopt.engine.live import LiveModel
from graphopt.executor.idle_trial import ALONE_S, BESIDE_SHARE
from graphopt.executor.plan import Plan
from graphopt.executor.step_trial import Beginnings, StepTrial, TierAndKey
from graphopt.executor.trial import ACCEPTANCE, Trial

PATIENCE_S = 2.0  # without another pair: then requests decide, in a trial
RETRY_S = 0.002  # until the next look at it, where a request came
# The steps have run when they were warmed. As many pairs as a layer of 20 ms fits into the patience:
# each that is allowed for makes the first look a harder one.
SETTINGS = replace(ACCEPTANCE, warmup_pairs=0, pairs_max=24)


def compare_steps(
    model: LiveModel,
    beginnings: Beginnings,
    new: Plan,
    proven: Set[TierAndKey],
    others_serve: Callable[[LiveModel], bool],
    now_s: Callable[[], float],
) -> Waiting:
    """Why the plan `new` needs no trial; empty when its new steps are slower, or requests came.

    Args:
        model: whose plans they are.
        beginnings: of the published plan, on one input of each shape.
        new: warm.
        proven: of steps that won before.
        others_serve: whether models other than the one it is given have requests.
        now_s: monotonic clock.
    """
    trial = Trial(beginnings.plan.id, new.id, SETTINGS)
    driver = StepTrial(trial, beginnings, new, model.slot, now_s, proven)
    if not driver.stretches:
        return "it won with regions of these kinds before"
    pairs, paired_s, result = 0, now_s(), None
    while result is None and now_s() < paired_s + PATIENCE_S:
        is_beside, begun_s = others_serve(model), now_s()
        result = driver.run(0.0 if is_beside else ALONE_S)
        spent_s = now_s() - begun_s
        if trial.pairs > pairs:
            pairs, paired_s = trial.pairs, now_s()
        if result is None:
            yield max(RETRY_S, spent_s * (1 / BESIDE_SHARE - 1) if is_beside else 0.0)
    if result is None or not result.is_no_slower:
        return ""
    return f"it won with most of its regions before, and its new steps take {result.reason}"
