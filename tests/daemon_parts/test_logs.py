"""A line is one JSON object whatever happens, and a slow reader never stops the service."""

import json
import logging
import os
import pty
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphoptd.event_table import EVENTS
from graphoptd.events import emit, problems
from graphoptd.logs import (
    LINE_BYTES_MAX,
    QUEUED_LINES_MAX,
    Logs,
    Ring,
    in_journal,
    install,
    line_of,
    text_of,
)
from graphoptd.settings import LogSettings

ROOT = Path(__file__).parents[2]
Installer = Callable[..., Logs]


@dataclass
class Target:
    """A pipe as stderr: `logs` writes into it, `lines` closes and reads it."""

    logs: Logs
    read_fd: int
    write_fd: int

    def lines(self) -> list[str]:
        self.logs.close()
        os.close(self.write_fd)
        with os.fdopen(self.read_fd, encoding="utf-8") as file:
            return file.read().splitlines()


@pytest.fixture
def target() -> Iterator[Callable[..., Target]]:
    made: list[Logs] = []

    def make(environ: dict[str, str] | None = None, **settings: Any) -> Target:
        read_fd, write_fd = os.pipe()
        environ = {
            key: value.replace("FD", _identity(write_fd)) for key, value in (environ or {}).items()
        }
        logs = install(LogSettings(**settings), write_fd, environ)
        made.append(logs)
        return Target(logs, read_fd, write_fd)

    yield make
    for logs in made:
        logs.close()


def _identity(fd: int) -> str:
    found = os.fstat(fd)
    return f"{found.st_dev}:{found.st_ino}"


def test_an_event_is_one_json_line_with_its_fields(target: Callable[..., Target]) -> None:
    to = target()
    emit("plan.published", graph="minilm", revision=13, plan_id="p7", ratio=0.91)
    [line] = [json.loads(text) for text in to.lines()]
    assert line.pop("ts").endswith("Z")
    assert line == {
        "severity": "info",
        "event": "plan.published",
        "schema": 1,
        "graph": "minilm",
        "revision": 13,
        "plan_id": "p7",
        "ratio": 0.91,
    }


def test_lines_under_the_journal_bear_their_priority(target: Callable[..., Target]) -> None:
    to = target({"JOURNAL_STREAM": "FD"})
    emit("daemon.stopping", reason="SIGTERM")
    emit("log.dropped", lines=2)
    emit("daemon.failed", code="state.unusable", message="two\nlines")
    texts = to.lines()
    assert [text[:3] for text in texts] == ["<6>", "<4>", "<3>"]
    assert json.loads(texts[2][3:])["message"] == "two\nlines"


def test_another_journal_stream_than_ours_is_not_taken_for_it(
    target: Callable[..., Target],
) -> None:
    to = target({"JOURNAL_STREAM": "1:1"})
    emit("log.dropped", lines=2)
    assert to.lines()[0].startswith("{")
    assert not in_journal(to.read_fd + 1000, {"JOURNAL_STREAM": "1:1"})


def test_a_terminal_gets_text_and_a_reload_can_change_that() -> None:
    master, slave = pty.openpty()
    logs = install(LogSettings(), slave, {})
    emit("delta.rejected", graph="m", code="delta.cycle", message="a cycle\x1b[2J")
    logs.configure(LogSettings(format="json"))
    emit("log.dropped", lines=1)
    logs.close()
    os.close(slave)
    first, second = _drained(master).splitlines()
    assert 'warning delta.rejected   graph=m code=delta.cycle message="a cycle\\u001b[2J"' in first
    assert json.loads(second)["event"] == "log.dropped"


def _drained(fd: int) -> str:
    found = b""
    while True:
        try:
            piece = os.read(fd, 65536)
        except OSError:  # Linux says EIO when the other side of a terminal is closed
            piece = b""
        if not piece:
            os.close(fd)
            return found.decode()
        found += piece


def test_other_libraries_are_carried_with_their_severity_from_warning_up(
    target: Callable[..., Target],
) -> None:
    to = target()
    other = logging.getLogger("some.library")
    other.info("not of interest")
    other.warning("look %s", "here")
    try:
        raise RuntimeError("boom")
    except RuntimeError:
        other.exception("it failed")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old call", UserWarning, stacklevel=1)
    lines = [json.loads(text) for text in to.lines()]
    assert [(line["event"], line["severity"], line["logger"]) for line in lines] == [
        ("log.other", "warning", "some.library"),
        ("log.other", "error", "some.library"),
        ("log.other", "warning", "py.warnings"),
    ]
    assert lines[0]["message"] == "look here"
    assert "RuntimeError: boom" in lines[1]["exception"]
    for line in lines:
        fields = {key: line[key] for key in ("logger", "message", "exception") if key in line}
        assert problems(EVENTS["log.other"], fields) == []


def test_the_level_holds_for_events_and_changes_live(target: Callable[..., Target]) -> None:
    to = target(level="warning")
    emit("signal.restored", signal="psi")
    emit("log.dropped", lines=1)
    to.logs.configure(LogSettings(level="info"))
    emit("signal.restored", signal="psi")
    logging.getLogger("graphopt.engine").debug("not yet")
    to.logs.configure(LogSettings(level="debug"))
    logging.getLogger("graphopt.engine").debug("now")
    lines = [json.loads(text) for text in to.lines()]
    assert [line["event"] for line in lines] == ["log.dropped", "signal.restored", "log.other"]
    assert lines[-1]["severity"] == "debug"


