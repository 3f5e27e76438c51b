"""Shared memory regions: what may be named, and what happens when the client's file changes under us."""

import os
from pathlib import Path

import pytest
from data_serving import Running, directory, identity, serving

from graphopt.errors import LimitError, RequestError
from graphoptd.data.shm import RegionNotFoundError, RegionRef, SharedMemory


@pytest.fixture
def memory(tmp_path: Path) -> SharedMemory:
    (tmp_path / "region").write_bytes(bytes(range(100)))
    shared = SharedMemory(2, str(tmp_path))
    shared.register("r", "/region", 10, 80)
    return shared


def test_a_stretch_is_read_and_written_at_its_place(memory: SharedMemory, tmp_path: Path) -> None:
    assert memory.read(RegionRef("r", 5, 3)) == bytes([15, 16, 17])
    memory.write(RegionRef("r", 6, 4), b"abcd")
    assert (tmp_path / "region").read_bytes()[16:20] == b"abcd"


@pytest.mark.parametrize(
    "key", ["../x", "a/b", "", "/", "..", ".", "/../etc/passwd", "x" * 300, "a\0b", "absent"]
)
def test_a_key_that_is_no_region_is_refused(memory: SharedMemory, key: str) -> None:
    with pytest.raises(RequestError, match="key"):
        memory.register("other", key, 0, 1)


def test_a_symlink_and_a_folder_are_refused(memory: SharedMemory, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "region")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for key in ("link", "folder", "pipe"):
        with pytest.raises(RequestError):
            memory.register("other", key, 0, 1)


def test_a_region_larger_than_its_file_is_refused_at_once(memory: SharedMemory) -> None:
    with pytest.raises(RequestError, match="smaller than the region"):
        memory.register("other", "region", 50, 51)


def test_a_file_that_shrinks_later_is_an_error_and_no_crash(
    memory: SharedMemory, tmp_path: Path
) -> None:
    os.truncate(tmp_path / "region", 20)
    with pytest.raises(RequestError, match="smaller than the region"):
        memory.read(RegionRef("r", 0, 80))
    with pytest.raises(RequestError, match="smaller than the region"):
        memory.write(RegionRef("r", 0, 80), bytes(80))
    assert (tmp_path / "region").stat().st_size == 20


def test_a_stretch_outside_the_region_is_refused(memory: SharedMemory) -> None:
    with pytest.raises(RequestError, match="81 of 80"):
        memory.read(RegionRef("r", 1, 80))
    with pytest.raises(RequestError, match="takes 9 bytes"):
        memory.write(RegionRef("r", 0, 8), bytes(9))


def test_names_are_unique_bounded_and_forgotten(memory: SharedMemory) -> None:
    with pytest.raises(RequestError, match="registered"):
        memory.register("r", "region", 0, 1)
    memory.register("s", "region", 0, 1)
    with pytest.raises(LimitError):
        memory.register("t", "region", 0, 1)
    descriptors = len(os.listdir("/proc/self/fd"))
    memory.unregister(None)
    assert len(os.listdir("/proc/self/fd")) == descriptors - 2
    with pytest.raises(RegionNotFoundError):
        memory.read(RegionRef("r", 0, 1))


def test_shared_memory_is_off_by_default(server: Running) -> None:
    for method, path in (
        ("GET", "/v2/systemsharedmemory/status"),
        ("POST", "/v2/systemsharedmemory/region/r/register"),
        ("POST", "/v2/systemsharedmemory/unregister"),
    ):
        assert server.ask(method, path).status == 403


def test_malformed_registrations_are_400_and_unknown_regions_404() -> None:
    with serving(directory(identity()), shared_memory=True) as running:
        register = "/v2/systemsharedmemory/region/r/register"
        for body in ({}, {"key": 1}, {"key": "x", "byte_size": -1}, {"key": "x", "byte_size": 0}):
            assert running.ask("POST", register, body).status == 400
        assert running.ask("GET", "/v2/systemsharedmemory/region/r/status").status == 404
        assert running.ask("POST", "/v2/systemsharedmemory/region/r/unregister").status == 200
        assert running.ask("GET", "/v2/systemsharedmemory/status").json == []
