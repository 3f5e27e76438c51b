"""The header of a safetensors file: what it may say, and the checks that make it trustworthy.

The header is bounded (other readers accept 100 MB), every product is checked, and offsets must
follow each other without gap or overlap and cover the file. Errors name the file and the tensor.
Deliberately absent: sharded index files and dtypes of less than a byte.

Format: https://huggingface.co/docs/safetensors#format (8 bytes of header length, a JSON header,
the data).
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType

import torch

from graphopt.errors import BundleError, LimitError
from graphopt.limits import SAFETENSORS_HEADER_BYTES_MAX, SAFETENSORS_TENSORS_MAX
from graphopt.safe_file import OpenFile, parse_json_object, read_at

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    # In the order of the format's reference implementation, which writes the last kind first, so
    # that data stays aligned.
    {
        "BOOL": torch.bool,
        "U8": torch.uint8,
        "I8": torch.int8,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
        "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
        "I16": torch.int16,
        "U16": torch.uint16,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I32": torch.int32,
        "U32": torch.uint32,
        "F32": torch.float32,
        "C64": torch.complex64,
        "F64": torch.float64,
        "I64": torch.int64,
        "U64": torch.uint64,
    }
)
"""Dtype names of the format that can be read and written."""

DIMS_MAX = 64  # dims of one tensor: torch's own bound
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANK = {dtype: position for position, dtype in enumerate(DTYPES.values())}
_LENGTH_BYTES = 8
_ALIGN_BYTES = 8  # the header is padded with spaces so that the data begins here


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file: `begin` and `end` are byte offsets from the start of the data."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a file holds.

    Attributes:
        tensors: entries by name, in the order of their data.
        metadata: the free text pairs of the file.
        data_offset: where the data begins, in bytes from the start of the file.
        data_bytes: length of the data.
    """

    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    data_offset: int
    data_bytes: int


def parse_header(file: OpenFile) -> Header:
    """Read and check the header of an open file.

    Raises:
        BundleError: cut off, or a header that lies; names file, tensor and remedy.
        LimitError: the header or the number of tensors is over the bound.
    """
    if file.size_bytes < _LENGTH_BYTES:
        raise bad_file(file.label, f"{file.size_bytes} bytes are too short for a safetensors file")
    length = bytearray(_LENGTH_BYTES)
    read_at(file, 0, memoryview(length))
    header_bytes = int.from_bytes(length, "little")
    if header_bytes > SAFETENSORS_HEADER_BYTES_MAX:
        raise LimitError(
            f"the header claims {header_bytes} bytes, at most {SAFETENSORS_HEADER_BYTES_MAX} are read",
            where=file.label,
            remedy="check that it is a safetensors file; split one with too many tensors",
        )
    data_offset = _LENGTH_BYTES + header_bytes
    if data_offset > file.size_bytes:
        raise bad_file(
            file.label, f"the header needs {data_offset} bytes, the file has {file.size_bytes}"
        )
    text = bytearray(header_bytes)
    read_at(file, _LENGTH_BYTES, memoryview(text))
    if not text.startswith(b"{"):
        raise bad_file(file.label, "the header does not begin with '{'")
    document = parse_json_object(bytes(text), label=file.label)
    metadata = _metadata(document.pop("__metadata__", {}), file.label)
    if len(document) > SAFETENSORS_TENSORS_MAX:
        raise LimitError(
            f"{len(document)} tensors, at most {SAFETENSORS_TENSORS_MAX} are read",
            where=file.label,
            remedy="split the file",
        )
    entries = sorted(
        (_entry(name, value, file.label) for name, value in document.items()),
        key=lambda entry: (entry.begin, entry.end, entry.name),
    )
    data_bytes = file.size_bytes - data_offset
    _check_cover(entries, data_bytes, file.label)
    return Header(
        MappingProxyType({entry.name: entry for entry in entries}),
        MappingProxyType(metadata),
        data_offset,
        data_bytes,
    )


