"""The installed service under a real systemd: what the units and systemd/README.md promise."""

import json

from graphoptd.ctl.client import Exit
from system.installed import (
    BUNDLE,
    CONFIG,
    OPERATOR,
    OUTSIDER,
    PLAIN,
    PREFIX,
    SERVICE,
    SPOOL,
    STATE,
    Installed,
)

# Runs where the service runs, before it; says what it was let do. System calls by their x86-64 numbers:
# 272 is unshare, 298 perf_event_open (of a software counter, of all processes on CPU 0).
PROBE = r"""
import ctypes, json, mmap, os, socket, struct
libc = ctypes.CDLL(None, use_errno=True)
def tried(act):
    try:
        act()
    except OSError as error:
        return os.strerror(error.errno)
    return "done"
def call(number, *arguments):
    if libc.syscall(number, *arguments) < 0:
        raise OSError(ctypes.get_errno(), "")
attributes = ctypes.create_string_buffer(struct.pack("IIQ", 1, 112, 0).ljust(112, b"\0"), 112)
found = {
    "write /etc": tried(lambda: open("/etc/new", "w")),
    "write the installation": tried(lambda: open("@PREFIX@/new", "w")),
    "list /root": tried(lambda: os.listdir("/root")),
    "list /home": tried(lambda: os.listdir("/home")),
    "see process 1": tried(lambda: os.stat("/proc/1")),
    "new user namespace": tried(lambda: call(272, 0x10000000)),
    "netlink": tried(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)),
    "set-user-id": tried(lambda: os.chmod(os.path.join(os.environ["STATE_DIRECTORY"], "x"), 0o4700)),
    "real time": tried(lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))),
    "another device": tried(lambda: open("/dev/some-device")),
    "/dev/urandom": tried(lambda: open("/dev/urandom", "rb").read(1)),
    "write kernel settings": tried(lambda: open("/proc/sys/kernel/hostname", "w")),
    "counters of the host": tried(lambda: call(298, attributes, -1, 0, -1, 0)),
    "machine code": tried(lambda: mmap.mmap(-1, 4096, prot=7)),
    "pressure": tried(lambda: open("/proc/pressure/cpu").read()),
    "files of others in /tmp": tried(lambda: os.stat("/tmp/of-others")),
}
open(os.path.join(os.environ["STATE_DIRECTORY"], "probe.json"), "w").write(json.dumps(found))
"""
LET_DO = {
    "write /etc": "Read-only file system",
    "write the installation": "Read-only file system",
    "write kernel settings": "Read-only file system",
    "list /root": "Permission denied",
    "list /home": "Permission denied",
    "files of others in /tmp": "No such file or directory",
    "see process 1": "No such file or directory",
    "new user namespace": "Operation not permitted",
    "netlink": "Address family not supported by protocol",
    "set-user-id": "Operation not permitted",
    "real time": "Operation not permitted",
    "another device": "Operation not permitted",
    "/dev/urandom": "done",
    "counters of the host": "done",
    "pressure": "done",
    "machine code": "done",
}
CAP_PERFMON = 38  # capability.h


def test_make_install_says_what_to_do_next_and_leaves_what_it_promises(
    installed: Installed,
) -> None:
    assert "systemctl daemon-reload && systemctl enable --now graphoptd" in installed.said
    listed = installed.manager.run("stat", "--format=%A %U %G", "/etc/graphoptd", CONFIG).stdout
    assert listed.splitlines() == ["drwxr-x--- root graphoptd", "-rw-r----- root graphoptd"]


def test_a_delta_of_an_operator_is_live_and_an_outsider_is_refused(service: Installed) -> None:
    assert service.infer() == {"a": [0, 0], "b": [0, 0], "revision": 1}
    assert service.apply(1) == Exit.OK
    assert service.infer() == {"a": [1, 1], "b": [1, 1], "revision": 2}
    # The socket's mode keeps bob out; alice may apply, and may not unload.
    assert service.apply(2, OUTSIDER, check=False) == Exit.DENIED
    assert service.ctl("unload", "pair", user=OPERATOR, check=False).returncode == Exit.DENIED
    assert service.infer()["revision"] == 2


