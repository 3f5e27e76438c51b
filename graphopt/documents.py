"""The one loader of every YAML and JSON document, and the strict decoder on top of it.

Loading gives plain Python values (`dict`, `list`, `str`, `int`, `float`, `bool`, `None`) and keeps
where each of them stood. YAML follows the 1.2 core schema, whatever PyYAML thinks of 1.1: `1e-5` is
a float, `no`, `on`, `12:30` and `1_000` are strings, `0o17` is 15. One document, UTF-8, string
keys. Both formats refuse duplicate keys, NaN, infinities, integers beyond 64 bits, lone surrogates,
NUL, and anything past the bounds of `graphopt.limits`. Deliberately absent from YAML: anchors and
aliases (an alias bomb is one), tags, merge keys, directives other than `%YAML 1.2`.

A `Reader` is a cursor on one value. It collects faults and goes on, so that one error names them
all; until `finish` has returned, what it gave for a faulty value is a stand-in. Keys nobody asked
for are faults too, with the nearest key that was asked for.

>>> text = '''
... delta: 1
... edits:
...   - add_node: {id: gate, op: aten.sigmoid.default, args: [$pooler]}
... '''
>>> reader = Reader(load_yaml(text, source="delta.yaml"))
>>> reader.field("delta").integer(low=1, high=1)
1
>>> for edit in reader.field("edits").items(count_max=100):
...     kind, body = edit.one_of(("add_node", "remove_node"))
...     print(kind, body.field("id").string(), [arg.raw() for arg in body.field("args").items()])
add_node gate ['$pooler']
>>> reader.finish()
Traceback (most recent call last):
graphopt.documents.FaultsError: delta.yaml:4:26 edits[0].add_node.op: unknown key ...

`decode` does the same from a dataclass: names, types, defaults, and `rule(...)` metadata.

>>> from dataclasses import dataclass, field
>>> @dataclass(frozen=True)
... class AddNode:
...     id: str
...     op: str
...     args: tuple[object, ...] = field(default=(), metadata=rule(count_max=64))
>>> decode(load_json('{"id": "gate", "op": "aten.sigmoid.default"}'), AddNode)
AddNode(id='gate', op='aten.sigmoid.default', args=())
"""

import json
import re
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin
from typing import get_type_hints as type_hints

from graphopt.document_formats import from_value, load_json, load_yaml, plain_number
from graphopt.document_text import Document, Trail, Value, path_text, place
from graphopt.errors import DocumentError, GraphoptError, nearest

__all__ = [
    "Document",
    "FaultsError",
    "Reader",
    "Rule",
    "Trail",
    "Value",
    "decode",
    "from_value",
    "load_json",
    "load_yaml",
    "path_text",
    "rule",
]

T = TypeVar("T")

FAULTS_MAX = 100  # faults of one error; a person stops reading sooner, a log line ends
_SHOWN_CHARS = 40  # of a wrong value, quoted in its fault
_ABSENT: Any = object()


class FaultsError(DocumentError):
    """A well-formed document does not say what it should; `detail` has each fault.

    `where` and `message` are those of the first fault; `str` prints one line a fault, as compilers
    do.
    """

    def __init__(self, faults: list[tuple[str, str, str]], dropped: int) -> None:
        more = len(faults) + dropped - 1
        first_where, _, first_reason = faults[0]
        super().__init__(
            first_reason + (f" (and {more} more)" if more else ""),
            where=first_where,
            detail=[(path, reason) for _, path, reason in faults],
        )
        self.lines = tuple(f"{where}: {reason}" for where, _, reason in faults)

    def __str__(self) -> str:
        return "\n".join(self.lines)


def decode(document: Document, kind: type[T]) -> T:
    """The dataclass `kind` filled from the document.

    Raises:
        FaultsError: listing every unknown, missing and ill-typed field.
    """
    reader = Reader(document)
    decoded = reader.decode(kind)
    reader.finish()
    return decoded


