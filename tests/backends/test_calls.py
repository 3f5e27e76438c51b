"""Calls of a loaded artifact: what is bound how often, whose memory a result is, which integers pass."""

import ctypes
import threading
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphopt.errors import RequestError
from graphopt.executor.backends import calls
from graphopt.executor.backends.artifact import Sheet
from graphopt.executor.backends.calls import FEW, Calls
from graphopt.executor.backends.translate import Guard

WIDTH = 8_192  # of float32: above what is copied


class Doubling:
    """A slot whose one exit is twice its one read."""

    def __init__(self, made: list["Doubling"]) -> None:
        made.append(self)
        self.read = self.exit = 0
        self.binds = 0
        self.on_run: Callable[[], None] = lambda: None

    def bind_read(self, index: int, address: int, shape: tuple[int, ...]) -> None:
        self.read = address

    def bind_exit(self, index: int, address: int, shape: tuple[int, ...]) -> None:
        self.exit = address
        self.binds += 1

    def run(self) -> None:
        self.on_run()
        values, results = (
            torch.frombuffer((ctypes.c_float * WIDTH).from_address(each), dtype=torch.float32)
            for each in (self.read, self.exit)
        )
        torch.mul(values, 2, out=results)


def doubling() -> tuple[Calls, list[Doubling]]:
    """The calls of an artifact of such slots, and the slots there are."""
    made: list[Doubling] = []
    type_ = f"f32[{WIDTH}]"
    sheet = Sheet("test", "1", (type_,), (type_,), (), 0, (), (), None, (), ())
    return Calls(sheet, lambda: Doubling(made), ()), made


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def given_(value: float) -> torch.Tensor:
    return torch.full((WIDTH,), float(value))


def test_a_caller_who_drops_each_result_has_one_slot_bound_once() -> None:
    function, made = doubling()
    for i in range(10):
        assert float(function(given_(i))[-1]) == 2 * i
    assert [slot.binds for slot in made] == [1]


def test_a_caller_who_holds_the_last_result_has_two_slots_bound_once() -> None:
    function, made = doubling()
    last = function(given_(0))
    for i in range(1, 10):
        result = function(given_(i))
        assert (float(last[0]), float(result[0])) == (2 * (i - 1), 2 * i)
        last = result
    assert [slot.binds for slot in made] == [1, 1]


def test_a_caller_who_holds_everything_gets_memory_of_its_own_for_each() -> None:
    function, made = doubling()
    results = [function(given_(i)) for i in range(10)]
    assert [float(result[-1]) for result in results] == [2.0 * i for i in range(10)]
    assert len({result.data_ptr() for result in results}) == 10
    assert len(made) == 2


def test_callers_at_once_have_two_slots_each_at_most() -> None:
    function, made = doubling()
    wrong: list[tuple[int, float]] = []
    start = threading.Barrier(4)

    def call(first: int) -> None:
        start.wait()
        last = None
        with torch.inference_mode():
            for i in range(first, first + 200):
                result = function(given_(i))
                if float(result[0]) != 2 * i or (last is not None and float(last[0]) != 2 * i - 2):
                    wrong.append((i, float(result[0])))
                last = result

    threads = [threading.Thread(target=call, args=(1_000 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(made) <= 8


def test_a_caller_has_two_slots_beside_one_who_came_later_too() -> None:
    """While a call of another takes long, nothing is bound anew for him who holds his last result."""
    function, made = doubling()
    last = function(given_(0))
    last = function(given_(1))  # two slots, and nobody else
    is_inside, may_end = threading.Event(), threading.Event()

    def wait() -> None:
        if threading.current_thread() is other:
            is_inside.set()
            assert may_end.wait(60)

    def call() -> None:
        with torch.inference_mode():
            function(given_(9))

    for slot in made:
        slot.on_run = wait
    other = threading.Thread(target=call)
    other.start()
    assert is_inside.wait(60)
    for i in range(2, 8):
        result = function(given_(i))
        assert (float(last[0]), float(result[0])) == (2 * (i - 1), 2 * i)
        last = result
    may_end.set()
    other.join()
    assert [slot.binds for slot in made] == [1, 1, 1]


class Nothing:
    """A slot that computes nothing."""

    def bind_read(self, index: int, address: int, shape: tuple[int, ...]) -> None: ...

    def bind_exit(self, index: int, address: int, shape: tuple[int, ...]) -> None: ...

    def run(self) -> None: ...


def bounded(sizes: Sequence[int], bounds: Sequence[tuple[int, int]]) -> Calls:
    """Calls with integer reads of those sizes and bounds."""
    reads = tuple(f"i64[{size}]" for size in sizes)
    guards = [Guard(i, low, high) for i, (low, high) in enumerate(bounds)]
    sheet = Sheet("test", "1", reads, ("f32[1]",), (), 0, (), (), None, (), ())
    return Calls(sheet, Nothing, guards)


@given(st.data())
def test_integers_pass_when_each_is_in_the_bounds_of_its_read(data: st.DataObject) -> None:
    """On either side of the number up to which they are looked at one by one."""
    sizes = data.draw(
        st.lists(st.sampled_from([0, 1, 3, FEW - 1, FEW + 1]), min_size=1, max_size=3)
    )
    edges = st.tuples(st.integers(-5, 5), st.integers(-5, 5)).map(sorted)
    bounds = [tuple(data.draw(edges)) for _ in sizes]
    function = bounded(sizes, [(low, high) for low, high in bounds])
    values = [torch.full((size,), low) for size, (low, _) in zip(sizes, bounds, strict=True)]
    read = data.draw(st.integers(0, len(sizes) - 1))
    low, high = bounds[read]
    value = data.draw(st.integers(low - 2, high + 2))
    if sizes[read]:
        values[read][data.draw(st.integers(0, sizes[read] - 1))] = value
    if sizes[read] and not low <= value <= high:
        with pytest.raises(RequestError, match=f"read {read} holds {value}, outside"):
            function(*values)
    else:
        function(*values)


def test_an_empty_read_of_integers_has_none_out_of_bounds() -> None:
    bounded([0, FEW * 8], [(0, 1), (0, 1)])(
        torch.empty(0, dtype=torch.int64), torch.zeros(FEW * 8).long()
    )


def test_few_and_many_integers_are_looked_at_in_different_ways() -> None:
    few = calls._Bounds([(FEW,)], [(0, 0, 1)])
    many = calls._Bounds([(FEW + 1,)], [(0, 0, 1)])
    assert (few._few is None, many._few is None) == (False, True)
