"""What systemd itself says about the rendered units; `make test-system` runs this.

systemd exits with 0 when it ignores a directive it does not know, so any message fails.
"""

import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "systemd"
EXPOSURE_MAX = 25  # tenths; systemd's own network daemons score 28
INSTANCE = "one"


@pytest.fixture
def rendered(tmp_path: Path) -> Path:
    """The units as an installation has them, templates also as an instance."""
    prefix, units = tmp_path / "opt", tmp_path / "units"
    (prefix / "bin").mkdir(parents=True)
    units.mkdir()
    for program in ("graphoptd", "graphoptctl"):
        (prefix / "bin" / program).write_text("#!/bin/sh\n")
        (prefix / "bin" / program).chmod(0o755)
    for path in FOLDER.iterdir():
        if path.suffix in (".service", ".socket"):
            text = path.read_text().replace("@PREFIX@", str(prefix))
            (units / path.name).write_text(text)
            if "@" in path.name:
                (units / path.name.replace("@", f"@{INSTANCE}")).write_text(text)
    return units


def analyze(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *arguments], cwd=cwd, capture_output=True, text=True, timeout=120
    )


def test_systemd_has_nothing_to_say_about_any_unit(rendered: Path) -> None:
    names = sorted(path.name for path in rendered.iterdir() if "@." not in path.name)
    assert len(names) == 6
    for name in names:
        done = analyze("verify", "--man=no", f"./{name}", cwd=rendered)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), name


def test_the_check_above_would_notice_a_directive_that_systemd_ignores(rendered: Path) -> None:
    path = rendered / "graphoptd.service"
    path.write_text(path.read_text().replace("ProtectClock=yes", "ProtectClocks=yes"))
    done = analyze("verify", "--man=no", "./graphoptd.service", cwd=rendered)
    assert "ProtectClocks" in done.stderr


@pytest.mark.parametrize("name", ["graphoptd.service", f"graphoptd@{INSTANCE}.service"])
def test_the_service_stays_below_the_exposure_bound(rendered: Path, name: str) -> None:
    done = analyze(
        "security", "--offline=yes", f"--threshold={EXPOSURE_MAX}", f"./{name}", cwd=rendered
    )
    assert done.returncode == 0, done.stdout[-300:]


def test_users_and_folders_are_made_below_a_scratch_root(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    for program, options, name in (
        ("systemd-sysusers", (), "graphoptd.sysusers"),
        ("systemd-tmpfiles", ("--create",), "graphoptd.tmpfiles"),
    ):
        done = subprocess.run(
            [program, f"--root={tmp_path}", *options, str(FOLDER / name)],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
    groups = {
        line.split(":")[0]: int(line.split(":")[2])
        for line in (tmp_path / "etc" / "group").read_text().splitlines()
    }
    assert set(groups) == {"graphoptd", "graphoptd-ctl", "graphoptd-data"}
    config, spool = tmp_path / "etc" / "graphoptd", tmp_path / "var" / "spool" / "graphoptd"
    assert config.stat().st_mode & 0o7777 == 0o750
    assert config.stat().st_gid == groups["graphoptd"]
    assert spool.stat().st_mode & 0o7777 == 0o2770
    assert spool.stat().st_gid == groups["graphoptd-ctl"]
