"""Memory for large results, used again when nobody holds the last one.

Fresh memory costs a page fault for every 4 KiB: 0.6 ms for the 13 MB of a language model's logits.
torch keeps no freed CPU memory, so results are kept here and handed out under a new name each time.
One is free again when nothing but this module refers to its storage: no tensor, no view, no array or
buffer made of one, and no storage object.
"""

import sys
from typing import Any

import torch

SHAPES_KEPT = 2  # of one exit of one lane, where its shape varies
BYTES_MAX = 64 << 20  # of one result; above it the kernel's work is small beside the model's


class _Kept:
    """A result's memory and how often it is referred to while it is free."""

    __slots__ = ("_count", "_references", "_storage", "shape", "tensor")

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape = shape
        self.tensor = torch.empty(shape, dtype=dtype)
        self._storage: Any = self.tensor.untyped_storage()
        self._count = _uses(self._storage._cdata)
        self._references = sys.getrefcount(self._storage)

    def is_free(self) -> bool:
        return (
            _uses(self._storage._cdata) == self._count
            and sys.getrefcount(self._storage) == self._references
        )


class Outputs:
    """The results of one exit of one lane; not for several threads at once."""

    __slots__ = ("_dtype", "_kept", "_most")

    def __init__(self, dtype: torch.dtype, *, is_fixed: bool) -> None:
        """`is_fixed`: all results have one shape."""
        self._dtype = dtype
        self._most = 1 if is_fixed else SHAPES_KEPT
        self._kept: list[_Kept] = []  # what was handed out last is the first

    def is_free(self) -> bool:
        """Whether nobody holds the last result, so that one of its shape lies where it lay."""
        return not self._kept or self._kept[0].is_free()

    def take(self, shape: tuple[int, ...]) -> torch.Tensor:
        """An uninitialised contiguous tensor of its own, as far as anybody can tell."""
        for i, kept in enumerate(self._kept):
            if kept.shape == shape and kept.is_free():
                if i:
                    self._kept.insert(0, self._kept.pop(i))
                return kept.tensor.detach()
        new = _Kept(shape, self._dtype)
        if new.tensor.nbytes <= BYTES_MAX:
            self._kept = [new, *self._kept[: self._most - 1]]
        return new.tensor.detach()


def _uses(storage: int) -> int:
    """How many tensors (and, once it was asked for, storage objects) share a storage."""
    count: int = torch._C._storage_Use_Count(storage)
    return count
