"""The SQLite side of the journal: connection settings, format version, statements.

`body` is the last column, so that a scan of the other columns does not walk its overflow pages. The
format version stands in the database header and is written with the table in one transaction: a
folder has both or neither.
"""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from graphopt.errors import (
    StateCorruptError,
    StateError,
    StateFullError,
    StateInUseError,
    StateNewerError,
)
from graphopt.store.chain import ANCHOR, Row
from graphopt.store.compaction import Outline
from graphopt.store.disk import Health

FORMAT = 1
_APPLICATION_ID = 0x67726F70  # "grop"; `file` shows it
_WAL_KEPT_BYTES = (
    4 << 20
)  # what a checkpoint leaves of a WAL that grew; a WAL that keeps its size syncs faster

_TABLE = """CREATE TABLE journal (
  seq INTEGER PRIMARY KEY,
  parent_sha TEXT NOT NULL,
  sha TEXT NOT NULL,
  kind TEXT NOT NULL,
  model TEXT NOT NULL,
  revision INTEGER NOT NULL,
  delta_id TEXT,
  content_sha TEXT NOT NULL,
  answer TEXT NOT NULL,
  wall_ns INTEGER NOT NULL,
  blobs TEXT NOT NULL,
  body TEXT NOT NULL
) STRICT"""
INSERT = "INSERT INTO journal VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
DELETE = "DELETE FROM journal WHERE seq BETWEEN ? AND ?"
_ROWS = "SELECT * FROM journal WHERE seq > ? ORDER BY seq LIMIT ?"
_OUTLINES = "SELECT seq, parent_sha, sha, kind, model, revision, blobs FROM journal ORDER BY seq"
# Errors of the disk or of permissions; every other one says that the bytes are not a journal.
_NOT_CONTENT = (
    "SQLITE_IOERR",
    "SQLITE_CANTOPEN",
    "SQLITE_READONLY",
    "SQLITE_PERM",
    "SQLITE_NOMEM",
)
_FAILED_SYNC = ("SQLITE_IOERR_FSYNC", "SQLITE_IOERR_DIR_FSYNC")


def connect(path: Path) -> sqlite3.Connection:
    """The one connection, in autocommit: transactions are written where they are meant."""
    return sqlite3.connect(path, timeout=1, isolation_level=None, check_same_thread=False)


def _configure(connection: sqlite3.Connection) -> None:
    # Before the first access: then the index of the log lives in memory, without a shared file.
    connection.execute("PRAGMA locking_mode=EXCLUSIVE")
    connection.execute("PRAGMA trusted_schema=OFF")
    connection.execute("PRAGMA cell_size_check=ON")
    connection.execute("PRAGMA mmap_size=0")  # a truncated mapped file is a SIGBUS
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA wal_autocheckpoint=0")
    connection.execute(f"PRAGMA journal_size_limit={_WAL_KEPT_BYTES}")


def check(connection: sqlite3.Connection, path: Path, *, fresh: bool) -> None:
    """Set the connection up; create the table, or refuse a file that this program cannot read.

    Args:
        connection: From `connect`.
        path: For errors.
        fresh: Nothing was ever acknowledged in this folder. An empty file is refused otherwise: the
            journal was lost.
    """
    _configure(connection)
    version = _pragma(connection, "user_version")
    application = _pragma(connection, "application_id")
    tables = connection.execute("SELECT sql FROM sqlite_master").fetchall()
    if (version, application, tables) == (0, 0, []) and fresh:
        _create(connection, path)
        return
    if application == _APPLICATION_ID and version > FORMAT:
        raise StateNewerError(
            f"format {version}; this program reads up to {FORMAT}",
            where=str(path),
            remedy="start the newer program again, or restore the backup made before it ran",
        )
    if (version, application, tables) != (FORMAT, _APPLICATION_ID, [(_TABLE,)]):
        raise _corrupt(path, "not a graphopt journal")
    damage = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if damage != "ok":
        raise _corrupt(path, str(damage))
    _enter_wal(connection, path)


def rows(connection: sqlite3.Connection, after_seq: int, count_max: int) -> Iterator[Row]:
    """Rows after `after_seq` in order, unverified; all of them for a `count_max` of -1."""
    return connection.execute(_ROWS, (after_seq, count_max))


def outlines(connection: sqlite3.Connection) -> Iterator[Outline]:
    """Every row without its body, not verified here: opening did that."""
    for seq, parent_sha, sha, kind, model, revision, blobs in connection.execute(_OUTLINES):
        first = seq
        if kind == ANCHOR:
            body = connection.execute("SELECT body FROM journal WHERE seq = ?", (seq,)).fetchone()[
                0
            ]
            first = json.loads(body)["first"]
        yield Outline(seq, first, parent_sha, sha, kind, model, revision, tuple(json.loads(blobs)))


@contextmanager
def reading(path: Path, health: Health) -> Iterator[None]:
    """SQLite's complaints about content become `StateCorruptError`, about the disk `StateError`.

    A failed sync puts the store into the failed state.
    """
    try:
        yield
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", None) or ""
        if name in _FAILED_SYNC:
            raise health.fail(f"{path}: {error} ({name})") from error
        if name == "SQLITE_FULL":
            raise no_space(path) from error
        if name == "SQLITE_BUSY":
            raise StateInUseError(
                "another program has the journal open", where=str(path), remedy="look at a copy"
            ) from error
        if name.startswith(_NOT_CONTENT) and name != "SQLITE_IOERR_SHORT_READ":
            raise StateError(f"cannot open or read: {error} ({name})", where=str(path)) from error
        raise _corrupt(path, f"SQLite cannot read it: {error}") from error
    except UnicodeDecodeError as error:  # an error message that quotes damaged bytes
        raise _corrupt(path, "SQLite cannot read it: text is damaged") from error


def no_space(path: Path) -> StateFullError:
    """SQLite found the disk full; it undid what it had begun."""
    return StateFullError(
        "no space for the journal", where=str(path), remedy="free space and try again"
    )


def _create(connection: sqlite3.Connection, path: Path) -> None:
    _enter_wal(connection, path)
    connection.execute("BEGIN IMMEDIATE")
    connection.execute(_TABLE)
    connection.execute(f"PRAGMA application_id={_APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version={FORMAT}")
    connection.execute("COMMIT")


def _enter_wal(connection: sqlite3.Connection, path: Path) -> None:
    """SQLite reports a failure here, also of a sync, only by staying in the old mode."""
    mode = connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
    if mode != "wal":
        raise StateError(
            f"the journal cannot use a write-ahead log (mode {mode})",
            where=str(path),
            remedy="see to the disk; it must be a local file system",
        )


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    return int(connection.execute(f"PRAGMA {name}").fetchone()[0])


def _corrupt(path: Path, reason: str) -> StateCorruptError:
    return StateCorruptError(
        reason, where=str(path), remedy="restore the state folder from a backup"
    )
