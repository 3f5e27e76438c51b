"""A published plan that is worse is taken back soon, one that is not stays, and nothing flaps."""

import gc
import json
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from executor.scripted_plans import (
    Clock,
    Noise,
    X,
    Y,
    bursts,
    failing,
    heavy_tailed,
    lognormal,
    plan,
    simulate,
    timed,
)
from graphopt.executor.guard import (
    BACKOFF_MAX_S,
    BACKOFF_S,
    BASELINE_MIN,
    CALM_S,
    DWELL_S,
    GAMMA_MAX,
    KEYS_MAX,
    Baseline,
    Guard,
    Hysteresis,
    baseline_of,
)
from graphopt.executor.latency import describe
from graphopt.executor.plan import Plan
from graphopt.executor.publish import Slot
from graphopt.executor.switch import Outcome, Switch
from graphopt.executor.trial import CONFIRMATION

torch.set_num_threads(1)
RUNS = 100


def guard_of(noise: Noise) -> Guard:
    baseline = baseline_of(describe([noise() for _ in range(300)]))
    assert baseline is not None
    return Guard("plan", {(): baseline})


def requests_to_alarm(guard: Guard, noise: Noise, factor: float, limit: int = 2_000) -> int:
    for requests in range(1, limit):
        if guard.observe((), factor * noise()) is not None:
            return requests
    return limit


# -- CUSUM


def test_twice_the_time_is_an_alarm_within_a_few_requests_but_never_at_the_first() -> None:
    for make, most in ((lambda seed: lognormal(seed, 0.05), 5), (lambda seed: lognormal(seed, 0.2), 10),
                       (heavy_tailed, 10)):  # fmt: skip
        for seed in range(RUNS):
            noise = make(seed)
            assert 1 < requests_to_alarm(guard_of(noise), noise, 2.0) <= most


def test_a_fifth_more_time_is_an_alarm_on_a_quiet_host() -> None:
    for seed in range(RUNS):
        noise = lognormal(seed, 0.05)
        assert requests_to_alarm(guard_of(noise), noise, 1.2) <= 60


