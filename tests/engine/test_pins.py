"""A pin holds until it ends, says who and why, and survives a restart."""

from pathlib import Path
from typing import Any

import pytest

from graphopt.engine.pins import FILE, PinError, Pins


class Clock:
    now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


def make(folder: Path | None) -> tuple[Pins, Clock, list[tuple[str, Any]]]:
    clock, said = Clock(), []
    return Pins(folder, clock, lambda name, fields: said.append((name, fields))), clock, said


def test_a_pin_ends_by_itself_and_says_so_once(tmp_path: Path):
    pins, clock, said = make(tmp_path)
    pins.set("m", "ann", "load test", 60)
    clock.now_s += 59
    assert pins.get("m").owner == "ann"
    clock.now_s += 1
    assert pins.get("m") is None
    assert pins.get("m") is None
    assert [name for name, _ in said] == ["pin.set", "pin.expired"]


def test_pins_survive_a_restart_and_a_damaged_file_holds_none(tmp_path: Path):
    make(tmp_path)[0].set("m", "ann", "why not", 60, ("fused",))
    pin = make(tmp_path)[0].get("m")
    assert (pin.owner, pin.reason, pin.tiers) == ("ann", "why not", ("fused",))
    assert pin.allows("fused")
    assert pin.allows("eager")
    assert not pin.allows("openvino")
    (tmp_path / FILE).write_text('[{"model": 1}]')
    assert make(tmp_path)[0].get("m") is None


def test_a_pin_without_tiers_allows_nothing_new(tmp_path: Path):
    pin = make(None)[0].set("m", "ann", "hold it", 60)
    assert not pin.allows("eager")


@pytest.mark.parametrize(("reason", "duration_s"), [(" ", 60), ("why", 0), ("why", 1e9)])
def test_a_pin_without_reason_or_end_is_refused(reason: str, duration_s: float):
    with pytest.raises(PinError):
        make(None)[0].set("m", "ann", reason, duration_s)


def test_taking_a_pin_away_that_is_not_there_is_an_error():
    pins, _, said = make(None)
    pins.set("m", "ann", "why", 60)
    assert pins.clear("m", "bob").owner == "ann"
    with pytest.raises(PinError):
        pins.clear("m", "bob")
    assert said[-1] == ("pin.cleared", {"graph": "m", "owner": "bob", "reason": "why"})
