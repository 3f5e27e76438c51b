"""What a bundle says of itself, and the checks that come before anything in it is used.

A manifest names the ops with their schemas and the files with size and SHA-256. File names follow
one pattern without separators, so none can lead out of the bundle; links are not followed.
Deliberately absent: the content of the files (`graphopt.bundle`).
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from graphopt.errors import BundleError, UnknownOpError
from graphopt.ops import SYM_OPS, get_overload, get_spec
from graphopt.safe_file import Source, open_regular, parse_json_object, read_bounded

FORMAT = 1  # of the bundle; a reader refuses higher ones
MANIFEST = "manifest.json"
GRAPH = "graph.txt"
MANIFEST_BYTES_MAX = 4 << 20  # all 2,500 functional ops of torch with their schemas take 0.5 MB
FILES_MAX = 10_000  # files of one bundle: 20 TB at 2 GB each

_FILE_NAME = re.compile(r"graph\.txt|constants-[0-9]{5}-of-[0-9]{5}\.safetensors")

Parts = Mapping[str, int]
"""The files of a bundle as open descriptors, by name."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """What the manifest says of a file: `size_bytes`, and `sha256` as hex digits."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The checked content of `manifest.json`.

    Attributes:
        name: of the graph.
        graphopt_version: that wrote the bundle.
        torch_version: whose op schemas it holds.
        ops: schema text of every op that the graph uses, by name.
        files: the other files, by name.
    """

    name: str
    graphopt_version: str
    torch_version: str
    ops: Mapping[str, str]
    files: Mapping[str, FileEntry]


def read_manifest(source: str | os.PathLike[str] | Parts) -> Manifest:
    """The manifest alone, checked for form; what it says of the files is not.

    Raises:
        BundleError: absent, malformed, of a newer format, or naming a file outside the bundle.
    """
    files = BundleFiles(source)
    label = files.label(MANIFEST)
    document = parse_json_object(
        read_bounded(files.open(MANIFEST), MANIFEST_BYTES_MAX, label=label), label=label
    )
    found = document.get("format")
    if type(found) is not int:
        raise damaged(label, "it names no format")
    if found > FORMAT:
        raise BundleError(
            f"format {found} is newer than this program, which reads format {FORMAT}",
            where=label,
            remedy=f"read it with graphopt {_text(document, 'graphopt', label)}, which wrote it",
        )
    table = document.get("files")
    if (
        found != FORMAT
        or not isinstance(table, dict)
        or len(table) > FILES_MAX
        or GRAPH not in table
    ):
        raise damaged(label, f"format {FORMAT} has a table of files with {GRAPH} in it")
    ops = document.get("ops")
    if not isinstance(ops, dict) or not all(isinstance(text, str) for text in ops.values()):
        raise damaged(label, "ops is not a table of schema texts")
    return Manifest(
        name=_text(document, "graph", label),
        graphopt_version=_text(document, "graphopt", label),
        torch_version=_text(document, "torch", label),
        ops=ops,
        files={name: _file_entry(name, value, label) for name, value in table.items()},
    )


def check_ops(manifest: Manifest, *, label: str = MANIFEST) -> None:
    """Refuse a bundle whose ops mean something else to the torch that is installed.

    Raises:
        BundleError: names each op that is gone or has another schema.
    """
    faults = []
    for op, recorded in sorted(manifest.ops.items()):
        try:
            present = op_schema(op)
        except UnknownOpError as fault:
            faults.append(
                (op, f"{fault.message}; {fault.remedy}" if fault.remedy else fault.message)
            )
            continue
        if present != recorded:
            faults.append(
                (op, f"the bundle has {recorded!r}, torch {torch.__version__} {present!r}")
            )
    if faults:
        raise BundleError(
            f"made for torch {manifest.torch_version}; {len(faults)} ops differ in torch {torch.__version__}",
            where=label,
            remedy=f"import the model again, or run with torch {manifest.torch_version}",
            detail=faults,
        )


def op_schema(op: str) -> str:
    """The schema text of an op, as torch prints it. Raises UnknownOpError."""
    if op in SYM_OPS:
        operands = ", ".join(f"int {param.name}" for param in get_spec(op).params)
        return f"{op}({operands}) -> int"
    return str(get_overload(op)._schema)


class BundleFiles:
    """The files of a bundle, in a folder or as descriptors."""

    def __init__(self, source: str | os.PathLike[str] | Parts) -> None:
        self.parts = source if isinstance(source, Mapping) else None
        self.folder = None if isinstance(source, Mapping) else Path(source)
        if self.folder is not None and not self.folder.is_dir():
            what = "not a folder" if os.path.lexists(self.folder) else "no such bundle"
            raise BundleError(what, where=str(self.folder), remedy="name the folder of a bundle")

    def open(self, name: str) -> Source:
        """The file as what the bounded readers take."""
        if self.folder is not None:
            return self.folder / name
        assert self.parts is not None
        if name not in self.parts:
            raise BundleError(
                "the file is missing", where=name, remedy="send every file of the bundle"
            )
        return self.parts[name]

    def label(self, name: str) -> str:
        """How errors name the file."""
        return name if self.folder is None else str(self.folder / name)

    def check_size(self, name: str, entry: FileEntry) -> None:
        """Refuses a file that is absent, a link, or of another size than the manifest says."""
        with open_regular(self.open(name), label=self.label(name)) as file:
            if file.size_bytes != entry.size_bytes:
                raise damaged(
                    file.label, f"{file.size_bytes} bytes, the manifest says {entry.size_bytes}"
                )


def damaged(label: str, message: str) -> BundleError:
    """The error for a part that is not what it should be."""
    return BundleError(message, where=label, remedy="copy or export the bundle again")


def _file_entry(name: str, value: object, label: str) -> FileEntry:
    if not _FILE_NAME.fullmatch(name):
        raise BundleError(
            f"{name[:80]!r} is not a file of a bundle: graph.txt and constants-*.safetensors beside it are",
            where=label,
            remedy="export the model again; do not load it if it came from elsewhere",
        )
    size_bytes = value.get("bytes") if isinstance(value, dict) else None
    sha256 = value.get("sha256") if isinstance(value, dict) else None
    if type(size_bytes) is not int or not isinstance(sha256, str):
        raise damaged(label, f"{name} has no bytes and sha256")
    return FileEntry(size_bytes, sha256)


def _text(document: Mapping[str, Any], key: str, label: str) -> str:
    value = document.get(key)
    if not isinstance(value, str):
        raise damaged(label, f"it has no {key}")
    return value
