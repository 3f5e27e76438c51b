"""What a delta took away from the way that runs, apart from what else a proposal would change.

A way of running that leaves out a block around edits is proposed anew once that block has calmed: with
the block taken in. That may be no gain, or wait for its next trial; what a delta took away elsewhere
meanwhile must not wait for it, or every delta would leave one more layer behind.
"""

import json
from collections.abc import Mapping
from typing import Any

from graphopt.engine.findings import Finding
from graphopt.executor.arrangement import Arrangement

Proposal = Mapping[str, Any]


def completed(plan: Proposal, chosen: Finding, published: Arrangement) -> Proposal | None:
    """`published` and those regions of `plan` that lie beside it, under the label of `chosen`.

    Args:
        plan: a proposal of the family of `chosen`.
        chosen: the way that runs.
        published: what is left of it.

    None where nothing is left or lacking, and where the result would be `plan` itself.
    """
    covered = published.covered()
    backends = {each["backend"] for each in plan["regions"]}
    kept = [
        {"blocks": list(overlay.step.blocks), "backend": key[2], "options": json.loads(key[-1])}
        for overlay in published.overlays
        for key in overlay.artifacts
        if key[2] in backends
    ]
    lacking = [each for each in plan["regions"] if covered.isdisjoint(each["blocks"])]
    is_more = any(each not in kept and each not in lacking for each in plan["regions"])
    if not kept or not lacking or not is_more:
        return None
    return {**plan, "label": chosen.label, "regions": [*kept, *lacking]}