def test_a_reader_that_does_not_read_loses_lines_but_never_stops_us(
    target: Callable[..., Target],
) -> None:
    to = target(ring_lines_max=100_000)
    n_lines = QUEUED_LINES_MAX * 2
    for i in range(n_lines):  # far beyond the pipe and the queue; nobody reads yet
        emit("signal.restored", signal=f"s{i}")
    assert to.logs.ring.read(count_max=n_lines).last == n_lines
    found: list[str] = []
    reader = threading.Thread(target=_read_until, args=(to.read_fd, "log.dropped", found))
    reader.start()
    reader.join()
    lines = [json.loads(text) for text in found]
    dropped = [line["lines"] for line in lines if line["event"] == "log.dropped"]
    written = [line["signal"] for line in lines if line["event"] == "signal.restored"]
    assert sum(dropped) + len(written) == n_lines
    assert written == [f"s{i}" for i in range(len(written))]
    to.lines()


def _read_until(fd: int, event: str, found: list[str]) -> None:
    with os.fdopen(os.dup(fd), encoding="utf-8") as file:
        for text in file:
            found.append(text)
            if event in text:
                return


def test_a_reader_that_went_away_does_not_hurt(target: Callable[..., Target]) -> None:
    to = target()
    os.close(to.read_fd)
    for _ in range(10):
        emit("log.dropped", lines=1)
    to.logs.close()
    assert to.logs.ring.read().last == 10
    os.close(to.write_fd)


def test_close_writes_what_is_queued_and_puts_logging_back(target: Callable[..., Target]) -> None:
    before = logging.getLogger().handlers[:]
    to = target()
    for i in range(500):
        emit("log.dropped", lines=i)
    assert [json.loads(text)["lines"] for text in to.lines()] == list(range(500))
    assert logging.getLogger().handlers == before


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda below: st.lists(below) | st.dictionaries(st.text(st.characters()), below),
    max_leaves=20,
)


def record(name: str, message: Any) -> logging.LogRecord:
    return logging.LogRecord(name, logging.WARNING, "file", 1, "%s", (message,), None)


@given(anything, st.text(st.characters()))
def test_any_value_becomes_one_line_of_valid_json_and_printable_text(value: Any, name: str) -> None:
    line = line_of(record(name, value))
    text = json.dumps(line, allow_nan=False, ensure_ascii=False)
    assert "\n" not in text
    assert text_of(line).isprintable()


def test_a_line_too_long_for_the_journal_is_cut_and_says_so(target: Callable[..., Target]) -> None:
    to = target()
    detail = [[f"edits[{i}]", "x" * 5_000] for i in range(500)]
    emit("delta.rejected", graph="m", code="delta.rejected", message="many", detail=detail)
    [text] = to.lines()
    line = json.loads(text)
    assert len(text.encode()) <= LINE_BYTES_MAX
    assert line["truncated"] is True
    assert line["code"] == "delta.rejected"
    assert line["detail"][0][0] == "edits[0]"
    assert line["detail"][-1] == "..."


def test_a_file_name_that_is_not_utf8_can_be_logged(target: Callable[..., Target]) -> None:
    to = target()
    path = os.fsdecode(b"/spool/\xff.yaml")
    emit("spool.rejected", path=path, code="document.invalid", message="no")
    [text] = to.lines()
    assert json.loads(text)["path"] == path


def test_the_ring_keeps_the_last_lines_and_a_follower_resumes() -> None:
    ring = Ring(lines_max=5, bytes_max=1000)
    for i in range(1, 9):
        assert ring.append(f"line {i}") == i
    page = ring.read()
    assert page.lines == tuple((i, f"line {i}") for i in range(4, 9))
    assert (page.last, page.missed) == (8, 3)
    assert ring.read(after=8).lines == ()
    assert ring.read(after=8).last == 8
    ring.append("line 9")
    assert ring.read(after=page.last).lines == ((9, "line 9"),)
    assert ring.read(after=6).missed == 0
    assert ring.read(after=5, count_max=2).last == 7


def test_the_ring_is_bounded_in_bytes() -> None:
    ring = Ring(lines_max=1000, bytes_max=100)
    for i in range(50):
        ring.append(f"{i:010d}")
    assert [seq for seq, _ in ring.read().lines] == list(range(41, 51))
    ring.resize(lines_max=3, bytes_max=100)
    assert [seq for seq, _ in ring.read().lines] == [48, 49, 50]


def test_the_last_lines_can_be_asked_for() -> None:
    ring = Ring(lines_max=10, bytes_max=1000)
    for i in range(4):
        ring.append(str(i))
    assert [text for _, text in ring.read(after=-2).lines] == ["2", "3"]
    assert [text for _, text in ring.read(after=-99).lines] == ["0", "1", "2", "3"]
    assert ring.read(after=-99).missed == 0


def test_a_follower_of_an_earlier_run_starts_anew() -> None:
    old, new = Ring(10, 1000), Ring(10, 1000)
    for i in range(5):
        old.append(f"old {i}")
    new.append("new 0")
    last = old.read()
    assert new.read(after=last.last, epoch=last.epoch).lines == ((1, "new 0"),)
    for i in range(1, 9):
        new.append(f"new {i}")
    assert new.read(after=last.last, epoch=last.epoch).lines[0] == (1, "new 0")


def test_a_listener_is_called_after_each_line_until_it_leaves() -> None:
    ring = Ring(10, 1000)
    seen: list[int] = []
    leave = ring.subscribe(lambda: seen.append(ring.read().last))
    ring.append("a")
    ring.append("b")
    leave()
    leave()
    ring.append("c")
    assert seen == [1, 2]


def test_the_last_words_of_a_process_arrive() -> None:
    program = (
        "from graphoptd.logs import install\nfrom graphoptd.events import emit\n"
        "from graphoptd.settings import LogSettings\nlogs = install(LogSettings())\n"
        "for i in range(2000): emit('log.dropped', lines=i)\nlogs.close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'daemon'}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert [json.loads(text)["lines"] for text in done.stderr.splitlines()] == list(range(2000))
