"""A process that ends in the middle: the next one is back on what ran, whatever a delta left of it."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from graphopt.delta import Delta, SetAttr
from graphopt.engine.better_path import BetterPath
from graphopt.engine.campaign import Campaign
from graphopt.engine.engine import Engine
from graphopt.engine.supply import Supply
from graphopt.executor.switch import Outcome
from helpers.layered import (
    LAYERED,
    SETTLED_S,
    Said,
    check_answers,
    edit,
    of,
    only_layers,
    open_engine,
    settle_on_layers,
)

REGIONS = 7  # a layer each, and the embeddings
NEW = Delta([SetAttr("layer.3/gelu", "approximate", "tanh")])  # a layer of another structure
Killed = Callable[[], Engine]


@pytest.fixture
def said() -> Said:
    return []


@pytest.fixture
def engine(said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    only_layers(monkeypatch)
    with open_engine(said, tmp_path / "state") as engine:
        settle_on_layers(engine)
        assert len(engine.model.arrangement.overlays) == REGIONS
        yield engine


@pytest.fixture
def killed(engine: Engine, said: Said, tmp_path: Path) -> Iterator[Killed]:
    """What comes up on the state folder as it lies there now: nothing is closed before."""
    with ExitStack() as stack:

        def come_up() -> Engine:
            shutil.copytree(tmp_path / "state", tmp_path / "left")
            said.clear()
            return stack.enter_context(open_engine(said, tmp_path / "left", anew=False))

        yield come_up


def test_what_was_published_is_not_built_again(
    engine: Engine, said: Said, killed: Killed, monkeypatch: pytest.MonkeyPatch
):
    """A campaign goes on for half a minute after its first publication."""
    monkeypatch.setattr(Campaign, "_conclude", lambda self, facts: None)
    edit(engine, 3)
    assert engine.settle(SETTLED_S)
    again = killed()
    assert again.settle(SETTLED_S)
    (published,) = of(said, "plan.published", 2)
    assert published["reason"] == "chosen before for this graph"
    assert len(again.model.arrangement.overlays) == REGIONS
    assert of(said, "plan.built", 2) == []
    check_answers(again)


def test_what_the_last_delta_left_alone_runs_at_once(
    engine: Engine, said: Said, killed: Killed, monkeypatch: pytest.MonkeyPatch
):
    with pytest.MonkeyPatch.context() as patch:  # the process ends before anything is built
        patch.setattr(BetterPath, "follow", lambda *args: None)
        engine.apply(NEW)
    again = killed()
    assert again.settle(SETTLED_S)
    first = of(said, "plan.published", 2)[0]
    assert first["reason"] == "chosen before the last delta, and left alone by it"
    assert first["tiers"]["openvino"] == REGIONS - 1
    assert of(said, "plan.built", 2) == []  # for which shapes, requests tell
    settle_on_layers(again)
    last = again.model.arrangement
    (built,) = of(said, "plan.built", 2)
    home = again.model.facts.home_of("layer.3/gelu")
    (run,) = (o.step.blocks for o in last.overlays if home in o.step.blocks)
    assert built["block"] in run
    assert len(last.overlays) == REGIONS
    check_answers(again)


@pytest.mark.parametrize("key", [(LAYERED, frozenset()), None], ids=["its way", "nobody knows"])
def test_what_was_taken_back_is_not_what_comes_up(
    engine: Engine, said: Said, killed: Killed, key: object
):
    """Also not for the graph before: it was the same way of running."""
    better = engine.host.better
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BetterPath, "follow", lambda *args: None)
        engine.apply(NEW)
    taken_back = Outcome("rolled_back", "fault", "a plan", "another", key, "it failed")
    better._tell(better._courses["transformer"], taken_back)
    again = killed()
    assert again.settle(SETTLED_S)
    assert not any("chosen before" in f.get("reason", "") for f in of(said, "plan.published", 2))


def test_while_the_process_runs_only_the_very_graph_is_recalled(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    """What was taken back there would come back otherwise, but for the regions of a later delta."""
    asked: list[bool] = []
    recall = Supply.recall
    monkeypatch.setattr(
        Supply,
        "recall",
        lambda *args, resumes: asked.append(resumes) or recall(*args, resumes=resumes),
    )
    engine.model.keep_to(lambda tier: False)
    edit(engine, 3)
    assert engine.settle(SETTLED_S)
    assert asked
    assert not any(asked)