@pytest.mark.parametrize(
    ("make", "requests_between"),
    [(lambda seed: lognormal(seed, 0.05), 40_000), (lambda seed: lognormal(seed, 0.2), 4_000),
     (lambda seed: lognormal(seed, 0.5), 4_000), (heavy_tailed, 200)],
)  # fmt: skip
def test_alarms_about_nothing_are_rare(make: Callable[[int], Noise], requests_between: int) -> None:
    alarms, requests = 0, 40_000
    for seed in range(8):
        noise = make(seed)
        guard = guard_of(noise)
        alarms += sum(guard.observe((), noise()) is not None for _ in range(requests // 8))
    assert alarms <= requests / requests_between


def test_an_alarm_about_nothing_hardly_ever_takes_a_plan_back() -> None:
    for make in (lambda seed: lognormal(seed, 0.2), heavy_tailed, bursts):
        found = [
            simulate(make(seed), 1.0, replace(CONFIRMATION, seed=seed))[0].verdict
            for seed in range(2 * RUNS)
        ]
        assert found.count("better") <= 0.02 * len(found)


def test_a_faster_plan_or_one_wild_request_is_no_alarm() -> None:
    noise = lognormal(0, 0.05)
    guard = guard_of(noise)
    assert all(guard.observe((), 0.5 * noise()) is None for _ in range(500))
    assert guard.observe((), 1e3) is None
    assert guard.observe((), noise()) is None


def test_buckets_are_watched_apart_and_unknown_ones_learn_first() -> None:
    guard = Guard("plan", {(1,): Baseline(0.001, 0.05), (64,): Baseline(0.1, 0.05)})
    for _ in range(100):
        for bucket, took_s in (((1,), 0.001), ((64,), 0.1), ((8,), 0.01)):
            assert guard.observe(bucket, took_s) is None
    alarms = [guard.observe((8,), 0.02) for _ in range(10)]
    found = next(alarm for alarm in alarms if alarm is not None)
    assert (found.plan, found.bucket, found.baseline_s) == ("plan", (8,), 0.01)
    assert found.ratio == pytest.approx(2.0)


def test_a_baseline_needs_some_requests() -> None:
    assert baseline_of(describe([1.0] * (BASELINE_MIN - 1))) is None
    assert baseline_of(describe([1.0] * BASELINE_MIN), 0.5) == Baseline(0.5, 0.0)


@given(st.lists(st.floats(0.5, 3.0), max_size=80), st.floats(1e-5, 10.0))
def test_an_alarm_does_not_depend_on_the_unit(factors: list[float], unit_s: float) -> None:
    plain, scaled = (Guard("p", {(): Baseline(s, 0.1)}) for s in (1.0, unit_s))
    for factor in factors:
        left, right = plain.observe((), factor), scaled.observe((), factor * unit_s)
        assert (left is None) == (right is None)


# -- hysteresis


def test_back_off_doubles_up_to_its_bound_and_ends_with_success() -> None:
    hysteresis = Hysteresis()
    assert hysteresis.why_not("a", 0.0) == ""
    now_s = 0.0
    delays = []
    for _ in range(20):
        delays.append(hysteresis.failed("a", now_s))
        assert "performance" in hysteresis.why_not("a", now_s + delays[-1] - 1.0)
        now_s += delays[-1]
        assert hysteresis.why_not("a", now_s) == ""
    assert delays[:3] == [BACKOFF_S, 2 * BACKOFF_S, 4 * BACKOFF_S]
    assert delays[-1] == BACKOFF_MAX_S
    assert hysteresis.why_not("b", 0.0) == ""
    hysteresis.failed("a", now_s)
    hysteresis.succeeded("a")
    assert hysteresis.why_not("a", now_s) == ""
    assert hysteresis.failed("a", now_s) == BACKOFF_S


def test_a_plan_stays_its_dwell() -> None:
    hysteresis = Hysteresis()
    hysteresis.switched(100.0)
    assert "stays" in hysteresis.why_not("a", 100.0 + DWELL_S / 2)
    assert hysteresis.why_not("a", 100.0 + DWELL_S) == ""


def test_a_switch_is_due_once_the_regret_outgrows_its_cost_and_reversals_make_it_dearer() -> None:
    hysteresis = Hysteresis()
    for _ in range(10):
        hysteresis.accrue("a", 0.1)
    assert hysteresis.accrue("a", -0.3) == pytest.approx(0.7)
    assert hysteresis.is_due("a", 0.5)
    assert not hysteresis.is_due("a", 0.8)
    assert hysteresis.accrue("b", -5.0) == 0.0
    hysteresis.switched(0.0)
    assert not hysteresis.is_due("a", 0.0)
    hysteresis.reversed("a", 30.0)
    assert hysteresis.gamma == 2.0
    hysteresis.accrue("b", 0.7)
    assert not hysteresis.is_due("b", 0.5)
    hysteresis.why_not("b", 30.0 + CALM_S)
    assert hysteresis.gamma == 1.0
    assert hysteresis.is_due("b", 0.5)
    for i in range(100):
        hysteresis.reversed("a", 30.0 + i)
    assert hysteresis.gamma == GAMMA_MAX


def test_a_square_wave_of_load_makes_few_switches_an_hour() -> None:
    # Two plans, each 20% faster in every other half minute: what flaps without hysteresis.
    hysteresis, clock, switches, current = Hysteresis(), 0.0, 0, "a"
    while clock < 3600.0:
        faster = "a" if int(clock / 30.0) % 2 else "b"
        other = "b" if current == "a" else "a"
        hysteresis.accrue(other, 0.2 if faster == other else -0.2)
        if hysteresis.is_due(other, 2.0) and not hysteresis.why_not(other, clock):
            hysteresis.reversed(current, clock) if switches else hysteresis.switched(clock)
            current, switches = other, switches + 1
        clock += 1.0
    assert switches <= 8


def test_only_so_many_candidates_are_remembered() -> None:
    hysteresis = Hysteresis()
    for i in range(2 * KEYS_MAX):
        hysteresis.failed(i, 0.0)
    assert hysteresis.why_not(0, 1.0) == ""
    assert hysteresis.why_not(2 * KEYS_MAX - 1, 1.0) != ""


# -- a slot and its switch


class Host:
    """A slot under a switch, with one client and a scripted clock."""

    def __init__(self, current: Plan, clock: Clock) -> None:
        self.clock, self.current = clock, current
        self.slot = Slot(current, clock)
        self.hysteresis = Hysteresis(dwell_s=0.0)
        self.switch = Switch(self.slot, self.hysteresis, clock)
        self.outcomes: list[Outcome] = []
        self.slot.wake = lambda: self.outcomes.extend(self.switch.step())

    def serve(self, count: int, until: str = "") -> Counter:
        """Up to `count` requests, and who served them; ends with the decision `until`."""
        ran: Counter[str] = Counter()
        for _ in range(count):
            outputs, plan = self.slot.run(X)
            assert torch.equal(outputs["y"], Y)
            ran[plan.id] += 1
            if until and any(outcome.decision == until for outcome in self.outcomes):
                break
        self.outcomes.extend(self.switch.step())
        return ran

    def decisions(self) -> list[tuple[str, str]]:
        return [(outcome.decision, outcome.cause) for outcome in self.outcomes]


class Scripted:
    """Noise that a test makes slower."""

    def __init__(self, noise: Noise) -> None:
        self.noise, self.factor = noise, 1.0

    def __call__(self) -> float:
        return self.factor * self.noise()


def host_of(noise: Noise) -> tuple[Host, Scripted, Plan, Scripted]:
    """A host, and a candidate of half the time, each with the script of its latency."""
    clock = Clock()
    old, new = Scripted(noise), Scripted(lambda: 0.5 * noise())
    host = Host(timed(1, clock, old), clock)
    return host, old, timed(2, clock, new), new


def publish(host: Host, candidate: Plan) -> None:
    host.serve(100)
    assert host.switch.consider(candidate, "key", expected=host.current) == ""
    host.serve(100, until="published")
    assert host.slot.plan is candidate
    assert host.slot.last_good is host.current


def test_a_faster_candidate_is_published_watched_and_then_good() -> None:
    host, _, candidate, _ = host_of(lognormal(0, 0.05))
    publish(host, candidate)
    assert host.switch.phase == "watch"
    host.serve(1_000, until="confirmed")
    assert host.decisions() == [("published", "trial"), ("confirmed", "watch")]
    assert host.slot.last_good is candidate
    assert host.switch.phase == "idle"
    assert host.serve(20) == {candidate.id: 20}


def test_a_slower_candidate_is_refused_and_backs_off() -> None:
    host, _, candidate, new = host_of(lognormal(0, 0.05))
    new.factor = 4.0
    host.serve(50)
    assert host.switch.consider(candidate, "key", expected=host.current) == ""
    ran = host.serve(200, until="refused")
    assert ran[candidate.id] <= 20
    assert host.decisions() == [("refused", "trial")]
    found = host.outcomes[0]
    assert found.trial is not None
    assert found.trial.ratio == pytest.approx(2.0, rel=0.1)
    assert found.backoff_s == BACKOFF_S
    assert "performance" in host.switch.consider(candidate, "key", expected=host.current)
    assert host.slot.plan is host.slot.last_good is host.current


@pytest.mark.parametrize(
    ("make", "share"),
    [(lambda seed: lognormal(seed, 0.05), 1.0), (lambda seed: lognormal(seed, 0.2), 0.92),
     (bursts, 0.7), (heavy_tailed, 0.6)],
)  # fmt: skip
def test_a_plan_that_becomes_twice_as_slow_is_taken_back_within_50_requests(
    make: Callable[[int], Noise], share: float
) -> None:
    needed: list[int] = []
    for seed in range(40):
        host, _, candidate, new = host_of(make(seed))
        host.serve(100)
        host.switch.consider(candidate, "key", expected=host.current, known="it won before")
        host.serve(40)
        new.factor = 4.0  # was half of the other plan's time, is twice
        host.outcomes.clear()
        needed.append(sum(host.serve(1_000, until="rolled_back").values()))
        assert host.slot.plan is host.current
        last = host.outcomes[-1]
        assert (last.decision, last.cause, last.key) == ("rolled_back", "watch", "key")
        assert last.alarm is not None
        assert last.trial is not None
        assert last.backoff_s == BACKOFF_S
    assert sum(count <= 50 for count in needed) >= share * len(needed)
    assert max(needed) <= 160  # where one request in eight meets something else


def test_a_neighbour_that_slows_both_plans_takes_none_back() -> None:
    host, old, candidate, new = host_of(lognormal(0, 0.05))
    publish(host, candidate)
    host.serve(40)
    old.factor = new.factor = 3.0
    host.serve(2_000, until="confirmed")
    assert host.decisions() == [("published", "trial"), ("kept", "watch"), ("confirmed", "watch")]
    assert host.slot.plan is candidate


def test_a_plan_of_known_cost_is_published_without_a_trial_and_watched() -> None:
    host, _, candidate, new = host_of(lognormal(0, 0.05))
    host.serve(100)
    new.factor = 4.0
    assert (
        host.switch.consider(candidate, "key", expected=host.current, known="it won before") == ""
    )
    assert host.slot.plan is candidate
    assert sum(host.serve(100, until="rolled_back").values()) <= 50
    assert host.slot.plan is host.current


def test_a_published_plan_that_raises_is_out_at_once_and_the_request_is_served() -> None:
    clock = Clock()
    host = Host(timed(1, clock, lambda: 1.0), clock)
    candidate = failing(2, RuntimeError("no kernel"), after=5)
    host.switch.consider(candidate, "key", expected=host.current, known="it won before")
    ran = host.serve(20)
    assert ran == {candidate.id: 5, host.current.id: 15}
    assert host.decisions() == [
        ("published", "known_cost"),
        ("rolled_back", "fault"),
    ]
    assert host.outcomes[1].reason == "RuntimeError: no kernel"
    assert host.outcomes[1].backoff_s == BACKOFF_S
    assert host.switch.phase == "idle"


def test_a_plan_that_raises_outside_of_a_watch_is_out_too() -> None:
    current, candidate = plan(1), failing(2, RuntimeError("no kernel"))
    slot = Slot(current)
    assert slot.publish(candidate, expected=current)
    assert slot.run(X)[1] is current
    assert slot.plan is current
    assert [(fault.plan, fault.good) for fault in slot.faults] == [(candidate.id, current.id)]


def test_a_good_plan_that_raises_has_nowhere_to_go_back_to() -> None:
    error = RuntimeError("no kernel")
    slot = Slot(failing(1, error))
    with pytest.raises(RuntimeError, match="no kernel"):
        slot.run(X)
    newer = failing(2, error)
    slot.publish(plan(1))
    slot.publish(newer)
    slot.confirm(newer)
    with pytest.raises(RuntimeError, match="no kernel"):
        slot.run(X)
    assert slot.plan is newer


def test_rolling_back_never_undoes_a_delta() -> None:
    first, second = plan(1, revision=1), plan(2, revision=2)
    slot = Slot(first)
    slot.publish(second)
    assert slot.last_good is second
    assert slot.roll_back(second) is None
    better = plan(3, revision=2)
    slot.publish(better)
    assert slot.last_good is second
    assert slot.roll_back(first) is None
    assert slot.roll_back(better) is second
    assert slot.plan is second


def test_a_publication_expects_the_plan_it_was_made_of() -> None:
    first, second, third = plan(1), plan(2), plan(3)
    slot = Slot(first)
    assert slot.publish(second, expected=first)
    assert not slot.publish(third, expected=first)
    assert slot.plan is second


def test_a_delta_in_the_middle_cancels_a_trial_or_a_watch() -> None:
    host, _, candidate, _ = host_of(lognormal(0, 0.05))
    host.switch.consider(candidate, "key", expected=host.current)
    host.serve(4)
    host.slot.publish(timed(3, host.clock, lambda: 1.0, revision=2))
    host.serve(4)
    assert host.decisions() == [("cancelled", "superseded")]
    assert host.switch.phase == "idle"
    host, _, candidate, _ = host_of(lognormal(0, 0.05))
    publish(host, candidate)
    host.slot.publish(timed(3, host.clock, lambda: 1.0, revision=2))
    host.serve(4)
    assert host.decisions()[-1] == ("cancelled", "superseded")


def test_a_delta_ends_the_watch_and_the_dwell_of_the_plan_before_it() -> None:
    """Without a request since, nobody has told the switch of the delta."""
    host, _, candidate, _ = host_of(lognormal(0, 0.05))
    host.switch = Switch(host.slot, Hysteresis(dwell_s=3600.0), host.clock)
    assert host.switch.consider(candidate, "key", expected=host.current, known="it won") == ""
    assert host.switch.phase == "watch"
    assert host.switch.consider(plan(4), "other", expected=candidate) == "another plan is in watch"
    live, better = (timed(n, host.clock, lambda: 1.0, revision=2) for n in (3, 4))
    host.slot.publish(live)
    assert host.switch.consider(better, "key", expected=live, known="it won") == ""
    told = [(outcome.decision, outcome.cause) for outcome in host.switch.step()]
    assert told == [
        ("published", "known_cost"),
        ("cancelled", "superseded"),
        ("published", "known_cost"),
    ]
    host.switch.cancel("the watch is over")
    why = host.switch.consider(
        timed(5, host.clock, lambda: 1.0, revision=2), "key", expected=better
    )
    assert "it stays" in why, "of its own revision"


def test_only_one_plan_is_judged_at_a_time() -> None:
    host, _, candidate, _ = host_of(lognormal(0, 0.05))
    assert host.switch.consider(candidate, "key", expected=host.current) == ""
    why = host.switch.consider(plan(9), "other", expected=host.current)
    assert why == "another plan is in trial"
    host.switch.cancel("the model is unloaded")
    assert host.switch.consider(plan(9), "other", expected=plan(8)) == "another plan was published"
    assert host.switch.phase == "idle"


def test_without_traffic_captured_inputs_decide_and_published_plans_are_watched() -> None:
    host, _, candidate, _ = host_of(lognormal(0, 0.05))
    assert host.switch.consider(candidate, "key", expected=host.current) == ""
    outcomes = host.switch.step([X])
    assert [outcome.decision for outcome in outcomes] == ["published"]
    assert host.switch.phase == "watch"
    host.serve(1_000, until="confirmed")
    assert host.slot.last_good is candidate


def test_outcomes_are_json_for_an_event() -> None:
    host, _, candidate, new = host_of(lognormal(0, 0.05))
    publish(host, candidate)
    host.serve(40)
    new.factor = 4.0
    host.serve(1_000, until="rolled_back")
    for outcome in host.outcomes:
        fields = json.loads(json.dumps(outcome.fields()))
        assert fields["plan_id"] == candidate.id
        assert fields["trial"]["verdict"] == "better"
        assert ("alarm" in fields) == (outcome.decision == "rolled_back")


# -- what plans cost


def test_plans_without_a_role_are_let_go_whatever_became_of_them() -> None:
    host, _, candidate, new = host_of(lognormal(0, 0.05))
    plans = weakref.WeakSet([host.current, candidate])
    publish(host, candidate)
    host.serve(40)
    new.factor = 4.0
    host.serve(1_000, until="rolled_back")
    del candidate
    for number in range(5, 25):
        slower = timed(number, host.clock, lambda: 3e-3)
        plans.add(slower)
        assert host.switch.consider(slower, number, expected=host.current) == ""
        del slower
        host.serve(200, until="refused")
        host.outcomes.clear()
        host.slot.reap()
    gc.collect()
    assert set(plans) == {host.current}


def test_requests_never_see_a_plan_of_an_older_revision_while_plans_come_and_go() -> None:
    slot = Slot(plan(0))
    wrong: list[str] = []
    stop = threading.Event()
    floor = [1]

    def broken(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel")

    def client() -> None:
        while not stop.is_set():
            least = floor[0]
            outputs, ran = slot.run(X)
            if ran.revision < least or not torch.equal(outputs["y"], Y):
                wrong.append(ran.id)

    threads = [threading.Thread(target=client) for _ in range(3)]
    for thread in threads:
        thread.start()
    switch = Switch(slot, Hysteresis(dwell_s=0.0, backoff_s=0.0), lambda: 0.0)
    for revision in range(2, 40):
        slot.publish(plan(revision, revision=revision))
        floor[0] = revision
        current = slot.plan
        switch.step()
        candidate = plan(1_000, broken if revision % 2 else torch.relu, revision)
        assert switch.consider(candidate, revision, expected=current) == ""
        while revision % 2 and switch.phase == "trial":
            switch.step()  # until a client has met it
        switch.step()
        slot.reap()
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    slot.reap()
    assert not slot.is_busy()
