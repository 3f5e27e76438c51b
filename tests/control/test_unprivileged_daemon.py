"""The daemon gets files, never paths: it may be unable to open what a client attaches."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from control_serving import ENVIRON, WAIT_S, Raw, adapter, ctl

NOBODY = 65534


@pytest.fixture
def home() -> Iterator[Path]:
    """A folder that only its owner may enter."""
    folder = Path(tempfile.mkdtemp(prefix="graphopt-home-"))
    os.chmod(folder, 0o700)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def daemon(home: Path) -> Iterator[tuple[Path, str]]:
    """A daemon of another user where we are root, else of our own; whether it can open the home."""
    adapter(home / "legal")
    other = NOBODY if os.getuid() == 0 else os.getuid()
    run = Path(tempfile.mkdtemp(prefix="graphopt-run-"))
    os.chown(run, other, -1)
    script = Path(__file__).with_name("unprivileged_daemon.py")
    arguments = [str(run / "c.sock"), str(other), str(home / "legal" / "adapter_config.json")]
    process = subprocess.Popen(
        [sys.executable, str(script), *arguments],
        env=ENVIRON, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        said = process.stdout.readline().split()
        assert said[:1] == ["ready"], process.stdout.read()
        yield run / "c.sock", said[1]
    finally:
        process.communicate(timeout=WAIT_S)
        shutil.rmtree(run)


def test_an_adapter_in_a_private_home_is_attached(daemon: tuple[Path, str], home: Path) -> None:
    socket, opened = daemon
    assert opened == ("no" if os.getuid() == 0 else "yes")
    (home / "d.yaml").write_text("delta: 1\nedits:\n  - attach_adapter: {name: l, path: legal}\n")
    ran = ctl(socket, "apply", str(home / "d.yaml"))
    assert ran.code == 0, ran.err
    assert json.loads(ctl(socket, "--json", "models").out)["models"][0]["adapters"] == ["l"]
    assert ctl(socket, "detach", "l").code == 0
    assert ctl(socket, "attach", "again", str(home / "legal")).code == 0
    # Whatever the daemon could open by itself: a path without a descriptor gets nobody anywhere.
    edit = {"attach_adapter": {"name": "p", "path": str(home / "legal")}}
    document = json.dumps({"delta": 1, "edits": [edit]})
    with Raw(socket) as client:
        reply = client.call("apply", params={"document": document, "format": "json"})
    assert "no file was sent" in reply["error"]["message"]
