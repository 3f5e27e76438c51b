"""A loaded document: its value, where each part stood, and what every loader checks.

`graphopt.documents` says what is allowed, `graphopt.document_formats` reads YAML and JSON.
Positions are kept as one number a node and looked up only to word an error.
"""

import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import NoReturn, TypeAlias

from graphopt.errors import DocumentError, LimitError
from graphopt.limits import DOCUMENT_BYTES_MAX, DOCUMENT_DEPTH_MAX

Value: TypeAlias = "str | int | float | bool | list[Value] | dict[str, Value] | None"
Trail: TypeAlias = tuple[str | int, ...]  # the keys and indices that lead to a value

Wanted: TypeAlias = tuple[Trail, bool]  # a value, or its key

INTEGER_LOW, INTEGER_HIGH = -(1 << 63), (1 << 64) - 1  # what int64 and uint64 tensors can hold

_PLAIN_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_BREAKS = re.compile(r"\r\n|\r|\n")
_DIGITS_MAX = 20  # of an integer within 64 bits; more would only cost time to convert


@dataclass(frozen=True, slots=True)
class Document:
    """A loaded document: its value, and where each part of the value stood in the text.

    `marks` holds one character offset a node, in document order (a key, then its value): eight
    bytes a node instead of a path each, and looked up only to word an error.
    """

    source: str
    value: Value
    text: str = field(default="", repr=False)
    marks: "array[int]" = field(default_factory=lambda: array("Q"), repr=False)

    def position(self, trail: Trail, *, of_key: bool = False) -> tuple[int, int] | None:
        """Line and column, both from 1, of the value at `trail` or of its key.

        Of a missing value: where its mapping or list begins. None without text.
        """
        return self.positions([(trail, of_key)])[0]

    def positions(self, wanted: Sequence[Wanted]) -> list[tuple[int, int] | None]:
        """`position` of many (trail, of_key), in one walk of the document."""
        if not self.marks:
            return [None] * len(wanted)
        nodes: dict[Wanted, int] = {}
        _find(self.value, 0, list(wanted), 0, nodes)
        offsets = [self.marks[nodes[each]] for each in wanted]
        return list(_line_columns(self.text, offsets))

    def where(self, trail: Trail = (), *, of_key: bool = False) -> str:
        """`file:line:column path` of the value at `trail`, or of its key."""
        position = self.position(trail, of_key=of_key)
        return place(self.source, position, trail)


def path_text(trail: Trail) -> str:
    """A trail as people write it: `edits[2].add_node.op`; the whole document is `(document)`."""
    text = ""
    for step in trail:
        if isinstance(step, int):
            text += f"[{step}]"
        elif _PLAIN_KEY.fullmatch(step):
            text += f".{step}" if text else step
        else:
            text += f"[{step!r}]"
    return text or "(document)"


