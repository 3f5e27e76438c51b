"""What each command asks the service and how it shows the answer."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from graphopt.errors import GraphoptError
from graphopt.explained import builder_line
from graphoptd.control.opening import (
    Opened,
    close_opened,
    named_paths,
    open_bundle,
    open_paths,
    read_document,
)
from graphoptd.ctl import views
from graphoptd.ctl.client import Client, Exit, Refused, allow_many_files
from graphoptd.ctl.graphviz import as_svg
from graphoptd.ctl.output import show_json, show_lines
from graphoptd.ctl.send import as_call

Options = argparse.Namespace
Command = Callable[[Client, Options], Exit]

_LOAD_TIMEOUT_S = 3_600.0  # a bundle of 100 GB at 30 MB/s
_STREAM_TIMEOUT_S = 86_400.0  # between two parts of a stream that has no rhythm of its own
_CALIBRATE_TIMEOUT_S = 330.0  # between two parts; the service gives up before
_SETTLE_MARGIN_S = 10.0  # the service's answer comes after its own time-out, not before


def simple(
    method: str,
    show: Callable[[Mapping[str, Any]], None],
    *names: str,
    timeout_s: float | None = None,
) -> Command:
    """A command that passes options on as parameters of the same name, and shows the answer."""

    def run(client: Client, options: Options) -> Exit:
        params = {name: getattr(options, name) for name in names}
        if timeout_s is not None and options.timeout is None:
            client.timeout_s = timeout_s
        return _shown(client.ask(method, params), options, show)

    return run


def models(client: Client, options: Options) -> Exit:
    """`models [-q]`."""
    found = client.ask("models")
    if options.quiet and not options.json:
        show_lines(row["name"] for row in found["models"])
        return Exit.OK
    return _shown(found, options, views.models)


def nodes(client: Client, options: Options) -> Exit:
    """`nodes [MODEL] [GLOB]`."""
    model, glob = _model_and(client, options.model, options.glob)
    return _shown(client.ask("nodes", {"model": model, "glob": glob}), options, views.nodes)


def show(client: Client, options: Options) -> Exit:
    """`show [MODEL] [NODE]`."""
    model, node = _model_and(client, options.model, options.node)
    return _shown(client.ask("show", {"model": model, "node": node}), options, views.shown)


def explain(client: Client, options: Options) -> Exit:
    """`explain [--dot | --svg]`."""
    if not options.dot and not options.svg:
        found = client.ask("explain", {"model": options.model})
        return _shown(found, options, views.explanation)
    found = client.ask("draw", {"model": options.model})
    if options.svg and not options.json:
        found = {**found, "lines": as_svg(found["lines"])}
    return _shown(found, options, views.drawn)


def apply(client: Client, options: Options) -> Exit:
    """`apply FILE`: the document and the files that it names."""
    from_stdin = options.file == "-"
    text = sys.stdin.buffer.read() if from_stdin else read_document(options.file)
    source = "standard input" if from_stdin else options.file
    is_json = not from_stdin and options.file.endswith(".json")
    folder = "." if from_stdin else str(Path(options.file).absolute().parent)
    format_ = "json" if is_json else "yaml"
    opened = open_paths(named_paths(text, format_), folder, label=source)
    try:
        return _apply(client, options, text, format_, source, opened)
    finally:
        close_opened(opened)


def edit(make: Callable[[Options], dict[str, Any]]) -> Command:
    """A command for one edit: the document is written here, and sent like any other."""

    def run(client: Client, options: Options) -> Exit:
        document: dict[str, Any] = {"delta": 1}
        if options.if_revision is not None:
            document["if_revision"] = options.if_revision
        if options.id is not None:
            document["id"] = options.id
        document["edits"] = [make(options)]
        text = json.dumps(document).encode()
        opened = open_paths(named_paths(text, "json"), ".")
        try:
            return _apply(client, options, text, "json", options.command, opened)
        finally:
            close_opened(opened)

    return run


def load(client: Client, options: Options) -> Exit:
    """`load NAME BUNDLE`."""
    allow_many_files()
    if options.timeout is None:
        client.timeout_s = _LOAD_TIMEOUT_S
    opened = open_bundle(options.bundle)
    try:
        params = {"name": options.name, "files": list(opened.files)}
        found = client.ask("load", params, list(opened.files.values()))
    finally:
        close_opened([opened])
    return _shown(found, options, views.loaded)


def settle(client: Client, options: Options) -> Exit:
    """`settle [--timeout S]`: progress on stderr when it takes long."""
    timeout_s = None if options.timeout is None else options.timeout + _SETTLE_MARGIN_S
    params = {"timeout_s": options.timeout}
    found: dict[str, Any] = {}
    for found in client.stream("settle", params, timeout_s=timeout_s):
        if not found["settled"] and "builder" in found and sys.stderr.isatty():
            sys.stderr.write(f"{found['waited_s']:.0f} s, {builder_line(found['builder'])}\n")
    _shown(found, options, views.settled)
    return Exit.OK if found["settled"] else Exit.BUSY


def pin(client: Client, options: Options) -> Exit:
    """`pin [MODEL] --for DURATION --reason TEXT [--tier T ...]`."""
    params = {
        "model": options.model,
        "for_s": options.duration_s,
        "reason": options.reason,
        "tiers": options.tiers,
    }
    return _shown(client.ask("pin", params), options, views.pinned)


def calibrate(client: Client, options: Options) -> Exit:
    """`calibrate [--threads N ...] [--within S]`: a bar on stderr while it measures."""
    params = {"threads": options.threads, "within_s": options.within_s}
    timeout_s = options.timeout or _CALIBRATE_TIMEOUT_S
    found: dict[str, Any] = {}
    try:
        for found in client.stream("calibrate", params, timeout_s=timeout_s):
            if "done" in found and sys.stderr.isatty():
                sys.stderr.write(f"\r{views.bar(found)}\x1b[K")
                sys.stderr.flush()
    finally:
        if sys.stderr.isatty():
            sys.stderr.write("\r\x1b[K")
    return _shown(found, options, views.calibrated)


def top(client: Client, options: Options) -> Exit:
    """`top`: repainted on a terminal, else once, or `-n` times."""
    is_live = sys.stdout.isatty() and not options.json
    count = options.count or (None if is_live else 1)
    params = {"interval_s": options.interval, "count": count}
    for found in client.stream("top", params, timeout_s=_STREAM_TIMEOUT_S):
        if is_live:
            sys.stdout.write("\x1b[H\x1b[2J")  # home, and clear
        _shown(found, options, views.status)
        sys.stdout.flush()
    return Exit.OK


def logs(client: Client, options: Options) -> Exit:
    """`logs [-f] [-n N]`."""
    params = {"count": options.lines, "follow": options.follow}
    for part in client.stream("logs", params, timeout_s=_STREAM_TIMEOUT_S):
        if missed := part.get("missed"):
            sys.stderr.write(f"graphoptctl: {missed} lines came too fast and are lost\n")
        for number, line in part.get("lines", ()):
            if options.json:
                show_json({"seq": number, **json.loads(line)})
            else:
                views.log_line(json.loads(line))
        sys.stdout.flush()
    return Exit.OK


def new_delta(client: Client, options: Options) -> Exit:
    """`new-delta KIND [MODEL]`."""
    found = client.ask("new_delta", {"kind": options.kind, "model": options.model})
    return _shown(found, options, views.template)


COMMANDS: Mapping[str, Command] = {
    "status": simple("status", views.status),
    "models": models,
    "nodes": nodes,
    "show": show,
    "history": simple("history", views.history, "model"),
    "explain": explain,
    "diff": simple("diff", views.difference, "model", "from_revision", "to_revision"),
    "new-delta": new_delta,
    "apply": apply,
    "attach": edit(
        lambda o: {"attach_adapter": {"name": o.name, "path": o.folder, "scale": o.scale}}
    ),
    "detach": edit(lambda o: {"detach_adapter": {"name": o.name}}),
    "bypass": edit(lambda o: {"bypass": {"node": o.node}}),
    "load-weights": edit(lambda o: {"load_weights": {"path": o.path, "strict": not o.no_strict}}),
    "rollback": simple("rollback", views.applied, "model", "revision"),
    "fork": lambda client, o: _shown(
        client.ask("fork", {"model": o.model, "name": o.new}), o, views.forked
    ),
    "load": load,
    "unload": simple("unload", views.unloaded, "model"),
    "cost": simple("cost", views.costs, "glob"),
    "calibrate": calibrate,
    "reload": simple("reload", views.reloaded, "wait"),
    "pin": pin,
    "unpin": simple("unpin", views.pinned, "model"),
    "settle": settle,
    "top": top,
    "logs": logs,
}


def _apply(
    client: Client,
    options: Options,
    text: bytes,
    format_: str,
    source: str,
    opened: Sequence[Opened],
) -> Exit:
    allow_many_files()
    params, files, own = as_call(text, format_, source, opened)
    params |= {"model": options.model, "dry_run": options.dry_run or None}
    try:
        found = client.ask("apply", params, files)
    finally:
        close_opened([own])
    return _shown(found, options, views.tried if options.dry_run else views.applied)


def _model_and(
    client: Client, first: str | None, second: str | None
) -> tuple[str | None, str | None]:
    """Which of one argument given it is: a model's name, or something in the only model."""
    if first is None or second is not None:
        return first, second
    names = [row["name"] for row in client.ask("models")["models"]]
    return (None, first) if len(names) == 1 and first not in names else (first, None)


def _shown(
    result: Mapping[str, Any], options: Options, show: Callable[[Mapping[str, Any]], None]
) -> Exit:
    if options.json:
        show_json(result)
    else:
        show(result)
    return Exit.OK


def run(client: Client, options: Options) -> Exit:
    """Runs the command that was given. Refused when it was."""
    try:
        return COMMANDS[options.command](client, options)
    except GraphoptError as error:
        raise Refused.of(error) from None
