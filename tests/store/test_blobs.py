import hashlib
import os
import socket
import threading
from pathlib import Path

import pytest

from graphopt.errors import LimitError, ProtocolError, StateCorruptError
from graphopt.store import DELTA, LOAD, Entry, References, StateFolder

from .conftest import Opener

NOTHING = References(10**9, frozenset())


def names(folder: StateFolder) -> set[str]:
    return set(os.listdir(folder.path / "blobs"))


def test_a_blob_is_named_by_the_sha256_of_its_bytes_however_they_were_chunked(
    open_state: Opener,
) -> None:
    blobs = open_state().blobs
    content = bytes(range(256)) * 20_000
    digest = hashlib.sha256(content).hexdigest()
    assert blobs.put(content) == digest
    assert blobs.put([content[:7], content[7:7], memoryview(content)[7:]]) == digest
    assert blobs.put(b"") == hashlib.sha256().hexdigest()
    assert blobs.read(digest) == content
    with blobs.open(digest) as file:
        assert file.read(3) == content[:3]
    assert blobs.path(digest).stat().st_mode & 0o777 == 0o400


def test_a_descriptor_sent_over_a_socket_is_copied_from_its_first_byte(
    open_state: Opener, tmp_path: Path
) -> None:
    content = os.urandom(3_000_000)
    (tmp_path / "adapter").write_bytes(content)
    here, there = socket.socketpair()
    with here, there, open(tmp_path / "adapter", "rb") as file:
        file.seek(1_000)
        socket.send_fds(here, [b"x"], [file.fileno()])
        _, (fd,), _, _ = socket.recv_fds(there, 1, 1)
        digest = open_state().blobs.put_fd(fd, len(content))
        os.close(fd)
        assert file.tell() == 1_000
    assert digest == hashlib.sha256(content).hexdigest()


def test_a_file_over_the_bound_is_refused_and_leaves_nothing(
    open_state: Opener, tmp_path: Path
) -> None:
    folder = open_state()
    (tmp_path / "big").write_bytes(bytes(1_001))
    with (
        open(tmp_path / "big", "rb") as file,
        pytest.raises(LimitError, match="more than 1000 bytes"),
    ):
        folder.blobs.put_fd(file.fileno(), 1_000)
    assert names(folder) == set()


def test_a_pipe_in_place_of_a_file_is_refused_without_waiting_for_it(open_state: Opener) -> None:
    receive, send = os.pipe()
    with pytest.raises(ProtocolError, match="not a regular file"):
        open_state().blobs.put_fd(receive, 10)
    os.close(receive)
    os.close(send)


def test_a_failing_source_leaves_nothing_behind(open_state: Opener) -> None:
    def chunks():
        yield b"half"
        raise RuntimeError("source broke")

    folder = open_state()
    with pytest.raises(RuntimeError):
        folder.blobs.put(chunks())
    assert names(folder) == set()


def test_an_altered_and_a_missing_blob_are_refused_by_name(open_state: Opener) -> None:
    blobs = open_state().blobs
    digest = blobs.put(b"weights")
    blobs.path(digest).chmod(0o600)
    blobs.path(digest).write_bytes(b"weightz")
    for check in (blobs.verify, blobs.read):
        with pytest.raises(StateCorruptError, match=digest):
            check(digest)
    blobs.path(digest).unlink()
    with pytest.raises(StateCorruptError, match=digest):
        blobs.verify(digest)


def test_putting_a_truncated_blob_again_heals_it(open_state: Opener) -> None:
    blobs = open_state().blobs
    digest = blobs.put(b"weights")
    blobs.path(digest).chmod(0o600)
    blobs.path(digest).write_bytes(b"wei")
    assert blobs.put(b"weights") == digest
    blobs.verify(digest)


def test_a_name_that_is_no_digest_never_reaches_the_file_system(open_state: Opener) -> None:
    with pytest.raises(ValueError, match="not a sha256"):
        open_state().blobs.open("../journal.sqlite3")


def test_left_over_temporary_files_are_gone_after_opening(open_state: Opener, state: Path) -> None:
    open_state().close()
    (state / "blobs" / "tmp-0123").write_bytes(b"half")
    assert names(open_state()) == set()


def test_collection_spares_what_was_put_until_it_is_released(open_state: Opener) -> None:
    folder = open_state()
    digest = folder.blobs.put(b"12345")
    folder.blobs.put([b"123", b"45"])
    assert folder.blobs.collect(References(0, frozenset())) == 0
    folder.blobs.release([digest])
    assert folder.blobs.collect(References(0, frozenset())) == 0  # the second put still holds it
    folder.blobs.release([digest])
    assert folder.blobs.collect(References(0, frozenset())) == 5
    assert names(folder) == set()


def test_references_older_than_a_row_do_not_cost_it_its_blob(open_state: Opener) -> None:
    folder = open_state()
    old = folder.journal.compact()
    digest = folder.blobs.put(b"graph")
    folder.journal.append([Entry(LOAD, "m", 0, "{}", (digest,))])
    assert folder.blobs.collect(old) == 0
    folder.blobs.verify(digest)
    assert folder.compact() == 0
    with pytest.raises(ValueError, match="older"):
        folder.blobs.collect(old)


def test_blobs_of_an_earlier_run_that_no_row_names_are_collected(open_state: Opener) -> None:
    folder = open_state()
    kept = folder.blobs.put(b"kept")
    folder.journal.append([Entry(LOAD, "m", 0, "{}", (kept,))])
    folder.blobs.put(b"abandoned")
    folder.close()
    folder = open_state()
    assert folder.compact() == len(b"abandoned")
    assert names(folder) == {kept}


def test_puts_and_appends_beside_endless_collections_never_lose_a_blob(open_state: Opener) -> None:
    """Four threads put the same few contents again and again, some journaled, some released."""
    folder = open_state()
    base = folder.blobs.put(b"base")
    folder.journal.append([Entry(LOAD, "m", 0, "{}", (base,))])
    revisions = iter(range(1, 10**6))
    errors: list[BaseException] = []
    stop = threading.Event()

    def write(worker: int) -> None:
        try:
            for i in range(25):
                digest = folder.blobs.put(b"shared %d" % (i % 3))
                if (i + worker) % 2:
                    folder.journal.append([Entry(DELTA, "m", next(revisions), "{}", (digest,))])
                    folder.blobs.verify(digest)
                else:
                    folder.blobs.verify(digest)
                    folder.blobs.release([digest])
        except BaseException as error:
            errors.append(error)

    def collect() -> None:
        try:
            while not stop.is_set():
                folder.compact()
        except BaseException as error:
            errors.append(error)

    writers = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    collector = threading.Thread(target=collect)
    for thread in (*writers, collector):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    collector.join()
    assert not errors
    for row in folder.journal.records():
        for digest in row.blobs:
            folder.blobs.verify(digest)
