"""The command `graphoptd`: read the command line, run the service, translate its end.

    graphoptd --config FILE
    graphoptd --model NAME=BUNDLE ... [--state DIR] [--host ADDRESS] [--port N] [--run-dir DIR]
              [--no-builder]

Exit status: 0 stopped, 2 wrong usage, 65 corrupt or newer state, 74 the state's disk failed, 78 bad
first configuration, 1 anything else; a signal that was caught is died of. 65 and 78 are not worth
another try, so systemd does not make one.

torch is loaded only once the configuration has been read: a mistake in it is told in a moment.
"""

import argparse
import gc
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import graphopt
from graphopt.errors import (
    BundleError,
    DocumentError,
    GraphoptError,
    LimitError,
    StateCorruptError,
    StateNewerError,
)
from graphoptd import config, logs, systemd
from graphoptd.settings import PORT_MAX, Settings

if TYPE_CHECKING:
    from graphoptd.service import Outcome

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_STATE, EXIT_STORE, EXIT_CONFIG = 0, 1, 2, 65, 74, 78
RUN_DIR = Path("run")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the service; returns the exit status, or dies of the signal that ended it."""
    parser = _parser()
    options = parser.parse_args(argv)
    _check_usage(parser, options)
    # Start-up makes a million objects and no garbage worth a collection; `garbage` takes over later.
    gc.disable()
    try:
        inherited = systemd.take()
        settings = _settings(options)
    except (DocumentError, LimitError) as error:
        settings = Settings()  # what the file says of the log is not known
        installed = logs.install(settings.log)
        _tell(error, EXIT_CONFIG, settings, installed)
        installed.close()
        return EXIT_CONFIG
    installed = logs.install(settings.log)
    try:
        outcome = _run(options, settings, installed, inherited)
    except GraphoptError as error:
        status = _status_of(error)
        _tell(error, status, settings, installed)
        return status
    finally:
        installed.close()
        inherited.notifier.close()
    if outcome.signal is not None:
        signal.signal(outcome.signal, signal.SIG_DFL)
        signal.raise_signal(outcome.signal)
    return outcome.status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="graphoptd", description="Hold model graphs live: serve them, and edit them meanwhile."
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", metavar="FILE", type=Path, help="configuration, reloaded live")
    source.add_argument(
        "--model",
        metavar="NAME=BUNDLE",
        action="append",
        help="serve a bundle without a configuration file; may be repeated",
    )
    parser.add_argument(
        "--state", metavar="DIR", type=Path, help="with --model: state folder (RUN_DIR/state)"
    )
    parser.add_argument("--host", metavar="ADDRESS", help="with --model: address (127.0.0.1)")
    parser.add_argument("--port", metavar="N", type=_port, help="with --model: TCP port (8080)")
    parser.add_argument(
        "--run-dir", metavar="DIR", type=Path, help="with --model: folder of the sockets (./run)"
    )
    parser.add_argument(
        "--no-builder",
        action="store_const",
        const=True,
        help="with --model: build no better plans beside the server; models stay on torch",
    )
    parser.add_argument(
        "--when-ready", metavar="TEXT", default="", help="say TEXT once every model serves"
    )
    parser.add_argument("--version", action="version", version=f"graphoptd {graphopt.__version__}")
    return parser


def _check_usage(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    only = {
        "--state": "state", "--host": "host", "--port": "port", "--run-dir": "run_dir",
        "--no-builder": "no_builder",
    }  # fmt: skip
    for name, key in only.items():
        if options.config is not None and getattr(options, key) is not None:
            parser.error(f"{name} goes with --model; with --config, write it into the file")


def _settings(options: argparse.Namespace) -> Settings:
    if options.config is not None:
        return config.load(options.config)
    base = Settings()
    run_dir = (options.run_dir or RUN_DIR).absolute()
    return config.of_models(
        options.model,
        replace(
            base,
            state=replace(base.state, path=(options.state or run_dir / "state").absolute()),
            # No group owns the socket of somebody's own service.
            control=replace(base.control, socket=run_dir / "graphoptd.sock", group=""),
            data=replace(
                base.data,
                host=options.host or base.data.host,
                port=base.data.port if options.port is None else options.port,
                socket_path=run_dir / "graphoptd-data.sock",
            ),
            builder=replace(base.builder, enabled=not options.no_builder),
        ),
    )


def _run(
    options: argparse.Namespace,
    settings: Settings,
    installed: logs.Logs,
    inherited: systemd.Inherited,
) -> "Outcome":
    import asyncio

    import uvloop

    from graphoptd.service import Service  # loads torch: seconds

    service = Service(settings, options.config, installed, inherited, options.when_ready)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(service.run())


def _status_of(error: GraphoptError) -> int:
    if isinstance(error, StateCorruptError | StateNewerError):
        return EXIT_STATE
    if isinstance(error, BundleError | DocumentError | LimitError):
        return EXIT_CONFIG
    return EXIT_FAILED


def _tell(error: GraphoptError, status: int, settings: Settings, installed: logs.Logs) -> None:
    """One line: for people on a terminal, as an event everywhere else."""
    if os.isatty(2) and settings.log.format != "json":
        installed.close()
        print(f"graphoptd: {error}", file=sys.stderr)
        return
    from graphoptd.events import emit, error_fields

    emit("daemon.failed", **error_fields(error), exit_code=status)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > PORT_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: 0 to {PORT_MAX}, 0 takes any free")
    return int(text)
