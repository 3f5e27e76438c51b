"""graphoptd installed by `make install` on a machine of its own, and what its operators do there."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from graphopt.bundle import save_bundle
from service.harness import infer_body, pair
from system.manager import ROOT, Manager

PREFIX = "/opt/graphoptd"
SERVICE = "graphoptd.service"
CONFIG, STATE = "/etc/graphoptd/graphoptd.yaml", "/var/lib/graphoptd"
SPOOL = "/var/spool/graphoptd"
DATA = "/run/graphoptd-data.sock"
DROP_INS = f"/etc/systemd/system/{SERVICE}.d"
BUNDLE = "/root/pair.bundle"  # of root alone: the service gets descriptors, not paths
OPERATOR, OUTSIDER = "alice", "bob"  # in the group graphoptd-ctl, and in none
INSTALL_TIMEOUT_S = 280.0
PLAIN = "state: {path: /var/lib/graphoptd}\n"
# Restarts come sooner than in production, to spare time; nothing is left of what is aborted on purpose.
DROP_IN = "[Service]\nRestartSec=100ms\nLimitCORE=0\n"
# Five starts are counted together however slow the machine is.
SOCKET_DROP_IN = "[Socket]\nTriggerLimitIntervalSec=1h\n"


class Installed:
    """The installation, and commands on its machine.

    Attributes:
        manager: the machine.
        said: what `make install` printed.
    """

    def __init__(self, manager: Manager) -> None:
        self.manager = manager
        self.said = self._install()
        for user, group in ((OPERATOR, "graphoptd-ctl"), (OUTSIDER, "")):
            inline = [f'u {user} - "" /home/{user} /bin/sh', *([f"m {user} {group}"] * bool(group))]
            manager.run("systemd-sysusers", "--inline", *inline)
            manager.run("install", "-d", "-m", "700", "-o", user, "-g", user, f"/home/{user}")
        save_bundle(pair(), manager.root / BUNDLE.lstrip("/"))
        manager.write(f"{DROP_INS}/test.conf", DROP_IN)
        manager.write("/etc/systemd/system/graphoptd-data.socket.d/test.conf", SOCKET_DROP_IN)
        manager.systemctl("daemon-reload")
        # As `make install` says at its end; the sockets come with it.
        manager.systemctl("enable", SERVICE)

    # -- around a test

    def begin(self) -> None:
        """Start it without any state, and load the pair of constants."""
        self.configure(PLAIN)
        self.manager.systemctl("start", SERVICE)
        self.ctl("load", "pair", BUNDLE)

    def end(self) -> None:
        """Stop it, sockets too, and remove what the test left."""
        units = ("graphoptd-control.socket", "graphoptd-data.socket", SERVICE)
        self.manager.systemctl("stop", *units)
        self.manager.run("find", DROP_INS, "-type", "f", "!", "-name", "test.conf", "-delete")
        self.manager.systemctl("daemon-reload")
        self.manager.systemctl("reset-failed")
        self.manager.run("rm", "-rf", STATE)

    # -- what operators do

    def add_to_unit(self, name: str, line: str) -> None:
        """A line more in the unit, until the end of the test."""
        self.manager.write(f"{DROP_INS}/{name}.conf", f"[Service]\n{line}\n")
        self.manager.systemctl("daemon-reload")

    def configure(self, text: str) -> None:
        """Another text in the configuration file, whose owner and mode stay."""
        self.manager.write(CONFIG, text)

    def ctl(
        self, *argv: str, user: str = "", check: bool = True
    ) -> "subprocess.CompletedProcess[str]":
        """A `graphoptctl` command as root or as a user, from the home of this user."""
        home = f"/home/{user}" if user else "/root"
        return self.manager.run(
            f"{PREFIX}/bin/graphoptctl", *argv, user=user, check=check, cwd=home
        )

    def delta(self, number: int) -> str:
        """The delta that makes both constants `number`."""
        edits = "".join(
            f"  - put_constant: {{name: {name}, dtype: f32, data: [{number}.0, {number}.0]}}\n"
            for name in "ab"
        )
        return f"delta: 1\ngraph: pair\nid: d{number}\nedits:\n{edits}"

    def apply(self, number: int, user: str = OPERATOR, check: bool = True) -> int:
        """Apply `delta(number)` from a file in a home of mode 0700; the exit status."""
        self.manager.write(f"/home/{user}/{number}.yaml", self.delta(number))
        return self.ctl("apply", f"{number}.yaml", user=user, check=check).returncode

    def infer(self, at: str = DATA) -> dict[str, Any]:
        """One request; the outputs by name, and the revision. Waits while nobody serves yet."""
        status, answer = self.manager.request("POST", "/v2/models/pair/infer", infer_body(1.0), at)
        assert status == 200, answer
        outputs = {each["name"]: each["data"] for each in answer["outputs"]}
        return outputs | {"revision": int(answer["model_version"])}

    def main_pid(self) -> int:
        """The service's process, as its machine numbers it; 0 when there is none."""
        return int(self.manager.show(SERVICE, "MainPID")[0])

    def lines(self) -> list[dict[str, Any]]:
        """What the service wrote in every run so far, as the journal keeps it, oldest first."""
        return self.manager.journal(f"_SYSTEMD_UNIT={SERVICE}", "SYSLOG_IDENTIFIER=graphoptd")

    def events(self, name: str) -> list[dict[str, Any]]:
        """The lines of an event, oldest first."""
        texts = [str(each["MESSAGE"]) for each in self.lines()]
        found = [json.loads(text) for text in texts if text.startswith("{")]
        return [line for line in found if line["event"] == name]

    def wait_for(self, event: str) -> None:
        """Return once the running service has a line of this event."""
        for entry in self.manager.follow(f"_PID={self.main_pid()}"):
            if json.loads(entry["MESSAGE"])["event"] == event:
                return

    # -- installing

    def _install(self) -> str:
        """`make install` with the torch of these tests, shown outside of homes as the service needs it."""
        run = self.manager.run
        packages = Path(torch.__file__).parents[1]
        run("mkdir", "/opt/packages")
        run("mount", "--bind", str(packages), "/opt/packages")
        run(self._python(), "-m", "venv", "--without-pip", "/opt/with-torch")
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        folder = f"/opt/with-torch/lib/{version}/site-packages"
        self.manager.write(f"{folder}/packages.pth", "/opt/packages\n")
        return run(
            *("make", "install", f"PREFIX={PREFIX}"),
            shares_network=True,
            cwd=str(ROOT),
            env={"TORCH": "system", "PYTHON": "/opt/with-torch/bin/python3"},
            timeout_s=INSTALL_TIMEOUT_S,
        ).stdout

    def _python(self) -> str:
        """A Python of the version of these tests that a service can run."""
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        found = [sys._base_executable, f"/usr/local/bin/{version}", f"/usr/bin/{version}"]
        usable = [each for each in found if Path(each).exists() and not _is_in_home(each)]
        assert usable, f"a service cannot run {found[0]}, which lies in a home: install {version}"
        return usable[0]


def _is_in_home(path: str) -> bool:
    return any(Path(path).resolve().is_relative_to(home) for home in ("/root", "/home"))
