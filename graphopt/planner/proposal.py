"""The first selection rule: the ways of running a graph that are worth building, most promising first.

A network of layers that take a millisecond or more each is run layer by layer, so that an edit drops
one layer to the live path and not the model; the whole graph as one region comes after it and has
to win. A network without such layers is run as a whole. Where a runtime cannot run an op, the run is
cut around the block that holds it; where deltas keep editing a block, around that one, so that the
next edit of it drops nothing else.

A proposal is a function of the facts and of the document it is given (law 3).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from graphopt.analysis.facts import Facts, Update
from graphopt.executor.backend import Backend, Options, backends
from graphopt.planner.forecast import Forecast, make_forecast
from graphopt.planner.layout import Run, around, layer_count, layers, whole
from graphopt.planner.ranking import parted, ranked
from graphopt.planner.support import Support
from graphopt.planner.variants import variants

LAYER_S_MIN = 1e-3  # a layer worth a region of its own (DESIGN section 7)
QUICK_S = 2e-3  # a hand-over to another thread and back takes some 10 us
PLANS_MAX = 8
PREFERRED = ("openvino", "onnxruntime")  # the order in which they won on most models measured


Document = Mapping[str, Any]


def propose(
    facts: Facts,
    document: Document,
    offered: Mapping[str, Backend] | None = None,
    forecast: Forecast | None = None,
) -> dict[str, Any]:
    """The plans worth building for a graph.

    Args:
        facts: of the graph.
        document: `backends`, names of the runtimes there are; `threads` and `streams` of a call;
            `buckets`, the sizes of the graph's symbols by name in its hottest shapes, hottest first,
            and `buckets_share`, the share of the requests' time that goes to them; `restless`, the
            blocks that deltas keep editing; `chosen`, the family of the plan that runs, or None;
            `latency_s`, what a request takes now, or None when it was not measured; `costs`, what to
            predict by (see `forecast`), which may be missing.
        offered: the backends by name; by default those that are registered.
        forecast: of this graph, as `foresee` makes it of the same document.

    Returns:
        `plans`: a list, the most promising first; each has a `label`, a `family` (the label but for
        what is left out around edits), `layout` (`layers`, `whole` or `parted`), `backend`,
        `predicted_s` of a request, where that can be told, and `regions`, a list of `{blocks,
        backend, options}` where several entries of the same blocks are variants for shape buckets.
    """
    there = _there(document, offered)
    count = layer_count(facts)
    latency_s = document.get("latency_s")
    by_layer = count > 0 and latency_s is not None and latency_s / count >= LAYER_S_MIN
    layouts = [("layers", layers(facts)), ("whole", whole(facts))] if by_layer else []
    last = [backend for backend in there if _is_last_resort(backend)]
    plans = []
    restless = frozenset(document["restless"])
    for layout, runs in layouts or [("whole", whole(facts))]:
        found = []
        for backend in there:
            if backend not in last:
                found += _plans(facts, document, layout, runs, restless, backend)
        plans += ranked(found, forecast)
    if not plans:  # what takes minutes to build is for graphs that nothing else takes
        for backend in last:
            plans += _plans(facts, document, "whole", whole(facts), restless, backend)
    if forecast is not None:
        plans = [*parted(facts, document, forecast, plans), *plans]
    return {"plans": plans[:PLANS_MAX]}


def foresee(
    facts: Facts,
    document: Document,
    standing: tuple[Forecast, Sequence[Update]] | None = None,
    offered: Mapping[str, Backend] | None = None,
) -> Forecast | None:
    """What the ways of running a graph would take; None where `document` has no costs to tell by.

    `standing` is the forecast of an earlier revision and what led from there to this one.
    """
    backends_there = [each for each in _there(document, offered) if not _is_last_resort(each)]
    ways = [(b, threads) for b in backends_there for threads in _thread_counts(document)]
    return make_forecast(facts, document, ways, *(standing or ()))


def _is_last_resort(backend: Backend) -> bool:
    return bool(getattr(backend, "last_resort", False))


def _there(document: Document, offered: Mapping[str, Backend] | None) -> list[Backend]:
    known = backends() if offered is None else offered
    return [known[name] for name in sorted(document["backends"], key=_rank) if name in known]


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
        for extra, regions in variants(facts, document, pieces, backend, base).items():
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
