"""Trials decide rightly on noisy hosts, cost few requests, and lose none."""

import math
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
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
from graphopt.errors import RequestError
from graphopt.executor.idle_trial import IdleTrial
from graphopt.executor.publish import Slot, _not_finite
from graphopt.executor.signed_rank import PAIRS_MAX, Bounds, Spending, bounds_of, combine
from graphopt.executor.trial import (
    ACCEPTANCE,
    BLOCK,
    BUCKETS_MAX,
    CONFIRMATION,
    FUTILE_LOSS_PAIRS,
    FUTILE_PAIRS,
    BucketFigures,
    Trial,
    TrialResult,
    TrialSettings,
)

torch.set_num_threads(1)
RUNS = 120
HOSTS: list[tuple[str, Callable[[int], Noise]]] = [
    ("quiet", lambda seed: lognormal(seed, 0.05)),
    ("noisy", lambda seed: lognormal(seed, 0.2)),
    ("heavy-tailed", heavy_tailed),
    ("bursts", bursts),
]


def verdicts(
    make: Callable[[int], Noise], ratio: float, base: TrialSettings = ACCEPTANCE
) -> Counter:
    found: Counter[str] = Counter()
    for seed in range(RUNS):
        found[simulate(make(seed), ratio, replace(base, seed=seed))[0].verdict] += 1
    return found


# -- the statistics


def test_signed_rank_bounds_are_those_of_the_tables() -> None:
    # One-sided 5% critical values of Wilcoxon's W (1945): 2 for 6 pairs, 5 for 8, 10 for 10, 60 for 20.
    for count, critical in ((6, 2), (8, 5), (10, 10), (20, 60)):
        values = [2.0**i for i in range(count)]
        walsh = sorted((a + b) / 2 for i, a in enumerate(values) for b in values[i:])
        found = bounds_of(values, 0.05)
        assert (found.low, found.high) == (walsh[critical], walsh[-1 - critical])
        assert found.attained <= 0.05


def test_too_few_pairs_give_no_bound() -> None:
    assert bounds_of([0.1] * 5, 1 / 64) == Bounds(0.1, -math.inf, math.inf, 0.0)
    assert bounds_of([0.1] * 6, 1 / 64) == Bounds(0.1, 0.1, 0.1, 1 / 64)


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=40), st.floats(0.001, 0.2))
def test_bounds_mirror_and_shift_with_the_differences(values: list[float], level: float) -> None:
    plain = bounds_of(values, level)
    mirrored = bounds_of([-value for value in values], level)
    assert (mirrored.low, mirrored.high) == (-plain.high, -plain.low)
    assert mirrored.estimate == pytest.approx(-plain.estimate)
    moved = bounds_of([value + 1.0 for value in values], level)
    assert moved.estimate == pytest.approx(plain.estimate + 1.0)
    assert plain.low <= plain.estimate <= plain.high


@given(
    st.lists(
        st.tuples(st.floats(0.1, 5), st.floats(-1, 1), st.floats(0, 1)), min_size=1, max_size=6
    )
)
def test_a_combination_lies_within_its_parts(parts: list[tuple[float, float, float]]) -> None:
    bounds = [(weight, Bounds(at, at - half, at + half, 0.05)) for weight, at, half in parts]
    found = combine(bounds)
    assert min(b.low for _, b in bounds) - 1e-9 <= found.low <= found.estimate
    assert found.estimate <= found.high <= max(b.high for _, b in bounds) + 1e-9
    if len(bounds) == 1:
        assert found.high == pytest.approx(bounds[0][1].high)


@given(st.lists(st.floats(0.0, 1.0), max_size=30))
def test_looks_never_spend_more_than_there_is(fractions: list[float]) -> None:
    spending, spent = Spending(0.05), 0.0
    for fraction in sorted(fractions):
        level = spending.level(fraction)
        spending.spend(level)
        spent += level
    assert spent <= 0.05 + 1e-12


# -- decisions


@pytest.mark.parametrize(("host", "make"), HOSTS)
def test_an_equal_plan_is_rarely_taken_for_faster_or_slower(
    host: str, make: Callable[[int], Noise]
) -> None:
    assert verdicts(make, 1.0)["equal"] >= 0.95 * RUNS


@pytest.mark.parametrize(("host", "make"), HOSTS)
def test_a_plan_no_faster_than_the_margin_is_accepted_at_most_as_often_as_stated(
    host: str, make: Callable[[int], Noise]
) -> None:
    # alpha is 5%; 120 runs of a coin of 5% give more than 12 with a probability of 0.4%
    assert verdicts(make, 1.0 - ACCEPTANCE.margin)["better"] <= 12


