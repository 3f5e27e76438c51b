"""Calls of unequal shares: the CPUs are never exceeded, nobody starves, and alike ones cost nothing."""

import threading
from collections import Counter, deque
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphopt.executor.shares import Admission, Share
from graphopt.executor.threads import ExecutorThreads, own_thread_count

ENDED_S = 60.0  # of a broken test

Started = list[tuple[int, int]]


@given(
    cpus=st.integers(1, 8),
    parts=st.lists(st.tuples(st.integers(1, 8), st.integers(1, 9)), min_size=1, max_size=4),
    moves=st.lists(st.integers(0, 9), max_size=80),
)
def test_calls_never_exceed_the_cpus_nor_their_share_and_start_in_order(
    cpus: int, parts: list[tuple[int, int]], moves: list[int]
) -> None:
    shares = [Share(workers, each) for workers, each in parts]
    running: deque[tuple[int, int]] = deque()
    begun: Started = []

    def start(call: tuple[int, int]) -> None:
        running.append(call)
        begun.append(call)

    admission = Admission(cpus, start)
    entered: Counter[int] = Counter()

    def check() -> None:
        assert sum(min(shares[which].each, cpus) for which, _ in running) <= cpus
        for which, count in Counter(which for which, _ in running).items():
            assert count <= shares[which].workers

    for move in moves:
        if move < len(shares):
            admission.enter(shares[move], (move, entered[move]))
            entered[move] += 1
        elif running:
            admission.leave(shares[running.popleft()[0]])
        check()
        assert running or len(begun) == entered.total(), "CPUs are free, and somebody waits"
    while running:
        admission.leave(shares[running.popleft()[0]])
        check()
    for which in entered:
        assert [n for each, n in begun if each == which] == list(range(entered[which]))


def test_a_wide_call_goes_before_the_narrow_ones_that_came_later() -> None:
    begun: list[str] = []
    admission = Admission(2, begun.append)
    narrow, wide = Share(2, 1), Share(1, 2)
    admission.enter(narrow, "first")
    admission.enter(wide, "wide")
    admission.enter(narrow, "later")
    assert begun == ["first"], "one CPU is free, and it is kept for the wide call"
    admission.leave(narrow)
    assert begun == ["first", "wide"]
    admission.leave(wide)
    assert begun == ["first", "wide", "later"]


def test_who_waits_for_his_own_share_holds_up_nobody_else() -> None:
    begun: list[str] = []
    admission = Admission(3, begun.append)
    capped, other = Share(1, 1), Share(3, 1)
    admission.enter(capped, "a")
    admission.enter(capped, "b")
    admission.enter(other, "c")
    assert begun == ["a", "c"]
    admission.leave(capped)
    assert begun == ["a", "c", "b"]


@pytest.fixture(autouse=True)
def own_count() -> None:
    """This thread keeps to one: at its first look it would take over what another thread set."""
    own_thread_count(1)


class Held:
    """Calls that say that they run, with how many torch threads, and end when told."""

    def __init__(self, threads: ExecutorThreads) -> None:
        self.threads = threads
        self.begun = threading.Semaphore(0)
        self.counts: list[int] = []
        self.may_end = threading.Event()

    def submit(self, share: Share | None = None) -> Future[None]:
        return self.threads.submit(self._run, share)

    def wait_begun(self, count: int) -> None:
        for _ in range(count):
            assert self.begun.acquire(timeout=ENDED_S)

    def _run(self) -> None:
        self.counts.append(torch.get_num_threads())
        self.begun.release()
        assert self.may_end.wait(ENDED_S)


def test_each_call_runs_with_the_torch_threads_of_its_share() -> None:
    threads = ExecutorThreads(1, 2, cpus=3)
    held = Held(threads)
    held.may_end.set()
    for share in (None, Share(1, 1), Share(1, 3), None, Share(1, 1)):
        held.submit(share).result(ENDED_S)
    threads.close()
    assert held.counts == [2, 1, 3, 2, 1]


def test_what_waits_for_cpus_is_run_before_the_threads_end() -> None:
    threads = ExecutorThreads(2, 1, cpus=2)
    held, wide = Held(threads), Share(1, 2)
    futures: list[Future[Any]] = [held.submit(), held.submit(wide), held.submit(wide)]
    held.wait_begun(1)
    closing = threading.Thread(target=threads.close)
    closing.start()
    assert not any(future.done() for future in futures)
    held.may_end.set()
    closing.join(ENDED_S)
    assert [future.exception(0) for future in futures] == [None] * 3


def test_a_call_that_fails_or_was_cancelled_gives_its_cpus_back() -> None:
    threads = ExecutorThreads(1, 1, cpus=1)
    held = Held(threads)
    first, cancelled = held.submit(), held.submit()
    held.wait_begun(1)
    assert cancelled.cancel()
    failing = threads.submit(lambda: 1 / 0)
    held.may_end.set()
    with pytest.raises(ZeroDivisionError):
        failing.result(ENDED_S)
    assert held.submit().result(ENDED_S) is None
    assert first.result(ENDED_S) is None
    threads.close()


def test_where_all_are_alike_nothing_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Admission, "enter", None)
    threads = ExecutorThreads(2, 1)
    assert threads.submit(lambda: 7, Share(2, 1)).result(ENDED_S) == 7
    threads.close()
