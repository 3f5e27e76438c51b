"""How one name, one reference and one literal are written: the words of the text form and of deltas.

    $encoder.add  $split:1        a value: output 0, output 1
    @lm_head.weight               a constant
    3  -0.0  1e-05  inf  nan      numbers; a float always shows that it is one
    "sum"  true  none  [1, [2]]   text, flags, nothing, lists

A name stands bare unless a reader could take it for something else; then it is quoted like a text:
`$"#1"`. An id that itself ends like an output index gets its index written out: `$a:1:0` is output
0 of the node `a:1`. Deliberately absent: what a literal means to an op (`graphopt.ops` knows), and
whole graphs (`graphopt.text`).
"""

import re
from collections.abc import Callable

from graphopt.errors import DocumentError
from graphopt.graph import Arg, Const, Ref
from graphopt.limits import DOCUMENT_DEPTH_MAX

_NAME = r"[^\s,()\[\]{}'\"=$@#][^\s,()\[\]{}'\"=$]*"
_STRING = r'"[^"\\]*(?:\\.[^"\\]*)*"'
NAME = rf"(?:{_STRING}|{_NAME})"  # patterns, for lines that hold names and values
REF = rf"\$(?:{_STRING}(?::[0-9]+)?|{_NAME})"

_BARE = re.compile(_NAME)
# Six digits: no op has a million outputs, and converting a longer run of digits costs time.
_INDEX = re.compile(r":(0|[1-9][0-9]{0,5})\Z")
_TOKEN = re.compile(
    rf"""\s*([\[\](),]|\w+=|[$@]?{_STRING}(?::[0-9]+)?|[^\s,()\[\]{{}}'"=]+)""",
)
_INT = re.compile(r"-?[0-9]+\Z")
_FLOAT = re.compile(r"-?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?\Z")
_WORDS: dict[str, Arg] = {
    "true": True,
    "false": False,
    "none": None,
    "inf": float("inf"),
    "-inf": float("-inf"),
    "nan": float("nan"),
}
_NUMBER_CHARS_MAX = 4000  # CPython refuses integers of more than 4300 digits
_ESCAPES = {'"': '"', "\\": "\\", "/": "/", "n": "\n", "r": "\r", "t": "\t", "b": "\b", "f": "\f"}
_ESCAPED = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)


