"""Seats are never more than there are, never lost, and handed over in turn to those who waited."""

import threading
import time

from graphopt.executor.seats import STARVED_S, Seats

ENDED_S = 60.0  # of a broken test


class Hand:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def waiter(seats: Seats, served: list[int], number: int) -> threading.Thread:
    """A thread that waits for a seat, notes its number and keeps the seat."""

    def run() -> None:
        seats.take()
        served.append(number)

    before = seats.waiting
    thread = threading.Thread(target=run)
    thread.start()
    while seats.waiting == before:
        pass
    return thread


def test_who_waited_long_gets_the_seat_though_others_ask():
    clock, served = Hand(), []
    seats = Seats(1, clock)
    seats.take()
    first, second = (waiter(seats, served, n) for n in (1, 2))
    clock.now_s = STARVED_S
    seats.give()
    assert seats.free == 0  # handed over: nobody can come between
    first.join(ENDED_S)
    assert served == [1]
    seats.give()
    second.join(ENDED_S)
    assert served == [1, 2]


def test_who_just_came_competes_with_those_who_ask():
    served: list[int] = []
    seats = Seats(1, Hand())
    seats.take()
    thread = waiter(seats, served, 1)
    seats.give()
    thread.join(ENDED_S)
    assert served == [1]
    assert (seats.free, seats.waiting) == (0, 0)


def test_never_more_callers_than_seats_and_all_are_served():
    seats, turns = Seats(2, time.perf_counter), 2_000
    inside: list[None] = []
    most: list[int] = []

    def run() -> None:
        for _ in range(turns):
            seats.take()
            inside.append(None)
            most.append(len(inside))
            inside.pop()
            seats.give()

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(ENDED_S)
    assert not any(thread.is_alive() for thread in threads)
    assert len(most) == 6 * turns
    assert max(most) <= 2
    assert (seats.free, seats.waiting) == (2, 0)
