"""The better path end to end: a real builder process, plans tried, published, watched and taken back,
while the answers stay right.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import torch

import graphopt
from graphopt.builder.records import BUSY
from graphopt.delta import AddNode, Delta, RemoveNode, Rewire, SetAttr, SetOutputs
from graphopt.engine.builder_files import ScratchConstants
from graphopt.engine.builder_link import BuilderLink, BuilderSettings
from graphopt.engine.engine import Engine
from graphopt.engine.improve import FusedStage
from graphopt.engine.shelf import Shelf
from graphopt.engine.supply import Supply
from graphopt.graph import Graph, Node, Ref
from helpers.graphs import relu_chain, transformer

HERE = str(Path(__file__).parent)
LENGTH = 150  # relus: about 0.3 ms of Python in eager
SETTLED_S = 120.0  # of a broken test; a good one takes seconds

Start = Callable[..., Engine]
Said = list[tuple[str, Mapping[str, Any]]]


@pytest.fixture
def said() -> Said:
    return []


@pytest.fixture
def start(said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts an engine that has the named runtimes of `chain_backends` and no others."""
    monkeypatch.syspath_prepend(HERE)
    torch.set_num_threads(1)
    with ExitStack() as stack:

        def start_one(
            *classes: str, graph: Graph | None = None, state: str | None = None
        ) -> Engine:
            settings = graphopt.EngineSettings(
                intra_op=1,
                backends=tuple(name.lower() for name in classes),
                extra_backends=tuple(f"chain_backends:{name}" for name in classes),
                extra_path=(HERE,),
                events=lambda name, fields: said.append((name, dict(fields))),
            )
            folder = tmp_path / state if state is not None else None
            return stack.enter_context(graphopt.Engine(graph, settings, state_dir=folder))

        yield start_one


def chain(length: int = LENGTH) -> Graph:
    return relu_chain(length)


def scaled() -> Graph:
    """A chain that ends in a factor."""
    whole = chain()
    scale = Node("scale", "aten.mul.Tensor", (whole.outputs[0][1], 1.0))
    nodes = [*whole.nodes.values(), scale]
    return Graph.build("chain", nodes, whole.inputs, [("y", Ref("scale"))], {}, None, whole.symbols)


def varied() -> Graph:
    """The same with blocks of other structures on the way; what is not negative passes them as it is."""
    others: dict[str, tuple[str, tuple[float, ...]]] = {
        "relu.10": ("aten.abs.default", ()), "relu.20": ("aten.add.Tensor", (0.0,)),
        "relu.30": ("aten.sub.Tensor", (0.0,)), "relu.40": ("aten.div.Tensor", (1.0,)),
    }  # fmt: skip
    graph, nodes = scaled(), []
    for id, node in graph.nodes.items():
        op, rest = others.get(id, (node.op, node.args[1:]))
        nodes.append(Node(id, op, (node.args[0], *rest)))
    return Graph.build("chain", nodes, graph.inputs, graph.outputs, {}, None, graph.symbols)


def ask(engine: Engine, times: int = 1) -> set[str]:
    """Asks, checks every answer, and returns the ids of the plans that gave them."""
    plans = set()
    for i in range(times):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(i))
        result = engine.run({"x": x})
        torch.testing.assert_close(result.outputs["y"], torch.relu(x), rtol=0, atol=0)
        plans.add(result.plan_id)
    return plans


def tiers(engine: Engine) -> dict[str, int]:
    return engine.model.slot.plan.tiers()


def states(engine: Engine) -> dict[str, str]:
    return {f.label: f.state for f in engine.host.better.findings("chain")}


def of(said: Said, name: str) -> list[Mapping[str, Any]]:
    return [fields for event, fields in said if event == name]


def test_a_model_reaches_the_faster_runtime_and_serves_all_the_while(start: Start, said: Said):
    engine = start("Once", graph=chain())
    ask(engine, 10)
    assert engine.settle(SETTLED_S)
    assert tiers(engine) == {"once": 1}
    ask(engine, 10)
    (published,) = of(said, "plan.published")
    assert published["cause"] == "trial"
    assert published["trial"]["ratio"] < 0.5
    assert of(said, "plan.built")[0]["tier"] == "once"


