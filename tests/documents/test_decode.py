"""A decoder names every fault at once, with place and remedy, and never guesses."""

import doctest
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from graphopt import documents
from graphopt.documents import (
    FAULTS_MAX,
    FaultsError,
    Reader,
    decode,
    from_value,
    load_json,
    load_yaml,
    rule,
)
from graphopt.errors import DocumentError


@dataclass(frozen=True, slots=True)
class Retry:
    times: int = field(default=3, metadata=rule(low=1, high=10))
    delay_s: float = field(default=0.5, metadata=rule(low=0))

    def __post_init__(self) -> None:
        if self.times * self.delay_s > 60:
            raise ValueError("more than a minute of retries")


@dataclass(frozen=True, slots=True)
class Job:
    name: str = field(metadata=rule(chars_max=8, pattern=r"[a-z]+"))
    start: str = field(default="", metadata=rule(key="from"))
    level: Literal["low", "high"] = "low"
    threads: int | Literal["auto"] = "auto"
    retry: Retry = field(default_factory=Retry)
    folder: Path | None = None
    tags: tuple[str, ...] = field(default=(), metadata=rule(count_max=2))
    limits: Mapping[str, float] = field(default_factory=dict)
    dry: bool = False
    extra: object = None


def faults(text: str, kind: type = Job) -> list[str]:
    with pytest.raises(FaultsError) as caught:
        decode(load_yaml(text, source="j"), kind)
    return str(caught.value).splitlines()


def test_the_examples_of_the_module_hold() -> None:
    result = doctest.testmod(documents, optionflags=doctest.ELLIPSIS)
    assert result.attempted > 5
    assert result.failed == 0


def test_a_dataclass_is_filled_with_its_types_and_defaults() -> None:
    text = (
        "{name: job, from: a, level: high, threads: 4, retry: {delay_s: 1}, folder: x/y,\n"
        " tags: [t], limits: {a: 1, b: 2.5}, dry: true, extra: [1, {k: null}]}"
    )
    assert decode(load_yaml(text), Job) == Job(
        name="job",
        start="a",
        level="high",
        threads=4,
        retry=Retry(delay_s=1.0),
        folder=Path("x/y"),
        tags=("t",),
        limits={"a": 1.0, "b": 2.5},
        dry=True,
        extra=[1, {"k": None}],
    )
    assert decode(load_json('{"name": "job"}'), Job) == Job("job")


def test_all_faults_come_at_once_in_the_order_of_the_text() -> None:
    text = (
        "nmae: x\nlevel: medium\nthreads: fast\nretry:\n  times: 11\n  dealy_s: 1\n"
        "tags: [a, 2]\nlimits: {a: b}\ndry: yes\nfolder: []\n"
    )
    assert faults(text) == [
        "j:1:1: the key 'name' is missing",
        "j:1:1 nmae: unknown key (did you mean name?)",
        "j:2:8 level: the string 'medium' is not allowed here (one of: low, high)",
        "j:3:10 threads: must be 'auto' or an integer, not the string 'fast'",
        "j:5:10 retry.times: must be at least 1 and at most 10, not 11",
        "j:6:3 retry.dealy_s: unknown key (did you mean delay_s?)",
        "j:7:11 tags[1]: must be a string, not 2",
        "j:8:13 limits.a: must be a number, not the string 'b'",
        "j:9:6 dry: must be true or false, not the string 'yes' (write true)",
        "j:10:9 folder: must be a string or null, not a list",
    ]


def test_an_error_carries_path_and_reason_for_machines() -> None:
    with pytest.raises(DocumentError) as caught:
        decode(load_yaml("name: job\ntags: [a, b, c]\ndry: 1\n", source="j"), Job)
    assert caught.value.code == "document.invalid"
    assert caught.value.where == "j:2:7 tags"
    assert caught.value.message == "has 3 entries, at most 2 are allowed (and 1 more)"
    assert caught.value.detail == (
        ("tags", "has 3 entries, at most 2 are allowed"),
        ("dry", "must be true or false, not 1"),
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("name: TOOLONGNAME", "has 11 characters, at most 8"),
        ("name: A", "the string 'A' does not match"),
        ("name: null", "must be a string, not null"),
        ("{name: j, retry: {times: 1_0}}", "not the string '1_0' (write 10)"),
        ("{name: j, retry: {times: 1.0}}", "must be an integer, not 1.0"),
        ("{name: j, retry: {times: true}}", "must be an integer, not true"),
        ("{name: j, retry: {delay_s: -1}}", "must be at least 0, not -1"),
        ("{name: j, retry: {times: 10, delay_s: 10}}", "retry: more than a minute of retries"),
        ("{name: j, retry: null}", "retry: must be a mapping, not null"),
        ("{name: j, folder: ''}", "folder: an empty path"),
        ("[]", "must be a mapping, not a list"),
        ("null", "must be a mapping, not null"),
        ("{name: j, start: a}", "start: unknown key"),
    ],
)
def test_a_fault_is_worded_for_its_author(text: str, reason: str) -> None:
    lines = faults(text)
    assert len(lines) == 1
    assert reason in lines[0]


