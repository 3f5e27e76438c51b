"""A run on the event loop gives the bits that an executor thread gives, on the real engine."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing
from typing import Any

import pytest
import torch

from graphopt.delta import AddNode, Delta, SetOutputs
from graphopt.dims import symbol
from graphopt.engine import EngineSettings, Host
from graphopt.graph import Graph, Ref, Symbol
from graphopt.nodes import make_node
from graphopt.types import TensorType
from graphoptd.directory import HostDirectory, Hosted


@pytest.fixture
def host() -> Iterator[Host]:
    with closing(Host(EngineSettings(threads=1, intra_op=2, improve=False))) as host:
        host.load(sums())
        # torch takes a thread's count over from whoever set one last, until the thread asks for it.
        host.threads.submit(torch.get_num_threads).result()
        host.threads.submit(lambda: torch.set_num_threads(2)).result()
        yield host


def sums() -> Graph:
    nodes = [make_node("total", "aten.sum.default", [Ref("x")])]
    inputs = [("x", TensorType("f32", (symbol("n"),)))]
    return Graph.build("sums", nodes, inputs, [("y", Ref("total"))], {}, symbols=[Symbol("n")])


def hosted(host: Host) -> Hosted:
    found = HostDirectory(host, lambda: None).find("sums")
    assert found is not None
    return found


def on_thread_with_one(call: Callable[[], Any]) -> Any:
    """`call()` on a thread that torch has been told to use alone, as somebody might on the loop's."""
    done: Future[Any] = Future()

    def work() -> None:
        assert torch.get_num_threads() > 0
        torch.set_num_threads(1)
        try:
            done.set_result(call())
        except BaseException as error:
            done.set_exception(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return done.result()


def test_a_split_sum_has_the_same_bits_wherever_it_runs(host: Host) -> None:
    model = hosted(host)
    generator = torch.Generator().manual_seed(7)
    n_split = 0  # sums whose bits show that two threads made them
    for size in (1_000, 40_000, 300_000):
        for _ in range(5):
            x = torch.randn(size, generator=generator)
            there = model.submit({"x": x}).result().result
            here = on_thread_with_one(lambda x=x: model.run({"x": x}))
            alone = on_thread_with_one(lambda x=x: x.sum())
            n_split += not torch.equal(alone, there.outputs["y"])
            assert torch.equal(here.outputs["y"], there.outputs["y"])
            assert (here.revision, here.plan_id) == (there.revision, there.plan_id)
    assert n_split, "no sum was split, so nothing was shown"


def test_the_plan_id_is_that_of_the_next_run_also_after_a_delta(host: Host) -> None:
    model = hosted(host)
    x = {"x": torch.ones(4)}
    first = model.plan_id()
    assert model.run(x).plan_id == first
    edits = [
        AddNode("negated", "aten.neg.default", (Ref("total"),)),
        SetOutputs((("y", Ref("negated")),)),
    ]
    host.get("sums").apply(Delta(edits))
    assert model.plan_id() != first
    result = model.run(x)
    assert result.plan_id == model.plan_id()
    assert result.outputs["y"] == -4


def test_what_a_run_took_on_its_thread_comes_with_it(host: Host) -> None:
    took = hosted(host).submit({"x": torch.ones(100_000)}).result()
    assert took.cpu_ns > 0
    assert took.wall_ns > 0
    assert took.result.outputs["y"] == 100_000
