"""Where events go: one JSON line each to stderr, and into a ring that `graphoptctl logs` reads.

On a terminal the lines are text; under systemd's journal each begins with its priority (`<4>`).
Writing happens on a thread of its own behind a bounded queue: a stopped terminal or a stalled
journal must not stop a service. Lines that find the queue full are dropped and counted in
`log.dropped`; the ring has them. Records of other libraries arrive by the same way as `log.other`,
from warning upwards.

Deliberately absent: files and rotation (the supervisor's job), levels by logger, and the native
journal socket, which costs more and loses large records.
"""

import json
import logging
import os
import select
import threading
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from math import isfinite
from typing import Any

from graphoptd.events import SCHEMA, Said, emit
from graphoptd.settings import LogSettings

LINE_BYTES_MAX = 40_000  # journald cuts lines at 48 KiB (LineMax=) and the rest would be no JSON
QUEUED_LINES_MAX = 10_000  # lines waiting for a slow reader
QUEUED_BYTES_MAX = 16 << 20
CLOSE_TIMEOUT_S = 2.0  # for the last lines; a reader that takes longer has stopped
_WRITE_BYTES = 64 << 10  # of one write: the size of a pipe
_CUTS = ((4_096, 100), (256, 10), (64, 3))  # characters of a text, entries of a list; tried in turn
_DEPTH_MAX = 6  # nesting inside a field

_OWN_LOGGERS = ("graphopt", "cost_models", "graphoptd")
_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3}  # of syslog


@dataclass(frozen=True, slots=True)
class Page:
    """A piece of the ring.

    Attributes:
        epoch: names this run of the service; sequence numbers begin anew with each.
        lines: sequence number and JSON line, in order.
        last: pass it as `after` to go on from here.
        missed: lines after `after` that the ring no longer has.
    """

    epoch: str
    lines: tuple[tuple[int, str], ...]
    last: int
    missed: int


