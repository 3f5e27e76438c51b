"""The forecast: predictions beside proposals, their order, and a plan over several runtimes where that
is predicted to pay; kept along deltas for as long as its prices stand.
"""

from collections.abc import Mapping
from typing import Any

import pytest

from graphopt.analysis.blocks import CONTEXT
from graphopt.analysis.facts import Facts, analyse, update
from graphopt.builder.models import CHANGES_MAX, Version
from graphopt.builder.workshop import Workshop
from graphopt.costs.op_work import CLASSES, LINEAR
from graphopt.delta import AddNode, Delta, Rewire, apply_fully
from graphopt.dims import symbol
from graphopt.executor.build import EagerBuilder
from graphopt.graph import Graph, Ref, Symbol
from graphopt.planner import foresee, propose
from graphopt.planner.forecast import Forecast
from graphopt.planner.layout import chain
from graphopt.types import TensorType
from helpers.graphs import Builder, transformer
from planner.test_propose import Runtime

FACTS = analyse(transformer(5))
SIZES = {"batch": 4, "seq": 16}
HOST = {
    "host.working_set.near": 262144, "host.working_set.middle": 8388608, "host.working_set.far": 134217728,
    "host.threads_2.peak": 1e11, "host.threads_2.bandwidth.near": 8e10,
    "host.threads_2.bandwidth.middle": 6e10, "host.threads_2.bandwidth.far": 2e10,
}  # fmt: skip
OFFERED: dict[str, Any] = {name: Runtime(name) for name in ("a", "b")}


def coefficients(**factors: float | Mapping[str, float]) -> dict[str, float]:
    """Each kernel takes 10 us times the factor of its tier, or of its class on that tier."""
    values: dict[str, float] = dict(HOST)
    for tier in ("eager", "fused", *factors):
        factor = factors.get(tier, 1.0)
        values[f"backends.{tier}.threads_2.call_s"] = 2e-6
        for kind in CLASSES:
            times = factor.get(kind, 1.0) if isinstance(factor, Mapping) else factor
            values[f"backends.{tier}.threads_2.{kind}.kernel_s"] = 1e-5 * times
    return values


def document(values: Mapping[str, float], **more: Any) -> dict[str, Any]:
    return {
        "backends": list(OFFERED), "threads": 2, "streams": 1, "buckets": [], "buckets_share": 0.0,
        "restless": [], "latency_s": 0.1,
        "costs": {"coefficients": dict(values), "sizes": SIZES, "samples": []}, **more,
    }  # fmt: skip


def ask(asked: dict[str, Any], facts: Facts = FACTS) -> list[dict[str, Any]]:
    seen = foresee(facts, asked, offered=OFFERED)
    plans: list[dict[str, Any]] = propose(facts, asked, OFFERED, seen)["plans"]
    return plans


def test_without_costs_nothing_is_predicted() -> None:
    asked = document({})
    assert foresee(FACTS, {**asked, "costs": None}, offered=OFFERED) is None
    assert foresee(FACTS, asked, offered=OFFERED) is None  # the live path's coefficients are absent
    assert all("predicted_s" not in plan for plan in ask(asked))


def test_what_is_plainly_quicker_comes_first_within_its_layout() -> None:
    plans = ask(document(coefficients(a=0.9, b=0.5)))
    assert [(p["layout"], p["backend"]) for p in plans] == [
        ("layers", "b"), ("layers", "a"), ("whole", "b"), ("whole", "a"),
    ]  # fmt: skip
    layered, _, whole, _ = (plan["predicted_s"] for plan in plans)
    calls = len(plans[0]["regions"]) - 1
    assert layered - whole == pytest.approx(2e-6 * calls + context_s(0.5), rel=1e-6)


def context_s(factor: float) -> float:
    """What computing the context values on the live path costs more than within a region."""
    kernels = len(FACTS.regions[CONTEXT].order)
    return 2e-6 + kernels * 1e-5 * (1 - factor)


def test_what_is_not_told_apart_keeps_its_order() -> None:
    plans = ask(document(coefficients(a=0.54, b=0.5)))
    assert [plan["backend"] for plan in plans] == ["a", "b", "a", "b"]


def test_what_the_model_does_not_know_is_proposed_all_the_same() -> None:
    plans = ask(document(coefficients(b=0.5)))
    assert {plan["backend"]: plan["predicted_s"] for plan in plans}["a"] is None
    assert [plan["backend"] for plan in plans] == ["a", "b", "a", "b"]


