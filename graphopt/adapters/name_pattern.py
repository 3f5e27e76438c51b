"""Match a stranger's regular expression against module names in bounded time.

PEFT configs carry regular expressions (`target_modules`, `rank_pattern` and others). Python's `re`
backtracks and may take exponential time on a hostile one, with the GIL held. Here the expression is
parsed by Python's own parser, then run over *sets* of positions (one int, a bit per position), which
is polynomial and never backtracks; a step budget bounds it. Same answers as `re` for whether a name
matches. Deliberately absent, because they need backtracking: groups' contents, back references,
atomic groups; and flags.
"""

import re
from collections.abc import Callable
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from graphopt.errors import AdapterError

STEPS_MAX = (
    200_000  # set operations of one match: milliseconds, a hundred times what real configs need
)
PATTERN_CHARS_MAX = 4_096  # the longest seen in published adapters is below 1,000
_HARMLESS = re.compile(
    r"[\w.^$\\-]*"
)  # nothing that repeats or branches: `re` itself is linear in it

_Step = Callable[["_Run", int], int]


class NamePattern:
    """A compiled expression; `where` is its place in the config, for errors.

    Args:
        before: trusted text put in front of the expression.
        pattern: the stranger's expression.
        after: trusted text put behind it.
        where: named in errors.

    Raises:
        AdapterError: not a valid expression, or one of a kind that is not supported.
    """

    __slots__ = ("_plain", "_step", "pattern", "where")

    def __init__(self, before: str, pattern: str, after: str, where: str) -> None:
        self.pattern = pattern
        self.where = where
        self._plain: re.Pattern[str] | None = None
        self._step: _Step | None = None
        if len(pattern) > PATTERN_CHARS_MAX:
            raise self._refused(f"{len(pattern)} characters, at most {PATTERN_CHARS_MAX} are read")
        try:
            if _HARMLESS.fullmatch(pattern):
                self._plain = re.compile(before + pattern + after)
            else:
                parsed = _parser.parse(before + pattern + after)
                if parsed.state.flags != re.UNICODE:
                    raise self._refused("flags such as (?i) are not supported")
                self._step = _sequence(parsed)
        except (re.error, OverflowError, RecursionError) as fault:
            raise self._refused(f"not a regular expression: {fault}") from None
        except KeyError as fault:
            raise self._refused(f"{fault.args[0].lower()} is not supported") from None

    def match(self, name: str) -> bool:
        """As `re.match`: the beginning of `name` matches.

        Raises:
            AdapterError: the match takes more than `STEPS_MAX` steps.
        """
        if self._plain is not None:
            return self._plain.match(name) is not None
        return self._ends(name) != 0

    def fullmatch(self, name: str) -> bool:
        """As `re.fullmatch`: all of `name` matches.

        Raises:
            AdapterError: the match takes more than `STEPS_MAX` steps.
        """
        if self._plain is not None:
            return self._plain.fullmatch(name) is not None
        return bool(self._ends(name) >> len(name) & 1)

    def _ends(self, name: str) -> int:
        assert self._step is not None
        try:
            return self._step(_Run(name), 1)
        except _TooLongError:
            raise self._refused(f"matching takes more than {STEPS_MAX} steps") from None

    def _refused(self, reason: str) -> AdapterError:
        shown = self.pattern if len(self.pattern) <= 80 else f"{self.pattern[:77]}..."
        return AdapterError(
            f"{shown!r}: {reason}", where=self.where, remedy="write a list of module names instead"
        )


class _TooLongError(Exception):
    """The step budget is spent."""


