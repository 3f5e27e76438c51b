"""A folder that takes deltas as files: for configuration management, cron, and whoever has no socket.

    mv adapter-legal.delta /var/spool/graphoptd/       a folder with delta.yaml and its files
    mv bypass.yaml /var/spool/graphoptd/               a single document

A unit is *renamed* into the folder, so it is whole when it appears; names that begin with a dot or
end in `.tmp` are somebody's work in progress. Units are applied in order of their names and moved
to `accepted/`, or to `rejected/` with the reason beside. Who owns the unit decides what it may do.

Exactly once: a unit without an `id` of its own gets one from its content, inode and time of arrival
(ctime), so a crash between applying and moving leads to the same id and the answer of the first
time, while the same file dropped in again later is a new wish.

Deliberately absent: reading partly written files, sub-folders beyond a unit's own, and anything but
deltas (loading a model needs `graphoptctl load`).
"""

import os
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer

from graphopt.delta import Delta
from graphopt.delta_document import decode_delta
from graphopt.documents import load_json, load_yaml
from graphopt.engine.records import Applied
from graphopt.errors import AccessDeniedError, DocumentError, GraphoptError, StateFailedError
from graphopt.graph import Constant
from graphopt.limits import DOCUMENT_BYTES_MAX
from graphopt.safe_file import read_bounded
from graphoptd.control.context import acting_for
from graphoptd.control.descriptors import FilesByPath, SentFiles, staged
from graphoptd.control.levels import Level, level_of, user_of
from graphoptd.control.opening import close_opened, named_paths, open_paths
from graphoptd.events import emit
from graphoptd.settings import Settings

ACCEPTED, REJECTED = "accepted", "rejected"
FOLDER_SUFFIX = ".delta"
DOCUMENTS = ("delta.yaml", "delta.json")  # of a unit that is a folder
SINGLE_SUFFIXES = (".yaml", ".json")
REASON_SUFFIX = ".reason.txt"

_CHUNK_BYTES = 1 << 20
_HINTS = frozenset({"created", "moved"})  # reading, ours among it, says nothing about arrivals
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH

Apply = Callable[[Delta], tuple[str, Applied]]


@dataclass(frozen=True, slots=True)
class _Unit:
    """A unit as it was found.

    Attributes:
        pin: a path that leads to this very inode while the unit is open, whatever is renamed.
    """

    name: str
    pin: str
    status: os.stat_result

    @property
    def is_folder(self) -> bool:
        return stat.S_ISDIR(self.status.st_mode)


