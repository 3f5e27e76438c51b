"""The command `graphopt`: `graphopt import SOURCE -o BUNDLE`.

Exit codes: 0 done, 1 refused (the reason on stderr), 2 wrong usage. Progress goes to stderr, the
summary to stdout.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from graphopt.errors import GraphoptError
from graphopt.frontend.sources import FORMS, is_source, load_source

if TYPE_CHECKING:  # importing it loads torch, which help and usage errors need not wait for
    from graphopt.graph import Graph, Symbol

OK, REFUSED = 0, 1  # 2 is argparse's own


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; SystemExit(2) on wrong usage."""
    parser = _parser()
    options = parser.parse_args(argv)
    if not is_source(options.source):
        parser.error(f"{options.source!r} is no source: give {FORMS}")
    try:
        return _import(options)
    except GraphoptError as error:
        print(f"graphopt: {error}", file=sys.stderr)
    except OSError as error:
        print(f"graphopt: {error.filename or options.output}: {error.strerror}", file=sys.stderr)
    return REFUSED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="graphopt", description="Import models as graphs that graphoptd serves."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "import",
        help="import a model and write a bundle",
        description=f"Import a model and write a bundle. SOURCE is {FORMS}. "
        "Importing runs the model's Python code as you.",
    )
    command.add_argument("source", metavar="SOURCE", help=FORMS)
    command.add_argument("-o", "--output", metavar="BUNDLE", type=Path, required=True)
    command.add_argument("--name", default="", help="the graph's name (default: from the source)")
    command.add_argument("--task", help="hf: what the model is for (default: from its config.json)")
    command.add_argument(
        "--inputs",
        default="",
        metavar="NAME,...",
        help="hf: text inputs of the graph (default: input_ids,attention_mask)",
    )
    command.add_argument("--replace", action="store_true", help="replace a bundle that is there")
    return parser


def _import(options: argparse.Namespace) -> int:
    start = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - start:6.1f} s  {text}", file=sys.stderr, flush=True)

    inputs = tuple(part for part in options.inputs.split(",") if part)
    graph = load_source(
        options.source, name=options.name, task=options.task, inputs=inputs, say=say
    )
    say(f"writing {options.output}")
    from graphopt.bundle import save_bundle  # loads torch; only once there is something to write

    save_bundle(graph, options.output, replace=options.replace)
    print(summary(graph, options.output, time.monotonic() - start))
    return OK


def summary(graph: "Graph", path: Path, elapsed_s: float) -> str:
    """What was imported, for people."""
    size = sum(c.tensor.numel() * c.tensor.element_size() for c in graph.constants.values())
    lines = [
        f"{path}: {graph.name}, {len(graph)} nodes, {len(graph.constants)} constants "
        f"({size / 1e6:.1f} MB), {elapsed_s:.1f} s",
        f"  inputs   {', '.join(f'{name} {type_}' for name, type_ in graph.inputs)}",
        f"  outputs  {', '.join(name for name, _ in graph.outputs)}",
    ]
    if graph.symbols:
        lines.append(f"  dims     {', '.join(_range(symbol) for symbol in graph.symbols)}")
    return "\n".join(lines)


def _range(symbol: "Symbol") -> str:
    most = f"to {symbol.max}" if symbol.max is not None else "or more"
    return f"{symbol.name} {symbol.min} {most}"


if __name__ == "__main__":
    sys.exit(main())
