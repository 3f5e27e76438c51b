"""Files are opened as what their path says, or not at all."""

import os
from pathlib import Path

import pytest

from graphopt.errors import BundleError, DocumentError, GraphoptError, LimitError
from graphoptd.control import opening
from graphoptd.control.opening import close_opened, named_paths, open_paths
from graphoptd.control.wire import DESCRIPTORS_CALL_MAX


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "sub").mkdir()
    for name in (
        "docs/a.safetensors",
        "docs/sub/b.safetensors",
        "docs/sub/c.json",
        "docs/sub/x.txt",
    ):
        (tmp_path / name).write_text(name)
    return tmp_path


def _read(paths: list[str], folder: Path, **options: bool) -> dict[str, dict[str, str]]:
    opened = open_paths(paths, str(folder), **options)
    found = {
        each.path: {name: os.pread(fd, 99, 0).decode() for name, fd in each.files.items()}
        for each in opened
    }
    close_opened(opened)
    return found


def test_files_and_folders_are_opened_relative_to_the_document(folder: Path) -> None:
    docs = folder / "docs"
    assert _read(["a.safetensors"], docs) == {
        "a.safetensors": {"a.safetensors": "docs/a.safetensors"}
    }
    inner = {"b.safetensors": "docs/sub/b.safetensors", "c.json": "docs/sub/c.json"}
    for path in ("sub", "./sub/", "../docs/sub", str(docs / "sub"), "sub/../sub"):
        assert _read([path], docs) == {path: inner}
    assert _read(["."], docs) == {".": {"a.safetensors": "docs/a.safetensors"}}
    assert _read([".."], docs / "sub")[".."] == {"a.safetensors": "docs/a.safetensors"}


def test_no_link_below_the_document_is_followed(folder: Path) -> None:
    docs = folder / "docs"
    (docs / "link").symlink_to("sub")
    (docs / "file").symlink_to("a.safetensors")
    (docs / "sub" / "d.safetensors").symlink_to("b.safetensors")
    for path in ("link", "link/b.safetensors", "file", "sub"):
        with pytest.raises(DocumentError, match="symbolic link"):
            open_paths([path], str(docs))
    # Above the document links are the user's own affair.
    (folder / "way").symlink_to("docs")
    assert _read(["a.safetensors"], folder / "way")


def test_a_file_has_one_name_and_is_a_file(folder: Path) -> None:
    docs = folder / "docs"
    os.link(docs / "a.safetensors", docs / "again")
    with pytest.raises(DocumentError, match="2 names"):
        open_paths(["a.safetensors"], str(docs))
    os.mkfifo(docs / "pipe")
    with pytest.raises(DocumentError, match="not a regular file"):
        open_paths(["pipe"], str(docs))
    (docs / "empty").mkdir()
    with pytest.raises(DocumentError, match="holds no safetensors"):
        open_paths(["empty"], str(docs))
    with pytest.raises(DocumentError, match="No such file"):
        open_paths(["nowhere/x"], str(docs))
    (docs / "m.pt2").write_bytes(b"PK")
    with pytest.raises(BundleError, match="never reads one"):
        open_paths(["m.pt2"], str(docs))


@pytest.mark.parametrize("path", ["../a.safetensors", "/etc/hostname", "sub/../../docs", "~/x"])
def test_confined_paths_stay_below_the_folder(folder: Path, path: str) -> None:
    with pytest.raises(GraphoptError):
        open_paths([path], str(folder / "docs" / "sub"), confined=True)


def test_what_was_opened_is_closed_when_one_path_fails(folder: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(DocumentError):
        open_paths(["sub", "a.safetensors", "nowhere"], str(folder / "docs"))
    assert len(os.listdir("/proc/self/fd")) == before


def test_sizes_and_counts_are_bounded(folder: Path) -> None:
    many = folder / "many"
    many.mkdir()
    for idx in range(DESCRIPTORS_CALL_MAX + 1):
        (many / f"{idx}.json").touch()
    with pytest.raises(LimitError, match=str(DESCRIPTORS_CALL_MAX)):
        open_paths(["many"], str(folder))
    huge = folder / "huge.safetensors"
    with huge.open("wb") as file:
        file.truncate(opening.FILE_BYTES_MAX + 1)  # sparse
    with pytest.raises(LimitError, match="at most"):
        open_paths(["huge.safetensors"], str(folder))


def test_paths_are_found_in_every_edit_and_nowhere_else() -> None:
    text = b"""
delta: 1
path: not-this
edits:
  - attach_adapter: {name: a, path: one}
  - put_constant: {name: b, path: two.safetensors}
  - swap_head: {node: h, path: one}
  - add_node: {id: path, op: x, args: [path]}
  - load_weights: {path: 3}
"""
    assert named_paths(text, "yaml") == ["one", "two.safetensors"]
    assert named_paths(b"delta: [", "yaml") == []
    assert named_paths(b"[]", "json") == []