def test_requests_are_answered_over_tcp_on_this_host(service: Installed) -> None:
    program = (
        "import json, urllib.request as r\n"
        "print(r.urlopen('http://127.0.0.1:8080/v2/models/pair').read().decode())"
    )
    answer = json.loads(service.manager.run(f"{PREFIX}/bin/python", "-c", program).stdout)
    assert (answer["name"], answer["versions"]) == ("pair", ["1"])


def test_a_killed_service_is_restarted_with_its_state_and_clients_only_wait(
    service: Installed,
) -> None:
    service.apply(1)
    before = service.main_pid()
    service.manager.systemctl("kill", "--signal=KILL", "--kill-who=main", SERVICE)
    assert service.infer() == {"a": [1, 1], "b": [1, 1], "revision": 2}
    assert service.main_pid() not in (0, before)
    assert service.manager.show(SERVICE, "NRestarts") == ["1"]


def test_a_service_that_hangs_is_ended_by_the_watchdog_and_restarted(service: Installed) -> None:
    service.add_to_unit("watchdog", "WatchdogSec=1")
    service.manager.systemctl("restart", SERVICE)
    service.apply(1)
    service.manager.systemctl("kill", "--signal=STOP", "--kill-who=main", SERVICE)
    assert service.infer() == {"a": [1, 1], "b": [1, 1], "revision": 2}
    assert service.manager.show(SERVICE, "NRestarts") == ["1"]
    said = service.manager.run("journalctl", f"--unit={SERVICE}", "--output=cat").stdout
    assert "Watchdog timeout" in said


def test_stop_drains_and_a_request_starts_the_service_again(service: Installed) -> None:
    service.apply(1)
    service.manager.systemctl("stop", SERVICE)
    state = service.manager.show(SERVICE, "ActiveState", "Result")
    assert state == ["inactive", "success"]
    assert service.events("daemon.stopping")[-1]["signal"] == "SIGTERM"
    assert service.events("daemon.stopped")[-1]["clean"] is True
    assert service.infer()["revision"] == 2
    assert service.manager.show(SERVICE, "ActiveState", "NRestarts") == ["active", "0"]


def test_reload_waits_for_the_verdict_and_a_refused_file_changes_nothing(
    service: Installed,
) -> None:
    before = service.main_pid()
    service.configure(PLAIN + "log: {level: debug}\n")
    service.manager.systemctl("reload", SERVICE)
    service.configure(PLAIN + "log: {level: loud}\n")
    assert service.manager.systemctl("reload", SERVICE, check=False).returncode != 0
    assert service.manager.show(SERVICE, "ActiveState") == ["active"]
    assert service.main_pid() == before
    assert service.infer()["revision"] == 1
    assert service.events("config.rejected")[-1]["where"].startswith(CONFIG)


def test_a_bad_first_configuration_is_not_retried_until_it_is_mended(service: Installed) -> None:
    service.configure(PLAIN + "log: {level: deafening}\n")
    assert service.manager.systemctl("restart", SERVICE, check=False).returncode != 0
    assert verdict(service) == ["failed", "78", "0"]
    # A waiting client starts it again, five times; then systemd gives the socket up.
    assert not is_let_in(service)
    assert service.manager.show("graphoptd-data.socket", "Result") == ["trigger-limit-hit"]
    tries = [each for each in service.lines() if "deafening" in each["MESSAGE"]]
    assert len(tries) == 1 + 5
    service.configure(PLAIN)
    service.manager.systemctl("start", SERVICE)
    assert service.infer()["revision"] == 1


def test_a_newer_state_is_left_alone_and_not_retried(service: Installed) -> None:
    service.manager.systemctl("stop", SERVICE)
    version = pragma(service, "user_version")
    pragma(service, "user_version = 1000")
    assert service.manager.systemctl("start", SERVICE, check=False).returncode != 0
    assert verdict(service) == ["failed", "65", "0"]
    assert service.events("daemon.failed")[-1]["exit_code"] == 65
    pragma(service, f"user_version = {version}")
    service.manager.systemctl("start", SERVICE)
    assert service.infer()["revision"] == 1