@pytest.mark.parametrize(("host", "make"), HOSTS)
def test_a_slower_plan_is_not_accepted(host: str, make: Callable[[int], Noise]) -> None:
    assert verdicts(make, 1.03)["better"] == 0


def test_a_tenth_less_time_is_seen_on_a_quiet_host_and_through_bursts() -> None:
    for _, make in (HOSTS[0], HOSTS[3]):
        assert verdicts(make, 0.9)["better"] >= 0.97 * RUNS


@pytest.mark.parametrize(("host", "make"), HOSTS)
@pytest.mark.parametrize(("ratio", "wanted"), [(0.5, "better"), (2.0, "worse")])
def test_twice_or_half_the_time_is_decided_within_ten_pairs_or_a_few_more(
    host: str, make: Callable[[int], Noise], ratio: float, wanted: str
) -> None:
    found = [simulate(make(seed), ratio, replace(ACCEPTANCE, seed=seed)) for seed in range(RUNS)]
    assert {result.verdict for result, _ in found} == {wanted}
    pairs = sorted(result.pairs for result, _ in found)
    assert pairs[RUNS // 2] <= 10
    assert pairs[-1] <= 40


def test_a_candidate_that_will_hardly_win_is_given_up_early() -> None:
    slower, requests = simulate(lognormal(0, 0.03), 1.3, ACCEPTANCE)
    assert (slower.verdict, slower.pairs) == ("worse", FUTILE_LOSS_PAIRS)
    assert requests == 2 * BLOCK * (FUTILE_LOSS_PAIRS + ACCEPTANCE.warmup_pairs)
    assert slower.ratio == pytest.approx(1.3, rel=0.1)
    found = [simulate(lognormal(seed, 0.03), 1.0, ACCEPTANCE)[0] for seed in range(RUNS)]
    assert sorted(result.pairs for result in found)[RUNS // 2] <= 2 * FUTILE_PAIRS


def test_a_candidate_that_need_not_win_settles_on_little_evidence() -> None:
    modest = replace(ACCEPTANCE, settles=True)
    faster, _ = simulate(lognormal(0, 0.03), 0.7, modest)
    assert (faster.verdict, faster.pairs) == ("better", FUTILE_LOSS_PAIRS)
    found = [simulate(lognormal(seed, 0.03), 1.0, modest)[0] for seed in range(RUNS)]
    assert sum(result.is_no_slower for result in found) > 0.85 * RUNS
    assert sorted(result.pairs for result in found)[RUNS // 2] <= 2 * FUTILE_PAIRS


@pytest.mark.parametrize(("name", "make"), HOSTS)
def test_a_slower_candidate_does_not_settle(name: str, make: Callable[[int], Noise]) -> None:
    modest = replace(ACCEPTANCE, settles=True)
    runs = [simulate(make(seed), 1.2, replace(modest, seed=seed))[0] for seed in range(RUNS)]
    assert sum(result.is_no_slower for result in runs) <= 0.05 * RUNS, name


def test_a_trial_ends_at_its_bound_of_pairs() -> None:
    patient = replace(ACCEPTANCE, gives_up=False)
    result, requests = simulate(lognormal(0, 0.3), 0.97, patient)
    assert (result.verdict, result.pairs) == ("equal", ACCEPTANCE.pairs_max)
    assert requests == 2 * BLOCK * (ACCEPTANCE.pairs_max + ACCEPTANCE.warmup_pairs)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.floats(1e-4, 1e-2), st.floats(1e-4, 1e-2), st.sampled_from([(1,), (8,)])),
             min_size=5, max_size=80),
    st.floats(0.2, 5.0),
)  # fmt: skip
def test_swapping_the_plans_mirrors_the_verdict(
    pairs: list[tuple[float, float, tuple[int, ...]]], ratio: float
) -> None:
    mirror = {"better": "worse", "worse": "better", "equal": "equal"}
    patient = replace(ACCEPTANCE, gives_up=False)
    one, other = Trial("a", "b", patient), Trial("b", "a", patient)
    for a_s, b_s, bucket in pairs:
        one.add_pair(bucket, a_s, ratio * b_s)
        other.add_pair(bucket, ratio * b_s, a_s)
        left, right = one.judge(), other.judge()
        assert (left is None) == (right is None)
        if left is not None and right is not None:
            assert right.verdict == mirror[left.verdict]
            assert left.pairs == right.pairs
            if left.ratio is not None and right.ratio is not None:
                assert right.ratio == pytest.approx(1.0 / left.ratio)
            return


