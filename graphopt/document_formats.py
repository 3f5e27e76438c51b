"""YAML and JSON, read strictly into a `Document`.

Both parsers work event by event in Python (libyaml below for YAML, CPython's string scanner for
JSON): a document of the largest allowed size never holds the GIL for long, which `json.loads`
would. PyYAML's resolvers and constructors never run.
"""

import re
from array import array
from collections.abc import Iterator
from json import decoder
from json.decoder import JSONDecodeError
from typing import Any, NoReturn

import yaml

from graphopt.document_text import Document, Load, Value, decoded

# PyYAML's C parser is about ten times faster; both give the same events.
_YAML_LOADER: Any = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
_YAML_CONSTANTS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
# YAML 1.2.2, section 10.3.2 (tag resolution of the core schema).
_YAML_NUMBER = re.compile(
    r"(?P<int>[-+]?[0-9]+)|0o(?P<oct>[0-7]+)|0x(?P<hex>[0-9a-fA-F]+)"
    r"|(?P<float>[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?)"
    r"|(?P<endless>[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))"
)
_JSON_SPACE = re.compile(r"[ \t\n\r]*")
_JSON_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?P<real>(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?)")
_JSON_WORD = re.compile(r"-?[A-Za-z]+")
_JSON_CONSTANTS: dict[str, bool | None] = {"true": True, "false": False, "null": None}
# CPython's C scanner of one string; typeshed does not know it.
_json_string: Any = vars(decoder)["scanstring"]


def load_yaml(data: str | bytes, source: str = "delta.yaml") -> Document:
    """The one document in `data`, by the YAML 1.2 core schema.

    Raises:
        DocumentError: it is not YAML, or uses what `graphopt.documents` leaves out.
        LimitError: more than `DOCUMENT_BYTES_MAX` bytes or `DOCUMENT_DEPTH_MAX` levels.
    """
    return _YamlLoad(decoded(data, source).removeprefix("\ufeff"), source).document()


def load_json(data: str | bytes, source: str = "delta.json") -> Document:
    """The one value in `data`, by RFC 8259 without its latitude.

    Raises:
        DocumentError: it is not JSON, or uses what `graphopt.documents` leaves out.
        LimitError: more than `DOCUMENT_BYTES_MAX` bytes or `DOCUMENT_DEPTH_MAX` levels.
    """
    return _JsonLoad(decoded(data, source), source).document()


def from_value(value: object, source: str = "value") -> Document:
    """A document around a Python value made by a caller (tuples count as lists), copied.

    Raises:
        DocumentError: a part of it is none of the types of `Value`, or a number out of range.
        LimitError: more than `DOCUMENT_DEPTH_MAX` levels.
    """
    return Document(source, _ValueLoad("", source).copied(value))


def plain_number(text: str) -> bool:
    """Whether YAML reads `text` as a finite number."""
    match = _YAML_NUMBER.fullmatch(text)
    return match is not None and match["endless"] is None


class _YamlLoad(Load):
    """Builds the value straight from parser events; PyYAML's own resolvers never run."""

    def document(self) -> Document:
        events: Any = yaml.parse(self.text, Loader=_YAML_LOADER)
        try:
            next(events)  # stream start
            start = next(events)
            if isinstance(start, yaml.StreamEndEvent):  # comments at most: an empty document
                return Document(self.source, None, self.text, array("Q", [0]))
            version = getattr(start, "version", None)
            if version not in (None, (1, 2)) or getattr(start, "tags", None):
                self.refuse("a directive", start.start_mark.index, "remove the line")
            value = self.node(next(events), events)
            next(events)  # document end
            if not isinstance(more := next(events), yaml.StreamEndEvent):
                self.refuse("a second document", more.start_mark.index, "write two files")
        except yaml.YAMLError as error:
            self.refuse_syntax(error)
        finally:
            events.close()
        return Document(self.source, value, self.text, self.marks)

    def node(self, event: Any, events: Iterator[Any]) -> Value:
        index = event.start_mark.index
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            self.refuse("anchors and aliases are not allowed", index, "write the value out")
        if event.tag is not None:
            self.refuse(f"the tag {event.tag!r} is not allowed", index, "remove it")
        self.marks.append(index)
        if isinstance(event, yaml.ScalarEvent):
            return self.scalar(event.value, event.style, index)
        self.check_depth(index)
        if isinstance(event, yaml.SequenceStartEvent):
            return self.sequence(events)
        return self.mapping(events)

    def sequence(self, events: Iterator[Any]) -> list[Value]:
        values: list[Value] = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            self.trail.append(len(values))
            values.append(self.node(event, events))
            self.trail.pop()
        return values

    def mapping(self, events: Iterator[Any]) -> dict[str, Value]:
        values: dict[str, Value] = {}
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            index = event.start_mark.index
            if isinstance(event, yaml.ScalarEvent):
                if event.value == "<<" and not event.style:
                    self.refuse("merge keys are not allowed", index, "write the keys out")
                key = self.node(event, events)
            else:
                key = None
            if not isinstance(key, str):
                self.refuse("keys must be strings", index, "put the key in quotes")
            self.enter_key(key, values, index)
            values[key] = self.node(next(events), events)
            self.trail.pop()
        return values

    def scalar(self, text: str, style: str | None, index: int) -> Value:
        if style:  # quoted or block: always a string
            return self.checked_text(text, index)
        if text in _YAML_CONSTANTS:
            return _YAML_CONSTANTS[text]
        match = _YAML_NUMBER.fullmatch(text)
        if match is None:
            return self.checked_text(text, index)
        form = match.lastgroup
        if form == "float":
            return self.checked_float(float(text), index)
        if form == "endless":
            return self.checked_float(float("inf"), index)
        base = {"int": 10, "oct": 8, "hex": 16}[str(form)]
        return self.checked_integer(match[str(form)], base, index)

    def refuse_syntax(self, error: yaml.YAMLError) -> NoReturn:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        if mark is None:  # yaml.reader.ReaderError: a character no YAML text may hold
            code = getattr(error, "character", 0)
            code = code if isinstance(code, int) else 0
            index = next((i for i, c in enumerate(self.text) if not _yaml_printable(c)), 0)
            self.refuse(f"the control character U+{code:04X}", index, "remove or escape it")
        words = [getattr(error, "context", None), getattr(error, "problem", None)]
        if "nesting depth" in (words[1] or ""):  # libyaml's own bound, met while it reads ahead
            self.refuse_depth(mark.index)
        message = "not valid YAML: " + ", ".join(word for word in words if word)
        at = self.text[mark.index : mark.index + 1]
        remedy = ""
        if at == "\t":
            remedy = "indent with spaces"
        elif at and at in "%@`*&!":
            remedy = f"put a text that begins with {at} in quotes"
        self.refuse(message, mark.index, remedy)