class Spool:
    """Watches the folder `settings().spool.path` and applies what arrives.

    Args:
        settings: the settings in force; asked for at each look.
        apply: applies a delta to the model it names and returns the model's name and the answer;
            `functools.partial(graphoptd.control.changes.apply_to, host)`.
        clock: seconds, monotonic.
        constant: finds a constant by content hash, for deltas that name one.
    """

    def __init__(
        self,
        settings: Callable[[], Settings],
        apply: Apply,
        clock: Callable[[], float] = time.monotonic,
        constant: Callable[[str], Constant | None] = lambda digest: None,
    ) -> None:
        path = settings().spool.path
        if path is None:
            raise DocumentError("no folder is configured", where="spool.path", remedy="name one")
        self.path = path
        self._settings = settings
        self._apply = apply
        self._clock = clock
        self._constant = constant
        self._looking = threading.Lock()
        self._hint = threading.Event()
        self._stop = threading.Event()
        self._stuck: set[tuple[int, int]] = set()  # inode and ctime of units that cannot be moved
        self._thread = threading.Thread(target=self._run, name="graphoptd-spool", daemon=True)
        self._observer = Observer()

    def start(self) -> str:
        """Starts; the reason why there are no notifications, or an empty string.

        Raises:
            DocumentError: the folder is missing, or this process may not write there.
        """
        for folder in (ACCEPTED, REJECTED):
            try:
                (self.path / folder).mkdir(mode=0o750, exist_ok=True)
            except OSError as error:
                raise DocumentError(
                    f"cannot keep entries there: {error.strerror}",
                    where=str(self.path / folder),
                    remedy="make the spool folder, owned by the service's user",
                ) from None
        missing = ""
        try:
            self._observer.schedule(_Arrivals(self._hint), str(self.path))
            self._observer.start()
        except OSError as error:  # no inotify instance or watch left: the rescan has to do
            missing = error.strerror or str(error)
        self._thread.start()
        self._hint.set()  # what arrived while nobody looked
        return missing

    def stop(self) -> None:
        """Stops after the unit at hand."""
        self._stop.set()
        self._hint.set()
        if self._observer.is_alive():
            self._observer.stop()
            self._observer.join()
        if self._thread.is_alive():
            self._thread.join()

    def rescan(self) -> int:
        """Looks now and processes what is there, in order of names; how many units were moved."""
        done = 0
        with self._looking:
            for name in self._names():
                if self._stop.is_set() or not self._process(name):
                    break
                done += 1
        return done

    def _run(self) -> None:
        while not self._stop.is_set():
            self._hint.wait(self._settings().spool.rescan_s)
            self._hint.clear()
            self.rescan()

    def _names(self) -> list[str]:
        found = []
        with suppress(OSError), os.scandir(self.path) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith(".") or name.endswith(".tmp") or name in (ACCEPTED, REJECTED):
                    continue
                is_folder = entry.is_dir(follow_symlinks=False)
                if name.endswith((FOLDER_SUFFIX,) if is_folder else SINGLE_SUFFIXES):
                    status = entry.stat(follow_symlinks=False)
                    if (status.st_ino, status.st_ctime_ns) not in self._stuck:
                        found.append(name)
        return sorted(found)

    def _process(self, name: str) -> bool:
        """Applies one unit and moves it; False when it has to wait, and with it those behind it."""
        start_s = self._clock()
        uid = delta_id = None
        try:
            inode = os.lstat(self.path / name).st_ino
            with self._opened(name) as unit:
                inode, uid = unit.status.st_ino, unit.status.st_uid
                self._check_level(unit)
                with self._decoded(unit) as delta:
                    delta_id = delta.id
                    with acting_for("spool", uid):
                        graph, applied = self._apply(delta)
        except FileNotFoundError:
            return True  # taken back before we came
        except GraphoptError as error:
            if error.retryable or isinstance(error, StateFailedError):
                return False
            emit(
                "spool.rejected",
                path=self._moved(name, inode, REJECTED, str(error)),
                code=error.code,
                message=error.message,
                delta_id=delta_id,
                where=error.where or None,
                remedy=error.remedy or None,
                detail=[list(pair) for pair in error.detail] or None,
                peer_uid=uid,
            )
            return True
        emit(
            "spool.accepted",
            path=self._moved(name, inode, ACCEPTED),
            graph=graph,
            revision=applied.revision,
            delta_id=delta_id,
            peer_uid=uid,
            duration_ms=round((self._clock() - start_s) * 1e3, 3),
        )
        return True

    @contextmanager
    def _opened(self, name: str) -> Iterator[_Unit]:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            descriptor = os.open(self.path / name, flags)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise DocumentError(
                f"cannot be opened: {error.strerror}",
                where=name,
                remedy="a unit is a file or folder that the service's user may read, not a link",
            ) from None
        try:
            yield _Unit(name, f"/proc/self/fd/{descriptor}", os.fstat(descriptor))
        finally:
            os.close(descriptor)

    def _check_level(self, unit: _Unit) -> None:
        """The owner of the unit must have what `apply` needs, and nobody else a hand in it."""
        _check_owned(unit.status, unit.status.st_uid, unit.name)
        peer = user_of(unit.status.st_uid, unit.status.st_gid)
        level = level_of(peer, self._settings().control.levels)
        if level < Level.OPERATE:
            emit("control.denied", method="spool", level="operate", peer_uid=peer.uid)
            raise AccessDeniedError(
                f"user {peer.uid} has the level {level.word}, a delta needs operate",
                where=unit.name,
                remedy="ask for membership in a group of control.levels",
            )

    @contextmanager
    def _decoded(self, unit: _Unit) -> Iterator[Delta]:
        """The unit's delta, with an id; its files are copies, so the owner can change nothing."""
        document, folder = DOCUMENTS[0], unit.pin
        if unit.is_folder:
            present = [each for each in DOCUMENTS if os.path.lexists(f"{unit.pin}/{each}")]
            if len(present) != 1:
                raise DocumentError(
                    f"the folder holds {len(present)} documents",
                    where=unit.name,
                    remedy=f"put one of {' and '.join(DOCUMENTS)} into it",
                )
            (document,) = present
            text = _read(f"{unit.pin}/{document}", unit, f"{unit.name}/{document}")
        else:
            document = unit.name
            descriptor = int(unit.pin.rpartition("/")[2])
            text = read_bounded(descriptor, DOCUMENT_BYTES_MAX, label=unit.name, one_link=True)
        is_json = document.endswith(".json")
        paths = named_paths(text, "json" if is_json else "yaml")
        if paths and not unit.is_folder:
            raise DocumentError(
                "a single document cannot bring files",
                where=f"{unit.name}: {paths[0]}",
                remedy=f"rename a folder NAME{FOLDER_SUFFIX} with delta.yaml and the files in",
            )
        opened = open_paths(paths, folder, label=unit.name, confined=True)
        try:
            for each in opened:
                for name, fd in each.files.items():
                    _check_owned(os.fstat(fd), unit.status.st_uid, f"{unit.name}/{name}")
            with staged({each.path: each.files for each in opened}) as files:
                loaded = (load_json if is_json else load_yaml)(text, source=unit.name)
                delta = decode_delta(loaded, SentFiles(files, self._constant))
                yield _with_id(delta, unit, text, files)
        finally:
            close_opened(opened)

    def _moved(self, name: str, inode: int, kind: str, reason: str = "") -> str:
        """Moves a unit aside, with its reason; returns where it is now."""
        source, folder = self.path / name, self.path / kind
        target = next(
            each
            for number in range(1 << 30)
            if not os.path.lexists(each := folder / (f"{name}~{number}" if number else name))
        )
        if reason:
            with suppress(OSError):  # the log has it as well
                target.with_name(target.name + REASON_SUFFIX).write_text(reason + "\n")
        for place in (target, self.path / f".{kind}.{name}"):
            # A folder that belongs to somebody else may only change its name where it lies.
            with suppress(OSError):
                os.rename(source, place)
                if os.lstat(place).st_ino != inode:
                    # Another unit was renamed over this one meanwhile: it has its turn yet.
                    os.rename(place, source)
                    return str(source)
                self._trim(folder)
                return str(place)
        with suppress(OSError):
            status = os.lstat(source)
            self._stuck.add((status.st_ino, status.st_ctime_ns))
        return str(source)

    def _trim(self, folder: Path) -> None:
        """Removes the oldest entries beyond `kept_max`; the rename into place set their ctime."""
        kept_max = self._settings().spool.kept_max
        with suppress(OSError):
            with os.scandir(folder) as found:
                entries = [entry for entry in found if not entry.name.endswith(REASON_SUFFIX)]
            if len(entries) <= kept_max:
                return
            by_age = sorted(
                entries,
                key=lambda entry: (entry.stat(follow_symlinks=False).st_ctime_ns, entry.name),
            )
            for entry in by_age[: len(entries) - kept_max]:
                _remove(Path(entry.path))
                _remove(Path(entry.path + REASON_SUFFIX))


