"""What the README says to type exists, and its Python runs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from graphoptd.ctl.parser import build_parser

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
CONSOLE = re.findall(r"^\$ (.*)$", README, re.MULTILINE)
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
MADE = re.compile(r"run/|\.venv|/etc/|/opt/|\.sock")  # by `make serve` or `make install`


@pytest.mark.parametrize("program", PYTHON)
def test_the_python_example_runs(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "output" in done.stdout  # it prints the graph


def test_every_make_target_exists() -> None:
    named = set(re.findall(r"`?make ([a-z-]+)", README))
    assert "serve" in named
    assert named <= TARGETS


def test_every_file_named_exists() -> None:
    words = re.findall(r"[\w./-]*/[\w./-]+|\w+\.(?:md|yaml|py)", README)
    paths = {word.rstrip(".").removeprefix("./") for word in words}
    paths = {path for path in paths if path.split("/")[0] in {each.name for each in ROOT.iterdir()}}
    missing = [path for path in paths if not MADE.search(path) and not (ROOT / path).exists()]
    assert "examples/attach_adapter.yaml" in paths
    assert missing == []


@pytest.mark.parametrize("line", [line for line in CONSOLE if line.startswith("./graphoptctl")])
def test_every_command_line_parses(line: str) -> None:
    words = shlex.split(re.sub(r"\|.*", "", line))[1:]
    build_parser().parse_args(words)


def test_the_delta_shown_is_the_one_in_examples() -> None:
    (shown,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    text = (ROOT / "examples" / "attach_adapter.yaml").read_text()
    assert "".join(line for line in text.splitlines(True) if not line.startswith("#")) == shown


def test_there_are_no_placeholders() -> None:
    assert not re.search(r"@[A-Z]+@|TODO|TBD|XXX", README)
