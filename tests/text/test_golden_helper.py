"""The golden helper itself: it must fail when it should."""

from pathlib import Path

import pytest

from helpers.golden import check_golden

NAME = "helper.txt"  # holds "as it was"


def test_the_same_text_passes():
    check_golden(NAME, "as it was\n")


def test_a_changed_text_fails_with_the_difference(monkeypatch):
    monkeypatch.delenv("UPDATE_GOLDEN", raising=False)
    with pytest.raises(AssertionError, match=r"(?s)helper.txt differs.*-as it was.*\+as it is"):
        check_golden(NAME, "as it is\n")


def test_a_missing_golden_file_fails_and_says_how_to_write_it(monkeypatch):
    monkeypatch.delenv("UPDATE_GOLDEN", raising=False)
    with pytest.raises(AssertionError, match="UPDATE_GOLDEN=1"):
        check_golden("absent.txt", "x")


def test_it_writes_the_file_on_request(monkeypatch, tmp_path):
    monkeypatch.setenv("UPDATE_GOLDEN", "1")
    # The helper looks beside the file of its caller, so the caller is made in a folder of its own.
    source = "from helpers.golden import check_golden\ncheck_golden('new.txt', 'written')\n"
    exec(compile(source, str(tmp_path / "test_it.py"), "exec"), {})
    assert Path(tmp_path, "golden", "new.txt").read_text() == "written"
