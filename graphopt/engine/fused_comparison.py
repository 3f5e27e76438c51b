"""Do `fused` steps gain anything? Those that do not give way to `eager`; their kind is not prepared again.

Asked of each kind of step once and by itself, so that what one gains does not hide what another loses;
of steps whose sizes are dynamic once there were requests, which alone can tell the sizes. A generator
of the background thread, which gives up where requests leave it no time: the next campaign asks again.
"""

from collections.abc import Iterable, Mapping, Sequence

from graphopt.analysis.facts import Facts
from graphopt.engine.improve import FusedStage, Waiting
from graphopt.engine.kinds import kind_of
from graphopt.engine.live import LiveModel
from graphopt.engine.step_comparison import Clock, OthersServe, result_of
from graphopt.executor.arrangement import Arrangement
from graphopt.executor.plan import Step

GAIN_MIN = 1.01  # of eager's time over theirs; where they are alike, the plainer one runs


def drop_without_gain(
    model: LiveModel, facts: Facts, fused: FusedStage, others_serve: OthersServe, now_s: Clock
) -> Waiting:
    """Publishes the plan without the `fused` steps that gain nothing.

    `facts` are those of the published plan, else MovedOnError. Nothing is done while the switch is at
    another plan: the guard would take the change for that plan's own.
    """
    old = model.arrangement_of(facts)
    kinds: dict[str, list[Step]] = {}
    for step in old.plan.steps:
        if step.tier == "fused":
            kinds.setdefault(kind_of(facts, step.blocks), []).append(step)
    yield from _compare(model, facts, fused, old, kinds, others_serve, now_s)
    gone = [step for kind, steps in kinds.items() if fused.compared(kind) for step in steps]
    if gone and model.switch.phase == "idle":
        for step in gone:
            fused.forget(step)
        model.publish_base(old, facts, _blocks(gone))


def _compare(
    model: LiveModel,
    facts: Facts,
    fused: FusedStage,
    old: Arrangement,
    kinds: Mapping[str, Sequence[Step]],
    others_serve: OthersServe,
    now_s: Clock,
) -> Waiting:
    """Times each kind that was not compared yet, until requests leave no time."""
    begun = model.beginnings(facts, old.plan)
    has_requests = bool(model.requests())
    for kind, steps in kinds.items():
        is_sized = has_requests or not any(step.symbols for step in steps)
        if fused.compared(kind) is not None or not is_sized:
            continue
        if model.switch.phase != "idle":
            return
        bare = model.bare(old, facts, _blocks(steps)).plan
        result = yield from result_of(
            model, begun, bare, frozenset(), others_serve, now_s, everywhere=True
        )
        if result is None:
            return
        if result.ratio is None:  # it could not be run, which says nothing of its time
            continue
        if result.ratio >= GAIN_MIN:
            fused.note_compared(kind, "")
            continue
        reason = f"no faster than eager, which takes {result.ratio:.2f} of its time in {result.pairs} pairs"
        fused.note_compared(kind, reason)
        fields = {
            "graph": model.name, "revision": old.plan.revision, "plan_id": old.plan.id,
            "from_plan_id": bare.id, "block": steps[0].block, "reason": f"fused is {reason}",
            "pairs": result.pairs,
        }  # fmt: skip
        model.settings.events("plan.declined", fields)


def _blocks(steps: Iterable[Step]) -> set[str]:
    return {block for step in steps for block in step.blocks}
