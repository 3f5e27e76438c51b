"""Sockets passed in by the manager outlive the process that serves them."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from fcntl import F_DUPFD, fcntl
from pathlib import Path

import pytest

from service.harness import ENVIRONMENT, TIMEOUT_S, Daemon

# What systemd does between fork and exec.
LAUNCH = """
import os, sys
for number, fd in enumerate(map(int, sys.argv[1:3]), start=3):
    os.dup2(fd, number)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.executable, [sys.executable, "-m", "graphoptd", *sys.argv[3:]])
"""


@pytest.fixture
def sockets(folder: Path) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Control and data, as systemd would open them."""
    (folder / "run").mkdir()
    control, data = folder / "run" / "graphoptd.sock", folder / "run" / "graphoptd-data.sock"
    with closing(listener(control)) as first, closing(listener(data)) as second:
        yield first, second


def listener(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made.bind(str(path))
    made.listen(16)
    return made


class Activated(Daemon):
    """graphoptd with its sockets on descriptors 3 and 4."""

    def __init__(self, folder: Path, argv: list[str], fds: tuple[int, int]) -> None:
        self._fds = fds
        super().__init__(folder, argv, None, {"LISTEN_FDS": "2", "LISTEN_FDNAMES": "control:data"})

    def _spawn(self, argv: list[str], env: dict[str, str], log: Path) -> int:
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-c", LAUNCH, *map(str, self._fds), *argv],
                env=ENVIRONMENT | env,
                pass_fds=self._fds,
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
            )
        return self._process.pid


def test_inherited_sockets_serve_and_connections_wait_while_nobody_does(
    folder: Path, model_argv: list[str], sockets: tuple[socket.socket, socket.socket]
) -> None:
    # Well above 3 and 4, which they are copied to.
    fds = (fcntl(sockets[0], F_DUPFD, 30), fcntl(sockets[1], F_DUPFD, 30))
    first = Activated(folder, model_argv, fds)
    first.until("READY=1")
    listening = [first.log.wait_for("daemon.listening", n) for n in (1, 2)]
    assert all(each["inherited"] for each in listening)
    assert first.infer()["revision"] == 1
    first.signal(signal.SIGTERM)
    assert first.wait() == -signal.SIGTERM
    assert (folder / "run" / "graphoptd-data.sock").exists()  # the manager's, not ours
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as waiting:
        waiting.settimeout(TIMEOUT_S)
        waiting.connect(str(folder / "run" / "graphoptd-data.sock"))  # into the backlog
        waiting.sendall(b"GET /v2/health/ready HTTP/1.1\r\nHost: x\r\n\r\n")
        second = Activated(folder, model_argv, fds)
        second.until("READY=1")
        assert waiting.recv(4096).startswith(b"HTTP/1.1 200")
        second.signal(signal.SIGTERM)
        second.wait()
    for fd in fds:
        os.close(fd)