class _Arrivals(FileSystemEventHandler):
    """Sets the flag when a name appears; which one it is, the folder knows better."""

    def __init__(self, hint: threading.Event) -> None:
        self._hint = hint

    def on_any_event(self, event: FileSystemEvent) -> None:
        if event.event_type in _HINTS:
            self._hint.set()


def _read(path: str, unit: _Unit, label: str) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise DocumentError(
            f"cannot be opened: {error.strerror}",
            where=label,
            remedy="it must be a file, not a link, that the service's user may read",
        ) from None
    try:
        _check_owned(os.fstat(descriptor), unit.status.st_uid, label)
        return read_bounded(descriptor, DOCUMENT_BYTES_MAX, label=label, one_link=True)
    finally:
        os.close(descriptor)


def _check_owned(status: os.stat_result, uid: int, label: str) -> None:
    """What others may write, or own, must not act with the rights of the unit's owner."""
    if status.st_uid != uid:
        raise AccessDeniedError(
            f"the file belongs to user {status.st_uid}, the unit to user {uid}",
            where=label,
            remedy="copy the file, so that all of the unit is yours",
        )
    if status.st_mode & _OTHERS_WRITE and not stat.S_ISLNK(status.st_mode):
        raise AccessDeniedError(
            "others than its owner may write it", where=label, remedy="chmod go-w it"
        )


def _with_id(delta: Delta, unit: _Unit, text: bytes, files: FilesByPath) -> Delta:
    if delta.id is not None:
        return delta
    hasher = sha256(text)
    for path, entries in sorted(files.items()):
        for name, descriptor in sorted(entries.items()):
            hasher.update(f"\0{path}\0{name}\0".encode())
            _feed(hasher.update, descriptor)
    status = unit.status
    hasher.update(f"\0{status.st_ino} {status.st_ctime_ns}".encode())
    return Delta(
        delta.edits,
        delta.graph,
        delta.if_revision,
        f"spool-{hasher.hexdigest()}",
        delta.allow_interface_change,
        delta.source,
    )


def _feed(update: Callable[[bytes], None], descriptor: int) -> None:
    offset = 0
    while chunk := os.pread(descriptor, _CHUNK_BYTES, offset):
        update(chunk)
        offset += len(chunk)


def _remove(path: Path) -> None:
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
