"""The tensor types of the protocol: their names, and what torch, JSON and a model configuration call them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class Datatype:
    """One tensor type.

    Attributes:
        name: as on the wire.
        torch_dtype: the same in torch.
        size_bytes: of one element.
        array_code: `array.array` type that JSON numbers are collected in; empty where the protocol
            has no JSON form.
        array_dtype: the same in numpy; None where it has none, and for BOOL, whose bytes are checked.
        kind: `bool`, `int` or `float`.
    """

    name: str
    torch_dtype: torch.dtype
    size_bytes: int
    array_code: str
    kind: str
    array_dtype: "np.dtype[Any] | None" = None

    @property
    def config_name(self) -> str:
        """As a Triton model configuration writes it."""
        return f"TYPE_{self.name}"


DATATYPES: dict[str, Datatype] = {
    datatype.name: datatype
    for datatype in (
        Datatype("BOOL", torch.bool, 1, "B", "bool"),
        Datatype("UINT8", torch.uint8, 1, "B", "int", np.dtype("u1")),
        Datatype("UINT16", torch.uint16, 2, "H", "int", np.dtype("u2")),
        Datatype("UINT32", torch.uint32, 4, "I", "int", np.dtype("u4")),
        Datatype("UINT64", torch.uint64, 8, "Q", "int", np.dtype("u8")),
        Datatype("INT8", torch.int8, 1, "b", "int", np.dtype("i1")),
        Datatype("INT16", torch.int16, 2, "h", "int", np.dtype("i2")),
        Datatype("INT32", torch.int32, 4, "i", "int", np.dtype("i4")),
        Datatype("INT64", torch.int64, 8, "q", "int", np.dtype("i8")),
        # The protocol gives 16-bit floats no JSON form: they travel as binary only.
        Datatype("FP16", torch.float16, 2, "", "float", np.dtype("f2")),
        Datatype("BF16", torch.bfloat16, 2, "", "float"),
        Datatype("FP32", torch.float32, 4, "f", "float", np.dtype("f4")),
        Datatype("FP64", torch.float64, 8, "d", "float", np.dtype("f8")),
    )
}

BY_TORCH_DTYPE: dict[torch.dtype, Datatype] = {
    entry.torch_dtype: entry for entry in DATATYPES.values()
}