class SpellingError(ValueError):
    """A text is not what it should be; `position` counts characters from its start, `remedy` may be empty."""

    def __init__(self, message: str, position: int = 0, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.position = position
        self.remedy = remedy


def format_value(value: Arg) -> str:
    """How an argument is written; `parse_value` gives the same value of the same type back.

    >>> format_value((Ref("split", 1), Const("w"), 1.0, "a b", None))
    '[$split:1, @w, 1.0, "a b", none]'
    """
    write = _FORMATS.get(type(value))
    if write is None:
        raise TypeError(f"a graph holds no {type(value).__name__}: {value!r}")
    return write(value)


def parse_value(text: str) -> Arg:
    """The argument that `format_value` wrote.

    Raises:
        DocumentError: not one value; says at which column.
    """
    try:
        values, _, end = parse_arguments(f"{text})", 0, {})
        if len(values) != 1 or end != len(text) + 1:
            raise SpellingError("one value is expected", min(end, len(text)))
    except SpellingError as fault:
        raise DocumentError(
            fault.message, where=f"column {fault.position + 1}", remedy=fault.remedy
        ) from None
    return values[0]


def format_ref(ref: Ref) -> str:
    """`$node`, or `$node:1` for another output than the first."""
    if ref.idx or _INDEX.search(ref.id):
        return f"${format_name(ref.id)}:{ref.idx}"
    return "$" + format_name(ref.id)


def parse_ref(text: str) -> Ref:
    """The value that `format_ref` wrote, as deltas write it too.

    Raises:
        DocumentError: not a reference.
    """
    try:
        value = parse_atom(text)
    except SpellingError as fault:
        raise DocumentError(fault.message, where=text[:80], remedy=fault.remedy) from None
    if not isinstance(value, Ref):
        raise DocumentError("not a value", where=text[:80], remedy="write $node or $node:1")
    return value


def format_name(name: str) -> str:
    """A name, bare where it can stand bare, else quoted."""
    return name if _BARE.fullmatch(name) and name.isprintable() else format_string(name)


def parse_name(text: str) -> str:
    """The name that `format_name` wrote; SpellingError when a quoted one is malformed."""
    return _parse_string(text) if text.startswith('"') else text


def format_string(text: str) -> str:
    r"""A text in double quotes, on one line: JSON's escapes, and eight digits of `\U` beyond 16 bits.

    Everything printable stands as it is. Unlike JSON, two `\u` escapes never join into one
    character, so any `str` survives.
    """
    if text.isprintable() and '"' not in text and "\\" not in text:
        return f'"{text}"'
    return f'"{"".join(map(_escaped, text))}"'


def parse_arguments(
    line: str, start: int, atoms: dict[str, Arg]
) -> tuple[tuple[Arg, ...], tuple[tuple[str, Arg], ...], int]:
    """Arguments from `start` to the closing parenthesis: positional, keyword, and the position after it.

    Args:
        line: the text.
        start: just after the opening parenthesis.
        atoms: values by spelling, filled here; shared between calls, equal references become one object.

    Raises:
        SpellingError: with the position of the first character that does not fit.
    """
    items: list[Arg] = []
    kwargs: list[tuple[str, Arg]] = []
    open_lists: list[list[Arg]] = []
    key, state, position = "", _OPENED, start
    while match := _TOKEN.match(line, position):
        token, begin, position = match[1], match.start(1), match.end()
        if token == ",":
            if state is not _FILLED:
                raise SpellingError("a value is expected before the comma", begin)
            state = _WANTING
            key = key if open_lists else ""
            continue
        if token in (")", "]"):
            if state is _WANTING:
                raise SpellingError("a value is expected", begin)
            if (token == "]") != bool(open_lists):
                raise SpellingError(f"{token!r} closes nothing here", begin)
            if token == ")":
                return tuple(items), tuple(kwargs), position
            value: Arg = tuple(items)
            items = open_lists.pop()
        elif state is _FILLED:
            raise SpellingError("a comma is expected", begin)
        elif token == "[":
            if len(open_lists) == DOCUMENT_DEPTH_MAX:
                raise SpellingError(f"nested deeper than {DOCUMENT_DEPTH_MAX} lists", begin)
            open_lists.append(items)
            items, state = [], _OPENED
            continue
        elif token[-1] == "=":
            if open_lists or key or any(token[:-1] == name for name, _ in kwargs):
                raise SpellingError(f"the keyword {token[:-1]} cannot stand here", begin)
            key, state = token[:-1], _WANTING
            continue
        else:
            value = atoms.get(token, atoms)
            if value is atoms:
                value = atoms[token] = parse_atom(token, begin)
        state = _FILLED
        if open_lists:
            items.append(value)
        elif key:
            kwargs.append((key, value))
        elif kwargs:
            raise SpellingError("a positional argument follows a keyword argument", begin)
        else:
            items.append(value)
    raise _no_token(line, position)


def parse_atom(token: str, position: int = 0) -> Arg:
    """One reference, constant, text, number or word; SpellingError at `position` when it is none of them."""
    head = token[0] if token else ""
    if head == "$":
        index = _INDEX.search(token)
        name = _checked_name(token[1 : index.start() if index else None], position)
        return Ref(name, int(index[1]) if index else 0)
    if head == "@":
        return Const(_checked_name(token[1:], position))
    if head == '"':
        return _parse_string(token, position)
    if token in _WORDS:
        return _WORDS[token]
    if len(token) <= _NUMBER_CHARS_MAX:
        if _INT.match(token):
            return int(token)
        if _FLOAT.match(token):
            return float(token)
    raise SpellingError(
        f"{token[:80]!r} is not a value",
        position,
        'a value is $node, a constant @name, a text "in quotes", a number, true, false or none',
    )


_OPENED, _WANTING, _FILLED = range(
    3
)  # just after an opening; after a comma or keyword; after a value


def _no_token(line: str, position: int) -> SpellingError:
    rest = line[position:].lstrip()
    at = len(line) - len(rest)
    if not rest:
        return SpellingError("the closing parenthesis is missing", at)
    if rest.lstrip("$@").startswith('"'):
        return SpellingError("the quoted text is never closed", at)
    return SpellingError(f"{rest[0]!r} cannot stand here", at)


def _checked_name(text: str, position: int) -> str:
    if text.startswith('"'):
        return _parse_string(text, position + 1)
    if not _BARE.fullmatch(text):
        raise SpellingError(
            f"{text[:80]!r} is not a name", position, "put a name with special characters in quotes"
        )
    return text


def _parse_string(token: str, position: int = 0) -> str:
    if len(token) < 2 or token[-1] != '"':
        raise SpellingError("nothing may follow a quoted text", position)
    body = token[1:-1]
    return body if "\\" not in body else _ESCAPE.sub(lambda m: _unescaped(m, position), body)


def _unescaped(match: re.Match[str], position: int) -> str:
    code = match[1] or match[2]
    if code is None:
        if match[3] not in _ESCAPES:
            raise SpellingError(f"unknown escape {match[0]}", position + 1 + match.start())
        return _ESCAPES[match[3]]
    number = int(code, 16)
    if number > 0x10FFFF:
        raise SpellingError(f"no character {match[0]}", position + 1 + match.start())
    return chr(number)


def _escaped(char: str) -> str:
    if char in _ESCAPED:
        return _ESCAPED[char]
    if char.isprintable():
        return char
    return f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}"


def _format_tuple(values: tuple[Arg, ...]) -> str:
    return f"[{', '.join(map(format_value, values))}]"


_FORMATS: dict[type, Callable[[Arg], str]] = {
    Ref: format_ref,
    Const: lambda const: "@" + format_name(const.name),
    tuple: _format_tuple,
    str: format_string,
    bool: lambda flag: "true" if flag else "false",
    int: repr,
    float: repr,
    type(None): lambda _: "none",
}
