import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from graphopt import limits
from graphopt.errors import (
    DuplicateDeltaError,
    LimitError,
    ModelExistsError,
    ModelNotFoundError,
    StateCorruptError,
    StateError,
    StateInUseError,
    StateNewerError,
)
from graphopt.store import DELTA, LOAD, SNAPSHOT, UNLOAD, Entry, StateFolder, content_sha

from .conftest import Opener

HOLDER = """
import sys
from graphopt.store import StateFolder
folder = StateFolder.open(sys.argv[1], wall_ns=lambda: 0)
print("open", flush=True)
sys.stdin.read()
"""


def load(folder: StateFolder, model: str = "m") -> str:
    digest = folder.blobs.put(model.encode())
    folder.journal.append([Entry(LOAD, model, 0, "{}", (digest,))])
    return digest


def delta(revision: int, delta_id: str | None = None, body: str = "{}") -> Entry:
    return Entry(DELTA, "m", revision, body, delta_id=delta_id, answer=f"revision {revision}")


def test_rows_come_back_in_order_with_what_was_appended(open_state: Opener) -> None:
    folder = open_state()
    base = load(folder)
    body = '{"edits":["µ\\u0000"]}'
    assert folder.journal.append([delta(1, "x", body), delta(2)]) == [2, 3]
    folder.close()
    rows = list(open_state().journal.records())
    assert [(r.seq, r.kind, r.revision, r.body) for r in rows] == [
        (1, "load", 0, "{}"),
        (2, "delta", 1, body),
        (3, "delta", 2, "{}"),
    ]
    assert rows[0].blobs == (base,)
    assert [r.parent_sha for r in rows[1:]] == [r.sha for r in rows[:2]]
    assert [r.wall_ns for r in rows] == [1000, 1001, 1001]  # one reading of the clock a transaction


def test_reading_can_begin_after_any_row(open_state: Opener) -> None:
    folder = open_state()
    load(folder)
    folder.journal.append([delta(i) for i in range(1, 300)])
    for after in (0, 1, 127, 128, 299, 300, 999):
        assert [r.seq for r in folder.journal.records(after)] == list(range(after + 1, 301))


def test_several_rows_are_all_there_or_none(open_state: Opener) -> None:
    folder = open_state()
    load(folder)
    with pytest.raises(StateCorruptError, match="f" * 64):
        folder.journal.append([delta(1), Entry(DELTA, "m", 2, "{}", ("f" * 64,))])
    with pytest.raises(ValueError, match="surrogates"):
        folder.journal.append([delta(1), delta(2, body="\ud800")])
    assert [r.seq for r in folder.journal.records()] == [1]
    assert folder.journal.append([delta(1)]) == [2]


def test_a_delta_id_is_found_again_with_its_answer_also_after_a_restart(open_state: Opener) -> None:
    folder = open_state()
    load(folder)
    folder.journal.append([delta(1, "8f0c", '{"edits":[]}')])
    for _ in range(2):
        found = folder.journal.find_delta("m", "8f0c")
        assert found is not None
        assert (found.revision, found.answer, found.seq) == (1, "revision 1", 2)
        assert found.content_sha == content_sha('{"edits":[]}', ())
        assert folder.journal.find_delta("m", "other") is None
        assert folder.journal.find_delta("n", "8f0c") is None
        folder.close()
        folder = open_state()


def test_an_id_that_is_remembered_is_not_journaled_twice(open_state: Opener) -> None:
    folder = open_state()
    load(folder)
    with pytest.raises(DuplicateDeltaError):
        folder.journal.append([delta(1, "x"), delta(2, "x")])
    folder.journal.append([delta(1, "x")])
    with pytest.raises(DuplicateDeltaError, match="x"):
        folder.journal.append([delta(2, "x")])
    folder.journal.append([Entry(UNLOAD, "m", 2, "{}")])
    load(folder)
    folder.journal.append([delta(1, "x")])  # a new model of that name


def test_remembered_ids_keep_their_bound_over_compactions_and_restarts(
    open_state: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "DELTA_IDS_KEPT_MAX", 7)
    folder = open_state()
    base = load(folder)
    revision = 0
    for _round in range(25):
        for _ in range(2):
            revision += 1
            folder.journal.append([delta(revision, f"id-{revision}")])
        folder.journal.append([Entry(SNAPSHOT, "m", revision, "{}", (base,))])
        folder.compact()
        if _round % 4 == 0:
            folder.close()
            folder = open_state()
        known = [i for i in range(1, revision + 1) if folder.journal.find_delta("m", f"id-{i}")]
        assert known == list(range(max(1, revision - 6), revision + 1))
    with sqlite3.connect(f"file:{_copied(folder)}?mode=ro", uri=True) as copy:
        assert copy.execute("SELECT count(*) FROM journal").fetchone()[0] < 25