def test_a_trial_beside_the_requests_of_another_model_still_ends(start: Start, said: Said):
    engine = start("Once", graph=chain())
    other = engine.host.load(chain(), "other")
    x = torch.randn(4, 8)
    is_over = threading.Event()

    def serve() -> int:
        answers = 0
        while not is_over.is_set():
            torch.testing.assert_close(other.run({"x": x}).outputs["y"], torch.relu(x))
            answers += 1
        return answers

    with ThreadPoolExecutor(1) as client:
        served = client.submit(serve)
        ask(engine, 10)  # from now on it has inputs that a trial can use, and no requests
        try:
            assert engine.settle(SETTLED_S)
        finally:
            is_over.set()
        assert served.result() > 0
    assert tiers(engine) == {"once": 1}


def test_a_delta_drops_what_it_touches_and_the_rest_comes_back(start: Start):
    engine = start("Once", graph=chain())
    assert engine.settle(SETTLED_S)
    first = tiers(engine)
    engine.apply(
        Delta(
            [
                AddNode("extra", "aten.relu.default", (Ref("relu.3"),)),
                Rewire(Ref("relu.3"), Ref("extra"), ("relu.4",)),
            ]
        )
    )
    assert "once" not in tiers(engine)
    ask(engine, 3)
    assert engine.settle(SETTLED_S)
    assert tiers(engine) == first
    ask(engine, 3)


@pytest.mark.parametrize("step", ["take", "fetch"], ids=["built", "loaded from disk"])
def test_a_delta_while_artifacts_are_loaded_never_gets_those_of_the_revision_before(
    start: Start, said: Said, monkeypatch: pytest.MonkeyPatch, step: str
):
    engine = start("Scaling", graph=scaled(), state="state")
    if step == "fetch":
        assert engine.settle(SETTLED_S)
        engine.close()
        engine = start("Scaling", state="state")
    load, deltas = getattr(Supply, step), [Delta([SetAttr("scale", "other", 2.0)])]

    def load_and_edit(*args: Any) -> Any:
        found = load(*args)
        if deltas and (step == "take" or found):
            engine.apply(deltas.pop())  # as if it came in the same moment
        return found

    monkeypatch.setattr(Supply, step, load_and_edit)
    x = torch.randn(4, 8)
    while deltas:
        engine.run({"x": x})
    assert engine.settle(SETTLED_S)
    assert tiers(engine) == {"scaling": 1}
    torch.testing.assert_close(engine.run({"x": x}).outputs["y"], torch.relu(x) * 2, rtol=0, atol=0)
    assert {fields["revision"] for fields in of(said, "plan.published")} >= {2}
    # The trial would have noticed too: it must never have come to that
    assert not any(
        "differs" in f["reason"] for n, f in said if n in ("plan.refused", "plan.declined")
    )


def test_a_place_that_is_edited_again_and_again_drops_no_region(
    start: Start, monkeypatch: pytest.MonkeyPatch
):
    engine = start("Scaling", graph=scaled())
    x = torch.randn(4, 8)

    def answers(factor: float) -> None:
        expected = torch.relu(x) * factor
        torch.testing.assert_close(engine.run({"x": x}).outputs["y"], expected, rtol=0, atol=0)

    for factor in (2.0, 3.0, 4.0):
        engine.apply(Delta([SetAttr("scale", "other", factor)]))
        answers(factor)
    assert engine.settle(SETTLED_S)
    assert states(engine)["scaling whole around edits"] == "chosen"
    (overlay,) = engine.model.arrangement.overlays
    reasons = {line.block: line.reason for line in engine.explain().steps}
    assert reasons[engine.model.facts.home_of("scale")].startswith("edited often of late")
    engine.apply(Delta([SetAttr("scale", "other", 5.0)]))
    assert engine.model.arrangement.overlays == (overlay,)
    answers(5.0)
    assert engine.settle(SETTLED_S)
    monkeypatch.setattr("graphopt.engine.churn.RESTLESS_S", 0.0)  # as if it was left alone
    assert engine.settle(SETTLED_S)
    again = {finding.label: finding for finding in engine.host.better.findings("chain")}
    assert again["scaling whole"].revision == engine.revision
    answers(5.0)


