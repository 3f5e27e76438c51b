"""Built artifacts on disk, by what they are made of: a restart loads what was built before.

    CACHE/artifacts/<sha256 of the key>/meta.json   what it is, with size and hash of every file
    CACHE/artifacts/<sha256 of the key>/...         the backend's files
    CACHE/artifacts/tmp-*                           being built, or being removed

An entry appears whole under its name (synced, then renamed) and goes whole (renamed, then removed).
It is a cache: whatever is missing, damaged, made on another host or by another schema is dropped with
its reason, and nothing else depends on it. Files that are mapped stay readable after their entry is
gone, so the folder may be deleted at any time.

Called from one thread, the background: adding an entry syncs megabytes. One process has a cache at a
time (the state folder's lock sees to it).
"""

import os
import secrets
import shutil
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from graphopt.engine.artifact_entry import (
    TEMPORARY,
    Artifact,
    Verified,
    fault_of,
    name_of,
    read_entry,
    seal,
    sync_folder,
    write_meta,
)
from graphopt.errors import GraphoptError, LimitError
from graphopt.executor.arrangement import ArtifactKey
from graphopt.store.disk import refusal

BYTES_MAX = 4 << 30  # by default: a dozen BERT-base sized models in float32
DISK_SHARE_MAX = 0.10  # of the disk, where that is less: the journal lies on it too
BUCKETS_MAX = 64  # whose latency is noted with an artifact

OnDrop = Callable[[str, str], None]