def feed(
    trial: Trial, ratios: dict[tuple[int, ...], float], count: int, seed: int = 0
) -> TrialResult:
    noise = lognormal(seed, 0.05)
    for _ in range(count):
        for bucket, ratio in ratios.items():
            trial.add_pair(bucket, noise(), noise() * ratio)
        if (result := trial.judge()) is not None:
            return result
    raise AssertionError("undecided")


def test_buckets_count_by_their_traffic() -> None:
    ratios = {(1,): 0.8, (8,): 1.08}
    weights = {(1,): 0.9, (8,): 0.1}
    assert feed(Trial("a", "b", weights=weights), ratios, 60).verdict == "better"
    turned = {(1,): 0.1, (8,): 0.9}
    assert feed(Trial("a", "b", weights=turned), ratios, 60).verdict != "better"


def test_a_plan_that_is_much_slower_for_one_shape_is_no_gain() -> None:
    weights = {(1,): 0.9, (8,): 0.1}
    result = feed(Trial("a", "b", weights=weights), {(1,): 0.8, (8,): 1.3}, 60)
    assert result.verdict == "equal"
    assert "slower for (8,)" in result.reason
    assert [line.bucket for line in result.buckets] == [(1,), (8,)]


def test_many_rare_shapes_are_judged_together() -> None:
    result = feed(Trial("a", "b"), {(i,): 0.7 for i in range(20)}, 60)
    assert result.verdict == "better"


def test_the_dealing_gives_each_plan_half_of_every_quad_and_both_orders() -> None:
    trial = Trial("a", "b")
    arms = [trial.is_candidate(i) for i in range(8 * BLOCK * 8)]
    quads = [arms[i : i + 4 * BLOCK] for i in range(0, len(arms), 4 * BLOCK)]
    assert all(sum(quad) == 2 * BLOCK and quad == quad[::-1] for quad in quads)
    assert len({tuple(quad) for quad in quads}) == 2
    assert not trial.is_candidate(-1)


def test_more_shapes_than_a_trial_takes_run_the_current_plan() -> None:
    trial = Trial("a", "b")
    for i in range(BUCKETS_MAX):
        assert trial.take((i,)) == 0
    assert trial.take((BUCKETS_MAX,)) == -1
    assert trial.take((0,)) == 1


def test_more_pairs_than_can_be_judged_are_refused() -> None:
    with pytest.raises(ValueError, match="pairs_max"):
        Trial("a", "b", TrialSettings(pairs_max=PAIRS_MAX + 1))


def test_the_first_verdict_stands() -> None:
    trial = Trial("a", "b")
    trial.fail("it raised")
    trial.cancel("too late")
    result = trial.judge()
    assert result is not None
    assert (result.verdict, result.reason, result.ratio) == ("failed", "it raised", None)
    assert trial.judge() is result


# -- live requests through a slot


def ask(slot: Slot, batch: int = 1) -> str:
    outputs, ran = slot.run({"x": X["x"].expand(batch, 4)})
    assert torch.equal(outputs["y"], Y.expand(batch, 4))
    return ran.id


def test_without_a_trial_every_request_runs_the_published_plan_and_is_timed() -> None:
    clock = Clock()
    current = timed(1, clock, lambda: 0.25)
    slot = Slot(current, clock)
    assert {ask(slot) for _ in range(3)} == {current.id}
    ask(slot, 8)
    assert slot.latencies.drain() == [(current.id, (1,), 0.25)] * 3 + [(current.id, (8,), 0.25)]


def test_a_trial_deals_requests_by_shape_and_answers_name_the_plan_that_ran() -> None:
    clock = Clock()
    current, candidate = timed(1, clock, lambda: 1.0), timed(2, clock, lambda: 0.5)
    slot, trial = Slot(current, clock), Trial("a", "b")
    assert slot.begin_trial(trial, candidate, current)
    ran = [[ask(slot, batch) for batch in (1, 8)] for _ in range(8 * BLOCK)]
    wanted = [[candidate.id if trial.is_candidate(i) else current.id] * 2 for i in range(8 * BLOCK)]
    assert ran == wanted
    result = trial.judge()
    while result is None:
        ask(slot)
        ask(slot, 8)
        result = trial.judge()
    assert result.verdict == "better"
    assert result.ratio == pytest.approx(0.5)
    assert {line.bucket: (line.current_s, line.candidate_s) for line in result.buckets} == {
        (1,): (1.0, 0.5), (8,): (1.0, 0.5),
    }  # fmt: skip


