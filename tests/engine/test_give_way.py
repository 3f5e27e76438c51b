"""When a delta sleeps for the requests beside it, and when it does not."""

import itertools
import os
import time as real_time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from graphopt.analysis.facts import analyse
from graphopt.delta import Delta, PutConstant, SetAttr
from graphopt.engine import Host, LiveModel
from graphopt.engine.give_way import PAUSE_S, PAUSES_MOST_S, QUICK_S, WORK_S, GiveWay
from graphopt.engine.live import Clocks
from graphopt.engine.records import EngineSettings
from graphopt.errors import GraphoptError
from graphopt.executor.build import EagerBuilder, build_plan
from graphopt.executor.publish import Slot
from graphopt.graph import Graph, Ref
from graphopt.types import TensorType
from helpers.graphs import BATCH, Builder


class Time:
    """A clock that moves when it is told to, and when somebody sleeps."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.slept_s: list[float] = []

    def monotonic_s(self) -> float:
        return self.now_s

    def pause(self, length_s: float) -> None:
        self.slept_s.append(length_s)
        self.now_s += length_s


@pytest.fixture
def time() -> Time:
    return Time()


def small() -> Graph:
    b = Builder()
    b.node("y", "mul.Tensor", Ref("x"), 2.0)
    inputs = [("x", TensorType("f32", (BATCH, 8)))]
    return Graph.build("small", b.nodes, inputs, [("y", Ref("y"))], b.constants)


@pytest.fixture
def slot() -> Slot:
    return Slot(build_plan(analyse(small()), 1, EagerBuilder()))


def serve(slot: Slot, took_s: float = 1e-3) -> None:
    slot.run({"x": torch.zeros(2, 8)})
    slot.latencies.drain()
    slot.latencies.add((slot.plan.id, {}, took_s))


def test_nobody_is_waited_for_where_nobody_is_served(time: Time, slot: Slot) -> None:
    with GiveWay(lambda: [slot], time.monotonic_s, time.pause).start() as between:
        for _ in range(10):
            time.now_s += WORK_S
            between()
        assert time.slept_s == []


def test_each_stretch_of_work_beside_quick_requests_ends_in_a_pause(time: Time, slot: Slot) -> None:
    with GiveWay(lambda: [slot], time.monotonic_s, time.pause).start() as between:
        for _ in range(3):
            serve(slot)
            time.now_s += WORK_S * 0.4
            between()  # too early
            time.now_s += WORK_S * 0.7
            between()
        assert time.slept_s == [PAUSE_S] * 3
        time.now_s += WORK_S
        between()  # nobody came meanwhile
        assert time.slept_s == [PAUSE_S] * 3


def test_a_delta_has_to_be_live_some_time(time: Time, slot: Slot) -> None:
    way = GiveWay(lambda: [slot], time.monotonic_s, time.pause)
    for _ in range(2):
        time.slept_s.clear()
        with way.start() as between:
            for _ in range(1000):
                serve(slot)
                time.now_s += WORK_S
                between()
        assert sum(time.slept_s) == pytest.approx(PAUSES_MOST_S, abs=PAUSE_S)


def test_long_requests_are_no_reason(time: Time, slot: Slot) -> None:
    with GiveWay(lambda: [slot], time.monotonic_s, time.pause).start() as between:
        serve(slot, QUICK_S)
        time.now_s += WORK_S
        between()
        assert time.slept_s == []


def test_a_delta_that_gives_way_interrupts_nobody_when_it_wakes(time: Time, slot: Slot) -> None:
    before, way = os.sched_getscheduler(0), GiveWay(lambda: [slot], time.monotonic_s, time.pause)

    def refused() -> None:
        with way.start() as between:
            time.now_s += WORK_S
            between()
            assert os.sched_getscheduler(0) == before
            serve(slot)
            time.now_s += WORK_S
            between()
            assert os.sched_getscheduler(0) == os.SCHED_BATCH
            raise GraphoptError("refused")

    with pytest.raises(GraphoptError):
        refused()
    assert os.sched_getscheduler(0) == before == os.SCHED_OTHER


def test_requests_of_another_model_count(time: Time, slot: Slot) -> None:
    other = Slot(slot.plan)
    with GiveWay(lambda: [other, slot], time.monotonic_s, time.pause).start() as between:
        serve(slot)
        time.now_s += WORK_S
        between()
        assert time.slept_s == [PAUSE_S]


@pytest.mark.parametrize("work", [LiveModel.apply, LiveModel.dry_run])
def test_live_models_give_way_to_the_requests_of_their_host(
    time: Time, work: Callable[[LiveModel, Delta], object]
) -> None:
    def monotonic_s() -> float:
        time.now_s += WORK_S
        return time.now_s

    clocks = Clocks(monotonic_s, real_time.time, time.pause)
    host = Host(EngineSettings(improve=False, builder=False), clocks=clocks)
    try:
        edited, served = host.load(small()), host.load(small(), "other")
        work(edited, Delta([SetAttr("y", "other", 3.0)]))
        assert time.slept_s == []
        served.run({"x": torch.zeros(2, 8)})
        work(edited, Delta([SetAttr("y", "other", 4.0)]))
        assert time.slept_s == [PAUSE_S]
    finally:
        host.close()


def test_a_delta_interrupted_in_any_of_its_pauses_has_not_happened(
    time: Time, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C falls into a pause sooner than anywhere else."""
    monkeypatch.setattr(
        "graphopt.engine.give_way.PAUSES_MOST_S", 1.0
    )  # else the last ones are left out
    until_interrupt = 0

    def monotonic_s() -> float:
        time.now_s += WORK_S
        return time.now_s

    def pause(length_s: float) -> None:
        nonlocal until_interrupt
        served.run({"x": torch.zeros(2, 8)})
        time.pause(length_s)
        if until_interrupt == 1:
            raise KeyboardInterrupt
        until_interrupt -= 1

    def was_interrupted(delta: Delta) -> bool:
        served.run({"x": torch.zeros(2, 8)})
        try:
            edited.apply(delta)
        except KeyboardInterrupt:
            return True
        return False

    settings = EngineSettings(improve=False, builder=False)
    host = Host(settings, tmp_path / "state", Clocks(monotonic_s, real_time.time, pause))
    try:
        edited, served = host.load(small()), host.load(small(), "other")
        for pauses in itertools.count(1):
            weight = PutConstant("w", torch.full((8,), float(pauses)))
            revision, digest = edited.revision, edited.graph.hash
            until_interrupt = pauses
            if not was_interrupted(Delta([weight, SetAttr("y", "other", float(pauses))])):
                break
            assert (edited.revision, edited.graph.hash) == (revision, digest)
            until_interrupt = 0
            assert not was_interrupted(Delta([weight, SetAttr("y", "other", -float(pauses))]))
            assert edited.revision == revision + 1
        assert pauses > 8, "it has pauses"
        revision, digest = edited.revision, edited.graph.hash
    finally:
        host.close()
    again = Host(settings, tmp_path / "state")
    try:
        assert again.get("small").revision == revision
        assert again.get("small").graph.hash == digest
    finally:
        again.close()
