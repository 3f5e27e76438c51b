"""What one model may have of the process: requests at once, threads inside each, memory of its plan."""

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import torch

import graphopt
from graphopt.delta import AddNode, Delta, Rewire
from graphopt.engine import Engine, EngineSettings, Host, ModelLimits
from graphopt.engine.builder_link import BuilderLink
from graphopt.engine.findings import Finding
from graphopt.engine.live import LiveModel
from graphopt.engine.thread_budget import ThreadBudget
from graphopt.executor.shares import Admission
from graphopt.executor.threads import own_thread_count
from graphopt.graph import Graph, Ref
from helpers.graphs import relu_chain

HERE = str(Path(__file__).parent)
SETTLED_S = 120.0  # of a broken test; a good one takes seconds
X = {"x": torch.randn(4, 8)}

Start = Callable[..., Engine]


@pytest.fixture(autouse=True)
def own_count() -> None:
    """This thread keeps to one: at its first look it would take over what another thread set."""
    own_thread_count(1)


def chain(length: int = 4) -> Graph:
    return relu_chain(length)


def limits(workers: int, each: int, memory_bytes_max: int | None = None) -> ModelLimits:
    return ModelLimits(ThreadBudget(workers, each), memory_bytes_max)


class Watched:
    """A model whose requests say that they run, with how many torch threads, and end when told."""

    def __init__(self, host: Host, name: str) -> None:
        self.model = host.load(chain(), name)
        self.begun = threading.Semaphore(0)
        self.may_end = threading.Event()
        self.counts: list[int] = []
        self._host = host
        self._answer = self.model.answer
        self.model.answer = self._watched  # type: ignore[method-assign]

    def submit(self) -> "Future[Any]":
        return self._host.submit(self.model, X)

    def wait_begun(self) -> None:
        assert self.begun.acquire(timeout=SETTLED_S)

    def is_begun(self) -> bool:
        return self.begun.acquire(blocking=False)

    def _watched(self, inputs: Any) -> Any:
        self.counts.append(torch.get_num_threads())
        self.begun.release()
        assert self.may_end.wait(SETTLED_S)
        return self._answer(inputs)


def host_of(**models: ModelLimits) -> Host:
    """One request at once with two threads, but for `models`."""
    return Host(EngineSettings(1, 2, improve=False, builder=False, models=models))


def test_models_of_other_preferences_share_the_cpus_and_the_wide_one_is_not_passed_by() -> None:
    with closing(host_of(narrow=limits(2, 1))) as host:
        narrow, wide = Watched(host, "narrow"), Watched(host, "wide")
        two = [narrow.submit(), narrow.submit()]
        for _ in two:
            narrow.wait_begun()
        waiting, late = wide.submit(), narrow.submit()
        order: list[str] = []
        for future, name in ((waiting, "wide"), (late, "narrow")):
            future.add_done_callback(lambda _, name=name: order.append(name))
        wide.may_end.set()
        narrow.may_end.set()
        for future in (*two, waiting, late):
            future.result(SETTLED_S)
        assert order == ["wide", "narrow"]
        assert (wide.counts, narrow.counts) == ([2], [1, 1, 1])
        assert host.threads.count == 2


def test_a_wide_request_keeps_the_narrow_ones_out_while_it_runs() -> None:
    with closing(host_of(narrow=limits(2, 1))) as host:
        narrow, wide = Watched(host, "narrow"), Watched(host, "wide")
        first, second = wide.submit(), narrow.submit()
        wide.wait_begun()
        reached = host.threads.submit(lambda: None, wide.model.share)
        assert not narrow.is_begun()
        assert not reached.done()
        narrow.may_end.set()
        wide.may_end.set()
        for future in (first, second, reached):
            future.result(SETTLED_S)


def test_a_model_runs_no_more_requests_at_once_than_it_may() -> None:
    with closing(
        Host(EngineSettings(3, 1, improve=False, models={"capped": limits(1, 1)}))
    ) as host:
        capped, other = Watched(host, "capped"), Watched(host, "other")
        futures = [capped.submit(), capped.submit(), other.submit(), other.submit()]
        capped.wait_begun()
        other.wait_begun()
        other.wait_begun()  # three run: the second of `capped` came before both and is not among them
        assert not capped.is_begun()
        other.may_end.set()
        capped.may_end.set()
        for future in futures:
            future.result(SETTLED_S)


def test_a_name_that_is_not_in_the_settings_has_the_defaults() -> None:
    with closing(host_of(narrow=limits(2, 1))) as host:
        host.load(chain(), "narrow")
        fork = host.fork("narrow", "fork")
        assert (fork.share.workers, fork.share.each) == (1, 2)


def test_models_that_are_all_alike_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Admission, "enter", None)
    with closing(host_of(chain=limits(1, 2))) as host:
        model = host.load(chain())
        result = host.submit(model, X).result(SETTLED_S)
        torch.testing.assert_close(result.outputs["y"], torch.relu(X["x"]))


def test_a_call_of_an_engine_has_what_its_model_may_have() -> None:
    settings = EngineSettings(4, 2, improve=False, builder=False, models={"chain": limits(1, 3)})
    seen: list[int] = []
    with graphopt.Engine(chain(), settings) as engine:
        answer = engine.model.answer

        def watched(inputs: Any) -> Any:
            seen.append(torch.get_num_threads())
            assert engine._seats.free == 0
            return answer(inputs)

        engine.model.answer = watched  # type: ignore[method-assign]
        own = torch.get_num_threads()
        engine.run(X)
        assert (seen, torch.get_num_threads()) == ([3], own)


