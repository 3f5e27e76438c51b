"""Rows as columns of plain text, and figures in the unit that suits them.

What the library prints and what `graphoptctl` prints outside a terminal come from here, so that both
show the same. Loads quickly: the client imports it. Deliberately absent: colours and cutting.
"""

from collections.abc import Mapping, Sequence
from typing import Any


def plain_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[str] = ()
) -> list[str]:
    """Columns as wide as they need, two blanks apart; `numbers` names those that end at the right."""
    table = [head, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(head))]
    lines = []
    for row in table:
        cells = [
            cell.rjust(width) if name in numbers else cell.ljust(width)
            for name, cell, width in zip(head, row, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def word(value: Any) -> str:
    """A value in a cell."""
    if value is None or value in ([], {}, ()):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {word(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(word, value))
    return str(value)


def bytes_word(count: int) -> str:
    """A size in the unit that suits it."""
    size = float(count)
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def seconds_word(seconds: float) -> str:
    """A duration in at most two units, seconds cut off to whole ones."""
    left = int(seconds)
    units = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))
    parts: list[str] = []
    for name, size in units:
        if left >= size or (name == "s" and not parts):
            parts.append(f"{left // size} {name}")
            left %= size
    return " ".join(parts[:2])


def short_seconds_word(seconds: float) -> str:
    """A time that was measured, with three figures in the unit that suits it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def count_word(count: int, noun: str) -> str:
    """`1 job`, `2 jobs`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
