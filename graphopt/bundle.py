"""A graph as a folder: text, tensors and a manifest, nothing that runs when it is read.

    minilm/
      manifest.json                        format, versions, op schemas, size and SHA-256 of the files
      graph.txt                            the text form (`graphopt.text`)
      constants-00001-of-00001.safetensors tensors under their content digest, each content once

A bundle is written beside its place and renamed into it, so that a reader finds the old one, the
new one or none. The same graph gives the same bytes. Loading trusts nothing: names, sizes, digests
and op schemas are checked before a graph exists, and a constant is what its digest says, or the
bundle is refused. What the manifest says of a constants file as a whole is for other tools
(`sha256sum`, blob stores): the digests in graph.txt are the stronger claim, so loading reads every
byte once, for those. Deliberately absent: pickle, archives, compression, links, inferred types,
plans and artifacts.
"""

import ctypes
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from graphopt.bundle_manifest import (
    FORMAT,
    GRAPH,
    MANIFEST,
    BundleFiles,
    Manifest,
    Parts,
    check_ops,
    damaged,
    op_schema,
    read_manifest,
)
from graphopt.constants import SHORT_DTYPES, constant_of, tensor_digest
from graphopt.errors import BundleError, GraphTextError, LimitError
from graphopt.graph import Constant, Graph
from graphopt.safe_file import read_bounded
from graphopt.safetensors_file import read_tensors, write_tensors
from graphopt.text import parse_graph, print_graph

GRAPH_BYTES_MAX = 256 << 20  # a million nodes at 250 bytes
SHARD_BYTES = 2 << 30  # one file's tensors: a file system or a proxy may stop at 4 GB
# A header entry takes about 150 bytes and readers accept 1 MiB (limits.SAFETENSORS_HEADER_BYTES_MAX).
SHARD_TENSORS = 4096

_RENAME_EXCHANGE = 2  # linux/fs.h
_AT_FDCWD = -100
_C128 = "c128:"  # before the digest of a tensor that is stored as pairs of f64