def test_a_trial_needs_the_plan_it_expects_and_one_revision() -> None:
    current, candidate = plan(1), plan(2)
    slot = Slot(current)
    with pytest.raises(ValueError, match="another revision"):
        slot.begin_trial(Trial("a", "b"), plan(2, revision=2), current)
    assert not slot.begin_trial(Trial("a", "b"), candidate, plan(3))
    assert slot.begin_trial(Trial("a", "b"), candidate, current)
    assert not slot.begin_trial(Trial("a", "b"), candidate, current)
    slot.end_trial()
    assert slot.begin_trial(Trial("a", "b"), candidate, current)


def test_a_delta_ends_a_trial_at_once() -> None:
    current, candidate, next_plan = plan(1), plan(2), plan(3, revision=2)
    slot, trial = Slot(current), Trial("a", "b")
    slot.begin_trial(trial, candidate, current)
    assert slot.publish(next_plan)
    assert {ask(slot) for _ in range(9)} == {next_plan.id}
    assert slot.last_good is next_plan
    result = trial.judge()
    assert result is not None
    assert result.verdict == "cancelled"


def test_a_request_that_the_candidate_fails_is_answered_and_the_reason_kept() -> None:
    current, candidate = plan(1), failing(2, RuntimeError("no kernel"), after=3)
    slot, trial = Slot(current), Trial("a", "b")
    slot.begin_trial(trial, candidate, current)
    woken: list[None] = []
    slot.wake = lambda: woken.append(None)
    ran = [ask(slot) for _ in range(20)]
    assert ran.count(candidate.id) == 3
    result = trial.judge()
    assert result is not None
    assert (result.verdict, result.reason) == ("failed", "RuntimeError: no kernel")
    assert woken
    assert slot.plan is current
    assert not slot.faults


def test_a_candidate_that_answers_nan_where_the_current_plan_does_not_is_out() -> None:
    current, candidate = plan(1), plan(2, lambda x: x / 0.0 * 0.0)
    slot, trial = Slot(current), Trial("a", "b")
    slot.begin_trial(trial, candidate, current)
    assert {ask(slot) for _ in range(8)} == {current.id}
    result = trial.judge()
    assert result is not None
    assert (result.verdict, "not finite" in result.reason) == ("failed", True)


def test_a_model_that_answers_infinity_itself_can_be_tried() -> None:
    current, candidate = plan(1, lambda x: x / 0.0), plan(2, lambda x: x / 0.0)
    slot, trial = Slot(current), Trial("a", "b")
    slot.begin_trial(trial, candidate, current)
    assert {slot.run(X)[1].id for _ in range(8 * BLOCK)} == {current.id, candidate.id}
    assert trial.judge() is None


def test_a_request_that_no_plan_can_serve_blames_none() -> None:
    error = IndexError("out of range")
    current, candidate = failing(1, error), failing(2, error)
    slot, trial = Slot(current), Trial("a", "b")
    slot.begin_trial(trial, candidate, current)
    for _ in range(8):
        with pytest.raises(IndexError):
            slot.run(X)
    with pytest.raises(RequestError):
        slot.run({})
    assert trial.judge() is None
    assert slot.plan is current


def test_no_request_is_lost_when_a_candidate_raises_under_threads() -> None:
    current = plan(0)
    slot = Slot(current)
    lost: list[BaseException] = []
    served = Counter()
    stop = threading.Event()

    def client() -> None:
        while not stop.is_set():
            try:
                served[ask(slot)] += 1
            except BaseException as error:  # the test fails on any
                lost.append(error)

    threads = [threading.Thread(target=client) for _ in range(3)]
    for thread in threads:
        thread.start()
    verdict_of = Counter()
    for number in range(1, 60):
        trial = Trial("a", "b")
        candidate = failing(number, RuntimeError("no kernel"), after=number % 7)
        assert slot.begin_trial(trial, candidate, current)
        while (result := trial.judge()) is None:
            slot.latencies.drain()
        verdict_of[result.verdict] += 1
        slot.end_trial()
        slot.reap()
    stop.set()
    for thread in threads:
        thread.join()
    assert not lost
    assert verdict_of == {"failed": 59}
    assert served[current.id] > 59
    assert slot.reap() == 0


# -- without traffic


def test_captured_inputs_decide_a_trial_when_nobody_asks() -> None:
    clock = Clock()
    current, candidate = timed(1, clock, lambda: 1.0), timed(2, clock, lambda: 0.5)
    slot, trial = Slot(current, clock), Trial("a", "b")
    inputs = [X, {"x": X["x"].expand(8, 4)}, {"wrong": X["x"]}]
    result = IdleTrial(trial, current, candidate, inputs, slot, clock).run()
    assert result is not None
    assert result.verdict == "better"
    assert [line.bucket for line in result.buckets] == [(1,), (8,)]
    assert not slot.latencies.drain()