def test_a_place_that_has_been_left_alone_is_taken_in_again(
    start: Start, monkeypatch: pytest.MonkeyPatch
):
    """Though the whole had been replaced by the way around it, on nearly the same blocks."""
    engine = start("Scaling", graph=varied())
    assert engine.settle(SETTLED_S)
    assert states(engine) == {"scaling whole": "chosen"}
    for factor in (2.0, 3.0, 4.0):
        engine.apply(Delta([SetAttr("scale", "other", factor)]))
    assert engine.settle(SETTLED_S)
    assert states(engine) == {
        "scaling whole": "replaced", "scaling whole around edits": "chosen",
    }  # fmt: skip
    assert tiers(engine) == {"scaling": 1, "eager": 1}
    monkeypatch.setattr("graphopt.engine.churn.RESTLESS_S", 0.0)
    assert engine.settle(SETTLED_S)
    assert states(engine) == {
        "scaling whole around edits": "replaced", "scaling whole": "chosen",
    }  # fmt: skip
    assert tiers(engine) == {"scaling": 1}
    x = torch.randn(4, 8)
    torch.testing.assert_close(engine.run({"x": x}).outputs["y"], torch.relu(x) * 4, rtol=0, atol=0)


def test_an_op_the_runtime_lacks_is_left_to_the_live_path(start: Start):
    engine = start("Once", graph=chain())
    engine.apply(
        Delta(
            [
                AddNode("double", "aten.add.Tensor", (Ref("relu.75"), Ref("relu.75"))),
                AddNode("half", "aten.mul.Tensor", (Ref("double"), 0.5)),
                Rewire(Ref("relu.75"), Ref("half"), ("relu.76",)),
            ]
        )
    )
    assert engine.settle(SETTLED_S)
    assert tiers(engine)["once"] == 2
    assert {s.block for s in engine.model.slot.plan.steps if s.tier != "once"} == {"double", "half"}
    ask(engine, 3)


def test_a_slower_candidate_is_refused_with_its_figures(start: Start, said: Said):
    engine = start("Slow", graph=chain(40))
    before = ask(engine)
    assert engine.settle(SETTLED_S)
    (declined,) = of(said, "plan.declined")
    assert declined["trial"]["ratio"] > 2
    assert ask(engine, 3) == before
    assert states(engine) == {"slow whole": "no gain"}


def test_a_wrong_candidate_never_answers(start: Start, said: Said):
    engine = start("Wrong", graph=chain())
    before = ask(engine)
    assert engine.settle(SETTLED_S)
    assert of(said, "plan.refused")[0]["stage"] == "verify"
    assert ask(engine, 3) == before
    assert states(engine) == {"wrong whole": "failed"}


def test_a_candidate_that_fails_in_the_server_alone_is_refused_before_any_request(
    start: Start, said: Said
):
    engine = start("Homesick", graph=chain())
    before = ask(engine, 3)
    assert engine.settle(SETTLED_S)
    (refused,) = of(said, "plan.refused")
    assert (refused["stage"], refused["tier"]) == ("load", "homesick")
    assert ask(engine, 3) == before
    assert states(engine) == {"homesick whole": "failed"}


def test_answers_that_say_nothing_about_a_candidate_are_not_held_against_it(tmp_path: Path):
    full = BuilderSettings(queue_max=0)
    link = BuilderLink(tmp_path, ScratchConstants(tmp_path / "c"), time.monotonic, full)
    settings = graphopt.EngineSettings(intra_op=1, improve=False)
    with closing(link), graphopt.Engine(transformer(1), settings) as engine:
        model = engine.model
        course = FusedStage(Shelf(), link).course(model)
        asked = next(course)
        assert asked.result().stage == BUSY
        with pytest.raises(StopIteration):
            course.send(asked.result())
        _, facts, blocks = model.take_unproven()
        assert blocks == set(facts.regions), "they are to be looked at again"


