"""A machine made of namespaces, with a real systemd as its first process.

Its files are the host's with a layer of memory over them, its processes, network and users are its
own; all of it ends with the process that made it, even by SIGKILL. Needs root, util-linux, iproute2
and systemd; boots in about a second.
"""

import http.client
import json
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 60.0  # of a broken test; a good one waits milliseconds
INSTALL_TIMEOUT_S = 600.0
NAMESPACES = ("mount", "pid", "cgroup", "uts", "ipc", "net")


class Manager:
    """The machine; `close` ends it.

    Attributes:
        root: its file system, as seen from outside.
    """

    def __init__(self) -> None:
        assert os.geteuid() == 0, "a real systemd needs root: sudo make test-system"
        self._scratch = Path(tempfile.mkdtemp(prefix="graphopt-machine"))
        (self._scratch / "files").mkdir()
        self._cgroup = _unified() / self._scratch.name
        self._cgroup.mkdir()
        self._pid = self._booted()
        self.root = Path(f"/proc/{self._pid}/root")

    def close(self) -> None:
        """End every process of the machine and wait for the last."""
        first = os.pidfd_open(self._pid)
        signal.pidfd_send_signal(first, signal.SIGKILL)
        select.select([first], [], [])  # the kernel ends the others before this one
        os.close(first)
        self._outer.communicate()
        for folder, _, _ in os.walk(self._cgroup, topdown=False):
            os.rmdir(folder)
        shutil.rmtree(self._scratch)

    # -- doing things there

    def run(
        self,
        *argv: str,
        user: str = "",
        shares_network: bool = False,
        check: bool = True,
        cwd: str = "/",
        env: Mapping[str, str] | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> subprocess.CompletedProcess[str]:
        """A command on the machine.

        Args:
            argv: the command.
            user: who runs it, with the groups of this user; root by default.
            shares_network: whether it has the host's network instead of the machine's.
            check: whether another exit status than 0 is a failure.
            cwd: where.
            env: added to the environment.
            timeout_s: of a broken command.
        """
        entered = [f"--{each}" for each in NAMESPACES if each != "net" or not shares_network]
        as_user = ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups"] if user else []
        done = subprocess.run(
            ["nsenter", "-t", str(self._pid), *entered, f"--wdns={cwd}", *as_user, *argv],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=os.environ | {"LC_ALL": "C"} | (env or {}),
            timeout=timeout_s,
        )
        assert not check or done.returncode == 0, (argv, done.returncode, done.stdout, done.stderr)
        return done

    def systemctl(self, *argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`systemctl`, which waits for what it asks; says why when it fails unexpectedly."""
        done = self.run("systemctl", *argv, check=False)
        if check and done.returncode != 0:
            log = self.run("journalctl", "--no-pager", "--lines=30", "--output=cat").stdout
            raise AssertionError(f"systemctl {argv}: {done.stderr}\n{log}")
        return done

    def show(self, unit: str, *names: str) -> list[str]:
        """Properties of a unit."""
        text = self.systemctl("show", unit, *(f"--property={name}" for name in names)).stdout
        found = dict(line.split("=", 1) for line in text.splitlines())
        return [found[name] for name in names]

    def journal(self, *matches: str) -> list[dict[str, Any]]:
        """Entries of the journal that have these fields, oldest first."""
        self.run("journalctl", "--sync")
        text = self.run("journalctl", "--output=json", "--all", *matches).stdout
        return [json.loads(line) for line in text.splitlines()]

    def follow(self, *matches: str) -> Iterator[dict[str, Any]]:
        """As `journal`, and then each new entry as it comes."""
        argv = ["journalctl", "--follow", "--lines=all", "--output=json", "--all", *matches]
        enter = ["nsenter", "-t", str(self._pid), *(f"--{each}" for each in NAMESPACES)]
        with subprocess.Popen([*enter, *argv], stdout=subprocess.PIPE, text=True) as journal:
            assert journal.stdout is not None
            try:
                for line in journal.stdout:
                    yield json.loads(line)
            finally:
                journal.kill()

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """A file there; one that exists keeps its owner and mode."""
        inside = self.root / path.lstrip("/")
        inside.parent.mkdir(parents=True, exist_ok=True)
        is_new = not inside.exists()
        inside.write_text(text)
        if is_new:
            inside.chmod(mode)

    def request(self, method: str, path: str, body: Any, at: str) -> tuple[int, Any]:
        """One HTTP request over the Unix socket `at`; waits while nobody serves it yet."""
        connection = http.client.HTTPConnection("localhost")
        connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.sock.settimeout(TIMEOUT_S)
        try:
            connection.sock.connect(str(self.root / at.lstrip("/")))
            connection.request(method, path, None if body is None else json.dumps(body))
            response = connection.getresponse()
            content = response.read()
            return response.status, json.loads(content) if content else None
        finally:
            connection.close()

    # -- booting and ending

    def _booted(self) -> int:
        """The process id of systemd, once it says that everything is up."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            notify.bind(str(self._scratch / "notify"))
            self._outer = self._start()
            ended = os.pidfd_open(self._outer.pid)
            try:
                while True:
                    ready, _, _ = select.select([notify, ended], [], [], TIMEOUT_S)
                    assert notify in ready, (
                        self._scratch / "log"
                    ).read_text() or "systemd is silent"
                    told, credentials, _, _ = notify.recvmsg(4096, socket.CMSG_SPACE(12))
                    if b"READY=1" in told.split(b"\n"):
                        pid, _, _ = struct.unpack("iII", credentials[0][2])
                        return int(pid)
            finally:
                os.close(ended)

    def _start(self) -> "subprocess.Popen[bytes]":
        shown = sorted({str(ROOT), sys.prefix, sys.base_prefix})
        # From within a cgroup of its own, which systemd then sees as the topmost.
        join = f'echo $$ >"{self._cgroup}/cgroup.procs" && exec "$@"'
        with (self._scratch / "log").open("wb") as log:
            return subprocess.Popen(
                [
                    *("setpriv", "--pdeathsig=KILL", "sh", "-c", join, "sh"),
                    *("unshare", "--fork", "--kill-child", *(f"--{each}" for each in NAMESPACES)),
                    *("sh", str(ROOT / "tests" / "system" / "boot.sh"), str(self._scratch), *shown),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )


def _unified() -> Path:
    """Where this host has the unified hierarchy of control groups, with older ones beside it or not."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, folder, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(folder)
    raise AssertionError("this kernel has no unified control groups, which systemd needs")
