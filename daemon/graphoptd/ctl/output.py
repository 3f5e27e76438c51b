"""How results and errors look to people.

On a terminal tables are rich's. Elsewhere the same rows are printed as plain columns, without
colour, cuts or padding, so that `grep` and `awk` see what is there; and rich, which takes longer to
import than the service to answer, is not loaded. Nothing from the service reaches the terminal with
control characters in it: names come from other people's documents.
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

from graphopt.tables import plain_table, word

_CONTROL = dict.fromkeys((*range(32), *range(127, 160)), "�")
_ERROR_LINES_MAX = 20


def show_json(value: Any) -> None:
    """One line of JSON on stdout."""
    _write(sys.stdout, json.dumps(value))


def show_lines(lines: Iterable[str]) -> None:
    """Texts, a line each."""
    for line in lines:
        _write(sys.stdout, clean(line))


def show_table(head: Sequence[str], rows: Iterable[Sequence[Any]], right: str = "") -> None:
    """A table; `right` names the columns that are numbers, separated by blanks."""
    cells = [[clean(word(value)) for value in row] for row in rows]
    numbers = right.split()
    if sys.stdout.isatty():
        _show_rich(head, cells, numbers)
    else:
        show_lines(plain_table(head, cells, numbers))


def show_pairs(pairs: Mapping[str, Any]) -> None:
    """A record as `name: value`."""
    width = max((len(name) for name in pairs), default=0)
    show_lines(f"{name + ':':<{width + 1}} {word(value)}" for name, value in pairs.items())


def show_error(body: Mapping[str, Any], as_json: bool = False) -> None:
    """What went wrong, where, and what to do, on stderr."""
    if as_json:
        _write(sys.stderr, json.dumps({"error": body}))
        return
    for line in error_lines(body):
        _write(sys.stderr, line)


def error_lines(body: Mapping[str, Any]) -> list[str]:
    """The lines of an error."""
    lines = [f"graphoptctl: {clean(str(body.get('message') or 'refused'))}"]
    where, remedy = str(body.get("where") or ""), str(body.get("remedy") or "")
    if where:
        lines.append(f"  where: {clean(where)}")
    faults = [each for each in body.get("detail") or () if isinstance(each, dict)]
    said = str(body.get("message"))
    if len(faults) > 1 or any(str(each.get("reason")) not in said for each in faults):
        shown = faults[:_ERROR_LINES_MAX]
        pairs = [(str(each.get("path")), str(each.get("reason"))) for each in shown]
        lines += [f"    {clean(path)}: {clean(reason)}" for path, reason in pairs]
    if len(faults) > _ERROR_LINES_MAX:
        lines.append(f"    and {len(faults) - _ERROR_LINES_MAX} more")
    if remedy:
        lines.append(f"  do:    {clean(remedy)}")
    return lines


def clean(text: str) -> str:
    """The text without anything a terminal would obey."""
    return text.translate(_CONTROL)


def _show_rich(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in head:
        table.add_column(name, justify="right" if name in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # Text: names are not markup
    Console().print(table)


def _write(stream: TextIO, line: str) -> None:
    stream.write(line.encode(stream.encoding or "utf-8", "replace").decode(stream.encoding) + "\n")
