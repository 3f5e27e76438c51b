"""Disks that a power loss may leave behind (after ALICE, OSDI 2014, and SQLite's own crash tests).

One run is recorded: every write, truncation, sync, creation, rename and removal, with acks between.
An image is built from the events before a moment: of each file what was synced, plus any sectors of
the writes since; of the names what was synced with their directory, plus any beginning of the
changes since. A name that was synced may then point to a file of which nothing was.
"""

import os
import random
from dataclasses import dataclass, field
from pathlib import Path

from .tracing import Stops, start

_WRITE, _PWRITE, _OPENAT, _FSYNC, _FDATASYNC = 1, 18, 257, 74, 75
_RENAME, _UNLINK, _MKDIR, _FTRUNCATE = 82, 87, 83, 77
_SECTOR_BYTES = 512


@dataclass(frozen=True)
class Event:
    kind: str  # write truncate sync / create mkdir rename unlink / ack
    path: str = ""
    inode: int = 0
    offset: int = 0
    data: bytes = b""
    target: str = ""


@dataclass
class Recording:
    events: list[Event] = field(default_factory=list)


def record(work) -> Recording:  # type: ignore[no-untyped-def]
    """Run `work(ack)` in a traced child and note what it does to files."""
    pid, receive, ack_fd = start(work)
    stops = Stops(pid)
    recording = Recording()
    for entering in stops:
        event = None if entering else _event(stops, pid, ack_fd)
        if event:
            recording.events.append(event)
    os.close(receive)
    assert stops.status == 0
    return recording


def _event(stops: Stops, pid: int, ack_fd: int) -> Event | None:
    call, result, (one, two, three, four) = stops.call()
    if result < 0:
        return None
    if call in (_WRITE, _PWRITE):
        data = stops.memory(two, result)
        if one == ack_fd:
            return Event("ack", data=data)
        offset = four if call == _PWRITE else _position(pid, one) - result
        return Event("write", *_file(pid, one), offset, data)
    if call in (_FSYNC, _FDATASYNC):
        return Event("sync", *_file(pid, one))
    if call == _FTRUNCATE:
        return Event("truncate", *_file(pid, one), two)
    if call == _OPENAT and three & os.O_CREAT:
        return Event("create", *_file(pid, result))
    if call == _MKDIR:
        return Event("mkdir", stops.text(one), os.stat(stops.text(one)).st_ino)
    if call == _RENAME:
        return Event("rename", stops.text(one), target=stops.text(two))
    if call == _UNLINK:
        return Event("unlink", stops.text(one))
    return None


def _file(pid: int, fd: int) -> tuple[str, int]:
    path = f"/proc/{pid}/fd/{fd}"
    return os.readlink(path), os.stat(path).st_ino


def _position(pid: int, fd: int) -> int:
    with open(f"/proc/{pid}/fdinfo/{fd}") as info:
        return int(info.readline().split()[1])


@dataclass
class _File:
    synced: bytearray = field(default_factory=bytearray)
    pending: list[Event] = field(default_factory=list)

    def content(self, rng: random.Random) -> bytes:
        """What is on disk: each sector of each unsynced write arrived or not; all or none of them, often."""
        content = bytearray(self.synced)
        chance = rng.choice([0.0, 0.5, 0.9, 1.0])
        for event in self.pending:
            if event.kind == "truncate":
                if rng.random() < chance:
                    del content[event.offset :]
                continue
            for at in range(0, len(event.data), _SECTOR_BYTES):
                if rng.random() < chance:
                    _write(content, event.offset + at, event.data[at : at + _SECTOR_BYTES])
        return bytes(content)

    def sync(self) -> None:
        for event in self.pending:
            if event.kind == "truncate":
                del self.synced[event.offset :]
            else:
                _write(self.synced, event.offset, event.data)
        self.pending.clear()


def _write(content: bytearray, offset: int, data: bytes) -> None:
    content.extend(bytes(max(0, offset - len(content))))
    content[offset : offset + len(data)] = data


def write_image(events: list[Event], recorded: Path, image: Path, rng: random.Random) -> list[str]:
    """Make the folder `image`; returns the acks that were given before the power was lost."""
    # A removed file's inode number may be used again, so files are told apart by a count.
    serial: dict[str, int] = {}  # path -> file, as the running system sees it
    files: dict[int, _File] = {}
    names: dict[str, int | None] = {str(recorded.parent): None}  # durable; None is a directory
    pending: list[Event] = []  # name changes, each with the file's number as inode
    acks: list[str] = []
    for event in events:
        if event.kind == "ack":
            acks += event.data.decode().splitlines()
        elif event.kind in ("write", "truncate"):
            files[serial[event.path]].pending.append(event)
        elif event.kind == "sync" and event.path in serial:
            files[serial[event.path]].sync()
        elif event.kind == "sync":
            for change in [c for c in pending if os.path.dirname(c.path) == event.path]:
                _rename(names, change)
                pending.remove(change)
        elif event.kind == "create" and event.path in serial:
            pass  # opened again
        elif event.kind == "rename":
            serial[event.target] = serial.pop(event.path)
            pending.append(event)
        elif event.kind == "unlink":
            serial.pop(event.path, None)
            pending.append(event)
        else:
            number = len(files) + 1
            if event.kind == "create":
                files[number] = _File()
                serial[event.path] = number
            pending.append(Event(event.kind, event.path, number))
    for change in pending[: rng.randint(0, len(pending))]:
        _rename(names, change)
    _make(names, files, recorded, image, rng)
    return acks


def _rename(names: dict[str, int | None], change: Event) -> None:
    if change.kind == "create":
        names[change.path] = change.inode
    elif change.kind == "mkdir":
        names[change.path] = None
    elif change.kind == "unlink":
        names.pop(change.path, None)
    elif change.path in names:
        names[change.target] = names.pop(change.path)


def _make(
    names: dict[str, int | None],
    files: dict[int, _File],
    recorded: Path,
    image: Path,
    rng: random.Random,
) -> None:
    image.mkdir(parents=True)
    for path, number in sorted(names.items()):
        inside = os.path.relpath(path, recorded)
        if inside.startswith(".."):
            continue
        if number is None:
            (image / inside).mkdir(exist_ok=True)
        elif (image / inside).parent.is_dir():
            (image / inside).write_bytes(files[number].content(rng))
