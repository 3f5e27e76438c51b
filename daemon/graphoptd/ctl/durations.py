"""Durations as people write them: `30s`, `15m`, `2h`, `3d`.

One whole number and one unit. Deliberately absent: fractions, sums and bare numbers; `90` for a pin
could be meant as seconds or minutes, and the wrong guess is noticed too late.
"""

import argparse
import re

DURATION_MAX_S = 30 * 86_400  # a month, as the service has it: `graphopt.engine.pins`

_PATTERN = re.compile(r"([0-9]{1,9})([smhd])", re.ASCII)
_UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}


def duration_s(text: str) -> int:
    """The seconds of a duration. ArgumentTypeError when it is none, nothing, or too long."""
    found = _PATTERN.fullmatch(text)
    if found is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no duration: write a whole number and a unit, as 30s, 15m, 2h or 3d"
        )
    seconds = int(found[1]) * _UNITS[found[2]]
    if not 1 <= seconds <= DURATION_MAX_S:
        raise argparse.ArgumentTypeError(
            f"{text} is not between 1s and {DURATION_MAX_S // 86_400}d"
        )
    return seconds
