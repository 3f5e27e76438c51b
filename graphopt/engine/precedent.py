"""What earlier campaigns tell about a proposed plan: how far off it is, and what is left to ask of it.

A way of running that won with regions of just these structures has nothing to prove again. One that
won before a delta changed a layer or two of it has to show that its new steps are faster than those
they replace, and no more: a trial of whole requests could not tell one layer in twelve, and every
delta would leave one more layer behind.

Deliberately absent: the trials themselves.
"""

from collections.abc import Callable, Set

from graphopt.analysis.facts import Facts
from graphopt.engine.assembly import Keyed
from graphopt.engine.findings import SAME_SHARE, Finding
from graphopt.engine.kinds import kind_of
from graphopt.executor.arrangement import ArtifactKey

NEAR = 0.25  # of a plan's nodes, at most, that are to be built: a layer or two of a network


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


def has_won(finding: Finding, before: Finding | None, proven: Set[str]) -> bool:
    """Whether a plan won with just these regions and shapes, and nothing was said against it since.

    Args:
        finding: about the plan.
        before: what was concluded about this way of running the last time.
        proven: kinds of regions with which it won trials on this host.
    """
    return _won_before(finding, before) and finding.kinds <= proven


def is_alike(
    facts: Facts, finding: Finding, before: Finding | None, keyed: Keyed, proven: Set[str]
) -> bool:
    """Whether it won with most of these regions, by their nodes; `keyed` are the plan's pieces."""
    won = {key for piece, key in keyed if kind_of(facts, piece.blocks) in proven}
    share = share_of(facts, keyed, won.__contains__)
    return _won_before(finding, before) and share >= SAME_SHARE


def has_run(before: Finding) -> bool:
    """Whether that way of running was published and not taken back."""
    return before.state in ("chosen", "replaced")


def _won_before(finding: Finding, before: Finding | None) -> bool:
    return before is not None and has_run(before) and finding.shapes <= before.shapes