ALIKE = dict.fromkeys(CLASSES, 0.47)
PARTED = coefficients(
    a={kind: 0.4 if kind == LINEAR else 2.0 for kind in CLASSES},
    b={kind: 2.0 if kind == LINEAR else 0.4 for kind in CLASSES},
)


def two_parts(exponentials: int) -> Facts:
    """Ten linears, then some exponentials."""
    b, x = Builder(), Ref("x")
    for i in range(10):
        x = b.linear(f"linear.{i}", x, 8, 8)
    for i in range(exponentials):
        x = b.node(f"exp.{i}", "exp.default", x)
    rows = TensorType("f32", (symbol("batch"), 8))
    symbols = [Symbol("batch", 1, 64)]
    graph = Graph.build("h", b.nodes, [("x", rows)], [("y", x)], b.constants, symbols=symbols)
    return analyse(graph)


def test_several_runtimes_are_proposed_where_each_is_good_at_something() -> None:
    first, *others = ask(document(PARTED), two_parts(10))
    assert (first["label"], first["family"], first["layout"]) == ("parted", "parted", "parted")
    assert [(r["backend"], len(r["blocks"])) for r in first["regions"]] == [("a", 10), ("b", 10)]
    assert first["backend"] == "a+b"
    assert first["predicted_s"] == pytest.approx(20 * 0.4e-5 + 2 * 2e-6, rel=1e-6)
    assert all(first["predicted_s"] < plan["predicted_s"] for plan in others)


def test_a_region_too_small_for_an_artifact_stays_on_the_live_path() -> None:
    facts = two_parts(4)
    first = ask(document(PARTED), facts)[0]
    assert first["label"] == "parted"
    assert [(r["backend"], len(r["blocks"])) for r in first["regions"]] == [("a", 10)]
    live_s = 4 * (1e-5 + 2e-6)
    assert first["predicted_s"] == pytest.approx(10 * 0.4e-5 + 2e-6 + live_s, rel=1e-6)


def test_a_parted_plan_that_runs_is_proposed_whatever_it_gains_now() -> None:
    """What a delta took away from it has to come back."""
    facts, nearly = two_parts(10), document(coefficients(a=0.5, b={**ALIKE, LINEAR: 0.54}))
    assert "parted" not in {plan["layout"] for plan in ask(nearly, facts)}
    assert ask({**nearly, "chosen": "a whole"}, facts)[0]["layout"] != "parted"
    first = ask({**nearly, "chosen": "parted"}, facts)[0]
    assert first["layout"] == "parted"
    assert {region["backend"] for region in first["regions"]} == {"a", "b"}


def test_a_parted_plan_leaves_out_what_deltas_keep_editing() -> None:
    first = ask(document(PARTED, restless=["linear.0"]), two_parts(10))[0]
    assert (first["label"], first["family"]) == ("parted around edits", "parted")
    assert [len(region["blocks"]) for region in first["regions"]] == [9, 10]


def test_one_runtime_is_enough_where_parting_gains_next_to_nothing() -> None:
    plans = ask(document(coefficients(a=0.5, b=0.52)))
    assert "parted" not in {plan["layout"] for plan in plans}


# -- kept along deltas


def edited(version: Version, number: int) -> Version:
    up, added = Ref(f"layer.{number % 5}/up"), Ref(f"more.{number}")
    readers = tuple(version.facts.graph.users[up.id])
    edit = Delta([AddNode(added.id, "aten.relu.default", (up,)), Rewire(up, added, readers)])
    applied = apply_fully(version.facts.graph, edit)
    change = update(version.facts, applied.graph, applied.change)
    return version.after(version.revision + 1, change)


def seen(version: Version, asked: dict[str, Any]) -> Forecast:
    found = foresee(version.facts, asked, version.standing, offered=OFFERED)
    assert found is not None
    return found


@pytest.fixture
def version() -> Version:
    version = Version(1, FACTS, EagerBuilder())
    version.standing = (seen(version, document(PARTED)), ())
    return version


@pytest.mark.parametrize("restless", [[], ["layer.2/add"]])
def test_a_forecast_is_repaired_and_is_the_one_from_scratch(
    version: Version, restless: list[str]
) -> None:
    asked = document(PARTED, restless=restless)
    for number in range(3):
        version = edited(version, number)
    assert version.standing is not None
    kept, changes = version.standing
    assert len(changes) == 3
    repaired, scratch = seen(version, asked), foresee(version.facts, asked, offered=OFFERED)
    assert scratch is not None
    assert repaired.planner is kept.planner
    assert repaired.planned.seconds == scratch.planned.seconds
    assert repaired.planned.restless == scratch.planned.restless == frozenset(restless)
    assert [r.blocks for r in repaired.planned.regions] == [
        r.blocks for r in scratch.planned.regions
    ]


