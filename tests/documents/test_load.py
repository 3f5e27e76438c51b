"""What a YAML or JSON text means, what is refused, and where the error points."""

import json
import math
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from graphopt import document_formats
from graphopt.documents import Document, from_value, load_json, load_yaml, path_text
from graphopt.errors import DocumentError, GraphoptError, LimitError
from graphopt.limits import DOCUMENT_BYTES_MAX, DOCUMENT_DEPTH_MAX


@pytest.fixture(params=["CBaseLoader", "BaseLoader"], autouse=True)
def _yaml_parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything below holds for libyaml and for PyYAML's own parser."""
    monkeypatch.setattr(document_formats, "_YAML_LOADER", getattr(yaml, request.param))


CORE_SCALARS: list[tuple[str, Any]] = [
    ("1e-5", 1e-5),
    ("1E5", 1e5),
    ("-.5", -0.5),
    ("+12.", 12.0),
    (".5e+3", 500.0),
    ("0", 0),
    ("-0", 0),
    ("+3", 3),
    ("007", 7),
    ("0o17", 15),
    ("0x1f", 31),
    ("18446744073709551615", 2**64 - 1),
    ("-9223372036854775808", -(2**63)),
    ("true", True),
    ("False", False),
    ("null", None),
    ("~", None),
    ("", None),
    # Strings, whatever YAML 1.1 thinks:
    ("no", "no"),
    ("on", "on"),
    ("Yes", "Yes"),
    ("y", "y"),
    ("1_000", "1_000"),
    ("0b11", "0b11"),
    ("017o", "017o"),
    ("12:30", "12:30"),
    ("2001-01-01", "2001-01-01"),
    ("1e", "1e"),
    (".", "."),
    ("e5", "e5"),
    ("tRUE", "tRUE"),
    ("=", "="),
    ("$pooler", "$pooler"),
    ("'1'", "1"),
    ('"true"', "true"),
    ("'~'", "~"),
    ("'<<'", "<<"),
    ("-0o7", "-0o7"),
    ("aten.sigmoid.default", "aten.sigmoid.default"),
]


@pytest.mark.parametrize(("text", "value"), CORE_SCALARS)
def test_a_yaml_scalar_means_what_version_1_2_says(text: str, value: Any) -> None:
    loaded = load_yaml(f"a: {text}\n").value
    assert isinstance(loaded, dict)
    assert type(loaded["a"]) is type(value)
    assert loaded["a"] == value


def test_the_delta_of_the_manual_loads() -> None:
    text = (
        "delta: 1\ngraph: minilm\nif_revision: 12\nedits:\n"
        "  - add_node: {id: gate, op: aten.sigmoid.default, args: [$pooler]}\n"
        "  - rewire: {from: $pooler, to: $gate, users: [classifier]}\n"
    )
    assert load_yaml(text).value == {
        "delta": 1,
        "graph": "minilm",
        "if_revision": 12,
        "edits": [
            {"add_node": {"id": "gate", "op": "aten.sigmoid.default", "args": ["$pooler"]}},
            {"rewire": {"from": "$pooler", "to": "$gate", "users": ["classifier"]}},
        ],
    }


YAML_REFUSALS = [
    ("a: &x [1]\nb: *x", "1:4 a: anchors and aliases are not allowed"),
    ("b: *x", "1:4 b: anchors and aliases are not allowed"),
    ("a: !!python/object:os.system x", "1:4 a: the tag"),
    ("a: !!str 1", "1:4 a: the tag"),
    ("a: ! 1", "1:4 a: the tag '!' is not allowed"),
    ("<<: {a: 1}", "1:1: merge keys are not allowed"),
    ("a: {b: 1,\n    b: 2}", "2:5 a.b: the key 'b' is here twice"),
    ("a: 1\n'a': 2", "2:1 a: the key 'a' is here twice"),
    ("1: x", "1:1: keys must be strings (put the key in quotes)"),
    ("null: x", "1:1: keys must be strings"),
    ("? [a]\n: x", "1:3: keys must be strings"),
    ("a: .nan", "1:4 a: a number that is not finite"),
    ("a: [1, -.INF]", "1:8 a[1]: a number that is not finite"),
    ("a: 1e999", "1:4 a: a number that is not finite"),
    ("a: 18446744073709551616", "1:4 a: an integer beyond 64 bits"),
    ("a: 0xfffffffffffffffff", "1:4 a: an integer beyond 64 bits"),
    ("a: 1\n---\nb: 1", "2:1: a second document"),
    ("%YAML 1.1\n---\na: 1", "a directive (remove the line)"),
    ("%TAG ! tag:x,2000:\n---\na: 1", "a directive (remove the line)"),
    ("a:\n\tb: 1", "not valid YAML"),
    ("a: @x", "1:4 a: not valid YAML"),
    ("a: %x", "put a text that begins with % in quotes"),
    ("a: [1, 2", "not valid YAML"),
    ("a: b: c", "1:5: not valid YAML"),
    ("a: \x01", "1:4: the control character U+0001"),
    ('a: "\\0"', "1:4 a: a NUL character"),
]


