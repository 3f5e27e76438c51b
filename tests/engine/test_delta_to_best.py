"""A delta to a network of layers: the runtime has the layer that it touched again before anything else,
and is compared by itself: no trial could tell one layer from many.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from graphopt.delta import AddNode, Delta, PutConstant, Rewire, SetAttr
from graphopt.engine.better_path import BetterPath
from graphopt.engine.builder_link import BuilderLink
from graphopt.engine.engine import Engine
from graphopt.engine.findings import Finding, Findings
from graphopt.engine.gather import Gathering
from graphopt.engine.kinds import kind_of
from graphopt.engine.prospects import Prospects
from graphopt.engine.supply import Supply
from graphopt.executor.guard import Hysteresis
from graphopt.executor.step_trial import StepTrial
from graphopt.executor.switch import Outcome
from graphopt.graph import Ref
from helpers.layered import (
    LAYERED,
    SETTLED_S,
    WHOLE,
    Said,
    check_answers,
    compare_as,
    edit,
    of,
    only_layers,
    open_engine,
    settle_on_layers,
    winning,
)


@pytest.fixture
def said() -> Said:
    return []


def settle_on_the_whole(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Findings:
    """Edits the first layer; after that a region of everything runs, and the layers ran before."""
    monkeypatch.setattr(Prospects, "is_open", lambda self, plan: plan["label"] in (LAYERED, WHOLE))
    with winning():
        edit(engine, 0)
        assert engine.settle(SETTLED_S)
    findings = engine.host.better.findings("transformer")
    assert {f.label: f.state for f in findings} == {LAYERED: "replaced", WHOLE: "chosen"}
    assert len(engine.model.arrangement.overlays) == 1
    return findings


@pytest.fixture
def engine(said: Said, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """Six layers, each on OpenVINO: as large ones would be, and as if that had won its trial."""
    only_layers(monkeypatch)
    with open_engine(said) as engine:
        settle_on_layers(engine)
        said.clear()
        yield engine


def test_the_touched_layer_alone_is_built_and_compared(engine: Engine, said: Said):
    before = {overlay.step.blocks: overlay for overlay in engine.model.arrangement.overlays}
    edit(engine, 3)
    dropped = set(before) - {o.step.blocks for o in engine.model.arrangement.overlays}
    assert len(dropped) == 1
    assert engine.settle(SETTLED_S)
    after = {overlay.step.blocks: overlay for overlay in engine.model.arrangement.overlays}
    kept = [blocks for blocks in before if after.get(blocks) is before[blocks]]
    assert len(kept) == len(before) - 1
    assert len(after) == len(before)
    first = of(said, "plan.published", 2)[0]
    assert first["cause"] == "known_cost"
    assert "its new steps take 0.5" in first["reason"]
    (built,) = of(said, "plan.built", 2)
    assert built["block"] in next(iter(set(after) - set(kept)))
    check_answers(engine)


def test_the_runtime_comes_before_the_fused_steps(engine: Engine, said: Said):
    edit(engine, 2)
    assert engine.settle(SETTLED_S)
    tiers = [f["tier"] for f in of(said, "plan.verified", 2)]
    assert tiers[0] == "openvino"
    check_answers(engine)


def test_steps_that_take_as_long_complete_the_plan(
    engine: Engine, said: Said, monkeypatch: pytest.MonkeyPatch
):
    compared = compare_as(monkeypatch, verdict="equal", ratio=1.01, reason="1.01 of the time")
    edit(engine, 3)
    assert engine.settle(SETTLED_S)
    assert compared
    assert len(engine.model.arrangement.overlays) == 7
    assert of(said, "plan.published", 2)[0]["cause"] == "known_cost"
    check_answers(engine)


@pytest.mark.parametrize(
    "found", [{"verdict": "worse", "ratio": 1.2}, {"verdict": "equal", "ratio": 1.03}], ids=str
)
def test_layers_that_won_do_not_wait_for_a_new_one_that_is_slower(
    engine: Engine, said: Said, monkeypatch: pytest.MonkeyPatch, found: dict[str, Any]
):
    """A trial of whole requests takes ten seconds and more, and they have nothing to prove."""
    settle_on_the_whole(engine, monkeypatch)
    monkeypatch.setattr(Prospects, "is_open", lambda self, plan: plan["label"] == LAYERED)
    compared = compare_as(monkeypatch, **found)
    engine.apply(Delta([SetAttr("layer.3/gelu", "approximate", "tanh")]))  # a new structure
    assert engine.settle(SETTLED_S)
    assert compared
    decided = [f for f in of(said, "plan.published", engine.model.revision) if "cause" in f]
    assert [f["cause"] for f in decided] == ["known_cost"]
    assert "without the new ones" in decided[0]["reason"]
    run = {block for overlay in engine.model.arrangement.overlays for block in overlay.step.blocks}
    edited = engine.model.facts.home_of("layer.3/gelu")
    assert edited not in run
    assert len(engine.model.arrangement.overlays) == 6
    check_answers(engine)


def test_steps_that_are_slower_leave_the_word_to_a_trial(
    engine: Engine, said: Said, monkeypatch: pytest.MonkeyPatch
):
    compared = compare_as(monkeypatch, verdict="worse")
    edit(engine, 3)
    assert engine.settle(SETTLED_S)
    assert compared
    causes = [f["cause"] for name, f in said if name in ("plan.published", "plan.declined")
              if f.get("revision") == 2 and "cause" in f]  # fmt: skip
    assert "known_cost" not in causes
    assert "trial" in causes
    check_answers(engine)


def test_steps_that_requests_disturb_leave_the_word_to_a_trial(
    engine: Engine, said: Said, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(StepTrial, "run", lambda self, budget_s: None)
    monkeypatch.setattr("graphopt.engine.step_comparison.PATIENCE_S", 0.05)
    edit(engine, 3)
    assert engine.settle(SETTLED_S)
    causes = {f["cause"] for name, f in said if name in ("plan.published", "plan.declined")
              if f.get("revision") == 2 and "cause" in f}  # fmt: skip
    assert causes == {"trial"}


def test_what_runs_stays_chosen_when_its_new_layer_is_no_gain(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    """Else each delta would leave one more layer behind: the next one asks for both again."""
    monkeypatch.setattr("graphopt.engine.pursuit.is_alike", lambda *args: False)
    monkeypatch.setattr("graphopt.executor.trial.FUTILE_PAIRS", 1)
    monkeypatch.setattr("graphopt.executor.trial.FUTILE_SIGMA", -100.0)
    edit(engine, 3)
    assert engine.settle(SETTLED_S)
    found = engine.host.better.findings("transformer").get(LAYERED)
    assert found is not None
    assert found.state == "chosen"
    assert len(engine.model.arrangement.overlays) == 6
    monkeypatch.setattr("graphopt.engine.pursuit.has_won", lambda *args: True)
    edit(engine, 1, 1.5)  # other regions than those that are backed off from
    assert engine.settle(SETTLED_S)
    assert len(engine.model.arrangement.overlays) == 7
    check_answers(engine)


def test_another_factor_is_nothing_new_to_compare(
    engine: Engine, said: Said, monkeypatch: pytest.MonkeyPatch
):
    """It takes as long, whatever it computes; another op in its place may not."""
    edit(engine, 3)
    assert engine.settle(SETTLED_S)
    compared = compare_as(monkeypatch)
    edit(engine, 1, 1.5)
    assert engine.settle(SETTLED_S)
    assert compared == []
    assert len(engine.model.arrangement.overlays) == 7
    assert "regions of this kind" in of(said, "plan.published", 3)[0]["reason"]
    engine.apply(Delta([SetAttr("layer.2/gelu", "approximate", "tanh")]))
    assert engine.settle(SETTLED_S)
    assert compared != []
    check_answers(engine)


def test_an_attribute_is_an_edit_like_any_other(engine: Engine, said: Said):
    engine.apply(Delta([SetAttr("layer.3/gelu", "approximate", "tanh")]))
    assert engine.settle(SETTLED_S)
    assert len(engine.model.arrangement.overlays) == 7
    check_answers(engine)


def test_a_layer_after_the_other_never_asks_for_a_trial(engine: Engine, said: Said):
    """What was compared by itself is proven: there is no end of deltas after which nothing is."""
    for layer in (0, 1, 2, 3, 4):
        edit(engine, layer, 1.25 + layer / 8)
        assert engine.settle(SETTLED_S)
        assert len(engine.model.arrangement.overlays) == 7
    back = [f for n, f in said if n == "plan.published" and f["tiers"].get("openvino") == 7]
    assert {f["cause"] for f in back} == {"known_cost"}
    check_answers(engine)


def test_after_a_whole_graph_the_layers_come_back_by_the_new_one_alone(
    engine: Engine, said: Said, monkeypatch: pytest.MonkeyPatch
):
    """An edit takes the region of everything away. The layers won before it did: those that the edit
    left alone have nothing to show again, and a trial of whole requests would take as many of them.
    """
    timed: list[int] = []
    make: Callable[..., None] = StepTrial.__init__

    def counting(self: StepTrial, *args: Any, **named: Any) -> None:
        make(self, *args, **named)
        timed.append(len(self.stretches))

    settle_on_the_whole(engine, monkeypatch)
    monkeypatch.setattr(StepTrial, "__init__", counting)
    engine.apply(Delta([SetAttr("layer.3/gelu", "approximate", "tanh")]))
    assert not engine.model.arrangement.overlays
    assert engine.settle(SETTLED_S)
    first = of(said, "plan.published", 3)[0]
    assert (first["cause"], first["tiers"]["openvino"]) == ("known_cost", 7)
    assert "its new steps take 0.5" in first["reason"]
    assert timed[0] == 1
    check_answers(engine)


def test_a_layer_comes_back_where_taking_in_a_calm_place_is_no_gain(
    engine: Engine, said: Said, monkeypatch: pytest.MonkeyPatch
):
    """The way that runs leaves a block out around edits. With that block taken in it was refused; an edit
    of another layer must be built all the same.
    """
    around = f"{LAYERED} around edits"
    monkeypatch.setattr(Prospects, "is_open", lambda self, plan: plan["family"] == LAYERED)
    with winning():
        for factor in (1.5, 1.6, 1.7):
            value = "layer.3/gelu"
            readers = tuple(engine.model.graph.users[value])
            scaled = AddNode(f"scaled.{factor}", "aten.mul.Tensor", (Ref(value), factor))
            engine.apply(Delta([scaled, Rewire(Ref(value), Ref(scaled.id), readers)]))
        assert engine.settle(SETTLED_S)
    findings = engine.host.better.findings("transformer")
    assert findings.chosen is not None
    assert findings.chosen.label == around
    left_out = {step.block for step in engine.model.slot.plan.steps if step.tier == "eager"}
    monkeypatch.setattr(Prospects, "is_open", lambda self, plan: False)
    monkeypatch.setattr("graphopt.engine.churn.RESTLESS_S", 0.0)
    monkeypatch.setattr("graphopt.engine.better_path._has_calmed", lambda course: False)
    edit(engine, 1)
    said.clear()
    assert engine.settle(SETTLED_S)
    back = engine.model.slot.plan.steps
    assert {step.block for step in back if step.tier == "eager"} <= left_out
    published = of(said, "plan.published", engine.revision)
    assert [f["cause"] for f in published if "cause" in f] == ["known_cost"]
    assert findings.chosen.label == around
    check_answers(engine)


def test_a_delta_right_after_a_publication_finds_the_way_that_runs(
    engine: Engine, said: Said, monkeypatch: pytest.MonkeyPatch
):
    """The campaign that published it is ended before it goes on; so is one that was still building."""
    findings = engine.host.better.findings("transformer")
    tell = BetterPath._tell
    left, ran = [4, 3], set[str]()  # integers: each is a kind of its own

    def tell_and_edit(self: BetterPath, course: Any, outcome: Outcome) -> None:
        tell(self, course, outcome)
        if outcome.decision == "published" and left:
            facts, overlays = engine.model.facts, engine.model.arrangement.overlays
            ran.update(kind_of(facts, overlay.step.blocks) for overlay in overlays)
            # As if it came in that moment, and to the same place: no later plan has that region
            engine.apply(Delta([SetAttr("scaled.0", "other", left.pop())]))

    monkeypatch.setattr(BetterPath, "_tell", tell_and_edit)
    monkeypatch.setattr("graphopt.engine.churn.RESTLESS_EDITS", 9)
    edit(engine, 0)
    assert engine.settle(SETTLED_S)
    assert (left, engine.revision) == ([], 4)
    assert ran <= engine.host.better.supply.proven(LAYERED)
    assert findings.chosen is not None
    assert findings.chosen.label == LAYERED
    causes = [f["cause"] for n, f in said if n == "plan.published" and "cause" in f]
    assert causes == ["known_cost"] * 3
    check_answers(engine)


@pytest.mark.parametrize("state", ["building", "on trial"])
def test_what_ran_is_known_to_run_when_a_delta_ends_the_campaign_under_way(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, state: str
):
    findings = engine.host.better.findings("transformer")
    note: Callable[..., None] = Findings.note
    left = [2]

    def note_and_edit(self: Findings, finding: Finding) -> None:
        note(self, finding)
        if finding.state == state and left:
            edit(engine, left.pop(), 1.75)

    monkeypatch.setattr(Findings, "note", note_and_edit)
    edit(engine, 0)
    before: list[Finding | None] = []
    precedent = Prospects.precedent
    monkeypatch.setattr(
        Prospects,
        "precedent",
        lambda self, plan: before.append(precedent(self, plan)) or before[-1],
    )
    with winning():  # two layers of six are too many for a comparison of their steps to suffice
        assert engine.settle(SETTLED_S)
    assert left == []
    assert findings.chosen is not None
    assert before[-1] is not None
    assert before[-1].state == "chosen"
    assert len(engine.model.arrangement.overlays) == 7
    check_answers(engine)


def test_what_runs_is_known_to_run_while_the_builder_has_no_answer(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    def undecided(*args: Any) -> Iterator[Any]:
        (into,) = (each for each in args if isinstance(each, Gathering))
        into.is_decided = False
        yield 0.0

    findings = engine.host.better.findings("transformer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("graphopt.engine.pursuit.gather", undecided)
        edit(engine, 0)
        assert engine.settle(SETTLED_S)
    assert len(engine.model.arrangement.overlays) == 6
    assert findings.chosen is not None
    assert findings.chosen.label == LAYERED


def test_a_publication_is_not_taken_for_the_end_of_the_watch_before_it(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    """Both are about regions of the same structures, and told in one breath where nothing came between
    the deltas: no request, and no look at what nobody tells.
    """
    findings = engine.host.better.findings("transformer")
    monkeypatch.setattr(BetterPath, "_look", lambda self: None)
    for layer in (1, 4, 2):
        name = f"layer.{layer}/up.weight"
        value = engine.graph.constants[name].tensor * 1.5
        engine.apply(Delta([PutConstant(name, value)]))
        assert engine.settle(SETTLED_S)
        assert findings.chosen is not None
        assert (findings.chosen.state, findings.chosen.revision) == (
            "chosen",
            engine.model.revision,
        )


def test_what_is_recalled_takes_the_place_of_what_was_chosen(
    engine: Engine, said: Said, monkeypatch: pytest.MonkeyPatch
):
    findings = settle_on_the_whole(engine, monkeypatch)
    monkeypatch.setattr(Prospects, "is_open", lambda self, plan: False)
    # As if the watch of the whole graph had ended a while ago
    engine.model.switch.cancel("watched")
    monkeypatch.setattr(Hysteresis, "why_not", lambda self, key, now_s, dwells: "")
    engine.rollback(1)
    assert engine.settle(SETTLED_S)
    first = of(said, "plan.published", 3)[0]
    assert first["reason"] == "chosen before for this graph"
    assert {f.label: f.state for f in findings} == {LAYERED: "chosen", WHOLE: "replaced"}


def test_the_builder_is_at_work_while_the_other_layers_are_loaded(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    """After a whole-graph plan all layers but one lie on disk, and loading them takes as long as
    building that one.
    """
    settle_on_the_whole(engine, monkeypatch)
    order: list[str] = []
    build, fetch = BuilderLink.build, Supply.fetch

    def asking(self: BuilderLink, job: Any, *ran: Any) -> Any:
        order.append("build")
        return build(self, job, *ran)

    def fetching(self: Supply, *args: Any) -> bool:
        order.append("fetch")
        return fetch(self, *args)

    monkeypatch.setattr(BuilderLink, "build", asking)
    monkeypatch.setattr(Supply, "fetch", fetching)
    edit(engine, 3, 1.5)
    assert engine.settle(SETTLED_S)
    assert order[:7] == ["build", *["fetch"] * 6]
    check_answers(engine)
