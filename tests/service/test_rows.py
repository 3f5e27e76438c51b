"""Requests share a batch only where the graph proves that rows do not meet."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.export import Dim

from graphopt.analysis.facts import analyse
from graphopt.frontend.torch_export import from_torch
from graphoptd.rows import RowProof
from helpers.graphs import transformer

Function = Callable[[Tensor], Tensor]
WEIGHT = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))


class Module(torch.nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


APART: dict[str, Function] = {
    "elementwise": lambda x: torch.relu(x) * 2 + x.sigmoid(),
    "against one row": lambda x: x + WEIGHT[:1],
    "linear": lambda x: x @ WEIGHT,
    "softmax of each row": lambda x: x.softmax(-1),
    "mean of each row": lambda x: x - x.mean(-1, keepdim=True),
    "merged and split": lambda x: (x.reshape(-1, 2) @ WEIGHT[:2, :2]).reshape(-1, 6),
    "heads": lambda x: x.view(-1, 2, 3).transpose(1, 2).reshape(-1, 6),
    "row by row products": lambda x: torch.bmm(x[:, :, None], x[:, None, :]).sum(-1),
    "the same for each row": lambda x: x + WEIGHT[0].expand(x.shape[0], 6),
    "numbered rows of the same": lambda x: x[
        torch.arange(x.shape[0])[:, None], torch.tensor([[1, 0]])
    ],
}
MEETING: dict[str, Function] = {
    "softmax over the batch": lambda x: x.softmax(0),
    "centred on the batch": lambda x: x - x.mean(0),
    "attention between rows": lambda x: x @ x.T @ x,
    "running sum": lambda x: x.cumsum(0),
    "turned over": lambda x: x.flip(0),
    "divided by the batch size": lambda x: x / x.shape[0],
    "plus the row's number": lambda x: x + torch.arange(x.shape[0])[:, None],
    "the first row for all": lambda x: x + x[:1],
    "sorted by column": lambda x: x.sort(0).values,
    "other rows by number": lambda x: x[
        (torch.arange(x.shape[0]) * 0)[:, None], torch.tensor([[1, 0]])
    ],
}


def batch_symbol(function: Function) -> str | None:
    shapes = {"x": {0: Dim("batch", min=1, max=64)}}
    graph = from_torch(Module(function), (torch.ones(2, 6),), shapes, name="m")
    return RowProof().batch_symbol(analyse(graph))


@pytest.mark.parametrize("name", APART)
def test_rows_that_stay_apart_are_batched_and_do_stay_apart(name: str) -> None:
    function = APART[name]
    assert batch_symbol(function) == "batch"
    a, b = torch.randn(3, 6), torch.randn(2, 6)
    together = function(torch.cat([a, b]))
    torch.testing.assert_close(together, torch.cat([function(a), function(b)]))


@pytest.mark.parametrize("name", MEETING)
def test_rows_that_meet_are_never_batched(name: str) -> None:
    assert batch_symbol(MEETING[name]) is None


def test_an_encoder_with_mask_and_positions_is_batched() -> None:
    assert RowProof().batch_symbol(analyse(transformer(2))) == "batch"
