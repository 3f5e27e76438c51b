"""A change of a watched file is reported, once, with or without notifications."""

import os
from collections.abc import Iterator
from pathlib import Path
from queue import Queue

import pytest

from graphoptd.watch import Watch

Reports = Queue[tuple[Path, ...]]
WAIT_S = 30  # bounds a failing test; a passing one never waits for it


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "etc" / "graphoptd.yaml"
    path.parent.mkdir()
    path.write_text("{}")
    return path


@pytest.fixture(params=[True, False], ids=["notifications", "rescan only"])
def reports(config: Path, request: pytest.FixtureRequest) -> Iterator[Reports]:
    found: Reports = Queue()
    # With notifications the rescan is out of the picture, and the other way round.
    rescan_s = 3600 if request.param else 0.02
    watch = Watch(
        [config], found.put, debounce_s=0.05, rescan_s=rescan_s, notifications=request.param
    )
    watch.start()
    yield found
    watch.stop()


def replace(path: Path, text: str) -> None:
    new = path.with_suffix(".new")
    new.write_text(text)
    new.rename(path)


def test_a_file_replaced_by_rename_is_reported(config: Path, reports: Reports) -> None:
    replace(config, "log: {level: debug}")
    assert reports.get(timeout=WAIT_S) == (config,)


def test_a_file_written_in_place_is_reported_once(config: Path, reports: Reports) -> None:
    with config.open("w") as file:
        for i in range(20):
            file.write(f"# {i}\n")
            file.flush()
    assert reports.get(timeout=WAIT_S) == (config,)
    replace(config, "{}")
    assert reports.get(timeout=WAIT_S) == (config,)
    assert reports.empty()


def test_a_file_that_goes_and_comes_back_is_reported_each_time(
    config: Path, reports: Reports
) -> None:
    config.unlink()
    assert reports.get(timeout=WAIT_S) == (config,)
    config.write_text("{}")
    assert reports.get(timeout=WAIT_S) == (config,)


def test_a_folder_swapped_behind_a_link_is_reported(tmp_path: Path, reports: Reports) -> None:
    """Kubernetes updates a ConfigMap so: `..data` is a link, renamed over."""
    folder = tmp_path / "map"
    (folder / "v1").mkdir(parents=True)
    (folder / "v1" / "g.yaml").write_text("a: 1")
    (folder / "v2").mkdir()
    (folder / "v2" / "g.yaml").write_text("a: 2")
    (folder / "..data").symlink_to("v1")
    (folder / "g.yaml").symlink_to("..data/g.yaml")
    found: Reports = Queue()
    watch = Watch([folder / "g.yaml"], found.put, debounce_s=0.05, rescan_s=3600)
    watch.start()
    try:
        (folder / "..tmp").symlink_to("v2")
        (folder / "..tmp").rename(folder / "..data")
        assert found.get(timeout=WAIT_S) == (folder / "g.yaml",)
    finally:
        watch.stop()
    assert reports.empty()


def test_other_files_of_the_folder_and_reading_are_not_reported(
    config: Path, reports: Reports
) -> None:
    (config.parent / "other.yaml").write_text("x")
    config.read_text()
    replace(config, "{}")
    assert reports.get(timeout=WAIT_S) == (config,)
    assert reports.empty()


def test_a_rescan_names_what_differs_from_the_last_look(config: Path) -> None:
    watch = Watch([config, config.parent / "none"], lambda paths: None)
    assert watch.rescan() == ()
    replace(config, "log: {}")
    assert watch.rescan() == (config,)
    assert watch.rescan() == ()


def test_a_same_sized_rewrite_with_the_old_modification_time_is_seen(config: Path) -> None:
    watch = Watch([config], lambda paths: None)
    before = config.stat()
    replace(config, "[]")
    os.utime(config, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert watch.rescan() == (config,)


def test_a_missing_folder_leaves_the_rescan_and_says_so(tmp_path: Path) -> None:
    found: Reports = Queue()
    path = tmp_path / "later" / "g.yaml"
    watch = Watch([path], found.put, debounce_s=0.02, rescan_s=0.02)
    try:
        assert "later" in watch.start()
        path.parent.mkdir()
        path.write_text("{}")
        assert found.get(timeout=WAIT_S) == (path,)
    finally:
        watch.stop()


def test_a_missing_folder_does_not_cost_the_others_their_notifications(
    config: Path, tmp_path: Path
) -> None:
    found: Reports = Queue()
    watch = Watch([tmp_path / "a" / "g.yaml", config], found.put, debounce_s=0.02, rescan_s=3600)
    try:
        assert watch.start()
        replace(config, "log: {}")
        assert found.get(timeout=WAIT_S) == (config,)
    finally:
        watch.stop()


def test_a_change_before_the_start_is_reported(config: Path) -> None:
    found: Reports = Queue()
    watch = Watch([config], found.put, debounce_s=0.02, rescan_s=3600)
    replace(config, "log: {}")
    watch.start()
    try:
        assert found.get(timeout=WAIT_S) == (config,)
    finally:
        watch.stop()


def test_a_watch_that_never_started_stops(config: Path) -> None:
    Watch([config], lambda paths: None).stop()
