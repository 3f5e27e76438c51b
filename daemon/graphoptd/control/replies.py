"""The lines of a good answer: one, or as many as its rows need.

Rows are measured one by one, so that the interpreter lock, which requests need too, is never held
for the whole of a large answer.
"""

from collections.abc import Mapping
from typing import Any

from graphopt.errors import LimitError
from graphoptd.control.task import Answer, Task
from graphoptd.control.wire import LINE_BYTES_MAX, PART_BYTES, dump_line, result_line


def reply_lines(task: Task, answer: Answer) -> list[bytes]:
    """The lines of an answer: one, or with `more` as many as its rows need."""
    head = {name: value for name, value in answer.result.items() if name != answer.rows}
    rows: list[Any] = answer.result.get(answer.rows, [])
    sizes = [len(dump_line({"row": row})) for row in rows]
    if sum(sizes) < PART_BYTES:
        return [_checked(task, answer.result)]
    if not task.call.more:
        raise _too_long(task, sum(sizes))
    replies = []
    first, size = 0, 0
    for number, row_bytes in enumerate(sizes):
        if number > first and size + row_bytes > PART_BYTES:
            part = {answer.rows: rows[first:number]}
            replies.append(result_line(task.call, part, task.revision, continues=True))
            first, size = number, 0
        size += row_bytes
    return [*replies, _checked(task, {**head, answer.rows: rows[first:]})]


def _checked(task: Task, result: Mapping[str, Any]) -> bytes:
    line = result_line(task.call, result, task.revision)
    if len(line) > LINE_BYTES_MAX:
        raise _too_long(task, len(line))
    return line


def _too_long(task: Task, size_bytes: int) -> LimitError:
    return LimitError(
        f"the answer takes {size_bytes} bytes, at most {PART_BYTES} go into one line",
        where=task.call.method,
        remedy="call with more: true to get it in parts, or ask for less",
    )
