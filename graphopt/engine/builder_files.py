"""Files for the builder: constants by content hash, the text of a graph, real inputs.

With a state folder, constants lie in the journal's blobs already and the builder maps those. What
lies nowhere is written once into the scratch folder, which goes when the engine closes.
"""

import os
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import immutables
import torch

from graphopt.errors import LimitError
from graphopt.graph import Constant, Graph
from graphopt.safetensors_file import write_tensors
from graphopt.text import print_graph, print_node

SCRATCH_BYTES_MAX = 8 << 30  # constants of models without a state folder: a large one in float32
NODES_AT_ONCE = 64  # printed without a pause: about a millisecond of the GIL
PAUSE_S = 2e-3  # in which requests get the GIL without asking for it
_C128 = "c128:"  # before the digest of a tensor that is stored as pairs of f64


class ConstantFiles(Protocol):
    """Where constants lie as files. Called from one thread of the engine."""

    def files(self, model: str, constants: Mapping[str, Constant]) -> list[Path]:
        """Safetensors files that hold `constants` (by digest) under their digests.

        Complex ones lie under `c128:DIGEST` as pairs of f64. LimitError when there is no room.
        """

    def retain(self, digests: Iterable[str]) -> None:
        """No other constants are in use; their files may go when room is short."""

    def close(self) -> None:
        """Removes what was written."""


class ScratchConstants:
    """Writes constants into files of its own folder, each content once."""

    def __init__(self, folder: Path, size_bytes_max: int = SCRATCH_BYTES_MAX) -> None:
        self._folder = folder
        self._size_bytes_max = size_bytes_max
        self._file_of: dict[str, Path] = {}
        self._sizes: dict[Path, int] = {}
        self._used: frozenset[str] = frozenset()
        self._count = 0

    def files(self, model: str, constants: Mapping[str, Constant]) -> list[Path]:
        """See `ConstantFiles`. Writing releases the GIL."""
        new = {digest: c.tensor for digest, c in constants.items() if digest not in self._file_of}
        if new:
            size = sum(tensor.nbytes for tensor in new.values())
            self._make_room(size, constants)
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            path = self._folder / f"constants-{self._count}.safetensors"
            self._count += 1
            self._sizes[path] = write_tensors(path, dict(_stored(new)))
            self._file_of.update(dict.fromkeys(new, path))
        return sorted({self._file_of[digest] for digest in constants})

    def retain(self, digests: Iterable[str]) -> None:
        """See `ConstantFiles`."""
        self._used = frozenset(digests)

    def close(self) -> None:
        """See `ConstantFiles`."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._file_of.clear()

    def _make_room(self, size: int, wanted: Mapping[str, Constant]) -> None:
        if sum(self._sizes.values()) + size <= self._size_bytes_max:
            return
        needed = {path for d, path in self._file_of.items() if d in self._used or d in wanted}
        for path in [path for path in self._sizes if path not in needed]:
            path.unlink(missing_ok=True)  # who has it mapped keeps it
            del self._sizes[path]
        self._file_of = {d: path for d, path in self._file_of.items() if path in self._sizes}
        if sum(self._sizes.values()) + size > self._size_bytes_max:
            raise LimitError(
                f"the builder's constants would take more than {self._size_bytes_max} bytes",
                where=str(self._folder),
                remedy="give the engine a state folder, whose blobs are shared instead",
            )


class BlobConstants:
    """Constants in the blobs of a state folder; what has no blob goes to `scratch`."""

    def __init__(self, find: Callable[[str, str], Path | None], scratch: ScratchConstants) -> None:
        """`find(model, digest)` is the blob that holds a constant, None when there is none."""
        self._find = find
        self._scratch = scratch

    def files(self, model: str, constants: Mapping[str, Constant]) -> list[Path]:
        """See `ConstantFiles`."""
        found = {digest: self._find(model, digest) for digest in constants}
        rest = {digest: constants[digest] for digest, path in found.items() if path is None}
        blobs = {path for path in found.values() if path is not None}
        return [*sorted(blobs), *(self._scratch.files(model, rest) if rest else ())]

    def retain(self, digests: Iterable[str]) -> None:
        """See `ConstantFiles`."""
        self._scratch.retain(digests)

    def close(self) -> None:
        """See `ConstantFiles`."""
        self._scratch.close()


def write_text(graph: Graph, path: Path, pause: threading.Event) -> None:
    """Writes the text form of `graph`, node by node with pauses, so that requests keep the GIL.

    `pause` is waited for a moment at a time; when it is set, the rest is written without pauses.
    """
    frame = Graph(
        graph.name, immutables.Map(), graph.inputs, graph.outputs, graph.constants, graph.aliases,
        graph.symbols, graph.users, graph.const_users, graph.labels, 0,
    )  # fmt: skip
    with open(path, "w", encoding="utf-8") as file:
        file.write(print_graph(frame))
        for position, node in enumerate(graph.iter_nodes(), 1):
            file.write(print_node(node) + "\n")
            if position % NODES_AT_ONCE == 0:
                pause.wait(PAUSE_S)


def write_inputs(inputs: Mapping[str, torch.Tensor], folder: Path) -> Path:
    """Writes one request's inputs into `folder`, under the hash of the file."""
    temporary = folder / f"request-{os.getpid()}"
    write_tensors(temporary, dict(_stored(inputs)))
    digest = sha256(temporary.read_bytes()).hexdigest()
    path = folder / f"request-{digest[:40]}.safetensors"
    os.replace(temporary, path)
    return path


def _stored(tensors: Mapping[str, torch.Tensor]) -> Iterable[tuple[str, torch.Tensor]]:
    for name, tensor in tensors.items():
        is_complex = tensor.dtype is torch.complex128  # which safetensors lacks
        yield (_C128 + name, torch.view_as_real(tensor)) if is_complex else (name, tensor)
