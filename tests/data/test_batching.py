"""The queue of a model: what runs together, in what order, and who suffers from whom."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch
import uvloop
from data_serving import (
    Gate,
    Model,
    Tensors,
    directory,
    failing,
    identity,
    json_request,
    serving,
    tensors,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.errors import BusyError, DeadlineError
from graphoptd.data import DataSettings, Signature
from graphoptd.data.batcher import Batcher, Outcome, Work
from graphoptd.data.statistics import ModelStatistics

LONG_S = 60.0


def on_loop(body: Callable[[], Awaitable[None]]) -> None:
    uvloop.run(asyncio.wait_for(body(), 60))  # type: ignore[arg-type]


def work(value: float, rows: int = 1, width: int = 2, key: tuple[Any, ...] | None = ("k",)) -> Work:
    x = torch.full((rows, width), float(value))
    return Work({"x": x}, rows, (*key, width) if key else None, x.nbytes)


def batcher_of(model: Model, **changes: object) -> Batcher:
    chosen = DataSettings(**changes)  # type: ignore[arg-type]
    return Batcher(model, chosen, ModelStatistics(), asyncio.get_running_loop())


async def entered(gate: Gate) -> None:
    """Until a run has begun."""
    assert await asyncio.get_running_loop().run_in_executor(None, gate.entered.acquire, True, 30)


@given(
    requests=st.lists(
        st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(0, 3)), min_size=1, max_size=40
    ),
    n_threads=st.integers(0, 3),
    batch_max=st.integers(1, 8),
    delay_us=st.sampled_from([0, 1000]),
)
@settings(max_examples=60, deadline=None)
def test_any_interleaving_gives_each_request_its_own_rows(
    requests: list[tuple[int, int, int]], n_threads: int, batch_max: int, delay_us: int
) -> None:
    async def body() -> None:
        model = identity(n_threads=n_threads)
        batcher = batcher_of(model, batch_max=batch_max, batch_delay_us=delay_us)

        async def one(index: int, rows: int, width: int, pause: int) -> None:
            for _ in range(pause):
                await asyncio.sleep(0)
            outcome = await batcher.enqueue(work(index, rows, width), LONG_S)
            assert torch.equal(outcome.outputs["y"], torch.full((rows, width), float(index)))

        await asyncio.gather(*[one(index, *request) for index, request in enumerate(requests)])
        assert batcher.is_idle()
        assert sum(model.batch_rows) == sum(rows for rows, _, _ in requests)
        largest = max(rows for rows, _, _ in requests)
        assert max(model.batch_rows) <= max(batch_max, largest)
        model.close()

    on_loop(body)


def test_an_idle_executor_never_waits_and_busy_ones_gather() -> None:
    async def body() -> None:
        gate = Gate()
        batcher = batcher_of(gate, batch_max=8, batch_delay_us=1000)
        first = batcher.enqueue(work(0), LONG_S)
        assert batcher.n_queued == 0, "the first request waited although nothing ran"
        await entered(gate)
        rest = [batcher.enqueue(work(i), LONG_S) for i in range(1, 20)]
        gate.opened.set()
        outcomes = await asyncio.gather(first, *rest)
        assert [float(outcome.outputs["y"][0, 0]) for outcome in outcomes] == list(range(20))
        assert gate.batch_rows[0] == 1
        assert sum(gate.batch_rows) == 20
        assert len(gate.batch_rows) == 4, "19 gathered requests fill three batches of eight"
        gate.close()

    on_loop(body)


def test_a_failing_request_does_not_fail_its_batch_mates() -> None:
    async def body() -> None:
        model = failing()
        blocker = Gate()
        batcher = batcher_of(blocker, batch_max=16)
        first = batcher.enqueue(work(1), LONG_S)
        await entered(blocker)
        batcher._served = model
        rest = [batcher.enqueue(work(value), LONG_S) for value in (2, 13, 3, 4)]
        blocker.opened.set()
        outcomes = await asyncio.gather(first, *rest, return_exceptions=True)
        failed = [i for i, outcome in enumerate(outcomes) if isinstance(outcome, BaseException)]
        assert failed == [2]
        assert [float(o.outputs["y"][0, 0]) for o in outcomes if isinstance(o, Outcome)] == [
            1,
            2,
            3,
            4,
        ]
        assert batcher._statistics.batches_retried == 1
        assert model.batch_rows == [4, 1, 1, 1, 1]
        blocker.close()
        model.close()

    on_loop(body)


def test_an_output_without_the_declared_rows_is_computed_singly() -> None:
    async def body() -> None:
        def mean(inputs: Tensors) -> Tensors:  # declared with a batch dim, but it mixes the rows
            blocker.wait(30)
            return {"y": inputs["x"].mean(0, keepdim=True)}

        import threading

        blocker = threading.Event()
        both = (
            tensors(("x", "FP32", [-1, -1]), batch=True),
            tensors(("y", "FP32", [-1, -1]), batch=True),
        )
        model = Model("mean", Signature(*both, 1), mean)
        batcher = batcher_of(model)
        futures = [batcher.enqueue(work(value), LONG_S) for value in (1, 2, 3)]
        blocker.set()
        outcomes = await asyncio.gather(*futures)
        assert [float(outcome.outputs["y"][0, 0]) for outcome in outcomes] == [1, 2, 3]
        model.close()

    on_loop(body)


def test_a_full_queue_refuses_the_next_and_forgets_nobody() -> None:
    async def body() -> None:
        gate = Gate()
        batcher = batcher_of(gate, queue_max=3, batch_max=1)
        futures = [batcher.enqueue(work(0), LONG_S)]
        await entered(gate)
        futures += [
            batcher.enqueue(work(i), LONG_S) for i in range(1, 5)
        ]  # one goes ahead, three wait
        with pytest.raises(BusyError, match="3 requests wait"):
            batcher.enqueue(work(9), LONG_S)
        gate.opened.set()
        assert len(await asyncio.gather(*futures)) == 5
        gate.close()

    on_loop(body)


@pytest.mark.parametrize(("of_all", "own"), [(9, 2), (1, 2)], ids=["fewer", "more"])
def test_what_a_model_says_of_its_queue_counts_more_than_what_is_said_of_all(
    of_all: int, own: int
) -> None:
    async def body() -> None:
        gate, other = Gate(), Gate("other")
        gate.own_queue_max = own
        one, two = (batcher_of(each, queue_max=of_all, batch_max=1) for each in (gate, other))
        futures = [one.enqueue(work(i), LONG_S) for i in range(2 + own)]
        with pytest.raises(BusyError, match=f"{own} requests wait"):
            one.enqueue(work(9), LONG_S)
        futures += [two.enqueue(work(i), LONG_S) for i in range(2 + of_all)]
        with pytest.raises(BusyError, match=f"{of_all} requests wait"):
            two.enqueue(work(9), LONG_S)
        gate.opened.set()
        other.opened.set()
        assert len(await asyncio.gather(*futures)) == 4 + own + of_all
        gate.close()
        other.close()

    on_loop(body)


def test_expired_and_cancelled_requests_never_run() -> None:
    async def body() -> None:
        gate = Gate()
        batcher = batcher_of(gate, batch_max=1)
        running = batcher.enqueue(work(0), LONG_S)
        ahead = batcher.enqueue(work(1), LONG_S)
        await entered(gate)
        expiring = batcher.enqueue(work(2), 0.005)
        leaving = batcher.enqueue(work(3), LONG_S)
        staying = batcher.enqueue(work(4), LONG_S)
        leaving.cancel()
        with pytest.raises(DeadlineError, match="deadline"):
            await expiring
        await asyncio.sleep(0)
        assert batcher.n_queued == 1
        gate.opened.set()
        await asyncio.gather(running, ahead, staying)
        assert len(gate.batch_rows) == 3
        assert batcher.is_idle()
        assert not batcher._groups
        assert not batcher._waiting
        gate.close()

    on_loop(body)


def test_a_run_that_hangs_is_answered_at_its_deadline() -> None:
    async def body() -> None:
        gate = Gate()
        batcher = batcher_of(gate)
        with pytest.raises(DeadlineError):
            await batcher.enqueue(work(0), 0.005)
        gate.opened.set()
        gate.close()

    on_loop(body)


def test_shapes_take_turns_so_that_none_starves() -> None:
    async def body() -> None:
        gate = Gate()
        batcher = batcher_of(gate, batch_max=2, batch_delay_us=0)
        order: list[int] = []

        def note(width: int) -> Callable[[object], None]:
            return lambda _: order.append(width)

        first = batcher.enqueue(work(0, width=9), LONG_S)
        await entered(gate)
        futures = [first]
        for width in (1, 1, 1, 1, 1, 1, 2, 3):
            future = batcher.enqueue(work(0, width=width), LONG_S)
            future.add_done_callback(note(width))
            futures.append(future)
        gate.opened.set()
        await asyncio.gather(*futures)
        assert order.index(2) < 5
        assert order.index(3) < 6
        gate.close()

    on_loop(body)


def test_large_requests_are_not_copied_together() -> None:
    async def body() -> None:
        gate = Gate()
        batcher = batcher_of(gate, batch_bytes_max=1024)
        futures = [batcher.enqueue(work(0), LONG_S)]
        await entered(gate)
        futures += [batcher.enqueue(work(1, width=200), LONG_S) for _ in range(3)]
        gate.opened.set()
        await asyncio.gather(*futures)
        assert gate.batch_rows == [1, 1, 1, 1]
        gate.close()

    on_loop(body)


def test_an_engine_that_is_busy_is_passed_on_as_503() -> None:
    model = identity()
    with serving(directory(model)) as running:
        model.refused = BusyError("the engine's queue is full", where="engine")
        reply = running.ask("POST", "/v2/models/identity/infer", json_request([1.0], [1, 1]))
        assert reply.status == 503
        assert reply.headers["retry-after"] == "1"
        assert reply.json["code"] == "busy"


def test_a_full_queue_and_a_timeout_are_503_over_http() -> None:
    gate = Gate()
    with serving(directory(gate), queue_max=1, batch_max=1) as running:
        from concurrent.futures import ThreadPoolExecutor

        def ask(timeout_us: int) -> int:
            request = json_request([1.0], [1, 1], parameters={"timeout": timeout_us})
            return running.ask("POST", "/v2/models/gate/infer", request).status

        with ThreadPoolExecutor(8) as pool:
            long = [pool.submit(ask, 0) for _ in range(4)]
            assert gate.entered.acquire(timeout=30)
            while running.server.plane.lanes.get("gate").batcher.n_queued == 0:
                pass
            refused = pool.submit(ask, 0)
            assert refused.result(30) == 503
            gate.opened.set()
            statuses = sorted(each.result(30) for each in long)
            assert statuses in ([200, 200, 200, 200], [200, 200, 200, 503])


def test_the_timeout_of_a_request_is_its_deadline() -> None:
    gate = Gate()
    with serving(directory(gate)) as running:
        request = json_request([1.0], [1, 1], parameters={"timeout": 5000})
        reply = running.ask("POST", "/v2/models/gate/infer", request)
        assert reply.status == 503
        assert reply.json["code"] == "deadline.exceeded"