# -- plans


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts an engine with one runtime of `chain_backends` on a chain long enough to gain by it."""
    monkeypatch.syspath_prepend(HERE)
    with ExitStack() as stack:

        def start_one(runtime: str, models: dict[str, ModelLimits]) -> Engine:
            settings = EngineSettings(
                intra_op=1,
                backends=(runtime.lower(),),
                extra_backends=(f"chain_backends:{runtime}",),
                extra_path=(HERE,),
                models=models,
            )
            folder = tmp_path / "state"
            return stack.enter_context(graphopt.Engine(chain(150), settings, state_dir=folder))

        yield start_one


def finding(engine: Engine, label: str) -> Finding:
    assert engine.settle(SETTLED_S)
    found = engine.host.better.findings("chain").get(label)
    assert found is not None
    return found


def in_two(engine: Engine) -> None:
    """A node in the middle that no runtime here can run: two regions from now on."""
    engine.apply(
        Delta(
            [
                AddNode("double", "aten.add.Tensor", (Ref("relu.75"), Ref("relu.75"))),
                AddNode("half", "aten.mul.Tensor", (Ref("double"), 0.5)),
                Rewire(Ref("relu.75"), Ref("half"), ("relu.76",)),
            ]
        )
    )


def test_artifacts_are_built_for_the_threads_of_their_model(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Mapping[str, Any]] = []
    propose = BuilderLink.propose

    def watched(link: BuilderLink, model: str, revision: int, document: Any) -> Any:
        asked.append(document)
        return propose(link, model, revision, document)

    monkeypatch.setattr(BuilderLink, "propose", watched)
    engine = start("Once", {"chain": limits(3, 2)})
    assert engine.settle(SETTLED_S)
    assert {(each["threads"], each["streams"]) for each in asked} == {(2, 3)}
    (step,) = engine.model.slot.plan.steps
    # A quick model is tried with one thread in a call too
    assert (step.tier, step.options) in [
        ("once", f"{n}, 3 streams") for n in ("2 threads", "1 thread")
    ]


def test_the_live_steps_are_priced_for_the_threads_of_their_model() -> None:
    with closing(host_of(chain=limits(3, 1))) as host:
        host.load(chain())
        other = host.load(chain(), "other")
        for model, text in ((host.get("chain"), (1, 3)), (other, (2, 1))):
            plan = model.arrangement
            _, options = host.better.costs._key(plan.plan.steps[0], plan, {"rows": 4})
            assert (options.threads, options.streams) == text


def test_plans_are_compared_with_the_threads_that_requests_have(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[int] = set()
    time_once = LiveModel.time_once

    def watched(model: LiveModel, inputs: Any) -> float:
        seen.add(torch.get_num_threads())
        return time_once(model, inputs)

    monkeypatch.setattr(LiveModel, "time_once", watched)
    assert start("Once", {"chain": limits(1, 2)}).settle(SETTLED_S)
    assert seen == {2}


def test_a_plan_that_would_hold_too_much_memory_is_not_tried_and_let_go(start: Start) -> None:
    engine = start("Heavy", {"chain": limits(1, 1, 300_000)})
    found = finding(engine, "heavy whole")
    assert found.state == "failed"
    assert found.reason == "its artifacts hold 400.0 KB, above memory_bytes_max of 300.0 KB"
    assert found.ratio is None
    assert "heavy" not in engine.model.slot.plan.tiers()
    assert engine.host.better.supply.loaded.keys() == set()
    assert found.reason in str(engine.explain())


def test_a_plan_within_the_bound_is_taken_and_its_artifacts_count_together(start: Start) -> None:
    engine = start("Heavy", {"chain": limits(1, 1, 400_000)})
    assert finding(engine, "heavy whole").state == "chosen"
    loaded = engine.host.better.supply.loaded.keys()
    in_two(engine)
    found = finding(engine, "heavy whole")
    assert (found.state, found.resident_bytes) == ("failed", 800_000)
    assert "heavy" not in engine.model.slot.plan.tiers()
    assert engine.host.better.supply.loaded.keys() <= loaded


def test_a_plan_that_ran_before_the_bound_was_lower_does_not_come_back(start: Start) -> None:
    first = start("Heavy", {})
    assert finding(first, "heavy whole").state == "chosen"
    first.close()
    again = start("Heavy", {"chain": limits(1, 1, 0)})
    assert finding(again, "heavy whole").state == "failed"
    assert "heavy" not in again.model.slot.plan.tiers()
    assert again.host.better.supply.loaded.keys() == set()


def test_what_another_model_runs_on_is_not_let_go(start: Start) -> None:
    engine = start("Heavy", {"tenant": limits(1, 1, 0)})
    assert finding(engine, "heavy whole").state == "chosen"
    loaded = engine.host.better.supply.loaded.keys()
    engine.host.fork("chain", "tenant")
    assert engine.settle(SETTLED_S)
    found = engine.host.better.findings("tenant").get("heavy whole")
    assert found is not None
    assert found.state == "failed"
    assert engine.host.better.supply.loaded.keys() == loaded


def test_a_plan_that_was_built_for_other_threads_does_not_come_back(start: Start) -> None:
    first = start("Once", {})
    assert finding(first, "once whole").state == "chosen"
    first.close()
    again = start("Once", {"chain": limits(2, 1)})
    assert finding(again, "once whole").shapes == {"1 thread, 2 streams"}
