"""Memory of results is used again only when nobody can see it any more."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from graphopt.executor.backends import outputs
from graphopt.executor.backends.outputs import SHAPES_KEPT, Outputs

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


@pytest.mark.parametrize("is_fixed", [True, False])
def test_what_was_let_go_is_used_again(*, is_fixed: bool) -> None:
    results = Outputs(torch.float32, is_fixed=is_fixed)
    assert len({results.take(SHAPE).data_ptr() for _ in range(10)}) == 1


def test_whether_the_last_result_is_held_can_be_asked() -> None:
    results = Outputs(torch.float32, is_fixed=True)
    assert results.is_free()
    out = results.take(SHAPE)
    assert not results.is_free()
    del out
    assert results.is_free()


def test_shapes_that_alternate_keep_their_memory() -> None:
    results = Outputs(torch.float32, is_fixed=False)
    shapes = [(i + 1, 50_000) for i in range(SHAPES_KEPT)] * 5
    assert len({results.take(shape).data_ptr() for shape in shapes}) == SHAPES_KEPT


@pytest.mark.parametrize("hold", HOLD.values(), ids=HOLD.keys())
def test_what_anybody_holds_is_left_alone(hold: Callable[[torch.Tensor], object]) -> None:
    results = Outputs(torch.float32, is_fixed=True)
    results.take(SHAPE)  # its own first memory is free again
    out = results.take(SHAPE)
    place = out.data_ptr()
    held = hold(out)
    del out
    assert all(results.take(SHAPE).data_ptr() != place for _ in range(5))
    del held


def test_another_shape_gets_memory_of_its_own() -> None:
    results = Outputs(torch.float32, is_fixed=False)
    small, large = results.take((2, 3)), results.take((5, 7))
    assert (small.shape, large.shape) == ((2, 3), (5, 7))
    assert small.data_ptr() != large.data_ptr()


def test_huge_results_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "BYTES_MAX", 100)
    results = Outputs(torch.float32, is_fixed=False)
    results.take(SHAPE)
    assert results._kept == []
