"""Tensors as constants: content hashes, and the names torch gives dtypes and memory formats."""

from hashlib import sha256

import torch

from graphopt.graph import Constant
from graphopt.types import CONTIGUOUS, DTYPES, STRIDED, Layout, TensorType

TORCH_DTYPES: dict[str, torch.dtype] = {
    short: getattr(torch, long) for short, long in DTYPES.items()
}
SHORT_DTYPES: dict[torch.dtype, str] = {dtype: short for short, dtype in TORCH_DTYPES.items()}


def constant_of(
    tensor: torch.Tensor, *, is_param: bool = False, digest: str | None = None
) -> Constant:
    """The constant that holds `tensor`, made contiguous and cut loose from autograd.

    Shares memory where it can.

    `digest` spares the hashing when the caller has it already. The tensor must not be written to
    afterwards.
    """
    data = tensor.detach().contiguous()
    type_ = TensorType(SHORT_DTYPES[data.dtype], tuple(data.shape))
    return Constant(digest or tensor_digest(data), type_, is_param, data)


def tensor_digest(tensor: torch.Tensor) -> str:
    """The SHA-256 of a contiguous tensor: dtype, shape and bytes."""
    hasher = sha256(f"{SHORT_DTYPES[tensor.dtype]}{list(tensor.shape)}".encode())
    if tensor.numel():
        hasher.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def layout_of(tensor: torch.Tensor) -> Layout:
    """How a (meta) tensor's dims lie in memory: see `graphopt.types`."""
    if tensor.is_contiguous():
        return CONTIGUOUS
    strides, shape = tensor.stride(), tensor.shape
    order = tuple(sorted(range(len(shape)), key=lambda d: (-strides[d], d)))
    expected = 1
    for dim in reversed(order):
        if shape[dim] != 1 and strides[dim] != expected:
            return STRIDED
        expected *= shape[dim]
    return order