def test_everybody_who_waits_is_told(start: Start):
    engine = start("Once", graph=chain())
    with ThreadPoolExecutor(4) as waiters:
        told = [waiters.submit(engine.settle, None) for _ in range(4)]
        assert all(future.result(SETTLED_S) for future in told)


def test_a_candidate_that_crashes_the_builder_costs_its_log_line(start: Start, said: Said):
    engine = start("Segfault", "Once", graph=chain())
    ask(engine, 3)
    assert engine.settle(SETTLED_S)
    ask(engine, 3)
    (quarantined,) = {fields["backend"] for fields in of(said, "builder.quarantined")}
    assert quarantined == "segfault"
    assert states(engine) == {"segfault whole": "failed", "once whole": "chosen"}


@pytest.mark.parametrize("asked_before", [20, 0], ids=["shape of the trial", "shape never tried"])
def test_a_plan_that_becomes_slow_is_taken_back_within_fifty_requests(
    start: Start, said: Said, tmp_path: Path, asked_before: int
):
    engine = start("Tiring", graph=chain(), state="state")
    ask(engine, asked_before)
    assert engine.settle(SETTLED_S)
    assert tiers(engine) == {"tiring": 1}
    tired = engine.model.slot.plan.id
    (tmp_path / "state" / "artifacts" / "tired").touch()
    served = 0
    while not of(said, "plan.rolled_back") and served < 200:
        served += len([plan for plan in [ask(engine)] if tired in plan])
        engine.host.settle(SETTLED_S)
    assert served <= 50
    assert "tiring" not in tiers(engine)
    assert states(engine) == {"tiring whole": "no gain"}


def test_a_plan_that_fails_a_request_is_out_and_the_request_answered(
    start: Start, said: Said, tmp_path: Path
):
    engine = start("Fragile", graph=chain(), state="state")
    assert engine.settle(SETTLED_S)
    assert tiers(engine) == {"fragile": 1}
    (tmp_path / "state" / "artifacts" / "broken").touch()
    ask(engine, 3)
    assert "fragile" not in tiers(engine)
    engine.host.settle(SETTLED_S)
    assert of(said, "plan.rolled_back")[0]["cause"] == "fault"


def test_a_restart_serves_the_best_known_plan_without_a_build(start: Start, said: Said):
    first = start("Once", graph=chain(), state="state")
    assert first.settle(SETTLED_S)
    ask(first)
    first.close()
    said.clear()
    again = start("Once", state="state")
    assert again.settle(SETTLED_S)
    assert tiers(again) == {"once": 1}
    assert [fields["cause"] for fields in of(said, "plan.published")] == ["known_cost"]
    assert of(said, "plan.built") == []
    assert of(said, "builder.started") == []
    ask(again, 3)


def test_a_hot_shape_gets_an_artifact_of_its_own(start: Start):
    engine = start("Once", graph=chain())
    assert engine.settle(SETTLED_S)
    assert "4" not in engine.model.slot.plan.steps[0].options
    ask(engine, 40)
    engine.host.better.look_again("chain")
    engine.host.settle(SETTLED_S)
    built = {shape for f in engine.host.better.findings("chain") for shape in f.shapes}
    assert "1 thread, 4" in built
    ask(engine, 3)


def test_a_pin_keeps_the_plan_until_it_is_taken_away(start: Start, said: Said):
    engine = start("Once", graph=chain())
    engine.host.better.pins.set("chain", "ann", "load test", 3_600)
    assert engine.settle(SETTLED_S)
    assert "once" not in tiers(engine)
    engine.host.better.pins.clear("chain", "ann")
    engine.host.better.look_again("chain")
    assert engine.settle(SETTLED_S)
    assert tiers(engine) == {"once": 1}


def test_an_interface_that_changes_under_way_leaves_everything_right(start: Start):
    engine = start("Once", graph=chain())
    delta = Delta(
        [SetOutputs((("y", Ref(f"relu.{LENGTH - 2}")),)), RemoveNode(f"relu.{LENGTH - 1}")],
        allow_interface_change=True,
    )
    engine.apply(delta)
    assert engine.settle(SETTLED_S)
    ask(engine, 3)
    assert tiers(engine) == {"once": 1}