@pytest.mark.parametrize(("text", "message"), YAML_REFUSALS)
def test_a_yaml_text_is_refused_by_place_and_reason(text: str, message: str) -> None:
    with pytest.raises(DocumentError) as caught:
        load_yaml(text, source="d.yaml")
    assert str(caught.value).startswith("d.yaml:")
    assert message in str(caught.value)


def test_version_1_2_may_be_declared_and_a_byte_order_mark_is_ignored() -> None:
    assert load_yaml("%YAML 1.2\n---\na: no\n").value == {"a": "no"}
    assert load_yaml(b"\xef\xbb\xbfa: 1").value == {"a": 1}


@pytest.mark.parametrize("text", ["", "\n", "# nothing here\n", "---\n", "null"])
def test_an_empty_yaml_text_is_null(text: str) -> None:
    assert load_yaml(text).value is None


JSON_REFUSALS = [
    ("NaN", "1:1: a number that is not finite"),
    ('{"a": [Infinity]}', "1:8 a[0]: a number that is not finite"),
    ("-Infinity", "1:1: a number that is not finite"),
    ("1e999", "1:1: a number that is not finite"),
    ('{"a": 1,\n "a": 2}', "2:2 a: the key 'a' is here twice"),
    ('{"a": 1,}', "1:9: not valid JSON: a key in double quotes was expected"),
    ("[1,]", "1:4 [1]: not valid JSON: a value was expected"),
    ("[1 2]", "1:4: not valid JSON: ',' was expected"),
    ("{'a': 1}", "1:2: not valid JSON: a key in double quotes was expected"),
    ("[01]", "1:3: not valid JSON"),
    ("[+1]", "1:2 [0]: not valid JSON"),
    ("[.5]", "1:2 [0]: not valid JSON"),
    ("[1.]", "1:3: not valid JSON"),
    ('"\\ud800"', "1:1: half of a surrogate pair"),
    ('"\\u0000"', "1:1: a NUL character"),
    ('"\\x"', "1:2: not valid JSON: invalid \\escape"),
    ('"tab\there"', "1:5: not valid JSON: invalid control character"),
    ('"open', "1:1: not valid JSON: unterminated string"),
    ("[1] []", "1:5: text after the end"),
    ("// no", "1:1: not valid JSON: a value was expected"),
    ("", "not valid JSON: a value was expected"),
    ("\ufeff{}", "1:1: not valid JSON: a value was expected"),
    ("true1", "1:5: text after the end"),
    ("99999999999999999999", "1:1: an integer beyond 64 bits"),
    ("9" * 100_000, "1:1: an integer beyond 64 bits"),
    ('{"a" 1}', "1:6 a: not valid JSON: ':' was expected"),
]


@pytest.mark.parametrize(("text", "message"), JSON_REFUSALS)
def test_a_json_text_is_refused_by_place_and_reason(text: str, message: str) -> None:
    with pytest.raises(DocumentError) as caught:
        load_json(text, source="d.json")
    assert str(caught.value).startswith("d.json")
    assert message in str(caught.value)


@pytest.mark.parametrize("load", [load_yaml, load_json])
def test_bytes_that_are_not_utf8_are_refused(load: Any) -> None:
    for data in (b"a: \xff", "a: 1".encode("utf-16"), b"\xed\xa0\x80"):
        with pytest.raises(DocumentError, match="not UTF-8"):
            load(data)
    with pytest.raises(DocumentError, match="surrogate"):
        load("a: \ud800")


@pytest.mark.parametrize("load", [load_yaml, load_json])
def test_the_bounds_hold_to_the_byte_and_the_level(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    deepest = "[" * DOCUMENT_DEPTH_MAX + "]" * DOCUMENT_DEPTH_MAX
    load(deepest)
    with pytest.raises(LimitError, match="deeper"):
        load(f"[{deepest}]")
    with pytest.raises(LimitError, match="deeper"):
        load("[" * 1_000_000)  # told without reading on
    # PyYAML's own parser would take five seconds for the next line.
    monkeypatch.setattr(document_formats, "_YAML_LOADER", yaml.CBaseLoader)
    load('"' + "a" * (DOCUMENT_BYTES_MAX - 2) + '"')
    with pytest.raises(LimitError, match="bytes"):
        load('"' + "a" * (DOCUMENT_BYTES_MAX - 1) + '"')


def test_an_alias_bomb_is_refused_at_its_first_anchor() -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(
        f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)
    )
    with pytest.raises(DocumentError, match="1:5 a0: anchors"):
        load_yaml(bomb)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": float("nan")}, "a: a number that is not finite"),
        ({1: 2}, "keys must be strings, not 1"),
        ({"a": [object()]}, r"a\[0\]: a object has no place"),
        ({"a": 1 << 64}, "beyond 64 bits"),
        (["\ud800"], "surrogate"),
    ],
)
def test_a_python_value_is_held_to_the_same_rules(value: Any, message: str) -> None:
    with pytest.raises(DocumentError, match=message):
        from_value(value, source="call")


def test_a_python_value_that_contains_itself_ends_at_the_depth_bound() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(LimitError, match="deeper"):
        from_value(value)


