"""scripts/setup.sh on hosts that lack something, with real Pythons, pip and uv, and a package index.

The torch of these tests stands for one that a user has: no test fetches another.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from system.manager import ROOT

TIMEOUT_S = 280.0
# An index without anything, whatever pip is told elsewhere: what is chosen shows before pip fails.
OFFLINE = {"PIP_ARGS": "--no-index", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}
SHELL_TOOLS = ("sh", "rm", "rmdir", "mv", "uname", "grep", "tail", "dirname")


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """A virtual environment that has torch, as a user's own."""
    return environment(tmp_path / "with-torch", Path(torch.__file__).parents[1])


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A Python without torch."""
    return environment(tmp_path / "bare", None)


@pytest.fixture(scope="session")
def uv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, from this host or else from the package index."""
    if found := shutil.which("uv"):
        return Path(found)
    folder = tmp_path_factory.mktemp("uv")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--target", str(folder), "uv"], check=True, timeout=TIMEOUT_S)
    return folder / "bin" / "uv"


def environment(folder: Path, packages: Path | None) -> Path:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    if packages is not None:
        (site,) = folder.glob("lib/*/site-packages")
        (site / "packages.pth").write_text(f"{packages}\n")
    return folder / "bin" / "python3"


def without_venv_module(folder: Path, python: Path) -> Path:
    """The Python as Debian has it without python3-venv: `import ensurepip` fails."""
    (folder / "ensurepip.py").write_text("raise ImportError('apt install python3-venv')\n")
    wrapper = folder / "python3"
    wrapper.write_text(f'#!/bin/sh\nPYTHONPATH={folder} exec {python} "$@"\n')
    wrapper.chmod(0o755)
    return wrapper


def path_of(folder: Path, *programs: Path) -> str:
    """A PATH with these programs, and of the host's only what a shell script cannot do without."""
    folder.mkdir()
    for name in SHELL_TOOLS:
        (folder / name).symlink_to(shutil.which(name) or name)
    for program in programs:
        (folder / program.name).symlink_to(program)
    return str(folder)


def setup(venv: Path, **env: str) -> "subprocess.CompletedProcess[str]":
    kept = {key: value for key, value in os.environ.items() if key not in ("TORCH", "PYTHON")}
    return subprocess.run(
        [ROOT / "scripts" / "setup.sh", venv, ""],
        cwd=ROOT,
        env=kept | {"PIP_ARGS": "", "EDITABLE": ""} | env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


def says(venv: Path, program: str) -> str:
    return subprocess.run(
        [venv / "bin" / "python", "-Ic", program], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_uv_makes_the_environment_where_the_venv_module_is_missing(
    tmp_path: Path, python: Path, uv: Path
) -> None:
    wrapper = without_venv_module(tmp_path, python)
    path = path_of(tmp_path / "path", wrapper, uv)
    done = setup(tmp_path / "venv", TORCH="system", PATH=path)
    assert done.returncode == 0, done.stderr
    assert "uv makes the environment" in done.stderr
    # It has graphopt, and the torch that was there.
    origin = says(tmp_path / "venv", "import graphopt, torch; print(torch.__file__)")
    assert origin == torch.__file__
    assert says(tmp_path / "venv", "import graphoptd; print(graphoptd.__file__)").startswith(
        str(tmp_path / "venv")
    )


def test_without_the_venv_module_and_uv_the_package_to_install_is_named(
    tmp_path: Path, bare: Path
) -> None:
    wrapper = without_venv_module(tmp_path, bare)
    done = setup(tmp_path / "venv", PATH=path_of(tmp_path / "path", wrapper))
    package = f"python{sys.version_info.major}.{sys.version_info.minor}-venv"
    assert done.returncode == 1
    assert f"apt install {package}; or install uv" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_without_any_python_the_packages_to_install_are_named(tmp_path: Path) -> None:
    done = setup(tmp_path / "venv", PATH=path_of(tmp_path / "path"))
    assert done.returncode == 1
    assert "apt install python3 python3-venv; or install uv" in done.stderr


def test_an_installed_torch_is_reused_also_by_an_environment_made_without_it(
    tmp_path: Path, python: Path
) -> None:
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    setup(venv, TORCH="system", PYTHON=str(python), **OFFLINE)
    assert says(venv, "import torch; print(torch.__file__)") == torch.__file__
    assert says(venv, "import sys; print(sys.prefix)") == str(venv)


def test_a_missing_system_torch_is_told_with_what_to_do(tmp_path: Path, bare: Path) -> None:
    done = setup(tmp_path / "venv", TORCH="system", PYTHON=str(bare))
    assert done.returncode == 1
    assert f"TORCH=system: {bare} has no torch 2.13" in done.stderr
    assert "PYTHON=" in done.stderr


def test_without_a_cpu_build_auto_falls_back_to_the_torch_that_is_there(
    tmp_path: Path, python: Path
) -> None:
    done = setup(tmp_path / "venv", TORCH="auto", PYTHON=str(python), **OFFLINE)
    assert f"reusing the torch of {python}" in done.stderr
    assert says(tmp_path / "venv", "import torch; print(torch.__file__)") == torch.__file__


def test_without_a_cpu_build_the_words_of_pip_and_the_ways_out_are_told(
    tmp_path: Path, bare: Path
) -> None:
    done = setup(tmp_path / "venv", TORCH="cpu", PYTHON=str(bare), **OFFLINE)
    assert done.returncode == 1
    assert "No matching distribution found for torch==2.13.0+cpu" in done.stderr
    assert "PIP_ARGS='--extra-index-url URL'" in done.stderr
    assert "TORCH=cuda" in done.stderr


def test_an_unknown_kind_of_torch_is_refused(tmp_path: Path, bare: Path) -> None:
    done = setup(tmp_path / "venv", TORCH="rocm", PYTHON=str(bare))
    assert done.returncode == 1
    assert "TORCH=rocm is none of auto, cpu, cuda, system" in done.stderr


def test_a_set_up_that_was_cut_off_goes_on(tmp_path: Path, python: Path) -> None:
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    done = setup(venv, TORCH="system", PYTHON=str(python), **OFFLINE)
    assert f"installing graphopt with torch>=2.13,<2.14 into {venv}" in done.stderr
    assert says(venv, "import pip; print(pip.__file__)").startswith(str(venv))


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path: Path, bare: Path) -> None:
    (tmp_path / "precious").write_text("here")
    done = setup(tmp_path, PYTHON=str(bare))
    assert done.returncode == 1
    assert "is no virtual environment" in done.stderr
    assert (tmp_path / "precious").read_text() == "here"
