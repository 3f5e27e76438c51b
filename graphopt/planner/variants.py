"""The artifacts of a plan: every piece as a backend offers to run it, in every shape that is hot."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from graphopt.analysis.facts import Facts
from graphopt.analysis.regions import Region
from graphopt.executor.backend import Backend, Options
from graphopt.executor.runs import run_region
from graphopt.kept import Kept
from graphopt.planner.layout import Run

# Of the time that requests take: the rest of them, on the live path's tiers, may well take half as long
# again, and that must not be felt.
HOT_ENOUGH = 0.98
CHOICES_MAX = 4_096  # of a backend for a structure; proposals are made on one thread

Document = Mapping[str, Any]
Extra = tuple[tuple[str, str], ...]
_CHOICES: Kept[Any, dict[Extra, Options]] = Kept(CHOICES_MAX)


def variants(
    facts: Facts, document: Document, pieces: Iterable[Run], backend: Backend, base: Options
) -> dict[Extra, list[dict[str, Any]]]:
    """The regions of each way in which the backend can run the pieces."""
    offers: list[tuple[list[str], tuple[str, ...], Mapping[Extra, Options]]] = []
    for piece in pieces:
        region = run_region(facts, piece)
        offers.append((list(piece), region.symbols, _choices(facts, region, backend, base)))
    # Most pieces are alike
    entries: dict[tuple[Options, tuple[str, ...]], list[dict[str, Any]]] = {}
    found_by: dict[Extra, list[dict[str, Any]]] = {}
    for extra in dict.fromkeys(extra for _, _, choices in offers for extra in choices):
        regions = found_by[extra] = []
        for blocks, symbols, choices in offers:
            choice = choices.get(extra) or next(iter(choices.values()))
            found = entries.get((choice, symbols))
            if found is None:
                found = entries[choice, symbols] = [
                    replace(choice, sizes=sizes).document() for sizes in _sizes(symbols, document)
                ]
            regions += [
                {"blocks": blocks, "backend": backend.name, "options": options} for options in found
            ]
    return found_by


def _choices(
    facts: Facts, region: Region, backend: Backend, base: Options
) -> Mapping[Extra, Options]:
    """The backend's choices for a region by what sets them apart; a structure is asked about once."""
    key = (backend.choices, region.key, base)
    found = _CHOICES.get(key)
    if found is None:
        offered = backend.choices(facts, region, base)
        found = _CHOICES[key] = {choice.extra: choice for choice in offered}
    return found


def _sizes(symbols: tuple[str, ...], document: Document) -> list[tuple[int, ...] | None]:
    """The shape variants of a region: one for each hot shape, and one that takes every shape.

    The latter holds the weights once more, so it is left out where hardly a request would run it:
    the others are served by the live path's tiers then.
    """
    if not symbols:
        return [()]
    hot = [tuple(bucket[name] for name in symbols) for bucket in document["buckets"]]
    any_shape = [] if hot and document["buckets_share"] >= HOT_ENOUGH else [None]
    return [*any_shape, *dict.fromkeys(hot)]