def test_a_python_value_is_copied_and_tuples_become_lists() -> None:
    value = {"a": (1, [2.5, None])}
    document = from_value(value)
    assert document.value == {"a": [1, [2.5, None]]}
    assert document.where(("a", 1)) == "value a[1]"


def test_a_path_reads_as_people_write_it() -> None:
    assert path_text(("edits", 2, "add_node", "op")) == "edits[2].add_node.op"
    assert path_text((3, "a")) == "[3].a"
    assert path_text(("nodes", "encoder.layer.3")) == "nodes['encoder.layer.3']"
    assert path_text(()) == "(document)"


def test_every_value_and_key_knows_its_line_and_column() -> None:
    text = "a: 1\n\nlist:\n  - x\n  - {y: [p, q], z:\n      deep}\nlast: 'é'\n"
    document = load_yaml(text)
    for trail, position, key in (
        (("a",), (1, 4), (1, 1)),
        (("list",), (4, 3), (3, 1)),
        (("list", 0), (4, 5), None),
        (("list", 1), (5, 5), None),
        (("list", 1, "y"), (5, 9), (5, 6)),
        (("list", 1, "y", 1), (5, 13), None),
        (("list", 1, "z"), (6, 7), (5, 17)),
        (("last",), (7, 7), (7, 1)),
    ):
        assert document.position(trail) == position, trail
        if key:
            assert document.position(trail, of_key=True) == key, trail
    assert document.position(("list", 1, "missing")) == (5, 5)
    assert document.position(()) == (1, 1)


@pytest.mark.parametrize("breaks", ["\n", "\r\n", "\r"])
def test_lines_are_counted_as_editors_count_them(breaks: str) -> None:
    document = load_yaml(breaks.join(["a: 1", "# é", "b: 2", ""]), source="d")
    assert document.where(("b",)) == "d:3:4 b"


# -- laws

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
numbers = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda below: st.lists(below, max_size=4) | st.dictionaries(texts, below, max_size=4),
    max_leaves=30,
)


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@given(values, st.sampled_from([None, 1]), st.booleans())
def test_what_json_dumps_load_json_reads(value: Any, indent: int | None, ascii_only: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    assert same(load_json(text).value, value)
    assert same(load_json(text.encode()).value, value)


def paths(value: Any, trail: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Any]]:
    below: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        below = list(value.items())
    elif isinstance(value, list):
        below = list(enumerate(value))
    return [(trail, value), *(found for step, v in below for found in paths(v, (*trail, step)))]


@given(values)
def test_the_text_at_a_values_position_is_the_value(value: Any) -> None:
    text = json.dumps(value, indent=1, ensure_ascii=False)
    document = load_json(text)
    lines = text.split("\n")
    for trail, part in paths(value):
        line, column = document.position(trail) or (0, 0)
        rest = "\n".join([lines[line - 1][column - 1 :], *lines[line:]])
        decoded, _ = json.JSONDecoder().raw_decode(rest)
        assert same(decoded, part)
        if trail and isinstance(trail[-1], str):
            line, column = document.position(trail, of_key=True) or (0, 0)
            decoded, _ = json.JSONDecoder().raw_decode(lines[line - 1][column - 1 :])
            assert decoded == trail[-1]


@given(values)
def test_many_positions_are_found_in_one_walk(value: Any) -> None:
    document = load_json(json.dumps(value))
    wanted = [(trail, of_key) for trail, _ in paths(value) for of_key in (False, True)]
    wanted += [((*trail, "missing"), False) for trail, _ in wanted]
    together = document.positions(wanted)
    assert together == [document.position(trail, of_key=key) for trail, key in wanted]


printable = st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | printable,
        lambda below: st.lists(below, max_size=4) | st.dictionaries(printable, below, max_size=4),
        max_leaves=20,
    ),
    st.sampled_from([True, False, None]),
)
def test_quoted_yaml_reads_back(value: Any, flow: bool | None) -> None:
    text = yaml.dump(value, default_flow_style=flow, sort_keys=False, Dumper=_QuotedStrings)
    assert same(load_yaml(text).value, value)


class _QuotedStrings(yaml.SafeDumper):
    """Quotes strings only, and knows no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_scalar(self, tag: str, value: Any, style: str | None = None) -> Any:
        quoted = '"' if tag == "tag:yaml.org,2002:str" else ""
        node = yaml.ScalarNode(tag, value, style=quoted)
        self.represented_objects[self.alias_key] = node
        return node


@given(st.text() | st.text(alphabet="[]{}:,-?&*!|>'\"%@` \n\t#~ab01.e<"))
def test_any_text_is_a_document_or_a_typed_error(text: str) -> None:
    for load in (load_yaml, load_json):
        try:
            document = load(text)
        except GraphoptError:
            continue
        assert isinstance(document, Document)
        for trail, part in paths(document.value):
            assert document.position(trail) is not None
            assert not isinstance(part, float) or math.isfinite(part)


@given(st.binary())
def test_any_bytes_are_a_document_or_a_typed_error(data: bytes) -> None:
    for load in (load_yaml, load_json):
        try:
            load(data)
        except GraphoptError:
            continue