def test_an_instance_has_sockets_and_state_of_its_own(service: Installed) -> None:
    service.manager.write("/etc/graphoptd/one.yaml", f"state: {{path: {STATE}@one}}\n", 0o644)
    service.manager.systemctl("enable", "--now", "graphoptd@one")
    service.ctl("--socket", "/run/graphoptd@one.sock", "load", "pair", BUNDLE)
    service.apply(1)
    assert service.infer("/run/graphoptd-data@one.sock")["revision"] == 1
    assert service.infer()["revision"] == 2
    units = ("graphoptd@one.service", "graphoptd-control@one.socket", "graphoptd-data@one.socket")
    service.manager.systemctl("reload", units[0])
    service.manager.systemctl("disable", "--now", *units)
    assert service.manager.show(units[0], "ActiveState", "Result") == ["inactive", "success"]


def test_a_delta_renamed_into_the_spool_by_an_operator_goes_live(service: Installed) -> None:
    service.configure(PLAIN + f"spool: {{path: {SPOOL}}}\n")
    service.manager.systemctl("restart", SERVICE)
    text = service.delta(1)
    service.manager.write(f"/home/{OPERATOR}/1.yaml", text)
    put = f"umask 022 && cp 1.yaml {SPOOL}/.1 && mv {SPOOL}/.1 {SPOOL}/1.yaml"
    service.manager.run("sh", "-c", put, user=OPERATOR, cwd=f"/home/{OPERATOR}")
    service.wait_for("spool.accepted")
    assert service.infer() == {"a": [1, 1], "b": [1, 1], "revision": 2}


def test_the_log_is_in_the_journal_one_json_object_a_line_with_its_priority(
    service: Installed,
) -> None:
    service.apply(1)
    assert service.ctl("apply", "missing.yaml", user=OPERATOR, check=False).returncode != 0
    assert service.ctl("unload", "pair", user=OPERATOR, check=False).returncode == Exit.DENIED
    pid = service.main_pid()
    entries = [each for each in service.lines() if each["_PID"] == str(pid)]
    assert len(entries) > 5
    lines = [(json.loads(each["MESSAGE"]), int(each["PRIORITY"])) for each in entries]
    priorities = {"debug": 7, "info": 6, "warning": 4, "error": 3}
    assert all(priority == priorities[line["severity"]] for line, priority in lines)
    applied = service.events("delta.applied")[-1]
    assert (applied["graph"], applied["revision"]) == ("pair", 2)
    assert service.events("control.denied")[-1]["severity"] == "warning"


def test_the_sandbox_is_in_force_and_leaves_what_the_service_needs(service: Installed) -> None:
    service.manager.write("/etc/probe.py", PROBE.replace("@PREFIX@", PREFIX))
    service.manager.write(f"{STATE}/x", "")
    service.manager.run("chown", "graphoptd:graphoptd", f"{STATE}/x")
    service.manager.write("/tmp/of-others", "")
    service.add_to_unit("probe", f"ExecStartPre={PREFIX}/bin/python /etc/probe.py")
    service.manager.systemctl("restart", SERVICE)
    found = json.loads((service.manager.root / f"{STATE[1:]}/probe.json").read_text())
    assert found == LET_DO
    status = service.manager.run("cat", f"/proc/{service.main_pid()}/status").stdout
    words = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert words["Seccomp"] == "2"
    assert words["NoNewPrivs"] == "1"
    for kind in ("CapEff", "CapPrm", "CapBnd", "CapAmb"):
        assert int(words[kind], 16) == 1 << CAP_PERFMON
    user = service.manager.run("id", "--user", "graphoptd").stdout.strip()
    assert set(words["Uid"].split()) == {user} != {"0"}


def verdict(service: Installed) -> list[str]:
    return service.manager.show(SERVICE, "ActiveState", "ExecMainStatus", "NRestarts")


def pragma(service: Installed, text: str) -> str:
    """Ask or change a setting of the journal's file, as its owner."""
    path = f"{STATE}/journal.sqlite3"
    program = f"import sqlite3; print(*sqlite3.connect({path!r}).execute('PRAGMA {text}'))"
    return service.manager.run(
        f"{PREFIX}/bin/python", "-c", program, user="graphoptd"
    ).stdout.strip("(,)\n")


def is_let_in(service: Installed) -> bool:
    """Whether a client of the data socket is answered, however long it has to wait."""
    try:
        service.infer()
    except OSError:
        return False
    return True
