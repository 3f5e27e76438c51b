"""How SQLite is used: the one connection, its settings, the table, transactions and checkpoints.

The format version stands in the database header and is written with the table in one transaction:
a folder has both or neither.
"""

import ctypes
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from graphopt.errors import (
    StateCorruptError,
    StateError,
    StateFullError,
    StateInUseError,
    StateNewerError,
)
from graphopt.store.chain import Row
from graphopt.store.disk import Health

FORMAT = 1
_APPLICATION_ID = 0x67726F70  # "grop"; `file` shows it
_WAL_KEPT_BYTES = 4 << 20  # what is left of a WAL that grew; one that keeps its size syncs faster

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
_INSERT = "INSERT INTO journal VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_DELETE = "DELETE FROM journal WHERE seq BETWEEN ? AND ?"
_ROWS = "SELECT * FROM journal WHERE seq > ? ORDER BY seq LIMIT ?"
# Errors of the disk or of permissions; every other one says that the bytes are not a journal.
_NOT_CONTENT = (
    "SQLITE_IOERR",
    "SQLITE_CANTOPEN",
    "SQLITE_READONLY",
    "SQLITE_PERM",
    "SQLITE_NOMEM",
)
_FAILED_SYNC = ("SQLITE_IOERR_FSYNC", "SQLITE_IOERR_DIR_FSYNC")


class Database:
    """The journal's database file. Not for several threads at a time: `Journal` sees to that."""

    def __init__(self, path: Path, health: Health) -> None:
        """Connect; nothing is read or written before `open`."""
        self._path = path
        self._health = health
        self._connection = sqlite3.connect(
            path, timeout=1, isolation_level=None, check_same_thread=False
        )

    def open(self, *, fresh: bool) -> None:
        """Set the connection up; create the table, or refuse a file that this program cannot read.

        Args:
            fresh: Nothing was ever acknowledged in this folder. An empty file is refused otherwise:
                the journal was lost.
        """
        with self._reading():
            _configure(self._connection)
            _check(self._connection, self._path, fresh=fresh)

    def rows(self, after_seq: int, count_max: int) -> list[Row]:
        """At most `count_max` rows after `after_seq` in order, unverified."""
        with self._reading():
            return self._connection.execute(_ROWS, (after_seq, count_max)).fetchall()

    def insert(self, rows: Sequence[Row]) -> None:
        """Add rows; inside `transaction`."""
        self._connection.executemany(_INSERT, rows)

    def delete(self, first_seq: int, last_seq: int) -> None:
        """Remove rows; inside `transaction`."""
        self._connection.execute(_DELETE, (first_seq, last_seq))

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, durable at the end.

        Raises:
            StateFullError: No space. The WAL then has no commit frame: nothing happened.
            StateFailedError: The outcome is unknown, or the disk is broken.
        """
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            yield
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            self._roll_back()
            raise self._write_error("commit", error) from error
        except BaseException as error:
            if not self._roll_back():
                self._health.fail(f"commit interrupted by {type(error).__name__}")
            raise

    def checkpoint(self) -> None:
        """Sync the WAL, move its rows into the database file, sync that, begin the WAL anew.

        RESTART, not TRUNCATE: a commit into a WAL that keeps its size was measured 1.4 times faster.

        Raises:
            StateFullError, StateFailedError: As `transaction`; the WAL stays as it is.
        """
        try:
            self._connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()
        except sqlite3.Error as error:
            raise self._write_error("checkpoint", error) from error

    def keep_wal(self) -> None:
        """SQLite deletes the WAL on close; of a refused journal a second name keeps it for repair."""
        with suppress(OSError):
            os.link(f"{self._path}-wal", f"{self._path}-wal.refused")

    def close(self) -> None:
        """Checkpoint and close. In the failed state the connection stays until the process ends."""
        if self._health.failed:
            # Python closes connections that it frees, also at exit. One reference too many prevents it.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._connection))
        else:
            self._connection.close()

    def _roll_back(self) -> bool:
        """True when a transaction was open and is undone: then no commit can have happened."""
        if not self._connection.in_transaction:
            return False
        with suppress(sqlite3.Error):
            self._connection.execute("ROLLBACK")
        return not self._connection.in_transaction

    def _write_error(self, what: str, error: sqlite3.Error) -> StateError:
        if _name(error) == "SQLITE_FULL":
            return _no_space(self._path)
        return self._health.fail(f"{what} failed: {error} ({_name(error)})")

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """SQLite's complaints about content become `StateCorruptError`, about the disk `StateError`.

        A failed sync puts the store into the failed state.
        """
        try:
            yield
        except sqlite3.Error as error:
            name = _name(error)
            if name in _FAILED_SYNC:
                raise self._health.fail(f"{self._path}: {error} ({name})") from error
            if name == "SQLITE_FULL":
                raise _no_space(self._path) from error
            if name == "SQLITE_BUSY":
                raise StateInUseError(
                    "another program has the journal open",
                    where=str(self._path),
                    remedy="look at a copy",
                ) from error
            if name.startswith(_NOT_CONTENT) and name != "SQLITE_IOERR_SHORT_READ":
                raise StateError(
                    f"cannot open or read: {error} ({name})", where=str(self._path)
                ) from error
            raise _corrupt(self._path, f"SQLite cannot read it: {error}") from error
        except UnicodeDecodeError as error:  # an error message that quotes damaged bytes
            raise _corrupt(self._path, "SQLite cannot read it: text is damaged") from error


def _configure(connection: sqlite3.Connection) -> None:
    # Before the first access: then the index of the log lives in memory, without a shared file.
    connection.execute("PRAGMA locking_mode=EXCLUSIVE")
    connection.execute("PRAGMA trusted_schema=OFF")
    connection.execute("PRAGMA cell_size_check=ON")
    connection.execute("PRAGMA mmap_size=0")  # a truncated mapped file is a SIGBUS
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA wal_autocheckpoint=0")
    connection.execute(f"PRAGMA journal_size_limit={_WAL_KEPT_BYTES}")


def _check(connection: sqlite3.Connection, path: Path, *, fresh: bool) -> None:
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


def _no_space(path: Path) -> StateFullError:
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


def _name(error: sqlite3.Error) -> str:
    return getattr(error, "sqlite_errorname", None) or type(error).__name__