class ArtifactCache:
    """The artifacts of one folder, least recently used first to go."""

    def __init__(
        self,
        folder: Path,
        host: str,
        *,
        bytes_max: int | None = None,
        on_drop: OnDrop = lambda name, reason: None,
        is_wanted: Callable[[str], bool] = lambda name: False,
    ) -> None:
        """Opens or creates the cache; drops what is not whole or not of this host.

        Args:
            folder: CACHE; made when it is not there.
            host: see `host_fingerprint`.
            bytes_max: of all entries; by default 4 GiB or a tenth of the disk, whichever is less.
            on_drop: told the name and the reason of every entry that goes.
            is_wanted: whether an entry is part of a plan that a restart would serve: such ones go
                last.

        Raises:
            StateError: The folder cannot be made or listed.
        """
        self._folder = folder / "artifacts"
        self._host = host
        self._on_drop = on_drop
        self._is_wanted = is_wanted
        self._pins: Counter[str] = Counter()
        self._whole: set[str] = set()  # whose hashes were checked in this process
        self._entries: OrderedDict[str, Artifact] = OrderedDict()
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.bytes_max = default_bytes_max(self._folder) if bytes_max is None else bytes_max
            self._scan()
        except OSError as error:
            raise refusal(error, self._folder) from error
        self._make_room(0)

    @property
    def size_bytes(self) -> int:
        """What all entries take."""
        return sum(entry.size_bytes for entry in self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: ArtifactKey) -> bool:
        return name_of(key) in self._entries

    def find(self, key: ArtifactKey) -> Artifact | None:
        """The entry of `key`, whole; None when there is none, or it was dropped just now.

        The first time in a process every file is hashed (about 1 GB/s), from then on only looked at.
        """
        entry = self._entries.get(name_of(key))
        if entry is None:
            return None
        try:
            fault = fault_of(entry, is_deep=entry.name not in self._whole)
        except OSError as error:
            fault = f"cannot be read: {error.strerror}"
        if fault:
            self._drop(entry.name, fault)
            return None
        self._whole.add(entry.name)
        self._touch(entry.name)
        return entry

    def new_folder(self) -> Path:
        """A folder of this cache to build in; it is not there yet. See `put`.

        What is left in one when the process ends is removed by the next.
        """
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return self._folder / f"{TEMPORARY}{secrets.token_hex(8)}"

    def put(self, key: ArtifactKey, built: Path, verified: Verified) -> Artifact:
        """Takes the folder `built` (made by `new_folder`) in as the entry of `key`.

        An entry of that key that is there already stays when it is pinned, and is returned. Other
        entries go to make room, least recently used first, never a pinned one.

        Raises:
            LimitError: It does not fit beside what is pinned, or has too many files.
            StateError: It holds anything but plain files, or cannot be written.

        `built` is gone in all cases.
        """
        name = name_of(key)
        try:
            present = self._entries.get(name)
            if present is not None and self._pins[name] and not fault_of(present, is_deep=False):
                return present
            files = seal(built)
            entry = Artifact(key, name, self._folder / name, self._host, verified, {}, files)
            self._make_room(entry.size_bytes, besides=name)
            write_meta(built, entry)
            self._drop(name, "built again")
            os.rename(built, entry.folder)
            sync_folder(self._folder)
        except OSError as error:
            raise refusal(error, built) from error
        finally:
            shutil.rmtree(built, ignore_errors=True)
        self._entries[name] = entry
        self._whole.add(name)
        return entry

    def note_latencies(
        self, key: ArtifactKey, latencies_s: Mapping[tuple[int, ...], float]
    ) -> None:
        """Adds measured medians by bucket to an entry's record; nothing when the entry is gone."""
        entry = self._entries.get(name_of(key))
        if entry is None:
            return
        known = {**entry.latencies_s, **latencies_s}
        while len(known) > BUCKETS_MAX:
            known.pop(next(iter(known)))
        self._entries[entry.name] = entry = replace(entry, latencies_s=known)
        try:
            write_meta(entry.folder, entry)
        except OSError as error:
            self._drop(entry.name, f"its record cannot be written: {error.strerror}")

    def pin(self, key: ArtifactKey) -> None:
        """Keeps the entry of `key` until as many calls of `unpin`: it is loaded."""
        self._pins[name_of(key)] += 1

    def unpin(self, key: ArtifactKey) -> None:
        """Gives up one `pin`; ValueError when there is none."""
        name = name_of(key)
        if not self._pins[name]:
            raise ValueError(f"{name[:12]} is not pinned")
        self._pins[name] -= 1
        if not self._pins[name]:
            del self._pins[name]

    def drop(self, key: ArtifactKey, reason: str) -> None:
        """Removes an entry, as when it would not load; a pinned one too: what is mapped stays."""
        self._drop(name_of(key), reason)

    # -- helpers

    def _scan(self) -> None:
        used: list[tuple[float, Artifact]] = []
        for path in sorted(self._folder.iterdir()):
            if path.name.startswith(TEMPORARY):
                _remove(path)
                continue
            try:
                entry = read_entry(path)
                fault = "" if entry.host == self._host else f"built on another host: {entry.host}"
                fault = fault or fault_of(entry, is_deep=False)
                used.append((path.stat().st_mtime, entry))
            except (GraphoptError, OSError) as error:
                fault = str(error)
            if fault:
                used = [pair for pair in used if pair[1].folder != path]
                self._discard(path, fault)
        for _, entry in sorted(used, key=lambda pair: pair[0]):
            self._entries[entry.name] = entry

    def _make_room(self, wanted_bytes: int, besides: str = "") -> None:
        """Removes entries until `wanted_bytes` more fit; `besides` is about to be replaced."""
        there = {name: e.size_bytes for name, e in self._entries.items() if name != besides}
        excess = sum(there.values()) + wanted_bytes - self.bytes_max
        free = [name for name in there if not self._pins[name]]
        if excess > sum(there[name] for name in free) and wanted_bytes:
            raise LimitError(
                f"{wanted_bytes} bytes do not fit into the artifact cache of {self.bytes_max}",
                where=str(self._folder),
                remedy="give the cache more room, or unload a model",
            )
        for name in sorted(free, key=self._is_wanted):  # stable: the oldest first in each half
            if excess <= 0:
                return
            excess -= there[name]
            self._drop(name, "least recently used, and the cache is full")

    def _touch(self, name: str) -> None:
        self._entries.move_to_end(name)
        try:
            os.utime(self._folder / name)  # the order of use outlives the process
        except OSError:
            return  # found gone or read-only: the next use of it tells

    def _drop(self, name: str, reason: str) -> None:
        self._whole.discard(name)
        if self._entries.pop(name, None) is not None:
            self._discard(self._folder / name, reason)

    def _discard(self, path: Path, reason: str) -> None:
        self._on_drop(path.name, reason)
        gone = self._folder / f"{TEMPORARY}{secrets.token_hex(8)}"
        try:
            os.rename(path, gone)
        except FileNotFoundError:
            return
        except OSError:
            gone = path
        _remove(gone)


def default_bytes_max(folder: Path) -> int:
    """4 GiB, or a tenth of the disk that `folder` lies on, whichever is less."""
    disk = os.statvfs(folder)
    return min(BYTES_MAX, int(DISK_SHARE_MAX * disk.f_blocks * disk.f_frsize))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
