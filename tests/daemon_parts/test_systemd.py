"""The systemd protocols, against a real datagram socket and real child processes."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from graphopt.errors import DocumentError
from graphoptd.systemd import Notifier, take

ROOT = Path(__file__).parents[2]

# Becomes the service as systemd would start it: descriptors from 3 on, our own process id.
LAUNCHER = """
import os, sys
fds = [os.dup2(int(fd), 100 + i) for i, fd in enumerate(sys.argv[2].split())]
os.closerange(3, 100)
for i, fd in enumerate(fds):
    os.dup2(fd, 3 + i, inheritable=True)
    os.close(fd)
if os.environ.get("LISTEN_PID") == "self":
    os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.executable, [sys.executable, "-c", sys.argv[1]])
"""


class Manager:
    """The receiving end of sd_notify."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self._socket.settimeout(30)

    def received(self) -> dict[str, str]:
        lines = self._socket.recv(65536).decode().split("\n")
        return dict(line.split("=", 1) for line in lines)

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(str(tmp_path / "notify"))
    yield made
    made.close()


def child(program: str, fds: list[int], **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", LAUNCHER, program, " ".join(map(str, fds))],
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'daemon'}", **environ},
        pass_fds=fds,
        capture_output=True,
        text=True,
        timeout=60,
    )


