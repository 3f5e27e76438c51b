"""What of a graph a runtime can run: its nodes, its blocks, and what is left of a run without the rest."""

from collections.abc import Callable, Mapping
from typing import Any

from graphopt.analysis.blocks import CONTEXT
from graphopt.analysis.facts import Facts
from graphopt.analysis.regions import Region
from graphopt.executor.runs import run_region
from graphopt.planner.layout import Run, pieces_of

VERDICTS_MAX = 4_096  # of a backend on a structure; all of this runs on one thread
_VERDICTS: dict[Any, tuple[int, ...]] = {}

WhyNot = Callable[[Facts, Region], Mapping[str, str]]
"""Nodes that are to stay out, with reasons: a backend's `unsupported` or `without_rule`."""


def supported(facts: Facts, run: Run, why_not: WhyNot) -> list[Run]:
    """`run` without the blocks that hold a node which is to stay out: the pieces left of it."""
    homes = {home for id in _bad(facts, run, why_not) if (home := facts.home_of(id))}
    if CONTEXT in homes:
        return supported(facts, run[1:], why_not)
    return pieces_of(facts, run, homes)


def is_supported(facts: Facts, region: Region, why_not: WhyNot) -> bool:
    """Whether no node of a region is to stay out."""
    return not _verdict(facts, region, why_not)


def _bad(facts: Facts, run: Run, why_not: WhyNot) -> list[str]:
    """The nodes of a run that cannot be run. Where each block is fine by itself the run is."""
    if not any(_verdict(facts, facts.regions[block], why_not) for block in run):
        return []
    return _verdict(facts, run_region(facts, run), why_not)


def _verdict(facts: Facts, region: Region, why_not: WhyNot) -> list[str]:
    """The nodes of a region that cannot be run. A structure that repeats is looked at once, and not
    again when a delta leaves it as it was: the answer depends on it and on the ranges of its symbols.
    """
    known = {each.name: (each.min, each.max) for each in facts.graph.symbols}
    ranges = tuple([known.get(name) for name in region.symbols])
    key = (why_not, region.key, ranges)
    found = _VERDICTS.get(key)
    if found is None:
        bad = why_not(facts, region)
        found = tuple(i for i, id in enumerate(region.order) if id in bad)
        _VERDICTS[key] = found
        while len(_VERDICTS) > VERDICTS_MAX:
            del _VERDICTS[next(iter(_VERDICTS))]
    return [region.order[i] for i in found]