def save_bundle(graph: Graph, path: str | os.PathLike[str], *, replace: bool = False) -> None:
    """Write `graph` as a bundle at `path`, durably and all or nothing.

    Args:
        graph: the graph; its constants must hold their tensors.
        path: the folder to make. Its parent must exist.
        replace: exchange a bundle that is there already. Processes that have it loaded keep their
            data.

    Raises:
        BundleError: something else is at `path`, a constant without data, or a failed write.
    """
    target = Path(path)
    if os.path.lexists(target) and not (replace and _is_bundle(target)):
        remedy = "choose another path" if replace else "remove it, or ask to replace it"
        what = "exists and is not a bundle" if replace else "exists already"
        raise BundleError(what, where=str(target), remedy=remedy)
    folder = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        try:
            folder.mkdir()
            _write_files(graph, folder)
            _move_into_place(folder, target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # what is left of it, or the bundle replaced
        _sync_folder(target.absolute().parent)
    except OSError as fault:
        raise BundleError(
            f"cannot be written: {fault.strerror}",
            where=str(target),
            remedy="check folder and disk",
        ) from fault


def load_bundle(
    source: str | os.PathLike[str] | Parts, *, verify: bool = True, mapped: bool = True
) -> Graph:
    """The graph of a bundle, its constants mapped from the files: nothing is copied.

    Mappings are private: processes that load one bundle share its pages, and no write reaches it.

    Args:
        source: the folder, or its files as open descriptors by name (left open, not moved).
        verify: check the SHA-256 of graph.txt and of every constant; one pass over the data. Leave
            it out only for files that were checked before and that nobody else can write.
        mapped: `False` copies instead. For files that somebody else may still truncate: touching a
            mapping beyond the end of its file kills the process.

    Raises:
        BundleError: damaged, unsafe, newer than this program, or made for other op schemas; names
            the file, op or constant and what to do.
        LimitError: a file is larger than a bound.
    """
    files = BundleFiles(source)
    manifest = read_manifest(source)
    for name, entry in manifest.files.items():
        files.check_size(name, entry)
    check_ops(manifest, label=files.label(MANIFEST))
    label = files.label(GRAPH)
    raw = read_bounded(files.open(GRAPH), GRAPH_BYTES_MAX, label=label)
    if verify and hashlib.sha256(raw).hexdigest() != manifest.files[GRAPH].sha256:
        raise damaged(label, "its SHA-256 is not the one in the manifest")
    data = _tensors(files, manifest, mapped=mapped)
    try:
        graph = parse_graph(raw.decode("utf-8"), data, canonical=True)
    except GraphTextError as fault:
        where = f"{label}: {fault.where}"
        raise BundleError(fault.message, where=where, remedy=fault.remedy) from fault
    except UnicodeDecodeError as fault:
        raise damaged(label, f"byte {fault.start} is not UTF-8") from None
    _check_content(graph, manifest, files, verify=verify)
    return graph


def _tensors(files: BundleFiles, manifest: Manifest, *, mapped: bool) -> dict[str, Constant]:
    """Every tensor of the bundle under the digest that the files claim for it."""
    found: dict[str, Constant] = {}
    for name in sorted(manifest.files.keys() - {GRAPH}):
        label = files.label(name)
        for key, tensor in read_tensors(files.open(name), label=label, mapped=mapped).items():
            digest = key.removeprefix(_C128)
            data = tensor if digest == key else _from_pairs(tensor, f"{label}: {key}")
            if data.dtype not in SHORT_DTYPES:
                raise damaged(label, f"{key}: a graph holds no {data.dtype}")
            found[digest] = constant_of(data, digest=digest)
    return found


def _check_content(graph: Graph, manifest: Manifest, files: BundleFiles, *, verify: bool) -> None:
    label = files.label(GRAPH)
    if graph.name != manifest.name:
        raise damaged(label, f"it is the graph {graph.name!r}, the manifest says {manifest.name!r}")
    unknown = {node.op for node in graph.nodes.values()} - manifest.ops.keys()
    if unknown:
        raise damaged(files.label(MANIFEST), f"no schema of {', '.join(sorted(unknown))}")
    checked: set[str] = set()
    for name, constant in sorted(graph.constants.items()) if verify else ():
        if constant.digest not in checked and tensor_digest(constant.tensor) != constant.digest:
            raise damaged(label, f"the data of the constant {name} are not what its digest says")
        checked.add(constant.digest)


def _write_files(graph: Graph, folder: Path) -> None:
    text = print_graph(graph).encode()
    if len(text) > GRAPH_BYTES_MAX:
        raise LimitError(
            f"the text form takes {len(text)} bytes, at most {GRAPH_BYTES_MAX} are read back",
            where=graph.name,
            remedy="split the model",
        )
    files = {GRAPH: _write(folder / GRAPH, text)}
    shards = list(_shards(graph))
    for number, tensors in enumerate(shards, 1):
        name = f"constants-{number:05d}-of-{len(shards):05d}.safetensors"
        files[name] = _write(folder / name, tensors)
    manifest = {
        "format": FORMAT,
        "graph": graph.name,
        "graphopt": _own_version(),
        "torch": torch.__version__,
        "ops": {op: op_schema(op) for op in {node.op for node in graph.nodes.values()}},
        "files": files,
    }
    _write(folder / MANIFEST, f"{json.dumps(manifest, indent=1, sort_keys=True)}\n".encode())
    _sync_folder(folder)


def _shards(graph: Graph) -> Iterator[dict[str, torch.Tensor]]:
    """Distinct tensors in order of the names that first use them, in pieces for one file each."""
    shard: dict[str, torch.Tensor] = {}
    seen: set[str] = set()
    size_bytes = 0
    for name, constant in sorted(graph.constants.items()):
        tensor = constant.tensor
        if tensor is None:
            raise BundleError(
                "the constant has no data", where=name, remedy="parse the graph with its constants"
            )
        if constant.digest in seen:
            continue
        seen.add(constant.digest)
        if shard and (size_bytes + tensor.nbytes > SHARD_BYTES or len(shard) == SHARD_TENSORS):
            yield shard
            shard, size_bytes = {}, 0
        is_c128 = tensor.dtype == torch.complex128  # which safetensors lacks: kept as pairs of f64
        key = f"{_C128}{constant.digest}" if is_c128 else constant.digest
        shard[key] = torch.view_as_real(tensor) if is_c128 else tensor
        size_bytes += tensor.nbytes
    if shard:
        yield shard


def _from_pairs(tensor: torch.Tensor, label: str) -> torch.Tensor:
    if tensor.dtype != torch.float64 or tensor.dim() == 0 or tensor.shape[-1] != 2:
        raise damaged(label, "not pairs of f64")
    return torch.view_as_complex(tensor)


def _write(path: Path, content: bytes | dict[str, torch.Tensor]) -> dict[str, object]:
    """Writes a new file, durably; its entry in the manifest."""
    with open(path, "x+b") as file:
        if isinstance(content, bytes):
            file.write(content)
            file.flush()
        else:
            write_tensors(file.fileno(), content)
        os.fsync(file.fileno())
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}


def _move_into_place(folder: Path, target: Path) -> None:
    if not os.path.lexists(target):
        os.rename(folder, target)
        return
    # A folder cannot be renamed onto a full one; the kernel can exchange the two names in one step.
    libc = ctypes.CDLL(None, use_errno=True)
    exchange = getattr(libc, "renameat2", None)
    names = (os.fsencode(folder.absolute()), os.fsencode(target.absolute()))
    if exchange is None or exchange(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE):
        reason = os.strerror(ctypes.get_errno() or errno.ENOSYS)
        raise BundleError(
            f"cannot be replaced in one step: {reason}",
            where=str(target),
            remedy="write to another path, then remove this bundle",
        )


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_bundle(target: Path) -> bool:
    return not target.is_symlink() and (target / MANIFEST).is_file()


def _own_version() -> str:
    try:
        return version("graphopt")
    except PackageNotFoundError:  # run from a checkout
        return "0"
