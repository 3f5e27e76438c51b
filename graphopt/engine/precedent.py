"""What earlier campaigns tell about a proposed plan: how far off it is, and whether it needs a trial.

A way of running that won with regions of just these structures need not prove itself again. Nor need
one that won before a delta changed a layer or two of it, unless the cost model says that the new
regions are slower than what runs in their place: one layer in twelve is less than a trial can tell
on a busy host, and every delta would leave one more layer behind. The watch takes back what should
have been tried.

Deliberately absent: trials (the switch) and predictions (the costs).
"""

from collections.abc import Callable, Set

from graphopt.analysis.facts import Facts
from graphopt.costs.plan_cost import PlanCost
from graphopt.engine.assembly import Keyed
from graphopt.engine.findings import SAME_SHARE, Finding
from graphopt.executor.arrangement import ArtifactKey

NEAR = (
    0.25  # of a plan's nodes, at most, in regions that are to be built: a layer or two of a network
)

Price = Callable[[], tuple[PlanCost | None, PlanCost | None]]
"""What a request takes on the published plan and on the candidate."""


def nodes_of(facts: Facts, run: tuple[str, ...]) -> int:
    """How many nodes the blocks of a run compute."""
    return sum(len(facts.regions[block].order) for block in run)


def share_of(facts: Facts, keyed: Keyed, belongs: Callable[[ArtifactKey], bool]) -> float:
    """The part of a plan's nodes that lie in regions whose artifacts all belong; 1.0 of no nodes."""
    runs: dict[tuple[str, ...], bool] = {}
    for piece, key in keyed:
        runs[piece.blocks] = runs.get(piece.blocks, True) and belongs(key)
    nodes = {run: nodes_of(facts, run) for run in runs}
    total = sum(nodes.values())
    return sum(nodes[run] for run, is_in in runs.items() if is_in) / total if total else 1.0


def why_known(
    facts: Facts,
    finding: Finding,
    before: Finding | None,
    keyed: Keyed,
    proven: Set[str],
    price: Price,
) -> str:
    """Why a plan needs no trial; empty when it needs one.

    Args:
        facts: of the graph.
        finding: about the plan.
        before: what was concluded about this way of running the last time.
        keyed: the plan's pieces.
        proven: structure keys of regions with which it won trials on this host.
        price: asked when only the new regions are in question.
    """
    if before is None or before.state not in ("chosen", "replaced"):
        return ""
    if not finding.shapes <= before.shapes:
        return ""
    if finding.structures <= proven:
        return "it won with regions of this structure before"
    if share_of(facts, keyed, lambda key: key[0] in proven) < SAME_SHARE:
        return ""
    reason = "it won with most of these regions before"
    now, then = price()
    if now is None or then is None:
        return reason
    if then.seconds >= now.seconds:
        return ""
    times = f"{then.seconds * 1e3:.3g} ms instead of {now.seconds * 1e3:.3g}"
    return f"{reason}, and the cost model says {times}"