@dataclass(frozen=True, slots=True)
class Rule:
    """What a dataclass field asks beyond its type; see `Reader` for each bound."""

    low: float | None = None
    high: float | None = None
    chars_max: int | None = None
    pattern: str = ""  # the whole string must match
    count_max: int | None = None
    key: str = ""  # the key in the document where it is not the field's name (`from`)
    read: Callable[["Reader"], Any] | None = None  # decodes the field itself, type and all


def rule(**bounds: Any) -> Mapping[str, Rule]:
    """`field(metadata=rule(low=1))`; the arguments are the fields of `Rule`."""
    return {"rule": Rule(**bounds)}


class _Findings:
    """What all readers of one document share."""

    def __init__(self) -> None:
        self.faults: dict[tuple[Trail, str], bool] = {}  # (trail, reason) -> is about the key
        self.count = 0  # of all faults, also those beyond FAULTS_MAX
        self.asked: dict[Trail, tuple[Mapping[str, Value], dict[str, None]]] = {}


class Reader:
    """A cursor on one value of a document; conversions report faults instead of raising."""

    __slots__ = ("_findings", "document", "trail", "value")

    def __init__(self, document: Document) -> None:
        self.document = document
        self.trail: Trail = ()
        self.value: Any = document.value
        self._findings = _Findings()

    @property
    def kind(self) -> str:
        """`mapping`, `list`, `string`, `integer`, `float`, `boolean`, `null` or `absent`."""
        return "absent" if self.value is _ABSENT else _KINDS[type(self.value)]

    def fault(self, reason: str, remedy: str = "", *, of_key: bool = False) -> None:
        """Record that this value (or its key) is wrong; `finish` raises."""
        text = f"{reason} ({remedy})" if remedy else reason
        found = self._findings
        if (self.trail, text) not in found.faults:
            found.count += 1
            if len(found.faults) < FAULTS_MAX:
                found.faults[(self.trail, text)] = of_key

    def finish(self) -> None:
        """Raise `FaultsError` when any reader of this document found a fault."""
        for trail, (mapping, asked) in self._findings.asked.items():
            for key in mapping:
                if key not in asked:
                    unknown = self._at((*trail, key), mapping[key])
                    remedy = nearest(key, asked) or f"known here: {', '.join(asked) or 'none'}"
                    unknown.fault("unknown key", remedy, of_key=True)
        if not self._findings.faults:
            return
        found = list(self._findings.faults.items())
        positions = self.document.positions([(trail, key) for (trail, _), key in found])
        faults = sorted(
            (
                (position, trail, reason)
                for position, ((trail, reason), _) in zip(positions, found, strict=True)
            ),
            key=lambda fault: fault[0] or (0, 0),
        )
        raise FaultsError(
            [
                (place(self.document.source, position, trail), path_text(trail), reason)
                for position, trail, reason in faults
            ],
            self._findings.count - len(faults),
        )

    def field(self, name: str) -> "Reader":
        """The value under a required key."""
        found = self.maybe(name)
        if found is not None:
            return found
        if self.kind == "mapping":
            self.fault(f"the key {name!r} is missing")
        return self._at((*self.trail, name), _ABSENT)

    def maybe(self, name: str) -> "Reader | None":
        """The value under an optional key; an explicit null is a value, not an absence."""
        if not self._is("mapping"):
            return None
        self._findings.asked.setdefault(self.trail, (self.value, {}))[1][name] = None
        return self._at((*self.trail, name), self.value[name]) if name in self.value else None

    def entries(self, *, count_max: int | None = None) -> "list[tuple[str, Reader]]":
        """Keys and values of a mapping whose keys are free, in document order."""
        if not self._is("mapping") or not self._counts(count_max):
            return []
        return [(key, self._at((*self.trail, key), value)) for key, value in self.value.items()]

    def items(self, *, count_max: int | None = None) -> "list[Reader]":
        """The values of a list."""
        if not self._is("list") or not self._counts(count_max):
            return []
        return [self._at((*self.trail, i), value) for i, value in enumerate(self.value)]

    def one_of(self, names: Iterable[str]) -> "tuple[str, Reader]":
        """The only key of a mapping, one of `names`, and its value; ("", absent) when it is not."""
        known = tuple(names)
        if self._is("mapping"):
            if len(self.value) == 1 and (key := next(iter(self.value))) in known:
                return key, self._at((*self.trail, key), self.value[key])
            unknown = next((key for key in self.value if key not in known), None)
            if unknown is None:
                self.fault(f"must have exactly one key, not {len(self.value)}", _any_of(known))
            else:
                remedy = nearest(unknown, known) or _any_of(known)
                self._at((*self.trail, unknown), None).fault("unknown key", remedy, of_key=True)
        return "", self._at(self.trail, _ABSENT)

    def string(
        self, *, choices: Iterable[str] = (), chars_max: int | None = None, pattern: str = ""
    ) -> str:
        """A string; one of `choices` and matching the whole of `pattern` where given."""
        if not self._is("string"):
            return ""
        text = cast("str", self.value)
        known = tuple(choices)
        if known and text not in known:
            self.fault(f"{_shown(text)} is not allowed here", _any_of(known))
        elif chars_max is not None and len(text) > chars_max:
            self.fault(f"has {len(text)} characters, at most {chars_max} are allowed")
        elif pattern and not re.fullmatch(pattern, text):
            self.fault(f"{_shown(text)} does not match {pattern}")
        return text

    def integer(self, *, low: float | None = None, high: float | None = None) -> int:
        """An integer within `low` to `high`, both included."""
        return int(self.value) if self._is("integer") and self._within(low, high) else 0

    def number(self, *, low: float | None = None, high: float | None = None) -> float:
        """A float, or an integer taken as one, within `low` to `high`, both included."""
        return float(self.value) if self._is("float") and self._within(low, high) else 0.0

    def boolean(self) -> bool:
        """A boolean: only `true` and `false`, whatever YAML 1.1 thought of `yes`."""
        return self._is("boolean") and bool(self.value)

    def raw(self) -> Value:
        """The plain value as it was loaded."""
        return None if self.value is _ABSENT else cast("Value", self.value)

    def decode(self, kind: type[T]) -> T:
        """The dataclass `kind` from this mapping; `ValueError` of its own checks is a fault too."""
        before = self._findings.count
        arguments = {}
        for name, key, hint, bounds, required in _plan(cast("type", kind)):
            reader = self.field(key) if required else self.maybe(key)
            if reader is not None:
                arguments[name] = _converted(reader, hint, bounds)
        if self._findings.count == before and self.kind == "mapping":
            try:
                return kind(**arguments)
            except (ValueError, GraphoptError) as error:
                self.fault(str(error))
        return cast("T", None)  # never seen: finish raises

    def _at(self, trail: Trail, value: Any) -> "Reader":
        child = object.__new__(Reader)
        child.document, child.trail, child.value = self.document, trail, value
        child._findings = self._findings
        return child

    def _is(self, kind: str) -> bool:
        own = self.kind
        if own == kind or (kind == "float" and own == "integer"):
            return True
        if own != "absent":  # an absent value was reported by `field`
            self.fault(f"must be {_NAMES[kind]}, not {_shown(self.value)}", self._hint(kind))
        return False

    def _hint(self, kind: str) -> str:
        text = str(self.value)
        if kind == "boolean" and text.lower() in ("yes", "no", "on", "off", "y", "n"):
            return f"write {'true' if text.lower() in ('yes', 'on', 'y') else 'false'}"
        if kind in ("integer", "float") and self.kind == "string":
            plain = text.replace("_", "").replace(",", "")
            return f"write {plain}" if plain_number(plain) else ""
        return ""

    def _within(self, low: float | None, high: float | None) -> bool:
        if (low is None or self.value >= low) and (high is None or self.value <= high):
            return True
        bounds = [f"at least {low:.16g}"] if low is not None else []
        bounds += [f"at most {high:.16g}"] if high is not None else []
        self.fault(f"must be {' and '.join(bounds)}, not {self.value}")
        return False

    def _counts(self, count_max: int | None) -> bool:
        if count_max is None or len(self.value) <= count_max:
            return True
        self.fault(f"has {len(self.value)} entries, at most {count_max} are allowed")
        return False


