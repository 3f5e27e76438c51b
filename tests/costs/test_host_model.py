"""Predictions: monotone, absent where nothing is known, and corrected by what was measured."""

from itertools import permutations
from math import exp, log
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cost_models.fitting import Measured, fit, nnls
from cost_models.host_model import HostModel
from cost_models.roofline import smooth_max, work_arrays
from graphopt.costs.op_work import CLASSES, Kernel
from graphopt.costs.work import Work
from graphopt.executor.backend import Options

LAYER = """\
cost: 1
host:
  working_set: {near: 262144, middle: 8388608, far: 134217728}
  threads_1: {peak: 1e11, bandwidth: {near: 8e10, middle: 6e10, far: 2e10}}
  threads_4: {peak: 4e11, bandwidth: {near: 3e11, middle: 1e11, far: 3e10}}
backends:
  eager:
    threads_1:
      call_s: 1e-6
      error: 0.2
      linear: {kernel_s: 5e-6, compute: 1.5, memory: 2.0}
      elementwise: {kernel_s: 3e-6, compute: 4.0, memory: 1.0}
"""
ONE = Options(1)
OPS = st.integers(0, 10**9)
BYTES = st.integers(0, 10**8)
KERNELS = st.lists(
    st.builds(Kernel, st.sampled_from(["linear", "elementwise"]), OPS, BYTES, BYTES, BYTES),
    min_size=1, max_size=6,
)  # fmt: skip


def model(folder: Path, more: str = "") -> HostModel:
    path = folder / "host.yaml"
    path.write_text(LAYER + more)
    return HostModel(path)


def work(*kernels: Kernel, key: str = "k", footprint: int = 1 << 20) -> Work:
    return Work(key, (), kernels, footprint)


def linear(scale: float = 1.0, kind: str = "linear") -> Kernel:
    return Kernel(kind, int(1e7 * scale), int(1e5 * scale), int(1e6 * scale), int(1e5 * scale))


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> HostModel:
    return model(tmp_path_factory.mktemp("host"))


def seconds(model: HostModel, work: Work, options: Options = ONE) -> float:
    found = model.predict(work, "eager", options)
    assert found is not None
    assert 0 < found.low_s <= found.seconds <= found.high_s
    return found.seconds


def test_what_no_layer_knows_is_absent_and_not_zero(host: HostModel) -> None:
    assert host.predict(work(linear()), "openvino", ONE) is None
    assert HostModel().predict(work(linear()), "eager", ONE) is None


@settings(max_examples=60, deadline=None)
@given(KERNELS, st.floats(1, 8))
def test_more_work_is_never_predicted_to_take_less(
    host: HostModel, kernels: list[Kernel], times: float
) -> None:
    grown = [
        Kernel(
            k.op_class, int(k.ops * times), int(k.read_bytes * times),
            int(k.weight_bytes * times), int(k.write_bytes * times),
        )
        for k in kernels
    ]  # fmt: skip
    assert seconds(host, work(*kernels)) <= seconds(host, work(*grown)) * (1 + 1e-9)
    assert seconds(host, work(*kernels)) <= seconds(host, work(*kernels, kernels[0])) * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(KERNELS, KERNELS)
def test_a_call_takes_as_long_as_its_kernels_and_the_call(
    host: HostModel, some: list[Kernel], others: list[Kernel]
) -> None:
    parts = seconds(host, work(*some)) + seconds(host, work(*others))
    assert parts == pytest.approx(seconds(host, work(*some, *others)) + 1e-6)


def test_a_larger_footprint_is_never_quicker(host: HostModel) -> None:
    sizes = [1 << n for n in range(10, 34)]
    took = [seconds(host, work(linear()).within(size)) for size in sizes]
    assert took == sorted(took)
    assert took[0] < took[-1]


def test_weights_of_compute_and_memory_change_the_objective_and_not_the_seconds(
    tmp_path: Path,
) -> None:
    plain, weighed = tmp_path / "a", tmp_path / "b"
    plain.mkdir()
    weighed.mkdir()
    free = model(plain).predict(work(linear()), "eager", ONE)
    priced = model(weighed, "weights: {alpha: 0.5, beta: 2.0}\n").predict(
        work(linear()), "eager", ONE
    )
    assert free is not None
    assert priced is not None
    assert free.seconds == priced.seconds == free.objective_s < priced.objective_s


def test_a_region_that_was_measured_is_predicted_as_measured(tmp_path: Path) -> None:
    found = model(tmp_path)
    before = found.predict(work(linear()), "eager", ONE)
    assert before is not None
    found.observe(work(linear()), "eager", ONE, 3 * before.seconds)
    after = found.predict(work(linear()), "eager", ONE)
    assert after is not None
    assert after.seconds == pytest.approx(3 * before.seconds, rel=0.05)
    assert after.high_s / after.low_s < before.high_s / before.low_s


