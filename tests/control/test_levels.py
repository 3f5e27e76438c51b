"""Who may do what: by the kernel's word on the peer, and the configuration's on users and groups."""

import grp
import json
import os
import pwd
import socket
import subprocess
import sys
from pathlib import Path

from control_serving import ENVIRON, WAIT_S, Raw, serving

from graphoptd.control.levels import Level, Peer, level_of, peer_of, user_of
from graphoptd.control.methods import METHODS
from graphoptd.settings import LevelSettings

NOBODY = 65534
_READ = [
    "hello", "help", "status", "models", "nodes", "show", "history", "explain", "draw", "diff", "new_delta",
    "top", "logs", "cost",
]  # fmt: skip
_OPERATE = ["apply", "rollback", "fork", "pin", "unpin", "settle"]
_ADMIN = ["load", "unload", "reload", "calibrate"]


def test_each_method_needs_the_level_that_the_design_says() -> None:
    found = {name: method.level for name, method in METHODS.items()}
    expected = dict.fromkeys(_READ, Level.READ)
    expected |= dict.fromkeys(_OPERATE, Level.OPERATE) | dict.fromkeys(_ADMIN, Level.ADMIN)
    assert found == expected


def test_root_and_the_own_user_are_admin_whatever_the_configuration_says() -> None:
    nothing = LevelSettings(operate_groups=(), others="none")
    assert level_of(Peer(1, 0, frozenset()), nothing) == Level.ADMIN
    assert level_of(Peer(1, 1234, frozenset()), nothing, own_uid=1234) == Level.ADMIN
    assert level_of(Peer(1, 1235, frozenset()), nothing, own_uid=1234) == Level.NONE


def test_users_and_groups_are_named_or_numbered() -> None:
    name, gid = pwd.getpwuid(os.getuid()).pw_name, os.getgid()
    peer, own = Peer(1, os.getuid() or 4321, frozenset((gid, 77))), 999_999
    group = grp.getgrgid(gid).gr_name
    settings = {
        Level.ADMIN: [LevelSettings(admin_users=(peer.uid,)), LevelSettings(admin_groups=(77,))],
        Level.OPERATE: [
            LevelSettings(operate_users=(peer.uid,)),
            LevelSettings(operate_groups=(group,)),
            LevelSettings(operate_groups=(77,)),
        ],
        Level.READ: [
            LevelSettings(operate_users=("no-such-user",), operate_groups=("no-such-group",))
        ],
        Level.NONE: [LevelSettings(operate_groups=(78,), others="none")],
    }
    for level, cases in settings.items():
        for case in cases:
            assert level_of(peer, case, own_uid=own) == level, case
    named = LevelSettings(operate_users=(name,))
    me = Peer(1, os.getuid(), frozenset())
    assert level_of(me, named, own_uid=own) == (Level.ADMIN if os.getuid() == 0 else Level.OPERATE)


def test_the_kernel_names_process_user_and_supplementary_groups() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        peer = peer_of(ours)
    assert (peer.pid, peer.uid) == (os.getpid(), os.geteuid())
    assert peer.groups == {os.getegid(), *os.getgroups()}


def test_the_owner_of_a_file_has_the_groups_of_the_user_database() -> None:
    entry = pwd.getpwuid(os.getuid())
    found = user_of(os.getuid(), os.getgid())
    assert set(os.getgrouplist(entry.pw_name, entry.pw_gid)) <= found.groups
    assert user_of(3_999_999_999, 5).groups == frozenset()


def made_for_tests(folder: Path) -> list[Path]:
    """The folders above one of pytest's that are pytest's too: those of the run, its worker, its user."""
    own = [i for i, each in enumerate(folder.parents) if each.name.startswith("pytest-of-")]
    return list(folder.parents[: own[0] + 1])


def test_others_may_read_and_a_refusal_is_logged(tmp_path: Path) -> None:
    """As root with a client of another user; else with the level that the own user has."""
    with serving(tmp_path) as service:
        if os.getuid() != 0:
            with Raw(service.socket) as client:
                assert client.call("hello")["result"]["level"] == "admin"
            return
        os.chmod(tmp_path, 0o755)
        for folder in made_for_tests(tmp_path):
            os.chmod(folder, 0o755)
        os.chmod(service.socket, 0o666)
        assert _as_nobody(service.socket, "hello")["result"]["level"] == "read"
        assert _as_nobody(service.socket, "status")["ok"]
        denied = _as_nobody(service.socket, "rollback", model="transformer", revision=1)
        assert denied["error"]["code"] == "auth.denied"
        assert "operate" in denied["error"]["message"]
        line = service.lines("control.denied")[0]
        assert (line["method"], line["level"], line["peer_uid"]) == ("rollback", "operate", NOBODY)
        assert (line["graph"], line["request_id"]) == ("transformer", "7")
        assert service.host.get("transformer").revision == 1
        os.chmod(service.socket, 0o660)
        ran = _nobody_runs(service.socket)
        assert ran.returncode == 5, ran.stderr
        assert "may not open the control socket" in ran.stderr


def test_supplementary_groups_raise_the_level(tmp_path: Path) -> None:
    if os.getuid() != 0:
        with (
            serving(tmp_path, levels=LevelSettings(others="none")) as service,
            Raw(service.socket) as c,
        ):
            assert c.call("hello")["result"]["level"] == "admin"
        return
    levels = LevelSettings(operate_groups=(54321,), others="none")
    with serving(tmp_path, levels=levels) as service:
        for folder in (tmp_path, *made_for_tests(tmp_path)):
            os.chmod(folder, 0o755)
        os.chmod(service.socket, 0o666)
        assert _as_nobody(service.socket, "hello", groups=(54321,))["result"]["level"] == "operate"
        many = (54321, *range(60_000, 60_600))  # more than Python's getsockopt returns
        assert _as_nobody(service.socket, "hello", groups=many)["result"]["level"] == "operate"
        denied = _as_nobody(service.socket, "status")
        assert denied["error"]["code"] == "auth.denied"


def _as_nobody(path: Path, method: str, groups: tuple[int, ...] = (), **params: object) -> dict:
    """The reply to a call by another user: a child that changes its user, then connects."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # only system calls and our raw client: the parent has threads
        try:
            os.setgroups(groups)
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            with Raw(path) as client:
                os.write(writer, json.dumps(client.call(method, id=7, params=params)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        text = file.read()
    os.waitpid(child, 0)
    return json.loads(text)


def _nobody_runs(path: Path) -> "subprocess.CompletedProcess[str]":
    """`graphoptctl status` by another user, who may not be able to read this interpreter's files."""
    script = (
        "import locale, os, sys; from graphoptd.ctl.main import build_parser, main; "
        "build_parser().parse_args(['status']); "  # what it imports then, while it still can
        f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY}); "
        f"sys.exit(main(['--socket', {str(path)!r}, 'status']))"
    )
    return subprocess.run(
        [sys.executable, "-c", script], env=ENVIRON, capture_output=True, text=True, timeout=WAIT_S
    )