def listener(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made.bind(str(path))
    made.listen()
    return made


def test_each_state_arrives_as_its_assignments(manager: Manager) -> None:
    notifier = Notifier(manager.address)
    assert notifier.ready("3 models")
    assert manager.received() == {"READY": "1", "STATUS": "3 models"}
    before_us = time.monotonic_ns() // 1000
    assert notifier.reloading()
    reloading = manager.received()
    assert reloading["RELOADING"] == "1"
    assert before_us <= int(reloading["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
    assert notifier.ready()
    assert manager.received() == {"READY": "1"}
    assert notifier.watchdog()
    assert manager.received() == {"WATCHDOG": "1"}
    assert notifier.extend_timeout(2.5)
    assert manager.received() == {"EXTEND_TIMEOUT_USEC": "2500000"}
    assert notifier.stopping("draining")
    assert manager.received() == {"STOPPING": "1", "STATUS": "draining"}
    notifier.close()
    assert not notifier.watchdog()


def test_an_abstract_address_is_understood() -> None:
    manager = Manager(f"@graphoptd-test-{os.getpid()}")
    notifier = Notifier(manager.address)
    assert notifier.status("hello")
    assert manager.received() == {"STATUS": "hello"}
    notifier.close()
    manager.close()


def test_a_status_text_cannot_smuggle_another_assignment(manager: Manager) -> None:
    notifier = Notifier(manager.address)
    notifier.status("loading a\nWATCHDOG=trigger\n" + "x" * 1000)
    received = manager.received()
    assert list(received) == ["STATUS"]
    assert len(received["STATUS"]) == 400
    notifier.status("bad name \udcff")
    assert manager.received() == {"STATUS": "bad name ?"}
    notifier.close()


def test_without_a_manager_nothing_is_sent_and_nothing_fails(tmp_path: Path) -> None:
    assert not Notifier().ready()
    gone = Notifier(str(tmp_path / "nobody"))
    assert not gone.ready()
    gone.close()


REPORT = """
import json, os, sys
from graphoptd.systemd import take
inherited = take()
inherited.notifier.ready("up")
for name in ("control", "data"):
    for listening in getattr(inherited, name):
        peer, _ = listening.accept()
        peer.sendall(name.encode())
        peer.close()
        assert not os.get_inheritable(listening.fileno())
print(json.dumps({
    "control": [s.getsockname() for s in inherited.control],
    "data": [s.getsockname() for s in inherited.data],
    "refused": inherited.refused,
    "watchdog_s": inherited.watchdog_s,
    "ping_period_s": inherited.ping_period_s,
    "environ": sorted(k for k in os.environ if k.startswith(("LISTEN", "NOTIFY", "WATCHDOG"))),
    "open": sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in range(3, 20)
                   if os.path.islink(f"/proc/self/fd/{fd}")),
}))
"""


def report(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_child_finds_its_sockets_by_name_and_serves_on_them(
    tmp_path: Path, manager: Manager
) -> None:
    """Two data sockets, one of them TCP; an unknown name and a non-listener are closed."""
    control, data = listener(tmp_path / "c"), listener(tmp_path / "d")
    tcp = socket.create_server(("127.0.0.1", 0))
    stray, connected = listener(tmp_path / "x"), socket.socketpair()
    passed = [data, stray, control, connected[0], tcp]
    clients = [socket.socket(socket.AF_UNIX) for _ in range(2)]
    clients[0].connect(str(tmp_path / "c"))
    clients[1].connect(str(tmp_path / "d"))
    clients.append(socket.create_connection(tcp.getsockname()))
    with open(os.devnull, "rb") as null:
        done = child(
            REPORT,
            [*(each.fileno() for each in passed), null.fileno()],
            LISTEN_FDS="6",
            LISTEN_PID="self",
            LISTEN_FDNAMES="data:stray:control:control:data:data",
            NOTIFY_SOCKET=manager.address,
            WATCHDOG_USEC="30000000",
        )
    found = report(done)
    assert found["control"] == [str(tmp_path / "c")]
    assert found["data"] == [str(tmp_path / "d"), list(tcp.getsockname())]
    assert [name for name, _ in found["refused"]] == ["stray", "control", "data"]
    assert [why for _, why in found["refused"]] == [
        "no socket is known by this name, only control and data",
        "not a listening stream socket",
        "not a socket",
    ]
    assert (found["watchdog_s"], found["ping_period_s"]) == (30.0, 15.0)
    assert found["environ"] == []
    kept = {f"socket:[{os.fstat(each.fileno()).st_ino}]" for each in (control, data, tcp)}
    closed = {f"socket:[{os.fstat(each.fileno()).st_ino}]" for each in (stray, connected[0])}
    assert kept <= set(found["open"])
    assert not closed & set(found["open"])
    assert manager.received() == {"READY": "1", "STATUS": "up"}
    assert [client.recv(100) for client in clients] == [b"control", b"data", b"data"]
    for each in (*passed, *clients, connected[1]):
        each.close()


def test_variables_meant_for_another_process_are_not_taken(tmp_path: Path) -> None:
    control = listener(tmp_path / "c")
    done = child(
        REPORT,
        [control.fileno()],
        LISTEN_FDS="1",
        LISTEN_PID="1",
        LISTEN_FDNAMES="control",
        WATCHDOG_USEC="1000000",
        WATCHDOG_PID="1",
    )
    found = report(done)
    assert (found["control"], found["data"], found["watchdog_s"]) == ([], [], None)
    assert found["environ"] == []
    # It is not ours to close.
    assert f"socket:[{os.fstat(control.fileno()).st_ino}]" in found["open"]
    control.close()


def test_sockets_without_names_are_refused(tmp_path: Path) -> None:
    control = listener(tmp_path / "c")
    found = report(child(REPORT, [control.fileno()], LISTEN_FDS="1", LISTEN_PID="self"))
    assert found["control"] == []
    assert found["refused"][0][0] == "unknown"
    control.close()


def test_started_by_hand_there_is_nothing() -> None:
    inherited = take({})
    assert (inherited.control, inherited.data, inherited.refused) == ((), (), ())
    assert inherited.watchdog_s is None
    assert inherited.ping_period_s is None
    assert not inherited.notifier.ready()


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("LISTEN_FDS", "many"),
        ("LISTEN_FDS", "-1"),
        ("LISTEN_FDS", "1000000000"),
        ("LISTEN_FDNAMES", "a:b"),
        ("LISTEN_PID", "x"),
        ("WATCHDOG_USEC", "1e6"),
        ("NOTIFY_SOCKET", "relative"),
    ],
)
def test_a_malformed_variable_is_refused_by_name(variable: str, value: str) -> None:
    environ = {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid()), "LISTEN_FDNAMES": "a"}
    with pytest.raises(DocumentError, match=variable):
        take({**environ, variable: value})
