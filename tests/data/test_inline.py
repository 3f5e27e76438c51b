"""Quick runs on the event loop: who may, when no longer, and that nothing else changes by it."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import pytest
import torch
import uvloop
from data_serving import (
    Model,
    Running,
    Tensors,
    binary_request,
    directory,
    json_request,
    serving,
    tensors,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.errors import BusyError, DocumentError
from graphoptd.data import DataSettings, Signature, Timed
from graphoptd.data.batcher import Batcher, Work
from graphoptd.data.inline import ALONE_NS_MAX, AMONG_NS_MAX, HELD_NS_MAX, WINDOW_RUNS, InlineGate
from graphoptd.data.statistics import ModelStatistics

QUICK_NS = 5_000
REQUESTS_MAX = 20_000  # a busy host may disturb some windows, never all of these


def earn(gate: InlineGate, plan_id: str = "p", ns: int = QUICK_NS, wall_ns: int = 0) -> None:
    for _ in range(WINDOW_RUNS):
        gate.add_elsewhere(plan_id, "s", ns, wall_ns or ns)


def seen(plan_id: str = "p") -> InlineGate:
    gate = InlineGate()
    assert not gate.admits(plan_id, "s", True)
    return gate


# -- the rule


def test_a_shape_earns_the_loop_by_a_window_of_quick_runs_and_only_for_itself() -> None:
    gate = seen()
    for _ in range(WINDOW_RUNS - 1):
        gate.add_elsewhere("p", "s", QUICK_NS, QUICK_NS)
        assert not gate.admits("p", "s", True)
    gate.add_elsewhere("p", "s", QUICK_NS, QUICK_NS)
    assert gate.admits("p", "s", True)
    assert not gate.admits("p", "another shape", True)


def test_a_new_plan_earns_it_again_and_late_runs_of_the_old_one_do_not_count() -> None:
    gate = seen()
    earn(gate)
    assert not gate.admits("q", "s", True)
    earn(gate, "p")
    assert not gate.admits("q", "s", True)
    earn(gate, "q")
    assert gate.admits("q", "s", True)


def test_one_run_that_holds_the_loop_too_long_sends_the_shape_back_for_longer_each_time() -> None:
    gate = seen()
    earn(gate)
    rests = []
    for _ in range(10):
        gate.add_here("s", HELD_NS_MAX + 1)
        n_windows = 0
        while not gate.admits("p", "s", True):
            earn(gate)
            n_windows += 1
        rests.append(n_windows - 1)
    assert rests == [4, 8, 16, 32, 64, 128, 256, 256, 256, 256]


def test_a_run_that_was_dealt_to_a_plan_on_trial_ends_the_spell() -> None:
    gate = seen()
    earn(gate)
    gate.add_here("s", QUICK_NS, "p")
    assert gate.admits("p", "s", True)
    gate.add_here("s", QUICK_NS, "candidate")
    for _ in range(4 + 1):
        assert not gate.admits("p", "s", True)
        earn(gate, "candidate")  # says nothing of the published plan
        assert not gate.admits("p", "s", True)
        earn(gate)
    assert gate.admits("p", "s", True)


def test_a_good_spell_on_the_loop_makes_the_next_rest_short_again() -> None:
    gate = seen()
    earn(gate)
    for _ in range(2):
        gate.add_here("s", HELD_NS_MAX + 1)
        while not gate.admits("p", "s", True):
            earn(gate)
    for _ in range(16 * WINDOW_RUNS):
        gate.add_here("s", QUICK_NS)
    gate.add_here("s", HELD_NS_MAX + 1)
    for _ in range(4 + 1):
        assert not gate.admits("p", "s", True)
        earn(gate)
    assert gate.admits("p", "s", True)


def test_a_model_that_became_slow_without_a_single_long_run_goes_back() -> None:
    gate = seen()
    earn(gate)
    for _ in range(WINDOW_RUNS):
        assert gate.admits("p", "s", True)
        gate.add_here("s", ALONE_NS_MAX + 1)
    assert not gate.admits("p", "s", True)


def test_a_run_that_waits_for_other_threads_is_not_quick_although_it_takes_no_cpu() -> None:
    gate = seen()
    earn(gate, ns=QUICK_NS, wall_ns=ALONE_NS_MAX + 1)
    assert not gate.admits("p", "s", True)


def test_waiting_for_the_gil_does_not_make_a_run_slow() -> None:
    gate = seen()
    for i in range(WINDOW_RUNS):
        gate.add_elsewhere("p", "s", QUICK_NS, QUICK_NS if i == 3 else 5_000_000)
    assert gate.admits("p", "s", True)


def test_among_other_requests_only_the_shortest_runs_stay_on_the_loop() -> None:
    gate = seen()
    earn(gate, ns=AMONG_NS_MAX + 1)
    assert gate.admits("p", "s", True)
    assert not gate.admits("p", "s", False)
    for _ in range(WINDOW_RUNS):
        gate.add_here("s", AMONG_NS_MAX)
    assert gate.admits("p", "s", False)


@given(
    st.lists(st.integers(1, 2 * HELD_NS_MAX) | st.integers(1, ALONE_NS_MAX), max_size=600),
    st.integers(1, 2 * HELD_NS_MAX),
)
@settings(max_examples=60, deadline=None)
def test_runs_that_hold_the_loop_too_long_stay_rare_whatever_they_take(
    times_ns: list[int], last_ns: int
) -> None:
    gate = seen()
    n_since = 4 * WINDOW_RUNS  # runs elsewhere since the last long one here
    for ns in [*times_ns, last_ns]:
        if gate.admits("p", "s", True):
            gate.add_here("s", ns)
            if ns > HELD_NS_MAX:
                assert n_since >= 4 * WINDOW_RUNS
                n_since = 0
        else:
            gate.add_elsewhere("p", "s", ns, ns)
            n_since += 1


def test_another_choice_than_auto_and_never_is_refused() -> None:
    with pytest.raises(DocumentError, match="inline"):
        DataSettings(inline="always")  # type: ignore[arg-type]


# -- in the batcher, with times as the test says them


class Told(Model):
    """An identity whose runs on its thread are said to take `told_ns`."""

    told_ns = QUICK_NS

    def __init__(self, compute: Callable[[Tensors], Tensors] | None = None) -> None:
        both = (
            tensors(("x", "FP32", [-1, -1]), batch=True),
            tensors(("y", "FP32", [-1, -1]), batch=True),
        )
        super().__init__("told", Signature(*both, 1), compute or (lambda i: {"y": i["x"]}))
        self.blocked = threading.Event()
        self.blocked.set()
        self.entered = threading.Semaphore(0)

    def submit(self, inputs: Tensors) -> Future[Timed]:
        assert self._pool is not None

        def work() -> Timed:
            self.entered.release()
            assert self.blocked.wait(60)
            return Timed(self.run(inputs), self.told_ns, self.told_ns)

        return self._pool.submit(work)

    def close(self) -> None:
        self.blocked.set()
        super().close()


def work(value: float = 0.0) -> Work:
    x = torch.full((1, 2), value)
    return Work({"x": x}, 1, ("k", 2), x.nbytes)


async def until_here(model: Model, batcher: Batcher) -> None:
    for _ in range(REQUESTS_MAX):
        await batcher.enqueue(work(), 60.0)
        if model.ran_on[-1] == threading.get_ident():
            return
    raise AssertionError("no run was done on the loop")


def on_loop(
    body: Callable[[Told, Batcher], object], under_way: Sequence[int] = (), **changes: object
) -> None:
    async def run() -> None:
        model = Told()
        chosen = DataSettings(**changes)  # type: ignore[arg-type]
        loop = asyncio.get_running_loop()
        await body(model, Batcher(model, chosen, ModelStatistics(), loop, under_way))  # type: ignore[misc]
        model.close()

    uvloop.run(asyncio.wait_for(run(), 60))


def test_a_run_on_the_loop_is_over_when_it_is_queued_and_is_counted() -> None:
    async def body(model: Told, batcher: Batcher) -> None:
        await until_here(model, batcher)
        while True:
            future = batcher.enqueue(work(3.0), 60.0)
            if future.done():
                break
            await future
        assert float(future.result().outputs["y"][0, 0]) == 3.0
        assert batcher.is_idle()
        assert batcher._statistics.executions == len(model.batch_rows)
        assert not batcher._waiting

    on_loop(body)


def test_with_inline_never_all_runs_are_the_executors() -> None:
    async def body(model: Told, batcher: Batcher) -> None:
        for _ in range(10 * WINDOW_RUNS):
            await batcher.enqueue(work(), 60.0)
        assert threading.get_ident() not in model.ran_on

    on_loop(body, inline="never")


def test_runs_that_could_share_a_batch_are_the_executors() -> None:
    async def body(model: Told, batcher: Batcher) -> None:
        model.told_ns = AMONG_NS_MAX + 1
        for _ in range(10 * WINDOW_RUNS):
            await batcher.enqueue(work(), 60.0)
        assert threading.get_ident() not in model.ran_on

    on_loop(body, under_way=(1, 2))


def test_while_an_executor_runs_the_model_quick_requests_queue_up_to_the_bound() -> None:
    async def body(model: Told, batcher: Batcher) -> None:
        await until_here(model, batcher)
        model.set_revision(2)  # a new plan: the next run is an executor's, and held there
        model.blocked.clear()
        n_before = len(model.ran_on)
        futures = [batcher.enqueue(work(i), 60.0) for i in range(5)]
        assert not any(future.done() for future in futures)
        with pytest.raises(BusyError, match="3 requests wait"):
            batcher.enqueue(work(), 60.0)
        model.blocked.set()
        outcomes = await asyncio.gather(*futures)
        assert [float(outcome.outputs["y"][0, 0]) for outcome in outcomes] == [0, 1, 2, 3, 4]
        assert threading.get_ident() not in model.ran_on[n_before:]

    on_loop(body, queue_max=3, batch_max=1)


# -- in a server


def loop_thread(running: Running) -> int:
    async def ident() -> int:
        return threading.get_ident()

    return int(running.call(ident()))


def exchange(connection: socket.socket, requests: int = 1, x: float = 1.0) -> bytes:
    """As many equal requests in one packet; the answers."""
    body, headers = binary_request(torch.full((1, 4), x))
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    request = (
        f"POST /v2/models/told/infer HTTP/1.1\r\nHost: h\r\n{head}Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    connection.sendall(request * requests)
    answers = b""
    while answers.count(b"HTTP/1.1 ") < requests or not answers.endswith(
        torch.full((1, 4), x).numpy().tobytes()
    ):
        part = connection.recv(1 << 16)
        assert part, answers
        answers += part
    return answers


def until_served_here(running: Running, model: Model) -> None:
    """Ask until a request is run on the loop."""
    loop = loop_thread(running)
    with running.connect() as connection:
        for _ in range(REQUESTS_MAX):
            exchange(connection)
            if model.ran_on[-1] == loop:
                return
    raise AssertionError("no run was done on the loop")


def test_a_model_earns_the_loop_by_serving_and_a_new_revision_earns_it_again() -> None:
    model = Told()
    with serving(directory(model)) as running:
        until_served_here(running, model)
        model.set_revision(2)
        with running.connect() as connection:
            exchange(connection)
        assert model.ran_on[-1] != loop_thread(running)
        until_served_here(running, model)


def test_requests_in_one_packet_are_answered_in_order_by_runs_on_the_loop() -> None:
    model = Told()
    with serving(directory(model)) as running:
        until_served_here(running, model)
        with running.connect() as connection:
            answers = exchange(connection, requests=20, x=7.0)
        assert answers.count(b"HTTP/1.1 200") == 20


def spin_over(deadline_s: float) -> None:
    end_s = time.perf_counter() + deadline_s
    while time.perf_counter() < end_s:
        pass


def test_a_run_on_the_loop_that_outlasts_its_deadline_is_503_and_the_next_are_the_executors() -> (
    None
):
    def compute(inputs: Tensors) -> Tensors:
        if inputs["x"][0, 0] == 13:
            spin_over(0.02)
        return {"y": inputs["x"]}

    model = Told(compute)
    with serving(directory(model)) as running:
        until_served_here(running, model)
        shape = [1, 4]  # as `exchange` asks
        slow = json_request([13.0] * 4, shape, parameters={"timeout": 2000})
        for _ in range(REQUESTS_MAX):  # the request above may have been the last on the loop
            reply = running.ask("POST", "/v2/models/told/infer", slow)
            if model.ran_on[-1] == loop_thread(running):
                break
            until_served_here(running, model)
        assert reply.status == 503
        assert reply.json["code"] == "deadline.exceeded"
        with running.connect() as connection:
            for _ in range(WINDOW_RUNS):
                exchange(connection)
        assert loop_thread(running) not in model.ran_on[-WINDOW_RUNS:]


def test_a_run_that_fails_on_the_loop_fails_its_request_and_no_other() -> None:
    def compute(inputs: Tensors) -> Tensors:
        if inputs["x"][0, 0] == 13:
            raise RuntimeError("a secret from inside the model")
        return {"y": inputs["x"]}

    model = Told(compute)
    with serving(directory(model)) as running:
        until_served_here(running, model)
        bad = json_request([13.0] * 4, [1, 4])
        for _ in range(REQUESTS_MAX):
            reply = running.ask("POST", "/v2/models/told/infer", bad)
            assert reply.status == 500
            assert b"secret" not in reply.body
            if model.ran_on[-1] == loop_thread(running):
                break
            until_served_here(running, model)
        assert model.ran_on[-1] == loop_thread(running)
        with running.connect() as connection:
            assert exchange(connection).startswith(b"HTTP/1.1 200")


def test_a_stop_during_a_run_on_the_loop_lets_its_answer_out() -> None:
    entered, go_on = threading.Event(), threading.Event()
    holds = threading.Event()

    def compute(inputs: Tensors) -> Tensors:
        if holds.is_set():
            entered.set()
            assert go_on.wait(60)
        return {"y": inputs["x"]}

    model = Told(compute)
    with serving(directory(model)) as running:
        until_served_here(running, model)
        loop = loop_thread(running)
        holds.set()
        answered: Future[bytes] = Future()

        def ask() -> None:
            with running.connect() as connection:
                answered.set_result(exchange(connection))
                assert connection.recv(1) == b"", "the connection outlived the stop"

        asking = threading.Thread(target=ask)
        asking.start()
        assert entered.wait(30)
        stopping = asyncio.run_coroutine_threadsafe(running.server.stop(), running.loop)
        go_on.set()
        assert stopping.result(30).n_aborted == 0
        assert answered.result(30).startswith(b"HTTP/1.1 200")
        asking.join(30)
        assert loop in model.ran_on


def test_a_client_that_leaves_during_a_run_on_the_loop_leaves_nothing_behind() -> None:
    entered, go_on = threading.Event(), threading.Event()
    holds = threading.Event()

    def compute(inputs: Tensors) -> Tensors:
        if holds.is_set():
            holds.clear()
            entered.set()
            assert go_on.wait(60)
        return {"y": inputs["x"]}

    model = Told(compute)
    with serving(directory(model)) as running:
        until_served_here(running, model)
        holds.set()
        body, headers = binary_request(torch.ones(1, 4))
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        leaving = running.connect()
        leaving.sendall(
            f"POST /v2/models/told/infer HTTP/1.1\r\nHost: h\r\n{head}"
            f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        assert entered.wait(30)
        leaving.close()
        go_on.set()
        with running.connect() as connection:
            assert exchange(connection).startswith(b"HTTP/1.1 200")
        plane = running.server.plane
        assert plane.lanes.get("told").batcher.is_idle()
        assert plane.budget.used_bytes == 0
