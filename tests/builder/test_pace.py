"""The floor of the builder: when it is lifted, when it falls back, and when it says that it starves."""

import os
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.builder.pace import AUTOGROUP, IDLE, NICE, Pacer, apply_level, read_threads


class Host:
    """A host that gives a builder of one thread what the test says, in looks of 0.25 s."""

    def __init__(self, policy: str = IDLE) -> None:
        self.pacer = Pacer(policy, 10.0)
        self.now_s = self.ran_s = self.waited_s = 0.0
        self.pacer.observe(0.0, {1: (0.0, 0.0)})

    def give(self, share_pct: float, waiting_pct: float, looks: int = 1) -> tuple[int, bool]:
        for _ in range(looks):
            self.now_s += 0.25
            self.ran_s += 0.25 * share_pct / 100
            self.waited_s += 0.25 * waiting_pct / 100
            pace = self.pacer.observe(self.now_s, {1: (self.ran_s, self.waited_s)})
        assert pace is not None
        return pace.level, pace.is_starved


def test_a_builder_on_a_free_core_is_left_idle() -> None:
    assert Host().give(98, 1, 20) == (0, False)


def test_a_builder_that_waits_for_a_disk_is_not_starved() -> None:
    assert Host().give(0.5, 1, 20) == (0, False)


def test_below_the_floor_it_climbs_and_only_at_the_top_it_says_that_it_starves() -> None:
    host = Host()
    assert [host.give(0.4, 99) for _ in range(8)] == [
        (0, False), (1, False), (1, False), (2, False), (2, False), (3, False), (3, False), (3, True),
    ]  # fmt: skip


def test_an_episode_of_starving_ends_when_it_has_been_fed_for_a_while() -> None:
    host = Host()
    host.give(0.4, 99, 8)
    assert [host.give(share, 85)[1] for share in (12, 1, 12, 12, 12, 12)] == [True] * 5 + [False]


def test_at_about_the_floor_it_stays_where_it_is() -> None:
    host = Host()
    host.give(0.4, 99, 2)
    assert host.give(9.7, 90, 40) == (1, False)


def test_when_nobody_else_wants_the_core_it_falls_back_at_once() -> None:
    host = Host()
    host.give(0.4, 99, 6)
    assert host.give(95, 3) == (0, False)


def test_a_step_that_gives_far_more_than_the_floor_is_taken_back_slowly() -> None:
    host = Host()
    host.give(0.4, 99, 4)
    assert [host.give(25, 75)[0] for _ in range(4)] == [2, 2, 2, 1]


def test_a_host_that_refuses_a_step_ends_the_ladder_below_it() -> None:
    host = Host()
    host.give(0.4, 99, 2)
    host.pacer.refused(1)
    assert host.give(0.4, 99, 2) == (0, True)


def test_without_privilege_and_without_sessions_there_is_one_step() -> None:
    assert Host(NICE).give(0.4, 99, 2) == (0, True)
    assert Host(AUTOGROUP).give(0.4, 99, 2) == (1, False)


def test_time_spent_waiting_for_a_core_does_not_count_against_a_bound() -> None:
    host = Host()
    host.give(10, 90, 40)
    assert host.pacer.active_s == pytest.approx(1.0)
    host.give(0, 0, 40)  # it sleeps
    assert host.pacer.active_s == pytest.approx(11.0)


def test_the_first_share_is_what_it_got_of_what_it_wanted() -> None:
    host = Host()
    assert host.pacer.base_share_pct is None
    host.give(30, 60)
    assert host.pacer.base_share_pct == pytest.approx(33.3, abs=0.1)


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100))))
def test_no_host_drives_it_off_its_ladder(looks: list[tuple[float, float]]) -> None:
    host = Host()
    for share, waiting in looks:
        level, is_starved = host.give(share, waiting)
        assert 0 <= level <= host.pacer.top
        assert not is_starved or level == host.pacer.top
    assert 0 <= host.pacer.active_s <= host.now_s + 1e-9


def test_the_kernel_tells_what_our_own_threads_got() -> None:
    ran_s, waited_s = read_threads(os.getpid())[os.getpid()]
    assert ran_s > 0
    assert waited_s >= 0
    assert read_threads(2**22 + 1) == {}


def test_a_process_that_is_gone_cannot_be_lifted_and_that_is_no_fault() -> None:
    assert apply_level(IDLE, 2**22 + 1, 2)
    assert apply_level(AUTOGROUP, 2**22 + 1, 2)


def test_a_process_is_lifted_where_the_host_lets_us_and_put_back() -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        assert apply_level(IDLE, process.pid, 0)
        assert os.sched_getscheduler(process.pid) == os.SCHED_IDLE
        if apply_level(IDLE, process.pid, 1):
            assert os.sched_getscheduler(process.pid) == os.SCHED_OTHER
            assert os.getpriority(os.PRIO_PROCESS, process.pid) >= 10
        assert apply_level(IDLE, process.pid, 0)
        assert os.sched_getscheduler(process.pid) == os.SCHED_IDLE
        process.communicate()
