"""Tensors out of a request: where their bytes or numbers are, and whether they fit the declared shape.

Binary tensors are views of the body, never copied; the body is laid out so that they start aligned.
"""

from math import prod
from typing import Any

import numpy as np
import torch

from graphopt.errors import RequestError
from graphoptd.data import jsontext
from graphoptd.data.datatypes import DATATYPES, Datatype
from graphoptd.data.fields import refuse
from graphoptd.data.served import TensorSpec

RANK_MAX = 32  # torch's iterators stop at 64; models have at most 6
_DIM_MAX = (
    1 << 40
)  # elements; far above any body, and products of RANK_MAX of them stay cheap integers
_ALIGN_BYTES = 16  # what malloc gives a bytearray, and the widest element we have is 8


class Body:
    """A whole request body: its JSON, and the binary part in a buffer of its own, aligned for tensors."""

    __slots__ = ("binary", "binary_offset", "json", "raw")

    def __init__(self, content: bytes, header_length: bytes | None) -> None:
        """Split at `header_length`, the value of Inference-Header-Content-Length.

        Raises:
            RequestError: the header is not a number or lies beyond the body.
        """
        self.raw = False
        if header_length is None:
            self.json, self.binary, self.binary_offset = content, bytearray(), 0
            return
        if (
            not header_length.isdigit()
            or len(header_length) > 10
            or int(header_length) > len(content)
        ):
            raise RequestError(
                f"{header_length[:32].decode('latin-1')!r} is no length within {len(content)} bytes",
                where="Inference-Header-Content-Length",
                remedy="send the length of the JSON part, before compression",
            )
        n_json = int(header_length)
        self.raw = n_json == 0
        self.json = content[:n_json]
        # The pad makes the binary part start aligned after JSON of any length; one copy, which also
        # makes it writable for torch and independent of the HTTP layer's buffer.
        pad = -n_json % _ALIGN_BYTES
        self.binary = bytearray().join((bytes(pad), content))
        self.binary_offset = pad + n_json


def read_datatype(value: Any, spec: TensorSpec, where: str) -> Datatype:
    """The input's type, which the request must repeat; raises RequestError."""
    if value != spec.datatype:
        raise RequestError(
            f"datatype {value!r}, but input {spec.name!r} is {spec.datatype}",
            where=f"{where}.datatype",
            remedy=f"convert the tensor to {spec.datatype}",
        )
    return DATATYPES[spec.datatype]


def read_shape(value: Any, spec: TensorSpec, where: str) -> tuple[int, ...]:
    """A shape that fits the input; raises RequestError."""
    where = f"{where}.shape"
    if not isinstance(value, list):
        refuse("it", "a list of sizes", where)
    if len(value) > RANK_MAX or any(type(n) is not int or not 0 <= n <= _DIM_MAX for n in value):
        refuse("it", f"at most {RANK_MAX} sizes from 0", where)
    shape = tuple(value)
    if len(shape) != len(spec.shape) or any(
        want not in (-1, got) for got, want in zip(shape, spec.shape, strict=True)
    ):
        raise RequestError(
            f"shape {list(shape)}, but input {spec.name!r} takes {list(spec.shape)} (-1 is any size)",
            where=where,
            remedy="reshape the tensor",
        )
    if spec.batch_dim and shape[0] == 0:
        raise RequestError("an empty batch", where=where, remedy="send at least one row")
    return shape


def read_binary(
    buffer: bytearray,
    offset: int,
    size: Any,
    datatype: Datatype,
    shape: tuple[int, ...],
    where: str,
) -> torch.Tensor:
    """The tensor of `size` bytes at `offset`; raises RequestError."""
    where = f"{where}.parameters.binary_data_size"
    if type(size) is not int or size < 0:
        refuse("it", "a number of bytes", where)
    if offset + size > len(buffer):
        raise RequestError(
            f"{size} bytes, but only {max(len(buffer) - offset, 0)} are left in the body",
            where=where,
            remedy="append the tensor's bytes, and send Inference-Header-Content-Length",
        )
    check_size(size, datatype, shape, where)
    return view_of(buffer, offset, datatype, shape, where)


def check_size(size: int, datatype: Datatype, shape: tuple[int, ...], where: str) -> None:
    """Raises RequestError when `size` bytes are not exactly the tensor."""
    if size != prod(shape) * datatype.size_bytes:
        raise RequestError(
            f"{size} bytes, but shape {list(shape)} of {datatype.name} takes "
            f"{prod(shape) * datatype.size_bytes}",
            where=where,
            remedy="send the tensor whole, row-major and without gaps",
        )


def view_of(
    buffer: bytearray, offset: int, datatype: Datatype, shape: tuple[int, ...], where: str
) -> torch.Tensor:
    """The tensor at `offset` of `buffer`: a view, but for elements that would lie unaligned.

    Raises:
        RequestError: a BOOL is neither 0 nor 1.
    """
    n_elements = prod(shape)
    if n_elements == 0:
        return torch.empty(shape, dtype=datatype.torch_dtype)
    if offset % datatype.size_bytes:
        # An odd-sized tensor stands before this one. Kernels may assume that elements are aligned.
        buffer = buffer[offset : offset + n_elements * datatype.size_bytes]
        offset = 0
    if datatype.array_dtype is not None:  # a third of the time of torch.frombuffer and view
        array: np.ndarray[Any, Any] = np.ndarray(shape, datatype.array_dtype, buffer, offset)
        return torch.from_numpy(array)
    if datatype.kind == "bool":
        octets = torch.frombuffer(buffer, dtype=torch.uint8, count=n_elements, offset=offset)
        if octets.max() > 1:
            raise RequestError("a byte above 1", where=where, remedy="send BOOL as bytes 0 and 1")
    flat = torch.frombuffer(buffer, dtype=datatype.torch_dtype, count=n_elements, offset=offset)
    return flat if len(shape) == 1 else flat.view(shape)


def read_numbers(data: Any, datatype: Datatype, shape: tuple[int, ...], where: str) -> torch.Tensor:
    """The tensor in JSON `data`; raises RequestError."""
    if not datatype.array_code:
        raise RequestError(
            f"{datatype.name} has no JSON form",
            where=where,
            remedy="send the tensor as binary data",
        )
    if isinstance(data, list):
        data = jsontext.number_text(data, where)
    if not isinstance(data, jsontext.NumberText):
        refuse("it", f"an array of {'booleans' if datatype.kind == 'bool' else 'numbers'}", where)
    values = jsontext.read_numbers(data, datatype, shape, where)
    if not values:
        return torch.empty(shape, dtype=datatype.torch_dtype)
    tensor = torch.frombuffer(values, dtype=datatype.torch_dtype).view(shape)
    # The parser refuses what is beyond FP64, so only narrowing can overflow.
    if datatype.name == "FP32" and not np.isfinite(tensor.numpy()).all():
        raise RequestError(
            f"a number beyond {datatype.name}", where=where, remedy="send finite values"
        )
    return tensor