def test_a_value_made_by_a_program_is_decoded_alike() -> None:
    assert decode(from_value({"name": "job", "tags": ("a",)}), Job).tags == ("a",)
    with pytest.raises(FaultsError, match=r"^call dry: must be true or false, not 'x'|not the"):
        decode(from_value({"name": "job", "dry": "x"}, source="call"), Job)


EDITS = """\
edits:
  - add_node: {id: gate, op: aten.sigmoid.default, args: [$pooler, {const: w}, 3]}
  - rewire: {from: $pooler, to: $gate}
"""


def read_edits(text: str) -> list[tuple[str, Any]]:
    """As the delta decoder uses a reader: tagged unions, and values of several kinds."""
    reader = Reader(load_yaml(text))
    found: list[tuple[str, Any]] = []
    for edit in reader.field("edits").items(count_max=10):
        kind, body = edit.one_of(("add_node", "remove_node", "rewire"))
        if kind == "add_node":
            args = [read_arg(arg) for arg in body.field("args").items()]
            found.append((kind, (body.field("id").string(), body.field("op").string(), args)))
        elif kind == "rewire":
            ends = (body.field("from").string(pattern=r"\$.+"), body.field("to").string())
            found.append((kind, ends))
    reader.finish()
    return found


def read_arg(arg: Reader) -> Any:
    if arg.kind == "mapping":
        return ("const", arg.field("const").string())
    return arg.raw()


def test_a_reader_follows_unions_by_tag_and_by_kind() -> None:
    assert read_edits(EDITS) == [
        ("add_node", ("gate", "aten.sigmoid.default", ["$pooler", ("const", "w"), 3])),
        ("rewire", ("$pooler", "$gate")),
    ]


def test_a_reader_goes_on_after_a_fault_and_names_each_once() -> None:
    text = EDITS.replace("add_node", "ad_node", 1).replace("$pooler, to", "pooler, too")
    text += "  - {}\n  - {rewire: {}, remove_node: {}}\n  - text\n"
    with pytest.raises(FaultsError) as caught:
        read_edits(text)
    assert [where for where, _ in caught.value.detail] == [
        "edits[0].ad_node",
        "edits[1].rewire",
        "edits[1].rewire.from",
        "edits[1].rewire.too",
        "edits[2]",
        "edits[3]",
        "edits[4]",
    ]
    text = str(caught.value)
    assert "edits[0].ad_node: unknown key (did you mean add_node" in text
    assert "edits[1].rewire: the key 'to' is missing" in text
    assert "must have exactly one key, not 2 (one of: add_node, remove_node, rewire)" in text


def test_a_fault_of_the_callers_own_has_a_place_too() -> None:
    reader = Reader(load_yaml("a: {b: x}", source="d"))
    node = reader.field("a").field("b")
    node.fault("no such node", "did you mean y?")
    node.fault("no such node", "did you mean y?")
    with pytest.raises(FaultsError) as caught:
        reader.finish()
    assert str(caught.value) == "d:1:8 a.b: no such node (did you mean y?)"


def test_what_is_missing_is_told_once_and_its_parts_are_not() -> None:
    reader = Reader(load_yaml("{}", source="d"))
    body = reader.field("body")
    assert body.kind == "absent"
    assert (body.string(), body.integer(), body.number(), body.boolean()) == ("", 0, 0.0, False)
    assert (body.items(), body.entries(), body.raw(), body.maybe("x")) == ([], [], None, None)
    assert body.field("x").one_of(["a"])[0] == ""
    with pytest.raises(FaultsError) as caught:
        reader.finish()
    assert str(caught.value) == "d:1:1: the key 'body' is missing"


def test_a_reader_without_faults_finishes_in_silence() -> None:
    reader = Reader(load_yaml("a: 1"))
    assert reader.maybe("b") is None
    assert reader.field("a").integer() == 1
    reader.finish()


def test_the_faults_of_one_error_are_bounded() -> None:
    text = "limits: {" + ", ".join(f"k{i}: x" for i in range(1000)) + "}\nname: job"
    with pytest.raises(FaultsError) as caught:
        decode(load_yaml(text), Job)
    assert len(caught.value.detail) == FAULTS_MAX
    assert re.search(r"\(and 999 more\)$", caught.value.message)


def test_a_large_document_full_of_faults_is_told_in_one_walk() -> None:
    """A walk a fault would take minutes here and run into the test's time limit."""
    text = "limits:\n" + "".join(f"  k{i}: [x, 1, 2, 3]\n" for i in range(50_000))
    with pytest.raises(FaultsError) as caught:
        decode(load_yaml(text), Job)
    assert caught.value.message.endswith("(and 50000 more)")
    assert str(caught.value).splitlines()[-1].startswith("delta.yaml:100:")


@dataclass(frozen=True)
class Custom:
    value: int = field(metadata=rule(read=lambda reader: reader.integer(low=0) * 2))


def test_a_field_may_bring_its_own_reading() -> None:
    assert decode(load_yaml("value: 4"), Custom) == Custom(8)
    assert "at least 0" in faults("value: -1", Custom)[0]
    assert "the key 'value' is missing" in faults("{}", Custom)[0]
