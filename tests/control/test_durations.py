"""Durations are read strictly: a pin that ends at the wrong time is noticed too late."""

import argparse
import re

import pytest
from control_serving import Service, ctl
from hypothesis import given
from hypothesis import strategies as st

from graphopt.engine import pins
from graphoptd.ctl.durations import DURATION_MAX_S, duration_s

UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}


@given(st.integers(0, 10**9), st.sampled_from(sorted(UNITS)))
def test_a_number_and_a_unit_are_so_many_seconds_or_refused(count: int, unit: str) -> None:
    seconds = count * UNITS[unit]
    if 1 <= seconds <= DURATION_MAX_S:
        assert duration_s(f"{count}{unit}") == seconds
    else:
        with pytest.raises(argparse.ArgumentTypeError):
            duration_s(f"{count}{unit}")


@given(st.text(max_size=8).filter(lambda text: re.fullmatch("[0-9]{1,9}[smhd]", text) is None))
def test_whatever_else_is_written_is_refused_with_the_units(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="30s, 15m, 2h or 3d"):
        duration_s(text)


@pytest.mark.parametrize(
    "text", ["", "90", "2h30m", "1.5h", "-1h", "+1h", " 2h", "2h ", "2H", "2 h", "h", "2w", "٢h", "2h\n"]
)  # fmt: skip
def test_what_could_be_meant_otherwise_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        duration_s(text)


def test_the_client_and_the_engine_have_the_same_bound() -> None:
    assert DURATION_MAX_S == pins.DURATION_MAX_S


def test_wrong_usage_of_pin_is_wrong_usage(service: Service) -> None:
    for words, says in (
        (["--for", "2h"], "--reason"),
        (["--reason", "x"], "--for"),
        (["--for", "90", "--reason", "x"], "a whole number and a unit"),
        (["--for", "31d", "--reason", "x"], "not between 1s and 30d"),
    ):
        ran = ctl(service, "pin", *words)
        assert ran.code == 2
        assert says in ran.err
    assert service.host.better.pins.get("transformer") is None
