"""What cannot be a graph is refused with the op and the module's path."""

import pytest
import torch
from torch import nn

from graphopt.errors import ImportRefusedError
from graphopt.frontend.torch_export import from_torch


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        self.seen.add_(1)
        return x + self.seen


class WritesInput(nn.Module):
    def forward(self, x):
        return x.add_(1) * 2


class Chosen(nn.Module):
    def forward(self, x):
        return x[x.nonzero()[:, 0]]


class Masked(nn.Module):
    def forward(self, x):
        return x[x > 0]


class Branch(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x - 1


class Conditional(nn.Module):
    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,))


class Random(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


class Loaded(nn.Module):
    def forward(self, x):
        return x, x.shape[0]


class Half(nn.Module):
    def forward(self, x):
        return x * (x.shape[0] ** 0.5)


@pytest.mark.parametrize(
    ("module", "place", "reason"),
    [
        (Counter(), "aten.add.Tensor in part.inner", "writes into the buffer part.inner.seen"),
        (WritesInput(), "aten.add.Tensor in part.inner", "writes into its input"),
        (Chosen(), "aten.nonzero.default in part.inner", "depends on tensor contents"),
        (Masked(), "aten.index.Tensor in part.inner", "depends on tensor contents"),
        (Branch(), "in part.inner", "branch depends on tensor contents"),
        (Conditional(), "higher_order.cond.default in part.inner", "higher-order op cond"),
        (Random(), "aten.rand_like.default in part.inner", "random"),
        (Loaded(), "output_1", "is not a tensor"),
        (Half(), "in part.inner", "not arithmetic on whole sizes"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_refusals_name_op_and_module_path(module, place, reason, capfd):
    part = nn.Sequential()
    part.add_module("inner", module)
    root = nn.Sequential()
    root.add_module("part", part)
    with pytest.raises(ImportRefusedError) as refusal:
        from_torch(root, torch.randn(3, 4), "batch")
    assert place in refusal.value.where
    assert reason in refusal.value.message
    assert refusal.value.remedy
    assert capfd.readouterr().out == ""


def test_a_branch_is_refused_with_the_line_of_the_model():
    with pytest.raises(ImportRefusedError, match=r"test_import_refusals\.py:\d+"):
        from_torch(Branch(), torch.randn(3, 4), "batch")


def test_what_nothing_needs_refuses_nothing():
    class Unused(nn.Module):
        def forward(self, x):
            torch.rand_like(x)
            x.shape[0] / 2
            return x + 1

    assert len(from_torch(Unused(), torch.randn(3), "batch")) == 1


def test_a_dim_that_the_model_fixes_is_refused_with_torchs_reason():
    class Fixed(nn.Module):
        def forward(self, x):
            return x + torch.ones(3, 4)

    with pytest.raises(ImportRefusedError, match="batch") as refusal:
        from_torch(Fixed(), torch.randn(3, 4), "batch")
    assert refusal.value.where == "dynamic_shapes"
    assert "batch = 3" in refusal.value.remedy


def test_relations_between_dims_and_dynamic_keyword_rests_are_refused():
    class Rest(nn.Module):
        def forward(self, x, **rest):
            return x + rest["y"]

    x = torch.randn(4, 4)
    with pytest.raises(ImportRefusedError, match="not a polynomial"):
        from_torch(nn.ReLU(), (x,), ({0: 2 * torch.export.Dim("half")},))
    with pytest.raises(ImportRefusedError, match=r"as \*\*rest"):
        from_torch(Rest(), {"x": x, "y": x}, "batch")
    assert len(from_torch(Rest(), {"x": x, "y": x}).inputs) == 2


@pytest.mark.parametrize(
    ("examples", "shapes", "where"),
    [
        ((torch.ones(2), torch.ones(2)), None, "example_inputs"),
        ({"y": torch.ones(2)}, None, "example_inputs"),
        (torch.ones(2, 4), {"y": {0: "batch"}}, "dynamic_shapes"),
        (torch.ones(2, 4), "no name", "dynamic_shapes"),
        (torch.ones(2, 4), 3, "dynamic_shapes"),
    ],
)
def test_examples_and_shapes_that_do_not_fit_are_refused(examples, shapes, where):
    with pytest.raises(ImportRefusedError) as refusal:
        from_torch(nn.Linear(4, 2), examples, shapes)
    assert refusal.value.where == where


def test_a_module_that_fails_on_its_examples_is_refused_with_the_path():
    with pytest.raises(ImportRefusedError) as refusal:
        from_torch(nn.Sequential(nn.ReLU(), nn.Linear(4, 2)), torch.randn(2, 5))
    assert "in 1" in refusal.value.where
