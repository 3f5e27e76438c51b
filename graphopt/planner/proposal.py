"""The first selection rule: the ways of running a graph that are worth building, most promising first.

A network of layers that take a millisecond or more each is run layer by layer, so that an edit drops
one layer to the live path and not the model; the whole graph as one region comes after it and has
to win. A network without such layers is run as a whole. Where a runtime cannot run an op, the run is
cut around the block that holds it; where deltas keep editing a block, around that one, so that the
next edit of it drops nothing else.

A proposal is a function of the facts and of the document it is given (law 3).
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from graphopt.analysis.facts import Facts
from graphopt.analysis.regions import Region
from graphopt.executor.backend import Backend, Options, backends
from graphopt.executor.runs import run_region
from graphopt.planner.layout import Run, around, layer_count, layers, whole
from graphopt.planner.support import Support

LAYER_S_MIN = 1e-3  # a layer worth a region of its own (DESIGN section 7)
QUICK_S = 2e-3  # a hand-over to another thread and back takes some 10 us
# Of the time that requests take: the rest of them, on the live path's tiers, may well take half as long
# again, and that must not be felt.
HOT_ENOUGH = 0.98
PLANS_MAX = 8
PREFERRED = ("openvino", "onnxruntime")  # the order in which they won on most models measured

CHOICES_MAX = 4_096  # of a backend for a structure; proposals are made on one thread

Document = Mapping[str, Any]
Extra = tuple[tuple[str, str], ...]
_CHOICES: dict[Any, dict[Extra, Options]] = {}


def propose(
    facts: Facts, document: Document, offered: Mapping[str, Backend] | None = None
) -> dict[str, Any]:
    """The plans worth building for a graph.

    Args:
        facts: of the graph.
        document: `backends`, names of the runtimes there are; `threads` and `streams` of a call;
            `buckets`, the sizes of the graph's symbols by name in its hottest shapes, hottest first,
            and `buckets_share`, the share of the requests' time that goes to them; `restless`, the
            blocks that deltas keep editing;
            `latency_s`, what a request takes now, or None when it was not measured.
        offered: the backends by name; by default those that are registered.

    Returns:
        `plans`: a list, the most promising first; each has a `label`, a `family` (the label but for
        what is left out around edits), `layout` (`layers` or `whole`), `backend` and `regions`, a
        list of `{blocks, options}` where several entries of the same blocks are variants for shape
        buckets.
    """
    known = backends() if offered is None else offered
    count = layer_count(facts)
    latency_s = document.get("latency_s")
    by_layer = count > 0 and latency_s is not None and latency_s / count >= LAYER_S_MIN
    layouts = [("layers", layers(facts)), ("whole", whole(facts))] if by_layer else []
    there = [known[name] for name in sorted(document["backends"], key=_rank) if name in known]
    last = [backend for backend in there if getattr(backend, "last_resort", False)]
    plans = []
    restless = frozenset(document["restless"])
    for layout, runs in layouts or [("whole", whole(facts))]:
        for backend in there:
            if backend not in last:
                plans += _plans(facts, document, layout, runs, restless, backend)
    if not plans:  # what takes minutes to build is for graphs that nothing else takes
        for backend in last:
            plans += _plans(facts, document, "whole", whole(facts), restless, backend)
    return {"plans": plans[:PLANS_MAX]}


def _rank(name: str) -> tuple[int, str]:
    return (PREFERRED.index(name) if name in PREFERRED else len(PREFERRED), name)


def _plans(
    facts: Facts,
    document: Document,
    layout: str,
    runs: list[Run],
    restless: frozenset[str],
    backend: Backend,
) -> list[dict[str, Any]]:
    calm = around(facts, runs, restless)
    around_edits = [] if calm == runs else ["around edits"]
    plans = []
    for note, pieces in _ways(facts, calm, backend).items():
        plans += _plans_of(facts, document, layout, around_edits, note, pieces, backend)
    return plans


def _ways(facts: Facts, runs: list[Run], backend: Backend) -> dict[tuple[str, ...], list[Run]]:
    """The pieces of `runs` that the backend can run, and, where they are others, those of what it has
    rules for: what a runtime's own converter writes may well be slower there than on the live path.
    """
    support = Support(facts, backend.unsupported)
    able = [piece for run in runs for piece in support.pieces(run)]
    unruled = getattr(backend, "without_rule", None)
    if unruled is None:
        return {(): able}
    support = Support(facts, unruled)
    ruled = [piece for run in runs for piece in support.pieces(run)]
    return {(): able} if ruled in ([], able) else {(): able, ("by rules",): ruled}


def _plans_of(
    facts: Facts,
    document: Document,
    layout: str,
    around_edits: list[str],
    note: tuple[str, ...],
    pieces: list[Run],
    backend: Backend,
) -> list[dict[str, Any]]:
    plans = []
    for threads in _thread_counts(document):
        base = Options(threads, document["streams"])
        for extra, regions in _variants(facts, document, pieces, backend, base).items():
            words = [*note, *(f"{key}={value}" for key, value in extra)]
            if threads != document["threads"]:
                words.append(f"threads={threads}")
            plans.append(
                {
                    "label": " ".join([backend.name, layout, *around_edits, *words]),
                    "family": " ".join([backend.name, layout, *words]),
                    "layout": layout,
                    "backend": backend.name,
                    "regions": regions,
                }
            )
    return plans if pieces else []


def _thread_counts(document: Document) -> list[int]:
    """How many threads a call may use: one as well, where handing work over could cost what it gains."""
    threads, latency_s = document["threads"], document.get("latency_s")
    is_quick = latency_s is not None and latency_s < QUICK_S
    return [1, threads] if is_quick and threads > 1 else [threads]


def _variants(
    facts: Facts, document: Document, pieces: Iterable[Run], backend: Backend, base: Options
) -> dict[Extra, list[dict[str, Any]]]:
    """The regions of each way in which the backend can run the pieces."""
    offers: list[tuple[list[str], tuple[str, ...], Mapping[Extra, Options]]] = []
    for piece in pieces:
        region = run_region(facts, piece)
        offers.append((list(piece), region.symbols, _choices(facts, region, backend, base)))
    entries: dict[
        tuple[Options, tuple[str, ...]], list[dict[str, Any]]
    ] = {}  # most pieces are alike
    variants: dict[Extra, list[dict[str, Any]]] = {}
    for extra in dict.fromkeys(extra for _, _, choices in offers for extra in choices):
        regions = variants[extra] = []
        for blocks, symbols, choices in offers:
            choice = choices.get(extra) or next(iter(choices.values()))
            found = entries.get((choice, symbols))
            if found is None:
                found = entries[choice, symbols] = [
                    replace(choice, sizes=sizes).document() for sizes in _sizes(symbols, document)
                ]
            regions += [{"blocks": blocks, "options": options} for options in found]
    return variants


def _choices(
    facts: Facts, region: Region, backend: Backend, base: Options
) -> Mapping[Extra, Options]:
    """The backend's choices for a region by what sets them apart; a structure is asked about once."""
    key = (backend.choices, region.key, base)
    found = _CHOICES.get(key)
    if found is None:
        offered = backend.choices(facts, region, base)
        found = _CHOICES[key] = {choice.extra: choice for choice in offered}
        while len(_CHOICES) > CHOICES_MAX:
            del _CHOICES[next(iter(_CHOICES))]
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
