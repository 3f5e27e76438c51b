"""Are `fused` steps any slower than `eager`? One that is gives way to it, and its kind is not prepared again.

Asked of each kind of step once and by itself, so that what one gains does not hide what another loses;
of steps whose sizes are dynamic once there were requests, which alone can tell the sizes. A generator
of the background thread, which gives up where requests leave it no time: the next campaign asks again.
"""

from collections.abc import Iterable

from graphopt.analysis.facts import Facts
from graphopt.engine.improve import FusedStage, Waiting
from graphopt.engine.kinds import kind_of
from graphopt.engine.live import LiveModel
from graphopt.engine.step_comparison import Clock, OthersServe, result_of
from graphopt.executor.arrangement import Arrangement
from graphopt.executor.plan import Step


def drop_slower(
    model: LiveModel, facts: Facts, fused: FusedStage, others_serve: OthersServe, now_s: Clock
) -> Waiting:
    """Publishes the plan without the `fused` steps than which `eager` is surely quicker.

    `facts` are those of the published plan, else MovedOnError. Nothing is done while the switch is at
    another plan: the guard would take the change for that plan's own.
    """
    old = model.arrangement_of(facts)
    steps = [(kind_of(facts, step.blocks), step) for step in old.plan.steps if step.tier == "fused"]
    yield from _compare(model, facts, fused, old, steps, others_serve, now_s)
    slower = [step for kind, step in steps if fused.compared(kind)]
    if slower and model.switch.phase == "idle":
        for step in slower:
            fused.forget(step)
        model.publish_base(old, facts, {block for step in slower for block in step.blocks})


def _compare(
    model: LiveModel,
    facts: Facts,
    fused: FusedStage,
    old: Arrangement,
    steps: Iterable[tuple[str, Step]],
    others_serve: OthersServe,
    now_s: Clock,
) -> Waiting:
    """Times the `steps` of `old` whose kind was not compared yet, until requests leave no time."""
    begun = model.beginnings(facts, old.plan)
    has_requests = bool(model.requests())
    for kind, step in steps:
        if fused.compared(kind) is not None or (step.symbols and not has_requests):
            continue
        if model.switch.phase != "idle":
            return
        bare = model.bare(old, facts, set(step.blocks)).plan
        result = yield from result_of(model, begun, bare, frozenset(), others_serve, now_s)
        if result is None:
            return
        if result.verdict != "better":
            fused.note_compared(kind, "")
            continue
        reason = (
            f"slower than eager, which takes {result.ratio:.2f} of its time in {result.pairs} pairs"
        )
        fused.note_compared(kind, reason)
        fields = {
            "graph": model.name, "revision": old.plan.revision, "plan_id": old.plan.id,
            "from_plan_id": bare.id, "block": step.block, "reason": f"fused is {reason}",
            "pairs": result.pairs,
        }  # fmt: skip
        model.settings.events("plan.declined", fields)