def _copied(folder: StateFolder) -> Path:
    folder.close()
    return folder.path / "journal.sqlite3"


def test_rows_that_recovery_could_not_use_are_refused(open_state: Opener) -> None:
    folder = open_state()
    with pytest.raises(ModelNotFoundError):
        folder.journal.append([delta(1)])
    load(folder)
    with pytest.raises(ModelExistsError):
        folder.journal.append([Entry(LOAD, "m", 0, "{}")])
    with pytest.raises(ModelNotFoundError):
        folder.journal.append([Entry(UNLOAD, "m", 0, "{}"), delta(1)])
    with pytest.raises(ValueError, match="~anchor"):
        folder.journal.append([Entry("~anchor", "m", 0, "{}")])
    with pytest.raises(LimitError, match="answer"):
        folder.journal.append([Entry(DELTA, "m", 0, "{}", answer="x" * 1_025)])
    with pytest.raises(LimitError, match="rows in one append"):
        folder.journal.append([delta(1)] * 1_025)


def test_a_second_process_is_refused_and_told_the_pid_of_the_first(state: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(state)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(StateInUseError, match=rf"pid {holder.pid}\b"):
            StateFolder.open(state, wall_ns=lambda: 0)
        holder.kill()
    StateFolder.open(state, wall_ns=lambda: 0).close()


def test_a_folder_of_a_newer_program_is_refused_and_left_alone(
    open_state: Opener, state: Path
) -> None:
    open_state().close()
    with sqlite3.connect(state / "journal.sqlite3") as connection:
        connection.execute("PRAGMA user_version=2")
    connection.close()
    before = (state / "journal.sqlite3").read_bytes()
    with pytest.raises(StateNewerError, match="format 2"):
        open_state()
    assert (state / "journal.sqlite3").read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"not a database at all, but long enough" * 200])
def test_a_journal_that_was_replaced_is_refused(
    open_state: Opener, state: Path, content: bytes
) -> None:
    folder = open_state()
    load(folder)
    folder.close()
    (state / "journal.sqlite3").write_bytes(content)
    with pytest.raises(StateCorruptError, match="journal"):
        open_state()


def test_an_older_copy_of_the_journal_is_refused_by_the_row_that_is_missing(
    open_state: Opener, state: Path
) -> None:
    folder = open_state()
    load(folder)
    folder.close()
    old = (state / "journal.sqlite3").read_bytes()
    folder = open_state()
    folder.journal.append([delta(1)])
    folder.close()
    (state / "journal.sqlite3").write_bytes(old)
    with pytest.raises(StateCorruptError, match="row 2"):
        open_state()


def test_another_reader_of_the_database_is_a_typed_refusal(open_state: Opener, state: Path) -> None:
    open_state().close()
    other = sqlite3.connect(state / "journal.sqlite3", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StateInUseError, match="another program"):
        open_state()
    other.close()


def test_the_folder_is_private_and_its_parents_are_made(tmp_path: Path) -> None:
    with StateFolder.open(tmp_path / "a" / "b", wall_ns=lambda: 0) as folder:
        assert folder.path.stat().st_mode & 0o777 == 0o700
    with pytest.raises(StateError):
        StateFolder.open("/proc/nowhere", wall_ns=lambda: 0)


def test_a_checkpointed_wal_does_not_grow(open_state: Opener, state: Path) -> None:
    folder = open_state()
    load(folder)
    sizes = set()
    for i in range(6):
        folder.journal.append([delta(10 * i + j, body='"%s"' % ("x" * 4_000)) for j in range(10)])
        folder.journal.checkpoint()
        assert folder.journal.status().wal_bytes == 0
        sizes.add(os.stat(state / "journal.sqlite3-wal").st_size)
    assert max(sizes) < 200_000


def test_reading_across_a_compaction_is_refused_not_wrong(open_state: Opener) -> None:
    folder = open_state()
    base = load(folder)
    folder.journal.append([delta(i) for i in range(1, 400)])
    rows = folder.journal.records()
    next(rows)
    folder.journal.append([Entry(SNAPSHOT, "m", 399, "{}", (base,))])
    folder.compact()
    with pytest.raises(StateError, match="compacted while"):
        list(rows)