def _metadata(value: object, label: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise bad_file(label, "__metadata__ is not a table of texts")
    return value


def _entry(name: str, value: object, label: str) -> TensorEntry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise bad_file(label, "an entry has exactly dtype, shape and data_offsets", name)
    dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise bad_file(label, f"dtype {value['dtype']!r} is not one of {', '.join(DTYPES)}", name)
    shape, offsets = value["shape"], value["data_offsets"]
    if not _sizes(shape) or len(shape) > DIMS_MAX:
        raise bad_file(
            label, f"shape {_short(shape)} is not a list of at most {DIMS_MAX} sizes", name
        )
    if not _sizes(offsets) or len(offsets) != 2:
        raise bad_file(label, f"data_offsets {_short(offsets)} are not two positions", name)
    begin, end = offsets
    # Python's integers do not overflow; the product over non-zero dims bounds what torch multiplies.
    if prod(size for size in shape if size) * dtype.itemsize > sys.maxsize:
        raise bad_file(label, f"shape {_short(shape)} is larger than any memory", name)
    need_bytes = prod(shape) * dtype.itemsize
    if end - begin != need_bytes:
        raise bad_file(
            label,
            f"{value['dtype']} {_short(shape)} needs {need_bytes} bytes, "
            f"data_offsets {begin}..{end} hold {end - begin}",
            name,
        )
    return TensorEntry(name, dtype, tuple(shape), begin, end)


def _sizes(value: object) -> bool:
    return isinstance(value, list) and all(
        type(size) is int and 0 <= size <= sys.maxsize for size in value
    )


def _check_cover(entries: list[TensorEntry], data_bytes: int, label: str) -> None:
    position = 0
    for entry in entries:
        if entry.begin != position:
            kind = (
                "overlaps the tensor before it"
                if entry.begin < position
                else "leaves a gap before it"
            )
            raise bad_file(
                label,
                f"data begins at {entry.begin} and {kind}, which ends at {position}",
                entry.name,
            )
        position = entry.end
        if position > data_bytes:
            raise bad_file(
                label,
                f"data ends at {position}, but the file holds only {data_bytes} bytes of data: "
                "it was cut off",
                entry.name,
            )
    if position != data_bytes:
        raise bad_file(label, f"{data_bytes - position} bytes at the end belong to no tensor")


def encode_header(
    order: list[str], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> bytes:
    """The length field and the header of a file that holds `tensors` in this order.

    Raises:
        BundleError: a tensor bears the name that the format reserves.
        LimitError: `parse_header` would refuse the result.
    """
    document: dict[str, object] = {}
    if metadata:
        document["__metadata__"] = dict(sorted(metadata.items()))
    position = 0
    for name in order:
        if name == "__metadata__":
            raise BundleError(
                "the name is reserved by the format", where=name, remedy="rename the tensor"
            )
        tensor = tensors[name]
        end = position + tensor.numel() * tensor.itemsize
        document[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGN_BYTES)
    if len(text) > SAFETENSORS_HEADER_BYTES_MAX or len(order) > SAFETENSORS_TENSORS_MAX:
        raise LimitError(
            f"{len(order)} tensors need a header of {len(text)} bytes; at most "
            f"{SAFETENSORS_TENSORS_MAX} tensors and {SAFETENSORS_HEADER_BYTES_MAX} bytes are read back",
            remedy="write several files",
        )
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def dtype_rank(name: str, tensor: torch.Tensor) -> int:
    """The place of the tensor's dtype in `DTYPES`.

    Raises:
        BundleError: the format has no such dtype, or the tensor is not strided.
    """
    if tensor.dtype not in _RANK:
        raise BundleError(
            f"safetensors has no dtype for {tensor.dtype}", where=name, remedy="convert the tensor"
        )
    if tensor.layout is not torch.strided:
        raise BundleError(
            f"layout {tensor.layout} cannot be written", where=name, remedy="make the tensor dense"
        )
    return _RANK[tensor.dtype]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def bad_file(label: str, message: str, tensor: str = "") -> BundleError:
    """The error for a damaged file, naming the tensor if the fault is in one."""
    name = f"tensor {_short(tensor)}: " if tensor else ""
    return BundleError(name + message, where=label, remedy="copy or export the file again")
