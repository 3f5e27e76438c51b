"""What an artifact looks like on disk: its record, the check of its files against it, and how both
become durable.

A record names every file with its size and hash; a folder with one more, one less or another one is
not that artifact. Nothing here follows a link.
"""

import json
import os
import secrets
import stat
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from graphopt.errors import GraphoptError, LimitError, StateError
from graphopt.executor.arrangement import ArtifactKey
from graphopt.safe_file import parse_json_object, read_bounded
from graphopt.store.disk import write_all

SCHEMA = 1
META = "meta.json"
META_BYTES_MAX = 1 << 20  # a few hundred bytes a file, and one line a bucket
FILES_MAX = 256  # of one artifact; runtimes write a handful
TEMPORARY = "tmp-"


@dataclass(frozen=True, slots=True)
class Verified:
    """The verdict an artifact entered with; errors are those of the worst output against float64."""

    max_error: float | None = None
    allowed: float | None = None
    n_samples: int = 0


@dataclass(frozen=True, slots=True)
class Artifact:
    """One entry.

    Attributes:
        key: region key, weight key, backend, its version, options as JSON.
        name: of the entry: the hash of schema and key.
        folder: holds what `Backend.load` reads, and `meta.json`.
        host: fingerprint of the host that built it.
        verified: in the builder, before it came here.
        latencies_s: measured medians by shape bucket, seconds.
        files: size in bytes and sha256 by path inside the folder.
    """

    key: ArtifactKey
    name: str
    folder: Path
    host: str
    verified: Verified
    latencies_s: Mapping[tuple[int, ...], float]
    files: Mapping[str, tuple[int, str]]

    @property
    def size_bytes(self) -> int:
        """What the backend's files take."""
        return sum(size for size, _ in self.files.values())


def name_of(key: ArtifactKey) -> str:
    """The name of a key's entry."""
    return sha256(json.dumps([SCHEMA, *key]).encode()).hexdigest()


def write_whole(path: Path, content: bytes) -> None:
    """Writes a small file so that after any crash it is the old one or the new one, whole. OSError."""
    temporary = path.with_name(f"{path.name}.{TEMPORARY}{secrets.token_hex(4)}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            write_all(fd, memoryview(content))
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def seal(folder: Path) -> dict[str, tuple[int, str]]:
    """Makes every file of `folder` durable; returns their sizes and hashes by path inside it."""
    found: dict[str, tuple[int, str]] = {}
    for path in _plain_files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            found[str(path.relative_to(folder))] = (
                os.fstat(file.fileno()).st_size,
                file_digest(file, "sha256").hexdigest(),
            )
    for inner, _, _ in os.walk(folder):
        sync_folder(Path(inner))
    return found


def _plain_files(folder: Path) -> list[Path]:
    """The files of `folder` but its record, sorted; StateError on anything else."""
    found = []
    for inner, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(inner, name)
            mode = path.lstat().st_mode
            if stat.S_ISREG(mode):
                found.append(path)
            elif not stat.S_ISDIR(mode):
                raise StateError("neither a file nor a folder", where=str(path))
        if len(found) > FILES_MAX:
            raise LimitError(f"more than {FILES_MAX} files", where=str(folder))
    # What an interrupted write of the record left bears its name too.
    return sorted(p for p in found if p.parent != folder or not p.name.startswith(META))


def fault_of(entry: Artifact, *, is_deep: bool) -> str:
    """What is wrong with the files of an entry; empty when nothing is."""
    try:
        present = {str(path.relative_to(entry.folder)): path for path in _plain_files(entry.folder)}
    except GraphoptError as error:
        return str(error)
    if present.keys() != entry.files.keys():
        odd = sorted(present.keys() ^ entry.files.keys())[0]
        return f"{odd!r} is {'not its own' if odd in present else 'missing'}"
    for name, (size, digest) in entry.files.items():
        if present[name].stat().st_size != size:
            return f"{name!r} has another size than was written"
        if is_deep:
            with present[name].open("rb") as file:
                if file_digest(file, "sha256").hexdigest() != digest:
                    return f"{name!r} is not what was written"
    return ""


def write_meta(folder: Path, entry: Artifact) -> None:
    """Writes the record of `entry` into `folder`. OSError."""
    document = {
        "schema": SCHEMA,
        "key": list(entry.key),
        "host": entry.host,
        "verified": asdict(entry.verified),
        "latencies_s": [[list(bucket), value] for bucket, value in entry.latencies_s.items()],
        "files": {name: list(about) for name, about in entry.files.items()},
    }
    write_whole(folder / META, json.dumps(document, indent=1).encode())


def read_entry(folder: Path) -> Artifact:
    """The entry that a folder's record describes; GraphoptError when it describes none."""
    if not stat.S_ISDIR(folder.lstat().st_mode):
        raise StateError("not an entry: no folder")
    text = read_bounded(folder / META, META_BYTES_MAX, label=META)
    document: dict[str, Any] = parse_json_object(text, label=META)
    if document.get("schema") != SCHEMA:
        raise StateError(f"its schema is {document.get('schema')}, this one is {SCHEMA}")
    try:
        verified = document["verified"]
        entry = Artifact(
            tuple(map(str, document["key"])),
            folder.name,
            folder,
            str(document["host"]),
            Verified(verified["max_error"], verified["allowed"], int(verified["n_samples"])),
            {tuple(map(int, bucket)): float(value) for bucket, value in document["latencies_s"]},
            {str(name): _about(about) for name, about in document["files"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StateError(f"its record is malformed: {error!r}", where=META) from error
    if name_of(entry.key) != folder.name:
        raise StateError("it lies under a name that is not its key's")
    return entry


def _about(document: Sequence[Any]) -> tuple[int, str]:
    size, digest = document
    return int(size), str(digest)


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable. OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
