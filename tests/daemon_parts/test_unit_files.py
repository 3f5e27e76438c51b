"""The units are whole, agree with the configuration's defaults, and render; no systemd needed."""

import re
import tomllib
from pathlib import Path

import pytest

from graphoptd.settings import Settings
from graphoptd.systemd import CONTROL, DATA

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "systemd"
UNITS = sorted(path.name for path in FOLDER.iterdir() if path.suffix in (".service", ".socket"))

Unit = dict[str, dict[str, list[str]]]


def parse(name: str) -> Unit:
    """Section -> directive -> values; anything but sections, directives and comments fails."""
    unit: Unit = {}
    section: dict[str, list[str]] = {}
    for line in (FOLDER / name).read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        if match := re.fullmatch(r"\[(\w+)\]", line):
            section = unit.setdefault(match[1], {})
            continue
        match = re.fullmatch(r"([A-Z]\w+)=(.*\S)", line)
        assert match, f"{name}: {line!r}"
        # systemd has no trailing comments: a `#` would become part of the value.
        assert "#" not in match[2], f"{name}: {line!r}"
        section.setdefault(match[1], []).append(match[2])
    return unit


def test_the_six_units_are_there() -> None:
    assert UNITS == [
        "graphoptd-control.socket",
        "graphoptd-control@.socket",
        "graphoptd-data.socket",
        "graphoptd-data@.socket",
        "graphoptd.service",
        "graphoptd@.service",
    ]


@pytest.mark.parametrize("name", UNITS)
def test_a_rendered_unit_has_no_placeholder_left_and_no_stray_path(name: str) -> None:
    text = (FOLDER / name).read_text()
    assert set(re.findall(r"@[A-Z_]+@", text)) <= {"@PREFIX@"}
    rendered = text.replace("@PREFIX@", "/opt/graphoptd")
    assert not re.search(r"@[A-Z_]+@", rendered)
    assert "/opt" not in text
    assert "/usr" not in text


@pytest.mark.parametrize("name", ["graphoptd.service", "graphoptd@.service"])
def test_memory_may_be_written_and_executed_because_torch_needs_it(name: str) -> None:
    assert "MemoryDenyWriteExecute" not in (FOLDER / name).read_text()


@pytest.mark.parametrize("name", ["graphoptd.service", "graphoptd@.service"])
def test_the_service_is_supervised_and_confined(name: str) -> None:
    unit = parse(name)
    service = unit["Service"]
    assert unit["Unit"]["StartLimitIntervalSec"] == ["0"]
    expected = {
        "Type": "notify",
        "Restart": "on-failure",
        "RestartPreventExitStatus": "65 78",
        "KillMode": "mixed",
        "OOMPolicy": "continue",
        "User": "graphoptd",
        "Group": "graphoptd",
        "UMask": "0077",
        "NoNewPrivileges": "yes",
        "AmbientCapabilities": "CAP_PERFMON",
        "CapabilityBoundingSet": "CAP_PERFMON",
        "SystemCallFilter": "@system-service perf_event_open",
        "SystemCallArchitectures": "native",
        "DevicePolicy": "closed",
        "ProtectSystem": "strict",
        "ProtectHome": "yes",
        "ProtectProc": "invisible",
        "RestrictNamespaces": "yes",
    }
    assert {key: service.get(key) for key in expected} == {
        key: [value] for key, value in expected.items()
    }
    # Each of these would blind a signal or hide the GPU, or change the user under the state.
    blinding = {"DynamicUser", "PrivateUsers", "ProcSubset", "PrivateDevices", "RemoveIPC"}
    assert not blinding & set(service)
    assert int(service["TimeoutStopSec"][0]) > Settings().data.drain_s
    assert "reload --wait" in service["ExecReload"][0]


def test_the_programs_of_the_units_are_those_that_are_installed() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    service = parse("graphoptd.service")["Service"]
    for directive in ("ExecStart", "ExecReload"):
        program = service[directive][0].split()[0]
        assert program.removeprefix("@PREFIX@/bin/") in scripts


def test_the_sockets_are_those_of_the_configuration() -> None:
    defaults = Settings()
    control = parse("graphoptd-control.socket")["Socket"]
    assert control["FileDescriptorName"] == [CONTROL]
    assert control["ListenStream"] == [str(defaults.control.socket)]
    assert control["SocketGroup"] == [defaults.control.group]
    assert list(defaults.control.levels.operate_groups) == control["SocketGroup"]
    data = parse("graphoptd-data.socket")["Socket"]
    assert data["FileDescriptorName"] == [DATA]
    address = f"{defaults.data.host}:{defaults.data.port}"
    assert data["ListenStream"] == [address, str(defaults.data.socket_path)]
    assert int(data["SocketMode"][0], 8) == defaults.data.socket_mode
    assert int(data["Backlog"][0]) == defaults.data.backlog
    service = parse("graphoptd.service")["Service"]
    assert f"/var/lib/{service['StateDirectory'][0]}" == str(defaults.state.path)
    assert service["Sockets"] == ["graphoptd-control.socket graphoptd-data.socket"]
    assert f"--socket {defaults.control.socket} " in service["ExecReload"][0]


def test_socket_units_name_their_service_and_leave_with_it() -> None:
    for name in UNITS:
        if name.endswith(".socket"):
            instance = "@%i" if "@" in name else ""
            assert parse(name)["Socket"]["Service"] == [f"graphoptd{instance}.service"]


def test_a_waiting_client_cannot_restart_a_refusing_service_forever() -> None:
    for name in UNITS:
        if name.endswith(".socket"):
            section = parse(name)["Socket"]
            assert section["TriggerLimitIntervalSec"] == ["60"]
            assert section["TriggerLimitBurst"] == ["5"]


def test_no_two_instances_share_a_path() -> None:
    """Instance `data` must not meet the data socket of the plain service either."""
    plain = parse("graphoptd-data.socket")["Socket"]["ListenStream"]
    plain += parse("graphoptd-control.socket")["Socket"]["ListenStream"]
    for plane in ("control", "data"):
        for path in parse(f"graphoptd-{plane}@.socket")["Socket"]["ListenStream"]:
            assert "@%i" in path
            assert path.replace("%i", "data") not in plain


def test_the_template_differs_from_the_service_only_by_its_instance() -> None:
    """The hardening is written twice; nobody may change one and forget the other."""
    plain = (FOLDER / "graphoptd.service").read_text().splitlines()
    template = (FOLDER / "graphoptd@.service").read_text().splitlines()
    assert len(plain) == len(template)
    different = [new for old, new in zip(plain, template, strict=True) if old != new]
    assert all("%i" in line or line.startswith("# graphoptd, one of") for line in different)


def test_users_groups_and_folders_are_created_by_the_installation() -> None:
    rows = [
        line.split()[:2]
        for line in (FOLDER / "graphoptd.sysusers").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert rows == [["u", "graphoptd"], ["g", "graphoptd-ctl"], ["g", "graphoptd-data"]]
    named = {
        group
        for name in UNITS
        for section in parse(name).values()
        for key in ("Group", "SupplementaryGroups", "SocketGroup")
        for group in section.get(key, [])
    }
    assert named == {name for _, name in rows}
    folders = (FOLDER / "graphoptd.tmpfiles").read_text()
    assert "d /etc/graphoptd 0750 root graphoptd -" in folders
    assert "d /var/spool/graphoptd 2770 graphoptd graphoptd-ctl -" in folders