class _Run:
    """One name being matched: the text, its positions by character test, and the budget."""

    __slots__ = ("chars", "end", "full", "masks", "steps", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.end = len(text)
        self.full = (1 << (self.end + 1)) - 1
        self.chars: dict[str, int] = {}  # a bit for each place where the character stands
        for i, char in enumerate(text):
            self.chars[char] = self.chars.get(char, 0) | 1 << i
        self.masks: dict[int, int] = {}  # the same for each character test, by its id
        self.steps = 0

    def spend(self) -> None:
        self.steps += 1
        if self.steps > STEPS_MAX:
            raise _TooLongError


def _sequence(parsed: Any) -> _Step:
    steps = [_node(str(op), argument) for op, argument in parsed]

    def run(state: _Run, positions: int) -> int:
        for step in steps:
            positions = step(state, positions)
            if not positions:
                return 0
        return positions

    return run


def _node(op: str, argument: Any) -> _Step:
    match op:
        case "LITERAL":
            return _literal(chr(argument))
        case "NOT_LITERAL":
            return _character(lambda char: ord(char) != argument)
        case "ANY":
            return _character(lambda char: char != "\n")
        case "IN":
            return _character(_one_of(argument))
        case "BRANCH":
            return _branch([_sequence(item) for item in argument[1]])
        case "SUBPATTERN":
            if argument[1] or argument[2]:
                raise KeyError("A GROUP WITH FLAGS")
            return _sequence(argument[3])
        case "MAX_REPEAT" | "MIN_REPEAT":
            return _repeat(int(argument[0]), int(argument[1]), _sequence(argument[2]))
        case "AT":
            return _anchor(str(argument))
        case "ASSERT" | "ASSERT_NOT":
            return _look(argument[0], argument[1], op == "ASSERT")
        case _:
            raise KeyError(op)


def _literal(wanted: str) -> _Step:
    def run(state: _Run, positions: int) -> int:
        state.spend()
        return (positions & state.chars.get(wanted, 0)) << 1

    return run


def _character(test: Callable[[str], bool]) -> _Step:
    def run(state: _Run, positions: int) -> int:
        state.spend()
        mask = state.masks.get(id(test))
        if mask is None:
            mask = sum(places for char, places in state.chars.items() if test(char))
            state.masks[id(test)] = mask
        return (positions & mask) << 1

    return run


def _one_of(items: Any) -> Callable[[str], bool]:
    negate = bool(items) and str(items[0][0]) == "NEGATE"
    tests = [_member(str(op), argument) for op, argument in (items[1:] if negate else items)]
    return lambda char: any(test(char) for test in tests) != negate


def _member(op: str, argument: Any) -> Callable[[str], bool]:
    match op:
        case "LITERAL":
            return lambda char: ord(char) == argument
        case "RANGE":
            return lambda char: argument[0] <= ord(char) <= argument[1]
        case "CATEGORY":
            name = str(argument)
            test = _CATEGORIES[name.replace("_NOT_", "_")]
            wanted = "_NOT_" not in name
            return lambda char: test(char) == wanted
        case _:
            raise KeyError(op)


def _is_word(char: str) -> bool:
    return char.isalnum() or char == "_"


_CATEGORIES: dict[str, Callable[[str], bool]] = {
    "CATEGORY_DIGIT": str.isdecimal,
    "CATEGORY_SPACE": str.isspace,
    "CATEGORY_WORD": _is_word,
}


def _branch(choices: list[_Step]) -> _Step:
    def run(state: _Run, positions: int) -> int:
        found = 0
        for choice in choices:
            found |= choice(state, positions)
        return found

    return run


def _repeat(least: int, most: int, body: _Step) -> _Step:
    def run(state: _Run, positions: int) -> int:
        # More rounds than positions only add empty matches, which change nothing.
        for _ in range(min(least, state.end + 1)):
            positions = body(state, positions)
        found = frontier = positions
        for _ in range(min(most - least, state.end + 1)):
            frontier = body(state, frontier) & ~found
            if not frontier:
                break
            found |= frontier
        return found

    return run


def _anchor(name: str) -> _Step:
    def run(state: _Run, positions: int) -> int:
        state.spend()
        last = 1 << state.end
        match name:
            case "AT_BEGINNING" | "AT_BEGINNING_STRING":
                return positions & 1
            case "AT_END":
                return positions & (last | last >> 1 if state.text.endswith("\n") else last)
            case "AT_END_STRING":
                return positions & last
        inside = [False, *map(_is_word, state.text), False]
        edges = sum(1 << i for i in range(state.end + 1) if inside[i] != inside[i + 1])
        return positions & (edges if name == "AT_BOUNDARY" else state.full & ~edges)

    if name not in _ANCHORS:
        raise KeyError(name)
    return run


_ANCHORS = (
    "AT_BEGINNING",
    "AT_BEGINNING_STRING",
    "AT_BOUNDARY",
    "AT_END",
    "AT_END_STRING",
    "AT_NON_BOUNDARY",
)


def _look(direction: int, parsed: Any, wanted: bool) -> _Step:
    body = _sequence(parsed)
    behind = parsed.getwidth()[0] if direction < 0 else 0

    def run(state: _Run, positions: int) -> int:
        found = 0
        for i in range(state.end + 1):
            here = 1 << i
            if positions & here:
                ends = body(state, here >> behind) & (here if direction < 0 else state.full)
                found |= here if bool(ends) == wanted else 0
        return found

    return run
