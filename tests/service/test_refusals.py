"""What cannot start says why, in one place, with the exit status that systemd is told about."""

import os
import pty
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from service.harness import ENVIRONMENT, Zygote, running


def command(*argv: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "graphoptd", *argv],
        env=ENVIRONMENT | (env or {}),
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_bad_first_configuration_names_its_line_and_exits_78(folder: Path) -> None:
    config = folder / "graphoptd.yaml"
    config.write_text("data:\n  prot: 8080\n")
    done = command("--config", str(config))
    assert done.returncode == 78
    assert "graphoptd.yaml" in done.stderr
    assert "prot" in done.stderr
    assert "port" in done.stderr  # the nearest key


def test_a_missing_configuration_exits_78(folder: Path) -> None:
    done = command("--config", str(folder / "none.yaml"))
    assert (done.returncode, done.stdout) == (78, "")
    assert str(folder / "none.yaml") in done.stderr


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--config", "a.yaml", "--model", "m=b"],
        ["--config", "a.yaml", "--port", "80"],
        ["--model", "m=b", "--port", "70000"],
    ],
)
def test_wrong_usage_exits_2_without_loading_torch(argv: list[str]) -> None:
    done = command(*argv)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: graphoptd")


def test_a_model_argument_that_names_no_bundle_exits_78(folder: Path, zygote: Zygote) -> None:
    argv = ["--model", f"m={folder / 'none'}", "--run-dir", str(folder / "run"), "--port", "0"]
    with running(folder, argv, zygote) as daemon:
        assert daemon.wait() == 78
        daemon.log.text()
        (failed,) = daemon.log.events("daemon.failed")
        assert failed["exit_code"] == 78
        assert str(folder / "none") in failed["where"]


def test_a_configured_model_that_cannot_be_loaded_is_refused_and_the_others_go_on(
    folder: Path, bundle: Path, zygote: Zygote
) -> None:
    config = folder / "graphoptd.yaml"
    config.write_text(
        f"state: {{path: state}}\ncontrol: {{socket: run/graphoptd.sock, group: ''}}\n"
        f"data: {{port: null, socket_path: run/graphoptd-data.sock}}\n"
        f"models: {{pair: {{bundle: {bundle}}}, other: {{bundle: none}}}}\n"
    )
    with running(folder, ["--config", str(config)], zygote) as daemon:
        daemon.until("READY=1")
        assert daemon.infer()["revision"] == 1
        assert daemon.log.wait_for("model.refused")["graph"] == "other"


def test_a_busy_port_is_one_clear_line(folder: Path, bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        mine, theirs = pty.openpty()
        argv = ["--model", f"pair={bundle}", "--run-dir", str(folder), "--port", str(port)]
        with subprocess.Popen(
            [sys.executable, "-m", "graphoptd", *argv], env=ENVIRONMENT, stderr=theirs
        ) as process:
            os.close(theirs)
            text = read_terminal(mine)
            assert process.wait() == 1
    lines = [line for line in text.splitlines() if "daemon.starting" not in line]
    assert lines == [
        f"graphoptd: 127.0.0.1:{port}: Address already in use "
        "(stop the other process, or choose another port)"
    ]


def read_terminal(fd: int) -> str:
    """Until its other end is closed."""
    text = b""
    while True:
        try:
            piece = os.read(fd, 4096)
        except OSError:  # EIO: that is how a terminal ends
            break
        text += piece
    os.close(fd)
    return text.decode()


def test_a_state_folder_in_use_names_the_process_that_has_it(
    folder: Path, model_argv: list[str], bundle: Path, zygote: Zygote
) -> None:
    with running(folder, model_argv, zygote) as first:
        first.until("READY=1")
        argv = ["--model", f"pair={bundle}", "--state", str(folder / "run" / "state")]
        argv += ["--run-dir", str(folder / "other"), "--port", "0"]
        with running(folder, argv, zygote) as second:
            assert second.wait() == 1
            second.log.text()
            (failed,) = second.log.events("daemon.failed")
            assert failed["code"] == "state.in_use"
            assert str(first.pid) in failed["message"]
        assert first.infer()["revision"] == 1


def test_a_corrupt_journal_exits_65_and_is_left_as_it_is(
    folder: Path, model_argv: list[str], zygote: Zygote
) -> None:
    with running(folder, model_argv, zygote) as daemon:
        daemon.until("READY=1")
        daemon.signal(15)
        daemon.wait()
    journal = folder / "run" / "state" / "journal.sqlite3"
    with sqlite3.connect(journal) as database:
        (table,) = (
            name
            for (name,) in database.execute("select name from sqlite_master where type = 'table'")
            if "body" in {row[1] for row in database.execute(f"pragma table_info({name})")}
        )
        database.execute(f"update {table} set body = '{{}}'")
    database.close()
    before = journal.read_bytes()
    with running(folder, model_argv, zygote) as daemon:
        assert daemon.wait() == 65
        daemon.log.text()
        assert daemon.log.events("daemon.failed")[0]["code"] == "state.corrupt"
    assert journal.read_bytes() == before
    assert not list((folder / "run").glob("*.sock"))


def test_a_state_of_a_newer_version_exits_65(
    folder: Path, model_argv: list[str], zygote: Zygote
) -> None:
    with running(folder, model_argv, zygote) as daemon:
        daemon.until("READY=1")
        daemon.signal(15)
        daemon.wait()
    with sqlite3.connect(folder / "run" / "state" / "journal.sqlite3") as database:
        database.execute("pragma user_version = 9999")
    database.close()
    with running(folder, model_argv, zygote) as daemon:
        assert daemon.wait() == 65
        daemon.log.text()
        assert daemon.log.events("daemon.failed")[0]["code"] == "state.newer"