class _JsonLoad(Load):
    """Recursive descent; the depth bound keeps it far from CPython's recursion limit."""

    def document(self) -> Document:
        end = self.space(0)
        value, end = self.node(end)
        end = self.space(end)
        if end != len(self.text):
            self.refuse("text after the end of the JSON value", end)
        return Document(self.source, value, self.text, self.marks)

    def node(self, index: int) -> tuple[Value, int]:
        self.marks.append(index)
        first = self.text[index : index + 1]
        if first == '"':
            return self.string(index)
        if first == "{":
            return self.mapping(index)
        if first == "[":
            return self.sequence(index)
        number = _JSON_NUMBER.match(self.text, index)
        if number is not None:
            digits = number[0]
            if number["real"]:
                return self.checked_float(float(digits), index), number.end()
            return self.checked_integer(digits, 10, index), number.end()
        word = _JSON_WORD.match(self.text, index)
        if word is not None and word[0] in _JSON_CONSTANTS:
            return _JSON_CONSTANTS[word[0]], word.end()
        if word is not None and word[0] in ("NaN", "Infinity", "-Infinity"):
            self.checked_float(float("inf"), index)
        return self.refuse("not valid JSON: a value was expected", index)

    def sequence(self, index: int) -> tuple[Value, int]:
        self.check_depth(index)
        values: list[Value] = []
        end = self.space(index + 1)
        if self.text.startswith("]", end):
            return values, end + 1
        while True:
            self.trail.append(len(values))
            value, end = self.node(end)
            self.trail.pop()
            values.append(value)
            end = self.space(end)
            if self.text.startswith("]", end):
                return values, end + 1
            end = self.space(self.expected(",", end))

    def mapping(self, index: int) -> tuple[Value, int]:
        self.check_depth(index)
        values: dict[str, Value] = {}
        end = self.space(index + 1)
        if self.text.startswith("}", end):
            return values, end + 1
        while True:
            if not self.text.startswith('"', end):
                self.refuse("not valid JSON: a key in double quotes was expected", end)
            self.marks.append(end)
            start = end
            key, end = self.string(start)
            self.enter_key(key, values, start)
            end = self.space(self.expected(":", self.space(end)))
            values[key], end = self.node(end)
            self.trail.pop()
            end = self.space(end)
            if self.text.startswith("}", end):
                return values, end + 1
            end = self.space(self.expected(",", end))

    def string(self, index: int) -> tuple[str, int]:
        try:
            text, end = _json_string(self.text, index + 1, True)
        except JSONDecodeError as error:
            problem = error.msg.lower().removesuffix(" at").removesuffix(" starting")
            self.refuse(f"not valid JSON: {problem}", error.pos)
        return self.checked_text(text, index), end

    def expected(self, sign: str, index: int) -> int:
        if not self.text.startswith(sign, index):
            self.refuse(f"not valid JSON: {sign!r} was expected", index)
        return index + 1

    def space(self, index: int) -> int:
        match = _JSON_SPACE.match(self.text, index)
        return match.end() if match else index


class _ValueLoad(Load):
    """The same checks on a value that was never text."""

    def copied(self, value: object) -> Value:
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int):
            return self.checked_range(int(value), 0)
        if isinstance(value, float):
            return self.checked_float(float(value), 0)
        if isinstance(value, str):
            return self.checked_text(str(value), 0)
        self.check_depth(0)
        if isinstance(value, list | tuple):
            return [self.below(i, item) for i, item in enumerate(value)]
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str):
                    self.refuse(f"keys must be strings, not {key!r}", 0)
            return {self.checked_text(key, 0): self.below(key, item) for key, item in value.items()}
        return self.refuse(
            f"a {type(value).__name__} has no place in a document", 0, "use plain Python values"
        )

    def below(self, step: str | int, value: object) -> Value:
        self.trail.append(step)
        copied = self.copied(value)
        self.trail.pop()
        return copied


def _yaml_printable(character: str) -> bool:
    """YAML 1.2.2, production 1 (c-printable)."""
    code = ord(character)
    return (
        code in (0x09, 0x0A, 0x0D, 0x85)
        or 0x20 <= code <= 0x7E
        or 0xA0 <= code <= 0xFFFD
        or code >= 0x10000
    )