def test_a_measurement_tells_most_about_its_like_and_nothing_about_other_backends(
    tmp_path: Path,
) -> None:
    found = model(tmp_path)
    like, unlike = work(linear(1.2), key="a"), work(linear(40, "elementwise"), key="b")
    before = [seconds(found, each) for each in (like, unlike)]
    found.observe(work(linear()), "eager", ONE, 2 * seconds(found, work(linear())))
    ratios = [seconds(found, each) / b for each, b in zip((like, unlike), before, strict=True)]
    assert 1.5 < ratios[0] < 2.1
    assert 1.0 <= ratios[1] < ratios[0]


def test_what_is_learned_does_not_depend_on_the_order(tmp_path: Path) -> None:
    samples = [(work(linear(s), key=str(s)), 1e-4 * s**0.7) for s in (0.3, 1.0, 4.0, 9.0)]
    asked = work(linear(2.0), key="asked")
    answers = set()
    for order in permutations(samples):
        found = model(tmp_path)
        for each, took in order:
            found.observe(each, "eager", ONE, took)
        answers.add(seconds(found, asked))
    assert len(answers) == 1


def test_a_new_measurement_replaces_the_one_before(tmp_path: Path) -> None:
    once, twice = model(tmp_path), model(tmp_path)
    twice.observe(work(linear()), "eager", ONE, 1.0)
    for each in (once, twice):
        each.observe(work(linear()), "eager", ONE, 2e-4)
    assert seconds(once, work(linear())) == seconds(twice, work(linear()))


@pytest.mark.parametrize("took", [0.0, -1.0, float("nan"), float("inf")])
def test_a_time_that_is_none_is_refused(tmp_path: Path, took: float) -> None:
    with pytest.raises(ValueError, match="a cost of"):
        model(tmp_path).observe(work(linear()), "eager", ONE, took)


def test_a_reload_keeps_what_was_measured(tmp_path: Path) -> None:
    found = model(tmp_path)
    found.observe(work(linear()), "eager", ONE, 5e-3)
    (tmp_path / "host.yaml").write_text(LAYER.replace("compute: 1.5", "compute: 3.0"))
    assert found.reload() == ["backends.eager.threads_1.linear.compute"]
    assert seconds(found, work(linear())) == pytest.approx(5e-3, rel=0.05)


# -- fitting


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000))
def test_least_squares_finds_what_made_the_figures(seed: int) -> None:
    random = np.random.default_rng(seed)
    a, x = random.random((30, 6)), np.maximum(0.0, random.normal(size=6))
    assert nnls(a, a @ x) == pytest.approx(x, abs=1e-8)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000))
def test_least_squares_meets_the_conditions_of_an_optimum(seed: int) -> None:
    random = np.random.default_rng(seed)
    a, b = random.normal(size=(20, 5)), random.normal(size=20)
    x = nnls(a, b)
    slope = a.T @ (b - a @ x)
    assert (x >= 0).all()
    assert (slope <= 1e-8).all()
    assert slope @ x == pytest.approx(0.0, abs=1e-8)


@pytest.mark.parametrize("seed", range(4))
def test_a_fit_recovers_the_coefficients_of_a_made_up_host(seed: int) -> None:
    random = np.random.default_rng(seed)
    used = [CLASSES.index(name) for name in ("linear", "normalisation", "moving")]
    call_s, peak, bandwidth, p = 8e-6, 1e11, 5e10, 4.0
    rates = np.zeros((len(CLASSES), 3))
    for i in used:
        rates[i] = (random.uniform(2e-6, 2e-5), random.uniform(1, 4), random.uniform(0.5, 3))
    measured = []
    for _ in range(120):
        kernels = [
            Kernel(
                CLASSES[random.choice(used)], int(10 ** random.uniform(4, 7)),
                int(10 ** random.uniform(3, 6.5)), 0, 0,
            )
            for _ in range(random.integers(1, 6))
        ]  # fmt: skip
        kinds, ops, sizes = work_arrays(work(*kernels))
        times = rates[kinds, 0] + smooth_max(
            rates[kinds, 1] * ops / peak, rates[kinds, 2] * sizes / bandwidth, p
        )
        noise = exp(random.normal(0, 0.01))
        measured.append(Measured((work(*kernels),), (call_s + times.sum()) * noise))
    found = fit(measured, peak, [bandwidth] * len(measured), p)
    assert found.error <= 0.06
    for i in used:
        assert np.abs(np.log(found.rates[i] / rates[i])).max() < log(1.3)
    assert found.call_s == pytest.approx(call_s, rel=0.4)
