"""Tells when files changed: notifications as the hint, `stat` as the truth.

The folders around the files are watched (editors, package managers and Kubernetes replace files by
renaming), and the files are also looked at every `rescan_s` seconds, because notifications get lost:
a full inotify queue, a network file system, a link into another folder. A change is reported once
two looks, `debounce_s` apart, agree: then the file is not being written any more, and a later
write cannot carry the same time stamp.

The callback runs on the watch's own thread. Deliberately absent: reading the files, and any idea
of what they mean.
"""

import os
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer

DEBOUNCE_S = 0.2  # longer than an editor takes from truncation to the last byte
RESCAN_S = 10.0  # how late a change may be noticed without notifications
SETTLE_LOOKS_MAX = 50  # looks at files that never come to rest: 10 s, then they are reported as is

# What one `stat` says about a file's content; None where there is none.
Look = tuple[int, int, int, int, int] | None

# Notifications of reading, ours among them, say nothing about change.
_CHANGES = frozenset({"created", "modified", "moved", "deleted", "closed"})


class Watch:
    """Watches `paths` and calls `changed` with those whose content changed, appeared or went.

    Args:
        paths: files; their folders should exist (without one, only the rescan sees it appear). Or
            what lists them at each look, for folders whose files come and go.
        changed: called on the watch's thread, one call at a time; it must not raise.
        debounce_s: seconds between the two looks that must agree.
        rescan_s: seconds between looks without a notification.
        notifications: False relies on the rescan alone, for file systems that send none.
    """

    def __init__(
        self,
        paths: Iterable[Path] | Callable[[], Iterable[Path]],
        changed: Callable[[tuple[Path, ...]], None],
        *,
        debounce_s: float = DEBOUNCE_S,
        rescan_s: float = RESCAN_S,
        notifications: bool = True,
    ) -> None:
        self._changed = changed
        self._debounce_s = debounce_s
        self._rescan_s = rescan_s
        fixed = () if callable(paths) else tuple(paths)
        self._list = paths if callable(paths) else lambda: fixed
        self._known: dict[Path, Look] = {path: look(path) for path in self._list()}
        self._lock = threading.Lock()  # of _known: rescan may be called from any thread
        self._hint = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="graphoptd-watch", daemon=True)
        self._observer = Observer() if notifications else None

    def start(self) -> str:
        """Start watching; the reason why there are no notifications, or an empty string."""
        missing = self._start_observer()
        self._thread.start()
        # A change between construction and here would have sent no notification.
        self._hint.set()
        return missing

    def stop(self) -> None:
        """Stop and join; no call of `changed` is running or to come afterwards."""
        self._stop.set()
        self._hint.set()
        if self._observer is not None and self._observer.is_alive():
            self._observer.stop()
            self._observer.join()
        if self._thread.is_alive():
            self._thread.join()

    def rescan(self) -> tuple[Path, ...]:
        """Look now: the files that differ from the last look. Does not call `changed`."""
        with self._lock:
            now = {path: look(path) for path in self._list()}
            known = self._known
            different = tuple(path for path in {**known, **now} if now.get(path) != known.get(path))
            self._known = now
        return different

    def _start_observer(self) -> str:
        if self._observer is None:
            return "notifications are off"
        handler = _Hint(self._hint)
        missing = ""
        try:
            self._observer.start()
        except OSError as error:  # no thread or inotify instance left
            return error.strerror or str(error)
        for folder in sorted({path.absolute().parent for path in self._known}):
            try:  # once it runs, one folder that cannot be watched does not spoil the others
                self._observer.schedule(handler, str(folder))
            except OSError as error:
                missing = f"{folder}: {error.strerror or error}"
        return missing

    def _run(self) -> None:
        while not self._stop.is_set():
            self._hint.wait(self._rescan_s)
            changed = set(self.rescan())
            for _ in range(SETTLE_LOOKS_MAX):
                # The hint means that something was written since; without one and without a
                # difference there is nothing to settle.
                if not changed and not self._hint.is_set():
                    break
                self._hint.clear()
                if self._stop.wait(self._debounce_s):
                    return
                again = self.rescan()
                changed.update(again)
                if not again and not self._hint.is_set():
                    break
            if changed and not self._stop.is_set():
                self._changed(tuple(sorted(changed)))


class _Hint(FileSystemEventHandler):
    """Sets the flag for each notification of a change; which file it was, `stat` knows better."""

    def __init__(self, hint: threading.Event) -> None:
        self._hint = hint

    def on_any_event(self, event: FileSystemEvent) -> None:
        if event.event_type in _CHANGES:
            self._hint.set()


def look(path: Path) -> Look:
    """Device, inode, size and the two times of the file `path` leads to; None without one."""
    with suppress(OSError):
        found = os.stat(path)
        return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    return None
