"""Freed memory goes back to the system when no request would wait for that, or when it must."""

from graphopt.engine.heap import EVERY_S, HOLES_MAX, Heap


class Fixture:
    """A heap whose calls of the C library are counted, and a clock."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.calls: list[int] = []
        self.heap = Heap(lambda: self.now_s, self.calls.append)


def test_nothing_freed_is_nothing_to_give_back() -> None:
    there = Fixture()
    assert not there.heap.give_back(is_quiet=True)
    assert there.calls == []


def test_while_no_request_runs_any_hole_goes_back_at_once() -> None:
    there = Fixture()
    there.heap.freed(1)
    assert there.heap.give_back(is_quiet=True)
    assert there.calls == [0]
    assert not there.heap.give_back(is_quiet=True)


def test_beside_requests_small_holes_stay_for_the_next_artifact() -> None:
    there = Fixture()
    there.heap.freed(HOLES_MAX - 1)
    assert not there.heap.give_back(is_quiet=False)
    assert there.calls == []
    assert there.heap.give_back(is_quiet=True)


def test_beside_requests_large_holes_go_back_but_seldom() -> None:
    there = Fixture()
    there.heap.freed(HOLES_MAX)
    assert there.heap.give_back(is_quiet=False)
    there.heap.freed(HOLES_MAX)
    there.now_s = EVERY_S / 2
    assert not there.heap.give_back(is_quiet=False)
    there.now_s = EVERY_S
    assert there.heap.give_back(is_quiet=False)
    assert len(there.calls) == 2
