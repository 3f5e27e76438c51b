"""The closed list of events: what the log can say, and the one function that says it.

The log alone must let a person reconstruct what the service did and why. So an event has a name, a
fixed severity, and fields out of one vocabulary: a field means the same wherever it appears. `emit`
refuses anything that is not in the tables below; `docs/EVENTS.md` is printed from them by
`python -m graphoptd.events`. The names and fields are an interface: adding is free, anything else
raises `SCHEMA`.

    emit("plan.published", graph="minilm", revision=13, plan_id="p7", predicted_ms=4.1)

A field given as None is left out: absent data is absent, never zero. Deliberately absent: how a
line looks and where it goes (`graphoptd.logs`), metrics, and any event by request (failures of
requests are counted into `request.failed`).
"""

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from graphopt.errors import GraphoptError
from graphoptd.event_fields import FIELDS, Field
from graphoptd.event_table import EVENTS, SCHEMA, Event

__all__ = [
    "EVENTS",
    "FIELDS",
    "LOGGER",
    "SCHEMA",
    "Event",
    "FailureCounter",
    "Field",
    "Said",
    "emit",
    "error_fields",
    "markdown",
    "problems",
]

LOGGER = logging.getLogger("graphoptd.events")

_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_TYPES: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "list": (list, tuple),
    "mapping": (dict,),
}


FAILURE_KINDS_MAX = (
    64  # (model, code) pairs of one line; clients choose names of models that do not exist
)
OTHER_GRAPH = "(other)"  # stands for the models beyond that


@dataclass(frozen=True, slots=True)
class Said:
    """An event on its way through the standard logging machinery, as `LogRecord.said`."""

    event: Event
    fields: Mapping[str, Any]


def emit(name: str, **fields: Any) -> None:
    """Log the event `name`; fields that are None are left out.

    Raises:
        ValueError: the event or a field is not in the tables, a required field is missing, or a
            value has the wrong type. That is a defect of the caller; the tests meet it first.
    """
    event = EVENTS.get(name)
    if event is None:
        raise ValueError(f"unknown event {name!r}: add it to graphoptd.event_table")
    given = {key: value for key, value in fields.items() if value is not None}
    found = problems(event, given)
    if found:
        raise ValueError(f"event {name}: {'; '.join(found)}")
    level = _LEVELS[event.severity]
    if LOGGER.isEnabledFor(level):
        LOGGER.log(level, name, extra={"said": Said(event, given)}, stacklevel=2)


class FailureCounter:
    """Counts failed requests by (model, code) and says so in one `request.failed` a period.

    Safe from any thread; counting costs about a microsecond. The service calls `tick` at least once
    a period and `flush` at its end.

    Args:
        clock: seconds, monotonic.
        period_s: least time between two lines; may be set later.
    """

    def __init__(self, clock: Callable[[], float], period_s: float) -> None:
        self.period_s = period_s
        self._clock = clock
        self._lock = threading.Lock()
        self._since = clock()
        self._counts: dict[tuple[str, str], list[Any]] = {}  # -> [count, first message]

    def add(self, graph: str, code: str, message: str, count: int = 1) -> None:
        """Count failures of one kind; the first message of each kind is kept as its example."""
        with self._lock:
            if not self._counts:
                self._since = self._clock()
            key = (graph, code)
            if key not in self._counts and len(self._counts) >= FAILURE_KINDS_MAX:
                key = (OTHER_GRAPH, code)
            self._counts.setdefault(key, [0, message])[0] += count

    def tick(self) -> None:
        """Say what was counted when the period is over; nothing was counted, nothing is said."""
        if self._counts and self._clock() - self._since >= self.period_s:
            self.flush()

    def flush(self) -> None:
        """Say now what was counted."""
        with self._lock:
            counts, self._counts = self._counts, {}
            period_s = round(self._clock() - self._since, 3)
        if counts:
            failures = [
                {"graph": graph, "code": code, "count": count, "message": message}
                for (graph, code), (count, message) in sorted(counts.items())
            ]
            total = sum(count for count, _ in counts.values())
            emit("request.failed", count=total, period_s=period_s, failures=failures)


def problems(event: Event, fields: Mapping[str, Any]) -> list[str]:
    """What the table has against these fields; empty when nothing."""
    found = [f"{name} is missing" for name in event.required if name not in fields]
    for name, value in fields.items():
        if name not in event.required and name not in event.optional:
            found.append(f"{name} is not a field of it")
        elif reason := _mismatch(FIELDS[name], value):
            found.append(f"{name} {reason}")
    return found


def markdown() -> str:
    """`docs/EVENTS.md`."""
    lines = [
        "# Events",
        "",
        "Printed by `python -m graphoptd.events`; edit `daemon/graphoptd/event_table.py` instead.",
        "",
        "Each line of the log is one event as a JSON object: `ts` (UTC, microseconds), `severity`",
        f"(info, warning, error), `event`, `schema` ({SCHEMA}), then the event's fields. A field",
        "that is not known is absent. On a terminal the same is printed as text. Under systemd each",
        "line bears its priority, so `journalctl -u graphoptd -p warning -o cat` finds the bad",
        "ones; `graphoptctl logs` shows the last ones from memory, each with a sequence number",
        "`seq`.",
        "",
        "A line longer than the journal takes is cut: long texts and lists end in `...`, and",
        "`truncated` is true. Names and fields are kept within a `schema`; new ones may appear.",
        "",
        "| event | severity | says | fields (optional ones in brackets) |",
        "|---|---|---|---|",
    ]
    for event in EVENTS.values():
        fields = [f"`{name}`" for name in event.required]
        fields += [f"[`{name}`]" for name in event.optional]
        lines.append(f"| `{event.name}` | {event.severity} | {event.says} | {' '.join(fields)} |")
    lines += ["", "## Fields", "", "| field | type | unit | meaning |", "|---|---|---|---|"]
    for field in FIELDS.values():
        lines.append(f"| `{field.name}` | {field.type} | {field.unit} | {field.meaning} |")
    return "\n".join(lines) + "\n"


def _mismatch(field: Field, value: Any) -> str:
    """Why the value is not of the field's type; empty when it is."""
    if not isinstance(value, _TYPES[field.type]):
        return f"must be of type {field.type}, not {type(value).__name__}"
    if isinstance(value, bool) and field.type != "boolean":
        return f"must be of type {field.type}, not bool"
    if isinstance(value, float) and not isfinite(value):
        return "is not finite: leave it out"
    return ""


if __name__ == "__main__":
    print(markdown(), end="")  # noqa: T201 - the generator of docs/EVENTS.md


def error_fields(error: GraphoptError) -> dict[str, Any]:
    """An error as the log's fields say it."""
    return {
        "code": error.code,
        "message": error.message,
        "where": error.where or None,
        "remedy": error.remedy or None,
        "detail": [list(each) for each in error.detail] or None,
    }
