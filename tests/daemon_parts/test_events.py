"""The events are a closed list; what is emitted fits it, and the documentation is printed from it."""

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from graphoptd.event_table import LINE_KEYS
from graphoptd.events import EVENTS, FIELDS, LOGGER, FailureCounter, Said, emit, markdown, problems

ROOT = Path(__file__).parents[2]
EXAMPLES: dict[str, Any] = {
    "string": "text",
    "integer": 3,
    "number": 0.5,
    "boolean": True,
    "list": [["edits[0]", "unknown key"]],
    "mapping": {"eager": 2},
}


class Catcher(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[tuple[str, dict[str, Any]]] = []

    def emit(self, record: logging.LogRecord) -> None:
        said = vars(record)["said"]
        assert isinstance(said, Said)
        self.said.append((said.event.name, dict(said.fields)))


@pytest.fixture
def caught() -> Iterator[Catcher]:
    handler = Catcher()
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    yield handler
    LOGGER.removeHandler(handler)
    LOGGER.setLevel(logging.NOTSET)


def test_every_event_can_be_emitted_with_all_of_its_fields(caught: Catcher) -> None:
    for event in EVENTS.values():
        fields = {name: EXAMPLES[FIELDS[name].type] for name in (*event.required, *event.optional)}
        emit(event.name, **fields)
        assert caught.said[-1] == (event.name, fields)


def test_the_tables_are_consistent() -> None:
    used: set[str] = set()
    for event in EVENTS.values():
        names = (*event.required, *event.optional)
        assert len(set(names)) == len(names), event.name
        used.update(names)
    assert used == set(FIELDS)
    assert not used & set(LINE_KEYS)
    for field in FIELDS.values():
        assert field.type in EXAMPLES, field.name
        unit = next((u for u in ("ms", "us", "s", "bytes") if field.name.endswith(f"_{u}")), None)
        assert unit is None or field.unit == unit, field.name


DESIGN_LIST = (
    *("delta.applied", "delta.rejected", "plan.built", "plan.verified", "plan.refused"),
    *("plan.published", "plan.rolled_back", "signal.capabilities"),
    *("signal.degraded", "signal.restored", "feedback.acted", "config.reloaded"),
    *("config.rejected", "control.denied", "pin.expired", "limit.reached"),
)


def test_the_list_of_the_design_is_there() -> None:
    assert set(DESIGN_LIST) <= set(EVENTS)
    kinds = {name.split(".")[0] for name in EVENTS}
    assert kinds >= {"daemon", "model", "spool", "builder"}


def test_the_documentation_is_what_the_tables_print() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "graphoptd.events"],
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'daemon'}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert printed.stderr == ""
    assert printed.stdout == markdown()
    assert (ROOT / "docs" / "EVENTS.md").read_text() == markdown(), (
        "run: python -m graphoptd.events > docs/EVENTS.md"
    )


@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        ("plan.exploded", {}, "unknown event"),
        ("control.denied", {"method": "load", "level": "admin"}, "peer_uid is missing"),
        ("control.denied", {"method": "x", "level": "y", "peer_uid": None}, "peer_uid is missing"),
        ("daemon.starting", {"version": "1", "pid": 1, "uid": 0}, "uid is not a field"),
        ("daemon.starting", {"version": 1, "pid": 1}, "must be of type string, not int"),
        ("daemon.starting", {"version": "1", "pid": True}, "must be of type integer, not bool"),
        ("log.dropped", {"lines": 1.5}, "must be of type integer, not float"),
        ("limit.reached", {"limit": "queue_max", "bound": float("nan")}, "not finite"),
    ],
)
def test_what_is_not_in_the_table_is_refused(
    caught: Catcher, name: str, fields: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        emit(name, **fields)
    assert caught.said == []


def test_an_absent_figure_is_left_out_and_not_zero(caught: Catcher) -> None:
    emit("plan.published", graph="m", revision=2, plan_id="p", predicted_ms=None)
    assert caught.said == [("plan.published", {"graph": "m", "revision": 2, "plan_id": "p"})]


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_failed_requests_are_counted_into_one_line_a_period(caught: Catcher) -> None:
    clock = Clock()
    counter = FailureCounter(clock, period_s=10)
    for i in range(1000):
        counter.add("minilm", "request.invalid", f"shape {i}")
    counter.add("bert", "busy", "queue full")
    clock.now_s += 9.9
    counter.tick()
    assert caught.said == []
    clock.now_s += 0.1
    counter.tick()
    counter.tick()
    [(name, fields)] = caught.said
    assert name == "request.failed"
    assert fields["count"] == 1001
    assert fields["period_s"] == 10.0
    assert fields["failures"] == [
        {"graph": "bert", "code": "busy", "count": 1, "message": "queue full"},
        {"graph": "minilm", "code": "request.invalid", "count": 1000, "message": "shape 0"},
    ]
    assert problems(EVENTS[name], fields) == []


def test_the_period_begins_with_the_first_failure(caught: Catcher) -> None:
    clock = Clock()
    counter = FailureCounter(clock, period_s=10)
    clock.now_s += 1000
    counter.add("m", "busy", "full")
    counter.tick()
    assert caught.said == []
    counter.flush()
    assert caught.said[0][1]["period_s"] == 0.0


def test_names_that_clients_invent_cannot_grow_the_line(caught: Catcher) -> None:
    counter = FailureCounter(Clock(), period_s=10)
    for i in range(10_000):
        counter.add(f"invented-{i}", "model.unknown", "no such model")
    counter.flush()
    [(_, fields)] = caught.said
    assert fields["count"] == 10_000
    assert len(fields["failures"]) == 65
    assert {key: fields["failures"][0][key] for key in ("graph", "code", "count")} == {
        "graph": "(other)",
        "code": "model.unknown",
        "count": 9_936,
    }
    assert len(json.dumps(fields)) < 20_000


def test_nothing_counted_says_nothing(caught: Catcher) -> None:
    FailureCounter(Clock(), period_s=10).flush()
    assert caught.said == []
