"""Expressions mean what they mean to `re`, and cost no more than polynomial time."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.adapters.name_pattern import NamePattern
from graphopt.errors import AdapterError

ATOMS = st.sampled_from(
    ["a", "b", ".", r"\.", r"\d", r"\w", r"\b", "[ab]", "[^a.]", "^", "$", "[a-c1]", r"\W"]
)
EXPRESSIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("|".join).map("({})".format),
        inner.map("(?:{})*".format),
        inner.map("(?:{})+?".format),
        inner.map("(?:{})?".format),
        inner.map("(?:{}){{1,3}}".format),
        inner.map("(?={})".format),
        inner.map("(?!{})".format),
    ),
    max_leaves=8,
)
NAMES = st.text(alphabet="ab.1_\n", max_size=9)


@settings(max_examples=400, deadline=None)
@given(expression=EXPRESSIONS, names=st.lists(NAMES, min_size=1, max_size=8))
def test_a_pattern_answers_as_re(expression: str, names: list[str]) -> None:
    ours = NamePattern(r"(.*\.)?(", expression, ")$", "x")
    whole = NamePattern("", expression, "", "x")
    for name in names:
        assert ours.match(name) == bool(re.match(rf"(.*\.)?({expression})$", name))
        assert whole.fullmatch(name) == bool(re.fullmatch(expression, name))


@pytest.mark.parametrize(
    "expression",
    [r"^(?!.*(?:visual|merger)).*\.(q|v)_proj", r".*(?<=self)\.query", r".*\.\d+\..*(up|down)$"],
)
def test_expressions_of_published_adapters_answer_as_re(expression: str) -> None:
    pattern = NamePattern("", expression, "", "x")
    for name in (
        "model.layers.3.self_attn.q_proj", "visual.layers.3.q_proj", "a.self.query", "a.query",
        "mlp.7.down", "mlp.7.down.x",
    ):  # fmt: skip
        assert pattern.fullmatch(name) == bool(re.fullmatch(expression, name))


@pytest.mark.parametrize(
    "expression", ["(a+)+b", "(a|a)*b", "(a|aa)+$b", ".*.*.*.*.*.*b", "(a?){60}a{60}b"]
)
def test_what_hangs_re_is_answered(expression: str) -> None:
    assert not NamePattern("", expression, "", "x").fullmatch("a" * 256)


def test_the_step_budget_ends_a_deeply_nested_match() -> None:
    nested = "(?:" * 12 + "a?" + "){250}" * 12
    with pytest.raises(AdapterError, match="steps"):
        NamePattern("", nested + "b", "", "x").fullmatch("a" * 256)