_KINDS: Mapping[type, str] = {
    dict: "mapping",
    list: "list",
    str: "string",
    int: "integer",
    float: "float",
    bool: "boolean",
    type(None): "null",
}
_NAMES = {
    "mapping": "a mapping",
    "list": "a list",
    "string": "a string",
    "integer": "an integer",
    "float": "a number",
    "boolean": "true or false",
    "null": "null",
}


@cache
def _plan(kind: type) -> tuple[tuple[str, str, Any, Rule, bool], ...]:
    """Name, key, type, rule and whether required, of each field of a dataclass."""
    hints = type_hints(kind)
    plan = []
    for each in fields(kind):
        bounds = each.metadata.get("rule", Rule())
        required = each.default is MISSING and each.default_factory is MISSING
        plan.append((each.name, bounds.key or each.name, hints[each.name], bounds, required))
    return tuple(plan)


def _converted(reader: Reader, hint: Any, bounds: Rule) -> Any:
    """The reader's value as the type `hint` within `bounds`."""
    if bounds.read is not None:
        return bounds.read(reader)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _one_member(reader, arguments, bounds)
    if origin is Literal:
        return reader.string(choices=arguments)
    if origin is tuple:
        items = reader.items(count_max=bounds.count_max)
        return tuple(_converted(item, arguments[0], bounds) for item in items)
    if origin is not None and issubclass(origin, Mapping):
        entries = reader.entries(count_max=bounds.count_max)
        return types.MappingProxyType(
            {key: _converted(value, arguments[1], bounds) for key, value in entries}
        )
    if is_dataclass(hint):
        return reader.decode(cast("type", hint))
    if hint is bool:
        return reader.boolean()
    if hint is int:
        return reader.integer(low=bounds.low, high=bounds.high)
    if hint is float:
        return reader.number(low=bounds.low, high=bounds.high)
    if hint is str or hint is Path:
        text = reader.string(chars_max=bounds.chars_max, pattern=bounds.pattern)
        if hint is Path and reader.value == "":
            reader.fault("an empty path")
        return Path(text) if hint is Path else text
    if hint is object or hint is Any:
        return reader.raw()
    raise TypeError(f"no decoding for {hint!r} at {path_text(reader.trail)}")


