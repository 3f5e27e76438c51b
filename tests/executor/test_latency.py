"""What requests took: noted by many threads, read by one."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.executor.latency import (
    FRESH_MAX,
    RING_SAMPLES,
    RINGS_MAX,
    TRAFFIC_REQUESTS_MAX,
    Latencies,
    describe,
    median,
)

SECONDS = st.floats(1e-7, 10.0)


def test_samples_come_back_in_order_with_their_bucket() -> None:
    latencies = Latencies()
    latencies.add(("a", {"batch": 8, "seq": 128}, 0.5))
    latencies.add(("b", {}, 0.25))
    assert latencies.drain() == [("a", (8, 128), 0.5), ("b", (), 0.25)]
    assert latencies.drain() == []
    assert latencies.traffic() == {(8, 128): (1, 0.5), (): (1, 0.25)}


def test_what_is_not_known_is_none() -> None:
    assert Latencies().statistics("a", ()) is None
    assert Latencies().by_bucket("a") == {}
    assert Latencies().newest() is None


def test_the_newest_sample_is_another_object_after_a_request() -> None:
    latencies = Latencies()
    latencies.add(("a", {}, 0.5))
    before = latencies.newest()
    assert latencies.newest() is before
    latencies.add(("a", {}, 0.5))
    assert latencies.newest() is not before


def test_shapes_out_of_use_are_forgotten() -> None:
    latencies = Latencies()
    for size in (1, 2):
        for _ in range(2 * TRAFFIC_REQUESTS_MAX):
            latencies.add(("a", {"batch": size}, 0.5 * size))
            latencies.drain()
        traffic = latencies.traffic()
        assert max(traffic, key=lambda bucket: traffic[bucket].busy_s) == (size,)
        assert sum(each.requests for each in traffic.values()) <= TRAFFIC_REQUESTS_MAX
    assert traffic[(1,)].requests < 0.25 * TRAFFIC_REQUESTS_MAX


def test_nothing_grows_without_bound() -> None:
    latencies = Latencies()
    for i in range(FRESH_MAX + 10):
        latencies.add(("a", {}, float(i)))
    assert len(latencies.drain()) == FRESH_MAX
    for i in range(3 * RING_SAMPLES):
        latencies.add(("a", {}, float(i + 1)))
        latencies.drain()
    known = latencies.statistics("a", ())
    assert known is not None
    assert (known.kept, known.requests) == (RING_SAMPLES, FRESH_MAX + 3 * RING_SAMPLES)
    for i in range(2 * RINGS_MAX):
        latencies.add(("a", {"batch": i}, 1.0))
        latencies.drain()
    assert len(latencies.by_bucket("a")) == RINGS_MAX


def test_a_forgotten_plan_is_unknown() -> None:
    latencies = Latencies()
    latencies.add(("a", {}, 0.5))
    latencies.add(("b", {}, 0.5))
    latencies.drain()
    latencies.forget("a")
    assert latencies.by_bucket("a") == {}
    assert latencies.by_bucket("b").keys() == {()}


def test_threads_lose_nothing_while_the_reader_keeps_up() -> None:
    latencies, each, n_threads = Latencies(), 5_000, 4
    room = threading.Semaphore(FRESH_MAX)
    taken = []

    def work(name: str) -> None:
        for i in range(each):
            room.acquire()
            latencies.add((name, {"i": i}, 1.0))

    threads = [threading.Thread(target=work, args=(str(k),)) for k in range(n_threads)]
    for thread in threads:
        thread.start()
    while len(taken) < each * n_threads:
        for sample in latencies.drain():
            taken.append(sample)
            room.release()
    for thread in threads:
        thread.join()
    for name in map(str, range(n_threads)):
        assert [bucket[0] for plan, bucket, _ in taken if plan == name] == list(range(each))


@given(st.lists(SECONDS, min_size=1, max_size=60), st.floats(0.01, 100.0))
def test_statistics_scale_with_the_unit(values: list[float], unit: float) -> None:
    plain, scaled = describe(values), describe([value * unit for value in values])
    assert scaled.median_s == pytest.approx(plain.median_s * unit)
    assert scaled.p99_s == pytest.approx(plain.p99_s * unit)
    assert scaled.mad_s == pytest.approx(plain.mad_s * unit)
    assert scaled.log_spread == pytest.approx(plain.log_spread, abs=1e-6)
    assert min(values) <= plain.median_s <= plain.p99_s <= max(values)


@given(st.lists(SECONDS, min_size=11, max_size=60), st.data())
def test_a_few_wild_requests_do_not_move_the_median_out_of_the_others(
    values: list[float], data: st.DataObject
) -> None:
    wild = data.draw(st.lists(st.just(1e6), max_size=(len(values) - 1) // 2))
    assert min(values) <= median(sorted(values + wild)) <= max(values)