class Load:
    """What the loaders share: the trail and marks of the node being read, and the checks."""

    def __init__(self, text: str, source: str) -> None:
        self.text = text
        self.source = source
        self.trail: list[str | int] = []
        self.marks = array("Q")

    def refuse(
        self,
        message: str,
        index: int,
        remedy: str = "",
        error: type[DocumentError] | type[LimitError] = DocumentError,
    ) -> NoReturn:
        """Raise `error` for the character at `index` and the node being read."""
        position = _line_column(self.text, index) if self.text else None
        where = place(self.source, position, tuple(self.trail))
        raise error(message, where=where, remedy=remedy)

    def check_depth(self, index: int) -> None:
        """Refuse to open another mapping or list at the depth bound."""
        if len(self.trail) >= DOCUMENT_DEPTH_MAX:
            self.refuse_depth(index)

    def refuse_depth(self, index: int) -> NoReturn:
        """Raise LimitError for what is opened at `index`."""
        self.refuse(f"nested deeper than {DOCUMENT_DEPTH_MAX} levels", index, error=LimitError)

    def checked_text(self, text: str, index: int) -> str:
        """The text, if it can be written as UTF-8 and used as a name."""
        if "\0" in text:
            self.refuse("a NUL character in a string", index)
        if not text.isascii() and not encodable(text):
            self.refuse("half of a surrogate pair in a string", index, "write the character itself")
        return text

    def checked_integer(self, digits: str, base: int, index: int) -> int:
        """The integer; long ones are refused unread, their conversion takes quadratic time."""
        number = int(digits, base) if len(digits.lstrip("+-0")) <= _DIGITS_MAX else 1 << 64
        return self.checked_range(number, index)

    def checked_range(self, number: int, index: int) -> int:
        """The integer, if int64 or uint64 can hold it."""
        if not INTEGER_LOW <= number <= INTEGER_HIGH:
            self.refuse("an integer beyond 64 bits", index)
        return number

    def checked_float(self, number: float, index: int) -> float:
        """The number, if it is finite."""
        if not isfinite(number):
            self.refuse("a number that is not finite", index, "leave the key out to mean no value")
        return number

    def enter_key(self, key: str, into: dict[str, Value], index: int) -> None:
        """Step below a key that the mapping does not have yet."""
        self.trail.append(key)
        if key in into:
            self.refuse(f"the key {key!r} is here twice", index, "keep one of them")


def decoded(data: str | bytes, source: str) -> str:
    """The text, within the byte bound and UTF-8."""
    if len(data) > DOCUMENT_BYTES_MAX:
        raise LimitError(
            f"more than {DOCUMENT_BYTES_MAX} bytes",
            where=source,
            remedy="tensors belong in safetensors files beside the document",
        )
    if isinstance(data, str):
        if not encodable(data):
            raise DocumentError("half of a surrogate pair in the text", where=source)
        return data
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DocumentError(
            f"byte {error.start} is not UTF-8", where=source, remedy="save the file as UTF-8"
        ) from None


def encodable(text: str) -> bool:
    """Whether the text has no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _size(value: Value) -> int:
    """Marks that a value takes: one a key and one a value."""
    if isinstance(value, dict):
        return 1 + len(value) + sum(map(_size, value.values()))
    if isinstance(value, list):
        return 1 + sum(map(_size, value))
    return 1


def _find(
    value: Value, depth: int, wanted: list[Wanted], node: int, nodes: dict[Wanted, int]
) -> int:
    """Note the node of each of `wanted`, all of them at or below `value`; the node after it."""
    below: dict[str | int, list[Wanted]] = {}
    for each in wanted:
        nodes[each] = node  # and there it stays when the value is missing
        if len(each[0]) > depth:
            below.setdefault(each[0][depth], []).append(each)
    node += 1
    if isinstance(value, dict):
        for key, child in value.items():
            inside = below.get(key, ())
            of_key = [each for each in inside if each[1] and len(each[0]) == depth + 1]
            nodes.update(dict.fromkeys(of_key, node))
            rest = [each for each in inside if each not in of_key]
            node += 1
            node = _find(child, depth + 1, rest, node, nodes) if rest else node + _size(child)
    elif isinstance(value, list):
        for i, child in enumerate(value):
            inside = below.get(i, [])
            node = _find(child, depth + 1, inside, node, nodes) if inside else node + _size(child)
    return node


def _line_column(text: str, offset: int) -> tuple[int, int]:
    return next(_line_columns(text, [offset]))


def _line_columns(text: str, offsets: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Line and column of each offset, in one pass over the text."""
    found: dict[int, tuple[int, int]] = {}
    line, start, end = 1, 0, 0
    for offset in sorted(set(offsets)):
        for match in _BREAKS.finditer(text, end, offset):
            line, start = line + 1, match.end()
        end = max(end, start)
        found[offset] = (line, offset - start + 1)
    return (found[offset] for offset in offsets)


def place(source: str, position: tuple[int, int] | None, trail: Trail) -> str:
    """`file:line:column path`, as far as these are known."""
    at = f"{source}:{position[0]}:{position[1]}" if position else source
    return f"{at} {path_text(trail)}" if trail else at
