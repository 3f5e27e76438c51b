"""What the forecast changes about proposals: their order, and one more where parting pays.

Predictions are right within some ten percent, so what is predicted to be closer than that keeps the
order in which it is known to have won; measurement decides, and the forecast only which comes first.
The cheapest plan of all, whichever runtimes it takes, is proposed where it is predicted to gain more
than the two percent that a region has to win by.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from graphopt.analysis.facts import Facts
from graphopt.planner.forecast import Forecast, Placed
from graphopt.planner.layout import CUT_NODES_MIN, node_count
from graphopt.planner.variants import variants

CLOSE = 1.1  # times as long as the quickest: not told apart
GAIN = 0.98  # of the time of the best proposal on one runtime, at most

FAMILY = "parted"

Plan = dict[str, Any]


def ranked(plans: Sequence[Plan], forecast: Forecast | None) -> list[Plan]:
    """The plans of one layout, each with `predicted_s`, those first that are predicted to be quick."""
    if forecast is None:
        return list(plans)
    seconds = [forecast.seconds(_placed(plan)) for plan in plans]
    for plan, predicted_s in zip(plans, seconds, strict=True):
        plan["predicted_s"] = predicted_s
    known = [predicted_s for predicted_s in seconds if predicted_s is not None]
    close_s = min(known, default=0.0) * CLOSE

    def lag(plan: Plan) -> float:
        predicted_s: float | None = plan["predicted_s"]
        return 0.0 if predicted_s is None or predicted_s <= close_s else predicted_s

    return sorted(plans, key=lag)


def parted(
    facts: Facts, document: Mapping[str, Any], forecast: Forecast, plans: Sequence[Plan]
) -> list[Plan]:
    """The cheapest plan, if it is predicted to win against all of `plans`; else nothing.

    Regions that are too small to be worth an artifact stay on the live path. Where such a plan runs
    it has won already, and what a delta took away from it is to come back.
    """
    planned = forecast.planned
    if planned.whole is not None:  # is among them
        return []
    wanted = [
        (each.blocks, each.way)
        for each in planned.regions
        if each.way is not None and node_count(facts, each.blocks) >= CUT_NODES_MIN
    ]
    predicted_s = forecast.seconds(
        (run, way.backend.name, way.options.threads) for run, way in wanted
    )
    known = [plan["predicted_s"] for plan in plans if plan.get("predicted_s") is not None]
    is_gain = predicted_s is not None and predicted_s <= GAIN * min(known, default=0.0)
    if not wanted or not (is_gain or document.get("chosen") == FAMILY):
        return []
    regions: list[dict[str, Any]] = []
    for run, way in wanted:
        offers = variants(facts, document, [run], way.backend, way.options)
        regions += next(iter(offers.values()))
    around = ["around edits"] if planned.restless else []
    backends = dict.fromkeys(region["backend"] for region in regions)
    return [
        {
            "label": " ".join([FAMILY, *around]),
            "family": FAMILY,
            "layout": FAMILY,
            "backend": "+".join(backends),
            "predicted_s": predicted_s,
            "regions": regions,
        }
    ]


def _placed(plan: Plan) -> list[Placed]:
    runs = {
        tuple(region["blocks"]): (region["backend"], region["options"]["threads"])
        for region in plan["regions"]
    }
    return [(run, *place) for run, place in runs.items()]