def _one_member(reader: Reader, members: tuple[Any, ...], bounds: Rule) -> Any:
    """The member of a union that takes values of the reader's kind."""
    if reader.kind == "absent":
        return None
    if reader.kind == "null" and type(None) in members:
        return None
    for member in members:
        if get_origin(member) is not Literal and reader.kind in _kinds_of(member):
            return _converted(reader, member, bounds)
    words = [word for member in members for word in get_args(member) if isinstance(word, str)]
    if reader.kind == "string" and reader.value in words:
        return reader.value
    names = [repr(word) for word in words] + [
        _NAMES[_kinds_of(member)[0]] for member in members if get_origin(member) is not Literal
    ]
    reader.fault(f"must be {' or '.join(names)}, not {_shown(reader.value)}")
    return None


def _kinds_of(hint: Any) -> tuple[str, ...]:
    origin = get_origin(hint) or hint
    if origin is type(None):
        return ("null",)
    if origin is float:
        return ("float", "integer")
    if origin is Path:
        return ("string",)
    if origin is tuple:
        return ("list",)
    return (_KINDS.get(origin, "mapping"),)


def _any_of(known: tuple[str, ...]) -> str:
    return f"one of: {', '.join(known)}"


def _shown(value: Any) -> str:
    if isinstance(value, str):
        cut = value if len(value) <= _SHOWN_CHARS else value[:_SHOWN_CHARS] + "..."
        return f"the string {cut!r}"
    if isinstance(value, dict | list):
        return _NAMES[_KINDS[type(value)]]
    return json.dumps(value)
