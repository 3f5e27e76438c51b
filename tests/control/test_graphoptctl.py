"""The command: what people see, what scripts get, and every exit code."""

import dataclasses
import json
import os
import re
import shlex
import signal
import socket
import subprocess
from pathlib import Path

import pytest
import torch
from control_serving import COMMAND, ENVIRON, WAIT_S, Service, adapter, ctl, serving
from safetensors.torch import save_file

from graphopt.delta_document import DECODERS
from graphopt.engine.host import SYSTEM_CLOCKS
from graphopt.errors import DocumentError
from graphoptd.control.pinning import user_name
from graphoptd.ctl.commands import COMMANDS
from graphoptd.ctl.parser import build_parser
from helpers.golden import check_golden

_ME = user_name(os.getuid())
_VARYING = (
    (re.compile(r"pid \d+"), "pid N"),
    (re.compile(r"up [0-9a-z ]+,"), "up TIME,"),
    (re.compile(r"live after [0-9.]+ ms"), "live after TIME"),
    (re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"), "DATE TIME"),
    (re.compile(r"\d\d:\d\d:\d\d\.\d{3}"), "TIME"),
    (re.compile(rf"pinned by {re.escape(_ME)}\b"), "pinned by ME"),
    (re.compile(r"waited [0-9.]+ s"), "waited TIME"),
    (re.compile(r"\b[0-9a-f]{12}\b"), "HASH"),
)


def _session(service: Service, folder: Path, *commands: str) -> str:
    """Commands and what they print, as a person would see it."""
    text = []
    for command in commands:
        ran = ctl(service, *(word.replace("DIR", str(folder)) for word in shlex.split(command)))
        said = ran.out + ran.err + (f"exit {ran.code}\n" if ran.code else "")
        text.append(f"$ graphoptctl {command}\n{said}")
    shown = "\n".join(text).replace(str(service.socket), "SOCKET").replace(str(folder), "DIR")
    for pattern, word in _VARYING:
        shown = pattern.sub(word, shown)
    return shown


def test_the_tables_people_see(service: Service, tmp_path: Path) -> None:
    adapter(tmp_path / "legal")
    shown = _session(
        service, tmp_path, "status", "models", "models -q", "nodes layer.0/q*", "nodes transformer *gelu",
        "show classifier", "explain", "attach legal DIR/legal --scale 2", "models",
        "bypass layer.0/gelu --dry-run", "bypass layer.0/gelu", "history", "diff 2 3", "diff 1 2",
        "detach legal", "diff 3 3", "rollback 1", "fork canary", "models", "unload canary",
        "settle", "reload --wait", "reload", "top",
    )  # fmt: skip
    check_golden("tables.txt", shown)


def test_the_pins_people_see(tmp_path: Path) -> None:
    noon = dataclasses.replace(SYSTEM_CLOCKS, wall_s=lambda: 1_800_000_000.0)  # no pin grows older
    with serving(tmp_path, clocks=noon) as service:
        shown = _session(
            service, tmp_path, "pin --for 2h --reason 'load test'", "status", "explain",
            "pin transformer --for 3d --reason 'spins' --tier fused --tier eager", "status",
            "unpin transformer", "unpin", "pin --for 2h --reason ' '",
            "pin --for 2h --reason x --tier fussed", "pin other --for 2h --reason x", "status",
        )  # fmt: skip
    check_golden("pins.txt", shown)


def test_the_errors_people_see(service: Service, tmp_path: Path) -> None:
    (tmp_path / "typo.yaml").write_text(
        "delta: 1\nedits:\n  - bypas: {node: layer.0/gelu}\n  - add_node: {id: x}\n"
    )
    (tmp_path / "no.yaml").write_text(
        "delta: 1\nedits:\n  - attach_adapter: {name: a, path: nowhere}\n"
    )
    (tmp_path / "model.pt2").write_bytes(b"PK\x03\x04")
    adapter(tmp_path / "wide", rank=3)
    shown = _session(
        service, tmp_path, "bypass layer.0/gelo", "apply DIR/typo.yaml", "apply DIR/no.yaml",
        "apply DIR/absent.yaml", "apply DIR", "apply DIR/model.pt2", "load m DIR/model.pt2",
        "load transformer DIR", "attach wide DIR/wide", "bypass embeddings/word", "rollback 7",
        "history transfomer", "show layer.0/gleu", "new-delta bypas", "new-delta detach-adapter",
        "fork transformer", "unload nobody", "detach nothing", "bypass layer.0/gelu --if-revision 9",
    )  # fmt: skip
    check_golden("errors.txt", shown)


def test_json_is_the_raw_result_on_one_line(service: Service) -> None:
    ran = ctl(service, "bypass", "layer.0/gelu", "--json")
    assert ran.out.count("\n") == 1
    found = json.loads(ran.out)
    assert found["revision"] == 2
    assert found["blocks_replanned"] >= 1
    assert json.loads(ctl(service, "--json", "models").out)["models"][0]["revision"] == 2
    refused = ctl(service, "--json", "bypass", "nope")
    assert refused.out == ""
    assert json.loads(refused.err)["error"]["code"] == "delta.unknown_node"
    lines = ctl(service, "logs", "--json").out.splitlines()
    assert json.loads(lines[0])["event"] == "daemon.listening"


def test_every_command_has_its_parser_and_every_parser_its_command() -> None:
    (choices,) = (a.choices for a in build_parser()._subparsers._group_actions)  # type: ignore[union-attr]
    assert set(choices) == {*COMMANDS, "completion"}


def test_a_drawing_is_dot_and_as_svg_takes_graphviz(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = ctl(service, "explain", "--dot")
    assert drawn.out.startswith('digraph "transformer" {\n')
    assert drawn.out.endswith("}\n")
    lines = json.loads(ctl(service, "explain", "--dot", "--json").out)["lines"]
    assert lines == drawn.out.splitlines()
    assert ctl(service, "explain", "--dot", "--svg").code == 2
    monkeypatch.setenv("PATH", str(tmp_path))
    absent = ctl(service, "explain", "--svg")
    assert (absent.code, absent.out) == (1, "")
    assert "install graphviz" in absent.err
    dot = tmp_path / "dot"
    dot.write_text("#!/bin/sh\nread first; echo '<svg>'; echo \"$1 $first\"; echo '</svg>'\n")
    dot.chmod(0o755)
    assert ctl(service, "explain", "--svg").out == '<svg>\n-Tsvg digraph "transformer" {\n</svg>\n'
    dot.write_text("#!/bin/sh\necho 'syntax error' >&2; exit 3\n")
    refused = ctl(service, "explain", "--svg")
    assert (refused.code, refused.out) == (1, "")
    assert "dot could not draw it: syntax error" in refused.err


def test_the_exit_codes(service: Service, tmp_path: Path) -> None:
    assert ctl(service, "status").code == 0
    assert ctl(service, "bypass", "nope").code == 1
    assert ctl(service, "rollback", "first").code == 2
    assert ctl(service, "frobnicate").code == 2
    assert ctl(service, "bypass").code == 2
    assert ctl(service, "top", "--interval", "-1").code == 2
    assert ctl(tmp_path / "absent.sock", "status").code == 3
    assert ctl(service, "bypass", "layer.0/gelu", "--if-revision", "9").code == 4
    service.reloads.append(DocumentError("must be a mapping", where="graphoptd.yaml:1:1"))
    assert ctl(service, "reload", "--wait").code == 1


def test_a_socket_nobody_listens_on_is_unreachable(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(tmp_path / "dead.sock"))
    ran = ctl(tmp_path / "dead.sock", "status")
    assert ran.code == 3
    assert "nobody listens" in ran.err
    assert "start graphoptd" in ran.err


def test_a_service_that_hangs_times_out_and_one_that_dies_is_unreachable(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as hung:
        hung.bind(str(tmp_path / "hung.sock"))
        hung.listen()
        ran = ctl(tmp_path / "hung.sock", "status", "--timeout", "0.05")
        assert ran.code == 6
        assert "no answer within 0.05 s" in ran.err
        process = _start(tmp_path / "hung.sock", "status")
        hung.accept()[0].close()  # of the first
        connected, _ = hung.accept()
        connected.recv(100)
        connected.close()
        _, err = process.communicate(timeout=WAIT_S)
        assert (process.returncode, b"hung up" in err) == (3, True)


def test_what_is_no_graphoptd_is_said(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(str(tmp_path / "other.sock"))
        other.listen()
        process = _start(tmp_path / "other.sock", "status")
        connected, _ = other.accept()
        connected.sendall(b"220 smtp ready\n")
        _, err = process.communicate(timeout=WAIT_S)
        connected.close()
    assert process.returncode == 3
    assert b"no graphoptd" in err


def test_settle_says_when_the_time_is_over(service: Service) -> None:
    import threading

    release = threading.Event()
    service.host._background.submit("blocked", release.wait)
    try:
        assert ctl(service, "settle", "--timeout", "0.1").code == 6
    finally:
        release.set()
    assert ctl(service, "settle", "--timeout", "10").out.startswith("settled")


@pytest.mark.parametrize("kind", sorted(DECODERS))
def test_a_template_of_every_edit_kind_can_be_applied(
    service: Service, tmp_path: Path, kind: str
) -> None:
    adapter(tmp_path / "adapters" / "legal")
    if kind == "detach_adapter":
        assert ctl(service, "attach", "old", str(tmp_path / "adapters/legal")).code == 0
    if kind in ("swap_head", "put_constant"):
        tensors = {"weight": torch.ones(5, 8), "bias": torch.ones(5)}
        save_file(tensors, tmp_path / "head.safetensors")
    if kind == "load_weights":
        graph = service.host.get("transformer").graph
        tensors = {n: c.tensor.clone() for n, c in graph.constants.items() if c.is_param}
        save_file(tensors, tmp_path / "model.safetensors")
    ran = ctl(service, "new-delta", kind)
    assert ran.code == 0, ran.err
    assert ran.out.startswith("# ")
    text = ran.out
    if kind == "swap_head":  # it changes the size of the output
        text = text.replace("edits:", "allow_interface_change: true\nedits:")
    (tmp_path / "new.yaml").write_text(text)
    applied = ctl(service, "apply", str(tmp_path / "new.yaml"))
    assert applied.code == 0, text + applied.err


def test_a_document_on_standard_input_is_applied(service: Service) -> None:
    process = _start(service.socket, "apply", "-")
    out, err = process.communicate(b"delta: 1\nedits: [{bypass: {node: layer.0/gelu}}]\n", WAIT_S)
    assert process.returncode == 0, err
    assert b"revision 2" in out


def test_the_socket_is_found_by_environment_then_below_the_current_folder(
    service: Service, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    os.symlink(service.socket, tmp_path / "run" / "graphoptd.sock")
    for environ, cwd in (
        ({**ENVIRON, "GRAPHOPT_SOCKET": str(service.socket)}, "/"),
        (ENVIRON, str(tmp_path)),
    ):
        ran = subprocess.run(
            [*COMMAND, "models", "-q"], env=environ, cwd=cwd, capture_output=True, timeout=WAIT_S
        )
        assert ran.stdout == b"transformer\n", ran.stderr


def test_an_interrupt_and_a_closed_pipe_end_it_quietly(service: Service) -> None:
    process = _start(service.socket, "logs", "-f")
    assert process.stdout is not None
    process.stdout.readline()  # it is following now
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=WAIT_S)
    assert (process.returncode, err) == (130, b"")
    process = _start(service.socket, "logs", "-f")
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert ctl(service, "bypass", "nope").code == 1
    assert ctl(service, "apply", "/dev/null").code == 1  # a line of the log, into the closed pipe
    assert process.wait(WAIT_S) == 0
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()


def test_output_is_free_of_control_characters_of_others(service: Service, tmp_path: Path) -> None:
    (tmp_path / "evil.json").write_text(
        json.dumps({"delta": 1, "edits": [{"bypass": {"node": "\x1b]0;owned\x07\x9b31m"}}]})
    )
    ran = ctl(service, "apply", str(tmp_path / "evil.json"))
    assert ran.code == 1
    assert "owned" in ran.err
    assert not any(ord(char) < 32 and char != "\n" for char in ran.err)
    assert "\x9b" not in ran.err


def test_a_terminal_gets_a_table_of_the_same_words(service: Service) -> None:
    import pty

    parent, child = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, "--socket", str(service.socket), "models"],
        env={**ENVIRON, "TERM": "xterm", "COLUMNS": "120"}, stdout=child, stderr=child,
    )  # fmt: skip
    assert process.wait(WAIT_S) == 0
    os.close(child)
    text = os.read(parent, 1 << 16).decode()
    os.close(parent)
    assert "\x1b[1m" in text  # the head is bold
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    words = ctl(service, "models").out.split()
    assert plain.split() == words


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_names_every_command(shell: str, tmp_path: Path) -> None:
    ran = ctl(tmp_path, "completion", shell)
    assert ran.code == 0
    assert all(re.search(rf"\b{name}\b", ran.out) for name in COMMANDS)
    if shell != "bash":  # an apostrophe in a help text ends no quote
        lines = [shlex.split(line) for line in ran.out.splitlines() if "Take a model" in line]
        words = [word.removeprefix("unpin:") for line in lines for word in line]
        assert {"Take a model's pin away", "Take a model down"} <= {
            word.removeprefix("unload:") for word in words
        }
    if shell == "bash":
        (tmp_path / "c").write_text(ran.out)
        script = (
            f"source {tmp_path / 'c'}; COMP_WORDS=(graphoptctl ro); COMP_CWORD=1; _graphoptctl;"
            ' echo "${COMPREPLY[@]}"; COMP_WORDS=(graphoptctl --json apply --dr); COMP_CWORD=3;'
            ' _graphoptctl; echo "${COMPREPLY[@]}"'
        )
        done = subprocess.run(
            ["bash", "-c", script], capture_output=True, text=True, timeout=WAIT_S
        )
        assert done.stdout.split() == ["rollback", "--dry-run"], done.stderr


def test_the_client_starts_without_torch_numpy_yaml_and_rich() -> None:
    script = (
        "import sys, graphoptd.ctl.main; "
        "print([m for m in ('torch', 'numpy', 'yaml', 'rich', 'asyncio') if m in sys.modules])"
    )
    ran = subprocess.run(
        [COMMAND[0], "-c", script], env=ENVIRON, capture_output=True, text=True, timeout=WAIT_S
    )
    assert ran.stdout == "[]\n", ran.stderr


def _start(path: Path, *arguments: str) -> "subprocess.Popen[bytes]":
    stdin = subprocess.PIPE if "-" in arguments else subprocess.DEVNULL
    return subprocess.Popen(
        [*COMMAND, "--socket", str(path), *arguments], env=ENVIRON,
        stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=_as_in_a_terminal,
    )  # fmt: skip


def _as_in_a_terminal() -> None:
    """A shell starts what is to run in the background with interrupts ignored, and so do its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
