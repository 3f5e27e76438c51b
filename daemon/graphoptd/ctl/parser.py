"""The command line of `graphoptctl`, as argparse knows it. Help, usage and completion come from here."""

import argparse
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from graphoptd.ctl.client import TIMEOUT_S, Exit
from graphoptd.ctl.durations import duration_s

SHELLS = ("bash", "zsh", "fish")

_MODEL_HELP = "the model; may be left out when one is loaded"
_EPILOG = """\
exit codes: 0 done, 1 rejected, 2 usage, 3 unreachable, 4 precondition failed, 5 denied,
6 timed out, 7 busy (try again)
"""
_PIN_EPILOG = """\
Without --tier the published plan is held as it is. With --tier the search for better plans goes on
within those tiers, and what runs on others is taken off at once. Deltas go live as always, and a
plan that fails or becomes slower is still taken back.
"""


class Parser(argparse.ArgumentParser):
    """As argparse's, without guessing abbreviated options: scripts outlive them."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Usage and reason on stderr, and the end."""
        self.print_usage(sys.stderr)
        self.exit(Exit.USAGE, f"{self.prog}: {message}\n")


def build_parser() -> Parser:
    """The whole parser."""
    parser = Parser(
        prog="graphoptctl",
        description="Look at and change the models that graphoptd serves.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_common(parser, top=True)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, says: str, **options: Any) -> Parser:
        command = commands.add_parser(name, help=says, description=says, **options)
        _add_common(command, top=False)
        assert isinstance(command, Parser)
        return command

    _add_looks(add)
    _add_changes(add)
    _add_service(add)
    return parser


Adder = Callable[..., Parser]


def _add_common(parser: Parser, *, top: bool) -> None:
    # Said before or after the command; the later one must not undo the earlier by its default.
    default: Any = None if top else argparse.SUPPRESS
    parser.add_argument("--socket", metavar="PATH", default=default, help="the control socket")
    parser.add_argument(
        "--json",
        action="store_true",
        default=False if top else argparse.SUPPRESS,
        help="print the result as JSON",
    )
    parser.add_argument(
        "--timeout",
        type=_seconds,
        metavar="S",
        default=default,
        help=f"seconds to wait for an answer ({TIMEOUT_S:g})",
    )


def _add_looks(add: Adder) -> None:
    add("status", "The service and its models")
    models = add("models", "The models that are loaded")
    models.add_argument("-q", "--quiet", action="store_true", help="names only")
    nodes = add("nodes", "Nodes of a model, in topological order")
    nodes.add_argument("model", nargs="?", metavar="MODEL", help=_MODEL_HELP)
    nodes.add_argument("glob", nargs="?", metavar="GLOB", help="such as 'encoder.layer.3.*'")
    show = add("show", "The text form of a model, or one node and what is around it")
    show.add_argument("model", nargs="?", metavar="MODEL", help=_MODEL_HELP)
    show.add_argument("node", nargs="?", metavar="NODE")
    _model(add("history", "The last revisions of a model"))
    explain = add("explain", "What runs each block, and why")
    _model(explain)
    drawn = explain.add_mutually_exclusive_group()
    drawn.add_argument("--dot", action="store_true", help="draw it, for Graphviz")
    drawn.add_argument("--svg", action="store_true", help="draw it, with Graphviz's dot")
    diff = add("diff", "What differs between two revisions")
    _model(diff)
    diff.add_argument("from_revision", type=_revision, metavar="REV")
    diff.add_argument("to_revision", type=_revision, metavar="REV")
    new_delta = add("new-delta", "Print a delta document to start from, with ids of the model")
    new_delta.add_argument("kind", metavar="KIND", help="an edit kind, such as bypass")
    _model(new_delta)


def _add_changes(add: Adder) -> None:
    apply = add("apply", "Apply a delta document (YAML, or JSON when it is called *.json)")
    apply.add_argument("file", metavar="FILE", help="the document; - reads standard input")
    apply.add_argument("--model", metavar="MODEL", help="for a document that names no graph")
    apply.add_argument("--dry-run", action="store_true", help="only say what it would do")
    attach = add("attach", "Attach a PEFT LoRA adapter")
    _model(attach)
    attach.add_argument("name", metavar="NAME", help="the adapter's name from now on")
    attach.add_argument("folder", metavar="FOLDER")
    attach.add_argument("--scale", type=float, default=1.0, help="factor on the adapter's own")
    _edit_options(attach)
    detach = add("detach", "Detach an adapter")
    _model(detach)
    detach.add_argument("name", metavar="NAME")
    _edit_options(detach)
    bypass = add("bypass", "Leave out a node, or all nodes of a module")
    _model(bypass)
    bypass.add_argument("node", metavar="NODE")
    _edit_options(bypass)
    load_weights = add("load-weights", "Take over weights from safetensors files")
    _model(load_weights)
    load_weights.add_argument("path", metavar="PATH", help="a file or a folder of them")
    load_weights.add_argument(
        "--no-strict", action="store_true", help="take what matches, whatever else there is"
    )
    _edit_options(load_weights)
    rollback = add("rollback", "Make a new revision that equals an old one")
    _model(rollback)
    rollback.add_argument("revision", type=_revision, metavar="REV")
    pin = add(
        "pin",
        "Hold a model's plan for a while, or keep it to some tiers",
        epilog=_PIN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _model(pin)
    pin.add_argument(
        "--for", dest="duration_s", type=duration_s, required=True, metavar="DURATION",
        help="until it ends by itself: 30s, 15m, 2h, 3d; at most 30d",
    )  # fmt: skip
    pin.add_argument("--reason", required=True, metavar="TEXT", help="why; status shows it")
    pin.add_argument(
        "--tier", dest="tiers", action="append", metavar="TIER",
        help="one that plans may still use besides eager; may be given again",
    )  # fmt: skip
    _model(add("unpin", "Take a model's pin away"))
    fork = add("fork", "Make a second live model that shares everything with the first")
    _model(fork)
    fork.add_argument("new", metavar="NEW")
    load = add("load", "Load a bundle")
    load.add_argument("name", metavar="NAME")
    load.add_argument("bundle", metavar="BUNDLE", help="a folder made by graphopt import")
    add("unload", "Take a model down").add_argument("model", metavar="MODEL")


def _add_service(add: Adder) -> None:
    reload = add("reload", "Read the configuration again")
    reload.add_argument("--wait", action="store_true", help="until it is in force or refused")
    cost = add("cost", "The coefficients of the cost model, with unit, range and origin")
    cost.add_argument("what", choices=("show",), metavar="show")
    cost.add_argument("glob", nargs="?", metavar="GLOB", help="such as 'backends.openvino.*'")
    calibrate = add("calibrate", "Measure this host for the cost model; takes up to 2 minutes")
    calibrate.add_argument(
        "--threads", type=_count, action="append", metavar="N",
        help="a count to measure with; may be given again (1, and what a request gets at most)",
    )  # fmt: skip
    calibrate.add_argument(
        "--within", dest="within_s", type=_seconds, default=None, metavar="S",
        help="seconds after which no further graph is measured",
    )  # fmt: skip
    add("settle", "Wait until the background has nothing better to offer")
    top = add("top", "Figures, again and again; once when the output is no terminal")
    top.add_argument("-i", "--interval", type=_seconds, default=1.0, metavar="S")
    top.add_argument("-n", "--count", type=_count, default=None, metavar="N")
    logs = add("logs", "The last lines of the log")
    logs.add_argument("-f", "--follow", action="store_true", help="and the coming ones")
    logs.add_argument("-n", "--lines", type=_revision, default=100, metavar="N")
    add("completion", "Print completion for a shell").add_argument("shell", choices=SHELLS)


def _model(parser: Parser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help=_MODEL_HELP)


def _edit_options(parser: Parser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="only say what it would do")
    parser.add_argument(
        "--if-revision", type=_revision, metavar="REV", help="refuse when the model has moved on"
    )
    parser.add_argument("--id", metavar="ID", help="the same id again changes nothing")


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value <= 86_400:
        raise argparse.ArgumentTypeError("a number of seconds up to a day")
    return value


def _revision(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def _count(text: str) -> int:
    value = _revision(text)
    if value < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return value
