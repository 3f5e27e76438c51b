"""Which blocks count as edited often, and that plans keep them apart."""

from graphopt.engine.churn import (
    BLOCKS_NOTED_MAX,
    DELTAS_NOTED_MAX,
    RESTLESS_EDITS,
    RESTLESS_S,
    Churn,
)


def test_a_block_is_restless_from_its_third_edit_until_it_was_left_alone_for_a_while() -> None:
    now_s = [0.0]
    seen = Churn(lambda: now_s[0])
    for edit in range(RESTLESS_EDITS):
        assert seen.restless() == frozenset()
        now_s[0] = edit * 10.0
        seen.note(edit + 2, {"a", f"b{edit}"})
    assert seen.restless() == {"a"}
    now_s[0] = RESTLESS_S
    assert seen.restless() == {"a"}
    now_s[0] = RESTLESS_S + 1.0  # the first edit is too long ago
    assert seen.restless() == frozenset()


def test_a_delta_that_changes_much_is_no_edit_of_a_place() -> None:
    seen = Churn(lambda: 0.0)
    for _ in range(RESTLESS_EDITS):
        seen.note(2, {f"b{i}" for i in range(BLOCKS_NOTED_MAX + 1)})
        seen.note(3, frozenset())
    assert seen.restless() == frozenset()


def test_what_is_kept_is_bounded() -> None:
    seen = Churn(lambda: 0.0)
    for i in range(DELTAS_NOTED_MAX + RESTLESS_EDITS):
        seen.note(i + 2, {"old" if i < RESTLESS_EDITS else "new"})
    assert seen.restless() == {"new"}


def test_the_last_revision_that_touched_a_block_is_known_until_the_block_is_gone() -> None:
    seen = Churn(lambda: 0.0)
    assert seen.touched({"a", "b"}) is None
    seen.note(2, {"a", "b"})
    seen.note(3, {f"b{i}" for i in range(BLOCKS_NOTED_MAX + 1)} | {"b"})
    assert (seen.touched({"a"}), seen.touched({"a", "b"})) == (2, 3)
    seen.note(4, frozenset({"c"}), frozenset({"b"}))
    assert (seen.touched({"b"}), seen.touched({"a", "b"})) == (None, 2)
