"""The requests that are kept to prove candidates on: some of every shape, and the same ones ever longer."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from graphopt.analysis.facts import analyse
from graphopt.engine.captured import BUCKETS_KEPT, PER_BUCKET, Captured
from graphopt.executor.build import EagerBuilder, build_plan
from helpers.graphs import transformer

PLAN = build_plan(analyse(transformer(1)), 1, EagerBuilder())


def request(batch: int, seq: int) -> dict[str, torch.Tensor]:
    ids = torch.zeros(batch, seq, dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(2, 6)), max_size=80))
def test_what_is_kept_are_requests_under_their_own_shape_within_bounds(
    shapes: list[tuple[int, int]],
):
    captured = Captured()
    sent = [request(*shape) for shape in shapes]
    for each in sent:
        captured.add(each)
        captured.collect(PLAN)
    kept = captured.collect(PLAN)
    assert len(kept) <= BUCKETS_KEPT
    if shapes:
        assert (
            shapes[-1] in kept
        )  # what is asked for now is not lost to what was asked for long ago
    for bucket, row in kept.items():
        assert len(row) == min(PER_BUCKET, shapes.count(bucket)) or len(set(shapes)) > BUCKETS_KEPT
        for inputs in row:
            assert any(inputs is each for each in sent)
            assert tuple(inputs["input_ids"].shape) == bucket


def test_the_longer_the_traffic_the_longer_the_same_ones_stay():
    captured, last, changes = Captured(), [], []
    for i in range(10_000):
        captured.add(request(1, 4))
        (row,) = captured.collect(PLAN).values()
        if [id(each) for each in row] != [id(each) for each in last]:
            changes.append(i)
        last = row
    assert len(changes) < 60  # 2 ln(10,000) = 18 are to be expected
    assert changes[-1] > 100  # and later ones still have their chance


def test_requests_of_an_interface_that_is_gone_are_let_go():
    captured = Captured()
    captured.add({"other": torch.zeros(1)})
    captured.add(request(1, 4))
    assert set(captured.collect(PLAN)) == {(1, 4)}
