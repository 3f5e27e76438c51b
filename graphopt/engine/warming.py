"""First runs of what is about to be published, on the background thread: they allocate, and page weights
in, which no request is to wait for.
"""

from collections.abc import Iterator
from contextlib import suppress

from graphopt.engine.assembly import Keyed
from graphopt.engine.findings import Finding
from graphopt.engine.precedent import has_run
from graphopt.executor.beginnings import Beginnings
from graphopt.executor.plan import Plan, run_plan
from graphopt.executor.step_trial import parting


def look_ahead(begun: Beginnings, before: Finding | None, missing: Keyed) -> None:
    """While the builder is at the `missing` pieces of a plan that ran before: computes what there is
    where the first of them begins. The new steps will be warmed and compared from there.
    """
    if before is None or not has_run(before):
        return
    wanted = {piece.blocks[0] for piece, _ in missing}
    steps = enumerate(begun.plan.steps)
    first = next((i for i, step in steps if not wanted.isdisjoint(step.blocks)), 0)
    for inputs in begun.inputs:
        with suppress(Exception):  # whoever needs it will meet the same
            begun.at(inputs, first)


def look_behind(begun: Beginnings) -> Iterator[None]:
    """Computes what crosses into the regions of several blocks, where that is not known: whatever the
    next delta touches, what is to be warmed for it begins there. An input at a time.
    """
    steps = enumerate(begun.plan.steps)
    last = max((i for i, step in steps if len(step.blocks) > 1), default=0)
    for inputs in begun.inputs:
        with suppress(Exception):  # whoever needs it will meet the same
            begun.at(inputs, last)
        yield


def warm(plan: Plan, begun: Beginnings) -> tuple[int, str]:
    """Runs a plan once in each shape, from its first step that is not published to its last.

    Returns on how many inputs it ran, and why it failed one that the published plan takes.
    """
    ran = 0
    first, last = parting(begun.plan.steps, plan.steps)
    for inputs in begun.inputs:
        try:
            begun.run(inputs, first, plan.steps[first : len(plan.steps) - last])
            ran += 1
        except Exception as error:  # whatever a runtime raises, it costs nobody a request here
            with suppress(Exception):
                run_plan(begun.plan, inputs)
                return ran, f"{type(error).__name__}: {error}"
    return ran, ""
