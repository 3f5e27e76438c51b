"""What of a graph a runtime can run: its regions, and what is left of a run without the rest.

A structure that repeats is looked at once, and not again when a delta leaves it as it was: the answer
depends on it and on the ranges of its symbols.
"""

from collections.abc import Callable, Mapping
from typing import Any

from graphopt.analysis.blocks import CONTEXT
from graphopt.analysis.facts import Facts
from graphopt.analysis.regions import Region
from graphopt.executor.runs import run_region
from graphopt.kept import Kept
from graphopt.planner.layout import Run, pieces_of

VERDICTS_MAX = 4_096  # of a backend on a structure; all of this runs on one thread
_VERDICTS: Kept[Any, tuple[int, ...]] = Kept(VERDICTS_MAX)

WhyNot = Callable[[Facts, Region], Mapping[str, str]]
"""Nodes that are to stay out, with reasons: a backend's `unsupported` or `without_rule`."""


class Support:
    """What `why_not` says about one graph."""

    def __init__(self, facts: Facts, why_not: WhyNot) -> None:
        """Asks nothing yet."""
        self._facts = facts
        self._why_not = why_not
        self._ranges = {each.name: (each.min, each.max) for each in facts.graph.symbols}

    def takes(self, region: Region) -> bool:
        """Whether no node of a region is to stay out."""
        return not self._verdict(region)

    def pieces(self, run: Run) -> list[Run]:
        """`run` without the blocks that hold a node which is to stay out: the pieces left of it."""
        bad = self._of_run(run)
        if not bad:
            return pieces_of(self._facts, run, frozenset())
        order = run_region(self._facts, run).order
        homes = {home for i in bad if (home := self._facts.home_of(order[i]))}
        if CONTEXT in homes:
            return self.pieces(run[1:])
        return pieces_of(self._facts, run, homes)

    def _of_run(self, run: Run) -> tuple[int, ...]:
        """The nodes of a run that cannot be run, by position. Where each block is fine by itself the
        run is.
        """
        region = run_region(self._facts, run)
        if len(run) == 1:
            return self._verdict(region)
        key = (self._why_not, "run", region.key, self._ranges_of(region))
        found = _VERDICTS.get(key)
        if found is None:
            regions = self._facts.regions
            is_fine = all(self.takes(regions[block]) for block in run)
            found = _VERDICTS[key] = () if is_fine else self._verdict(region)
        return found

    def _verdict(self, region: Region) -> tuple[int, ...]:
        key = (self._why_not, region.key, self._ranges_of(region))
        found = _VERDICTS.get(key)
        if found is None:
            bad = self._why_not(self._facts, region)
            found = _VERDICTS[key] = tuple(i for i, id in enumerate(region.order) if id in bad)
        return found

    def _ranges_of(self, region: Region) -> object:
        return tuple([self._ranges.get(name) for name in region.symbols])
