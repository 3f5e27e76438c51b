"""Each byte of a small journal, of its write-ahead log, of its witness and of a blob is flipped.

Allowed outcomes: refused with a typed error, or exactly the rows that were written. Never another
content, and never fewer rows.
"""

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from graphopt.errors import StateCorruptError, StateError, StateNewerError
from graphopt.store import DELTA, LOAD, SNAPSHOT, Entry, Record, StateFolder

from .conftest import memory_folder

WRITER = """
import os, sys
from store.test_bit_rot import write
folder = write(sys.argv[1])
if sys.argv[2] == "closed":
    folder.close()
os.kill(os.getpid(), 9)
"""


def write(path: str) -> StateFolder:
    """Rows of every sort, an anchor and a row of remembered ids among them."""
    folder = StateFolder.open(path, wall_ns=lambda: 77)
    digest = folder.blobs.put(b"graph" * 20)
    rows = [
        Entry(LOAD, "m", 0, '{"a":1}', (digest,)),
        *(Entry(DELTA, "m", i, f'{{"x":{i}}}', (), f"id{i}", "", "ok") for i in (1, 2, 3)),
        Entry(SNAPSHOT, "m", 2, '{"b":1}', (digest,)),
    ]
    folder.journal.append(rows)
    folder.compact()
    folder.journal.append([Entry(DELTA, "m", 4, '{"x":4}', (), "id4")])
    return folder


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def folders(scratch: Path) -> dict[str, Path]:
    """One whose writer closed it (all rows in the database), one whose writer was killed (all in the log)."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    for end in ("closed", "killed"):
        command = [sys.executable, "-c", WRITER, str(scratch / end), end]
        assert subprocess.run(command, env=environment, check=False).returncode == -9
    return {end: scratch / end for end in ("closed", "killed")}


@contextmanager
def copy_of(source: Path) -> Iterator[Path]:
    copy = source.with_name("copy")
    shutil.copytree(source, copy)
    yield copy
    shutil.rmtree(copy)


def rows_of(path: Path) -> list[Record]:
    with StateFolder.open(path, wall_ns=lambda: 0) as folder:
        rows = list(folder.journal.records())
        assert folder.journal.find_delta("m", "id1")
        return rows


def flip_each_byte(folder: Path, name: str, expected: list[Record]) -> Counter[str]:
    original = (folder / name).read_bytes()
    outcomes: Counter[str] = Counter()
    for at in range(len(original)):
        if original[at : at + 64] == bytes(64) and at % 61:
            continue  # of the long empty stretches of a page, one byte in 61
        with copy_of(folder) as path:
            flipped = bytearray(original)
            flipped[at] ^= (0x01, 0xFF, 0x80, 0x10)[at % 4]
            (path / name).write_bytes(flipped)
            try:
                assert rows_of(path) == expected, f"byte {at} of {name}: other rows were served"
                outcomes["harmless"] += 1
            except StateNewerError:
                outcomes["newer"] += 1
            except StateCorruptError:
                outcomes["corrupt"] += 1
            except StateError:
                outcomes["refused"] += 1
    return outcomes


@pytest.mark.parametrize(
    ("end", "name", "refused_min"),
    [
        ("closed", "journal.sqlite3", 1_000),
        ("killed", "journal.sqlite3-wal", 2_000),
        ("killed", "journal.head", 0),
    ],
)
def test_a_flipped_byte_is_detected_or_harmless(
    folders: dict[str, Path], end: str, name: str, refused_min: int
) -> None:
    with copy_of(folders[end]) as good:
        expected = rows_of(good)
    assert [r.revision for r in expected] == [3, 2, 4]
    outcomes = flip_each_byte(folders[end], name, expected)
    print(end, name, dict(outcomes))
    assert outcomes.total() - outcomes["harmless"] >= refused_min


def test_a_flipped_byte_of_a_blob_is_refused_by_name(tmp_path: Path) -> None:
    with StateFolder.open(tmp_path, wall_ns=lambda: 0) as folder:
        digest = folder.blobs.put(b"graph" * 50)
        path = folder.blobs.path(digest)
        original = path.read_bytes()
        path.chmod(0o600)
        for at in range(len(original)):
            path.write_bytes(original[:at] + bytes([original[at] ^ 0x10]) + original[at + 1 :])
            for check in (folder.blobs.verify, folder.blobs.read):
                with pytest.raises(StateCorruptError, match=digest):
                    check(digest)
        for length in range(len(original)):
            path.write_bytes(original[:length])
            with pytest.raises(StateCorruptError, match=digest):
                folder.blobs.verify(digest)


def test_a_log_cut_short_before_an_acknowledged_row_is_refused(folders: dict[str, Path]) -> None:
    """SQLite takes a shorter log for what a crash left; the witness knows better."""
    content = (folders["killed"] / "journal.sqlite3-wal").read_bytes()
    for length in range(0, len(content), 1_024):
        with copy_of(folders["killed"]) as path:
            (path / "journal.sqlite3-wal").write_bytes(content[:length])
            with pytest.raises(StateCorruptError, match="journal"):
                rows_of(path)
            refused = path / "journal.sqlite3-wal.refused"
            assert length < 4_152 or refused.read_bytes()[: len(content)] == content[:length]


def test_rows_before_the_bad_one_can_still_be_read(tmp_path: Path) -> None:
    """Rot under an open journal: good rows are served, the rest is refused by its number."""
    with StateFolder.open(tmp_path, wall_ns=lambda: 0) as folder:
        digest = folder.blobs.put(b"graph")
        folder.journal.append([Entry(LOAD, "m", 0, "{}", (digest,))])
        folder.journal.append([Entry(DELTA, "m", i, f'{{"n":{i}}}') for i in range(1, 10)])
        folder.journal._database._connection.execute("UPDATE journal SET body = '{}' WHERE seq = 5")
        rows = folder.journal.records()
        assert [next(rows).seq for _ in range(4)] == [1, 2, 3, 4]
        with pytest.raises(StateCorruptError, match="row 5"):
            next(rows)
