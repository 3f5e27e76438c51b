"""Memory of results is used again only when nobody can see it any more."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch

from graphopt.executor.backends import outputs
from graphopt.executor.backends.outputs import KEPT, Outputs

SHAPE = (4, 50_000)

HOLD: dict[str, Callable[[torch.Tensor], object]] = {
    "the tensor": lambda out: out,
    "a view": lambda out: out[1:, ::2],
    "an alias": lambda out: out.detach(),
    "an array": lambda out: out.numpy(),
    "a part of an array": lambda out: out.numpy()[2],
    "a buffer": lambda out: memoryview(out.numpy()),
    "a capsule": np.from_dlpack,
    "the storage": lambda out: out.untyped_storage(),
}


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def test_what_was_let_go_is_used_again() -> None:
    results = Outputs(torch.float32)
    assert len({results.take(SHAPE).data_ptr() for _ in range(10)}) == 1


def test_a_caller_who_keeps_the_last_result_alternates() -> None:
    results, seen = Outputs(torch.float32), []
    last = None
    for _ in range(10):
        last = results.take(SHAPE)
        seen.append(last.data_ptr())
    assert last is not None
    assert len(set(seen)) == KEPT
    assert all(a != b for a, b in itertools.pairwise(seen))


@pytest.mark.parametrize("hold", HOLD.values(), ids=HOLD.keys())
def test_what_anybody_holds_is_left_alone(hold: Callable[[torch.Tensor], object]) -> None:
    results = Outputs(torch.float32)
    results.take(SHAPE)  # its own first memory is free again
    out = results.take(SHAPE)
    place = out.data_ptr()
    held = hold(out)
    del out
    assert all(results.take(SHAPE).data_ptr() != place for _ in range(5))
    del held


def test_another_shape_gets_memory_of_its_own() -> None:
    results = Outputs(torch.float32)
    small, large = results.take((2, 3)), results.take((5, 7))
    assert (small.shape, large.shape) == ((2, 3), (5, 7))
    assert small.data_ptr() != large.data_ptr()


def test_huge_results_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "BYTES_MAX", 100)
    results = Outputs(torch.float32)
    results.take(SHAPE)
    assert results._kept == []