class Ring:
    """The last lines, bounded in number and bytes, for readers that come and go."""

    def __init__(self, lines_max: int, bytes_max: int) -> None:
        self.epoch = uuid.uuid4().hex[:12]
        self._lock = threading.Lock()
        self._lines: deque[str] = deque()
        self._bytes = 0
        self._last = 0
        self._listeners: list[Callable[[], None]] = []
        self.resize(lines_max, bytes_max)

    def resize(self, lines_max: int, bytes_max: int) -> None:
        """Change the bounds; the oldest lines go when there are too many."""
        with self._lock:
            self._lines_max, self._bytes_max = lines_max, bytes_max
            self._trim()

    def append(self, line: str) -> int:
        """Add a line; its sequence number, from 1."""
        with self._lock:
            self._last += 1
            self._lines.append(line)
            self._bytes += len(line)
            self._trim()
            last, listeners = self._last, tuple(self._listeners)
        for listener in listeners:
            listener()
        return last

    def read(self, after: int = 0, count_max: int = 1_000, epoch: str = "") -> Page:
        """Up to `count_max` lines after the sequence number `after`, oldest first.

        A negative `after` counts from the end: -10 means the last ten. With the `epoch` of another
        run, reading starts at the oldest line.
        """
        with self._lock:
            oldest = self._last - len(self._lines) + 1
            if after < 0:
                after = max(oldest - 1, self._last + after)
            if (epoch and epoch != self.epoch) or after > self._last:
                after = 0
            first = max(oldest, after + 1)
            lines = tuple(islice(self._lines, first - oldest, first - oldest + count_max))
        numbered = tuple(enumerate(lines, start=first))
        return Page(self.epoch, numbered, first + len(lines) - 1, first - after - 1)

    def subscribe(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Call `listener` after each line, on the thread that logged it; returns how to stop.

        It must not block and must not log: hand over to an event loop (`call_soon_threadsafe`).
        """
        with self._lock:
            self._listeners.append(listener)

        def unsubscribe() -> None:
            with self._lock:
                if listener in self._listeners:
                    self._listeners.remove(listener)

        return unsubscribe

    def _trim(self) -> None:
        while self._lines and (len(self._lines) > self._lines_max or self._bytes > self._bytes_max):
            self._bytes -= len(self._lines.popleft())


class Logs:
    """The installed logging: keep it, `configure` it on a reload, `close` it last."""

    def __init__(self, settings: LogSettings, fd: int, environ: Mapping[str, str]) -> None:
        self.ring = Ring(settings.ring_lines_max, settings.ring_bytes_max)
        self._fd = fd
        self._in_journal = in_journal(fd, environ)
        self._writer = _Writer(fd)
        self._handler = _Outlet(self.ring, self._writer)
        self._root = logging.getLogger()
        self._before = (self._root.handlers[:], self._root.level)
        self._root.handlers[:] = [self._handler]
        self._root.setLevel(logging.WARNING)
        logging.captureWarnings(True)
        self.configure(settings)

    def configure(self, settings: LogSettings) -> None:
        """Take over level, format and the bounds of the ring."""
        terminal = settings.format == "auto" and not self._in_journal and os.isatty(self._fd)
        self._handler.text = settings.format == "text" or terminal
        self._handler.prefixed = self._in_journal
        self.ring.resize(settings.ring_lines_max, settings.ring_bytes_max)
        for name in _OWN_LOGGERS:
            logging.getLogger(name).setLevel(settings.level.upper())

    def say(self, text: str) -> None:
        """Write a text for people among the lines, in order; it is no event."""
        self._writer.put(text.encode("utf-8", "backslashreplace") + b"\n")

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Write what is queued, for at most `timeout_s`, and put logging back as it was."""
        self._writer.close(timeout_s)
        if self._handler not in self._root.handlers:
            return  # closed before
        handlers, level = self._before
        # Handlers that others added since stay; they alone know when to take them away.
        since = [each for each in self._root.handlers if each is not self._handler]
        self._root.handlers[:] = since or handlers
        self._root.setLevel(level)
        for name in _OWN_LOGGERS:
            logging.getLogger(name).setLevel(logging.NOTSET)
        logging.captureWarnings(False)


def install(settings: LogSettings, fd: int = 2, environ: Mapping[str, str] | None = None) -> Logs:
    """Route all logging of this process to `fd` (stderr) and a ring; once, at start."""
    return Logs(settings, fd, os.environ if environ is None else environ)


def in_journal(fd: int, environ: Mapping[str, str]) -> bool:
    """Whether `fd` is the stream that systemd connected to the journal (systemd.exec(5))."""
    try:
        found = os.fstat(fd)
    except OSError:
        return False
    return environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def line_of(record: logging.LogRecord) -> dict[str, Any]:
    """The line as a mapping, cut to what `LINE_BYTES_MAX` allows."""
    ts = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds")
    said = getattr(record, "said", None)
    severity: str
    fields: Mapping[str, Any]
    if isinstance(said, Said):
        event, severity, fields = said.event.name, said.event.severity, said.fields
    else:
        event, severity, fields = "log.other", _severity(record.levelno), _foreign(record)
    head = {"ts": f"{ts[:-6]}Z", "severity": severity, "event": event, "schema": SCHEMA}
    for chars_max, entries_max in _CUTS:
        cut = _Cut(chars_max, entries_max)
        line = head | {name: cut.value(value) for name, value in fields.items()}
        if cut.happened or chars_max != _CUTS[0][0]:
            line["truncated"] = True
        if len(_dumped(line)) <= LINE_BYTES_MAX:
            return line
    return head | {"truncated": True}


def text_of(line: Mapping[str, Any]) -> str:
    """The line for people: time of day, severity, event, then `key=value`."""
    ts = str(line["ts"])
    words = [ts[11:23], f"{line['severity']:<7}", f"{line['event']:<16}"]
    for name, value in line.items():
        if name not in ("ts", "severity", "event", "schema", "exception"):
            words.append(f"{name}={_word(value)}")
    text = " ".join(words)
    for row in str(line.get("exception", "")).splitlines():
        text += "\n    " + (row if row.isprintable() else json.dumps(row))
    return text


def _foreign(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = {"logger": record.name, "message": record.getMessage()}
    if record.exc_info and record.exc_info[0] is not None:
        fields["exception"] = logging.Formatter().formatException(record.exc_info)
    return fields


def _severity(level: int) -> str:
    if level >= logging.ERROR:
        return "error"
    if level >= logging.WARNING:
        return "warning"
    return "info" if level >= logging.INFO else "debug"


def _dumped(line: Mapping[str, Any]) -> bytes:
    # A lone surrogate (from a file name) becomes its escape, which is JSON again.
    return json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace")


def _word(value: Any) -> str:
    plain = isinstance(value, str) and value.isprintable() and not set(value) & set(' ="')
    # ASCII only where anything is odd: a terminal obeys control characters beyond ASCII too.
    return value if plain and value else json.dumps(value)


class _Cut:
    """Makes any value JSON within bounds, and remembers whether something was left out."""

    def __init__(self, chars_max: int, entries_max: int) -> None:
        self.chars_max = chars_max
        self.entries_max = entries_max
        self.happened = False

    def value(self, value: Any, depth: int = 0) -> Any:
        if value is None or isinstance(value, bool | int):
            return value
        if isinstance(value, float):
            return value if isfinite(value) else None
        if isinstance(value, Mapping) and depth < _DEPTH_MAX:
            kept = self.entries(value.items())
            return {self.text(str(key)): self.value(item, depth + 1) for key, item in kept}
        if isinstance(value, list | tuple) and depth < _DEPTH_MAX:
            kept = [self.value(item, depth + 1) for item in self.entries(value)]
            return [*kept, "..."] if len(value) > len(kept) else kept
        return self.text(str(value))

    def entries(self, values: Any) -> list[Any]:
        self.happened |= len(values) > self.entries_max
        return list(islice(values, self.entries_max))

    def text(self, text: str) -> str:
        if len(text) <= self.chars_max:
            return text
        self.happened = True
        return text[: self.chars_max] + "..."


class _Outlet(logging.Handler):
    """Makes the line once and hands it to the ring and the writer."""

    def __init__(self, ring: Ring, writer: "_Writer") -> None:
        super().__init__()
        self.text = False
        self.prefixed = False
        self._ring = ring
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = line_of(record)
            dumped = _dumped(line)
            written = text_of(line).encode("utf-8", "backslashreplace") if self.text else dumped
            if self.prefixed:
                mark = b"<%d>" % _PRIORITIES[line["severity"]]
                written = mark + written.replace(b"\n", b"\n" + mark)
            self._writer.put(written + b"\n")
            self._ring.append(dumped.decode())
        except Exception:
            self.handleError(record)


class _Writer:
    """Writes queued lines to a file descriptor on its own thread."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._wake = threading.Condition()
        self._queue: deque[bytes] = deque()
        self._bytes = 0
        self._dropped = 0
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="graphoptd-log", daemon=True)
        self._thread.start()

    def put(self, line: bytes) -> None:
        with self._wake:
            if len(self._queue) >= QUEUED_LINES_MAX or self._bytes >= QUEUED_BYTES_MAX:
                self._dropped += 1
                return
            self._queue.append(line)
            self._bytes += len(line)
            self._wake.notify()

    def close(self, timeout_s: float) -> None:
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._queue and not self._closing:
                    self._wake.wait()
                if not self._queue:
                    return
                piece = self._taken()
                dropped = self._dropped if not self._queue else 0
                self._dropped -= dropped
            try:
                self._write(piece)
            except OSError:  # the reader is gone, or the disk is full: the ring still has the lines
                continue
            if dropped:
                emit("log.dropped", lines=dropped)

    def _taken(self) -> bytes:
        lines, size = [], 0
        while self._queue and size < _WRITE_BYTES:
            lines.append(self._queue.popleft())
            size += len(lines[-1])
        self._bytes -= size
        return b"".join(lines)

    def _write(self, piece: bytes) -> None:
        view = memoryview(piece)
        while view:
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:  # whoever started us made the descriptor non-blocking
                select.select([], [self._fd], [])
