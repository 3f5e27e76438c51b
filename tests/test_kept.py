"""What the planner looks up is bounded: a builder lives for months."""

from graphopt.kept import Kept


def test_the_oldest_goes_first_and_an_update_is_no_newcomer() -> None:
    kept = Kept[str, int](2)
    kept["a"], kept["b"] = 1, 2
    kept["a"] = 3
    assert kept == {"a": 3, "b": 2}
    kept["c"] = 4
    assert kept == {"b": 2, "c": 4}
