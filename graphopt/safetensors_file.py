"""Read and write safetensors files, the only tensor format there is here.

Written by ourselves rather than taken from the `safetensors` package because files arrive as
descriptors and from strangers: see `safetensors_header` for what is checked. Deliberately absent:
sharded index files, big-endian machines.
"""

import mmap
import os
from collections.abc import Iterable, Mapping
from tempfile import mkstemp

import torch

from graphopt.errors import BundleError, nearest
from graphopt.safe_file import OpenFile, Source, open_regular, read_at
from graphopt.safetensors_header import (
    DTYPES,
    Header,
    TensorEntry,
    bad_file,
    dtype_rank,
    encode_header,
    parse_header,
)

__all__ = ["DTYPES", "Header", "TensorEntry", "read_header", "read_tensors", "write_tensors"]


def read_header(source: Source, *, label: str = "", one_link: bool = False) -> Header:
    """Read and check the header of a file, given as a path or as a descriptor (left open, not moved).

    Args:
        source: the file.
        label: how errors name it.
        one_link: refuse a file that has hard links.

    Raises:
        BundleError: not a regular file, cut off, or a header that lies; names file, tensor and remedy.
        LimitError: the header or the number of tensors is over the bound.
    """
    with open_regular(source, label=label, one_link=one_link) as file:
        return parse_header(file)


def read_tensors(
    source: Source,
    names: Iterable[str] | None = None,
    *,
    label: str = "",
    one_link: bool = False,
    mapped: bool = True,
) -> dict[str, torch.Tensor]:
    """The tensors of a file, by name, on the CPU.

    Args:
        source: the file.
        names: only these; by default all.
        label: how errors name the file.
        one_link: refuse a file that has hard links.
        mapped: share the file's pages instead of copying. Writing to such a tensor changes
            private pages, never the file. Give `False` for a file that somebody else may still
            truncate: touching a mapping beyond the end kills the process.

    Raises:
        BundleError: as `read_header`, or a name that the file does not have.
        LimitError: as `read_header`.
    """
    with open_regular(source, label=label, one_link=one_link) as file:
        header = parse_header(file)
        wanted = list(header.tensors) if names is None else list(names)
        for name in wanted:
            if name not in header.tensors:
                raise BundleError(
                    f"no tensor {name!r}", where=file.label, remedy=nearest(name, header.tensors)
                )
        if not wanted:
            return {}
        if mapped:
            return _map(file, header, wanted)
        return {name: _copy(file, header, header.tensors[name]) for name in wanted}


def write_tensors(
    target: Source,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Write a file whose bytes depend on the content only, and return its size in bytes.

    Tensors come in the order of the format's reference implementation (wide dtypes first, then by
    name), which keeps each aligned; metadata by key. A path is written beside and renamed into
    place; a descriptor is written from its current position. Making it durable is the caller's part.

    Raises:
        BundleError: a dtype or layout that the format does not have, a reserved name, or a failed write.
        LimitError: more tensors or a longer header than `read_header` would accept.
    """
    order = sorted(tensors, key=lambda name: (-dtype_rank(name, tensors[name]), name))
    head = encode_header(order, tensors, metadata or {})
    label = f"descriptor {target}" if isinstance(target, int) else os.fspath(target)
    try:
        if isinstance(target, int):
            return _write_all(target, head, order, tensors)
        return _replace(label, head, order, tensors)
    except OSError as fault:
        raise BundleError(
            f"cannot be written: {fault.strerror}", where=label, remedy="check the folder and disk"
        ) from fault


def _replace(path: str, head: bytes, order: list[str], tensors: Mapping[str, torch.Tensor]) -> int:
    descriptor, temporary = mkstemp(dir=os.path.dirname(path) or ".", prefix=".tensors-")
    try:
        size_bytes = _write_all(descriptor, head, order, tensors)
        os.fchmod(descriptor, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    finally:
        os.close(descriptor)
    return size_bytes


def _map(file: OpenFile, header: Header, names: list[str]) -> dict[str, torch.Tensor]:
    if header.data_bytes == 0:
        return {
            name: _shaped(torch.empty(0, dtype=torch.uint8), header.tensors[name]) for name in names
        }
    try:
        # Private and writable: torch takes a writable buffer without warning, and no write reaches the file.
        mapping = mmap.mmap(
            file.descriptor,
            header.data_offset + header.data_bytes,
            flags=mmap.MAP_PRIVATE,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
        )
    except (OSError, ValueError) as fault:
        raise bad_file(file.label, f"cannot be mapped: {fault}") from None
    whole = torch.frombuffer(mapping, dtype=torch.uint8)  # keeps the mapping alive
    found = {}
    for name in names:
        entry = header.tensors[name]
        start = header.data_offset + entry.begin
        raw = whole[start : header.data_offset + entry.end]
        if start % entry.dtype.itemsize:  # the format does not promise alignment
            raw = raw.clone()
        found[name] = _checked(_shaped(raw, entry), entry, file.label)
    return found


def _copy(file: OpenFile, header: Header, entry: TensorEntry) -> torch.Tensor:
    raw = torch.empty(entry.end - entry.begin, dtype=torch.uint8)
    if raw.numel():
        read_at(file, header.data_offset + entry.begin, raw.numpy().data)
    return _checked(_shaped(raw, entry), entry, file.label)


def _shaped(raw: torch.Tensor, entry: TensorEntry) -> torch.Tensor:
    if entry.begin == entry.end:
        return torch.empty(entry.shape, dtype=entry.dtype)
    return raw.view(entry.dtype).view(entry.shape)


def _checked(tensor: torch.Tensor, entry: TensorEntry, label: str) -> torch.Tensor:
    # A bool that is neither 0 nor 1 is undefined behaviour in the C++ that reads it.
    if entry.dtype is torch.bool and tensor.numel() and int(tensor.view(torch.uint8).max()) > 1:
        raise bad_file(label, "a BOOL tensor holds bytes other than 0 and 1", entry.name)
    return tensor


def _write_all(
    descriptor: int, head: bytes, order: list[str], tensors: Mapping[str, torch.Tensor]
) -> int:
    size_bytes = _write(descriptor, memoryview(head))
    for name in order:
        plain = tensors[name].detach().cpu().resolve_conj().resolve_neg().contiguous()
        if plain.numel():
            raw = plain.reshape(-1).view(torch.uint8).numpy()
            size_bytes += _write(descriptor, raw.data)
    return size_bytes


def _write(descriptor: int, part: memoryview) -> int:
    done = 0
    while done < len(part):
        done += os.write(descriptor, part[done:])
    return done