def test_after_too_many_deltas_it_is_made_anew(version: Version) -> None:
    for number in range(CHANGES_MAX):
        version = edited(version, number)
    assert version.standing is not None
    assert edited(version, 0 + CHANGES_MAX).standing is None


@pytest.mark.parametrize(
    ("times", "stands"), [(1.0, True), (1.04, True), (1.1, False), (1 / 1.1, False)]
)
def test_prices_stand_until_something_else_is_measured(times: float, stands: bool) -> None:
    block = chain(FACTS)[3]
    options = {"threads": 2, "streams": 1, "sizes": None, "extra": []}

    def measured(seconds: float) -> dict[str, Any]:
        asked = document(PARTED)
        asked["costs"]["samples"] = [[[block], "eager", options, seconds]]
        return asked

    before = foresee(FACTS, measured(1e-4), offered=OFFERED)
    assert before is not None
    after = foresee(FACTS, measured(1e-4 * times), (before, ()), offered=OFFERED)
    assert after is not None
    assert (after.planner is before.planner) == stands
    unmeasured = foresee(FACTS, document(PARTED), (before, ()), offered=OFFERED)
    assert unmeasured is not None
    assert unmeasured.planner is before.planner  # to hear nothing new is no news


@pytest.mark.parametrize(("others", "stands"), [(1, True), (2, False)])
def test_prices_stand_while_three_quarters_of_what_runs_take_what_they_took(
    others: int, stands: bool
) -> None:
    """A delta makes one step new: that is no reason to price all the others anew."""
    options = {"threads": 2, "streams": 1, "sizes": None, "extra": []}
    kinds = {FACTS.regions[block].key: block for block in chain(FACTS)}
    blocks = list(kinds.values())[:4]

    def measured(times: list[float]) -> dict[str, Any]:
        asked = document(PARTED)
        samples = zip(blocks, times, strict=True)
        asked["costs"]["samples"] = [[[b], "eager", options, 1e-4 * t] for b, t in samples]
        return asked

    before = foresee(FACTS, measured([1.0] * 4), offered=OFFERED)
    assert before is not None
    now = measured([2.0] * others + [1.0] * (4 - others))
    after = foresee(FACTS, now, (before, ()), offered=OFFERED)
    assert after is not None
    assert (after.planner is before.planner) == stands


def test_other_coefficients_or_sizes_make_it_anew(version: Version) -> None:
    assert version.standing is not None
    before = version.standing[0]
    other = document({**PARTED, "backends.a.threads_2.call_s": 1e-3})
    assert seen(version, other).planner is not before.planner
    larger = document(PARTED)
    larger["costs"]["sizes"] = {"batch": 8, "seq": 16}
    assert seen(version, larger).planner is not before.planner
    assert seen(version, document(PARTED)).planner is before.planner


def test_the_builder_keeps_the_forecast_with_the_revision() -> None:
    asked = document(coefficients(openvino=0.5), backends=["openvino"])
    version, workshop = Version(1, FACTS, EagerBuilder()), Workshop(lambda: 0.0, lambda: 0.0)
    first = workshop.propose(version, asked)
    assert version.standing is not None
    assert first["plans"][0]["predicted_s"] > 0
    later = edited(version, 1)
    workshop.propose(later, asked)
    assert later.standing is not None
    assert later.standing[0].planner is version.standing[0].planner
    assert later.standing[1] == ()
    workshop.propose(later, {**asked, "costs": None})
    assert later.standing is None


def test_a_host_that_was_never_calibrated_costs_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = document({})
    options = {"threads": 2, "streams": 1, "sizes": None, "extra": []}
    asked["costs"]["samples"] = [[[chain(FACTS)[3]], "eager", options, 1e-4]]
    worked: list[object] = []
    monkeypatch.setattr("graphopt.planner.forecast.as_given", lambda *args: worked.append(args))
    assert foresee(FACTS, asked, offered=OFFERED) is None
    assert worked == []


def test_a_forecast_that_fails_costs_no_proposal() -> None:
    asked = document(coefficients(openvino=0.5), backends=["openvino"])
    asked["costs"]["sizes"] = {"batch": 4}
    version, workshop = Version(1, FACTS, EagerBuilder()), Workshop(lambda: 0.0, lambda: 0.0)
    proposal = workshop.propose(version, asked)
    assert proposal["fault"] == "KeyError: 'seq'"
    assert proposal["plans"]
    assert version.standing is None