def test_an_idle_trial_yields_at_once_to_a_request_and_does_not_count_what_it_spoilt() -> None:
    clock = Clock()
    current = timed(1, clock, lambda: 1.0)
    slot = Slot(current, clock)
    interrupted: list[int] = []

    def serve_one(x: torch.Tensor) -> torch.Tensor:
        clock.now_s += 0.5
        if not interrupted:
            interrupted.append(1)
            thread = threading.Thread(target=lambda: ask(slot))
            thread.start()
            thread.join()
        return torch.relu(x)

    trial = Trial("a", "b")
    driver = IdleTrial(trial, current, plan(2, serve_one), [X], slot, clock)
    assert driver.run() is None
    assert trial.pairs == 0
    slot.latencies.drain()
    result = driver.run()
    assert result is not None
    assert result.verdict == "better"


def test_an_idle_trial_does_nothing_while_a_request_runs() -> None:
    clock, inside, leave = Clock(), threading.Event(), threading.Event()

    def wait(x: torch.Tensor) -> torch.Tensor:
        inside.set()
        leave.wait()
        return torch.relu(x)

    slot = Slot(plan(1, wait), clock)
    request = threading.Thread(target=lambda: ask(slot))
    request.start()
    inside.wait()
    ran: list[None] = []
    candidate = plan(2, lambda x: ran.append(None) or torch.relu(x))
    assert IdleTrial(Trial("a", "b"), candidate, candidate, [X], slot, clock).run() is None
    leave.set()
    request.join()
    assert not ran


def test_an_idle_trial_refuses_a_candidate_that_raises_or_answers_otherwise() -> None:
    clock = Clock()
    current = plan(1)
    for candidate, reason in (
        (failing(2, RuntimeError("no kernel")), "no kernel"),
        (plan(2, lambda x: torch.relu(x) + 0.01), "differs by 0.01"),
        (plan(2, lambda x: torch.relu(x) * torch.nan), "differs by nan"),
        (plan(2, lambda x: torch.relu(x).double()), "float64"),
    ):
        result = IdleTrial(Trial("a", "b"), current, candidate, [X], Slot(current), clock).run()
        assert result is not None
        assert (result.verdict, reason in result.reason) == ("failed", True), result.reason


def test_an_input_that_no_plan_can_run_ends_no_trial() -> None:
    clock = Clock()
    error = IndexError("out of range")
    trial = Trial("a", "b")
    driver = IdleTrial(trial, failing(1, error), failing(2, error), [X, X], Slot(plan(1)), clock)
    assert driver.run() is None
    assert trial.judge() is None


def test_a_confirmation_may_end_after_five_pairs() -> None:
    result, requests = simulate(lognormal(0, 0.05), 0.5, CONFIRMATION)
    assert (result.verdict, result.pairs, requests) == ("better", 5, 2 * BLOCK * 5)


@pytest.mark.parametrize(
    ("verdict", "ratio", "by_bucket", "expected"),
    [
        ("better", 0.9, (0.9,), True),
        ("equal", 1.02, (1.02, 0.9), True),
        ("equal", 1.0, (1.03, 0.8), False),  # one shape pays for the other
        ("equal", 1.03, (), False),  # most likely slower, and not for certain
        ("equal", None, (), False),  # too few pairs to tell
        ("worse", 0.5, (), False),
        ("failed", 0.5, (), False),
    ],
)
def test_no_slower_is_better_or_as_good_for_every_shape(
    verdict: Any, ratio: float | None, by_bucket: tuple[float, ...], *, expected: bool
) -> None:
    figures = [
        BucketFigures((i,), 9, 0.5, 1.0, each, each, None, None, 0.1)
        for i, each in enumerate(by_bucket)
    ]
    result = TrialResult(
        verdict, "old", "new", 9, 0.02, ratio, None, None, tuple(figures), "of a test"
    )
    assert result.is_no_slower is expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_an_output_is_wrong_when_any_element_is_not_finite(
    dtype: torch.dtype, wrong: float
) -> None:
    most = torch.finfo(dtype).max
    large = torch.full((64,), most, dtype=dtype)  # the sum of which is infinite
    assert _not_finite({"x": torch.ones(3), "large": large}) is None
    large[17] = wrong
    assert _not_finite({"x": torch.ones(3), "large": large}) == "large"
