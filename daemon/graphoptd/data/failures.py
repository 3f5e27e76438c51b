"""Failed requests, counted by model and kind, so that a burst of them is one line in the log."""

import traceback
from dataclasses import dataclass

from graphopt.errors import GraphoptError

_KINDS_MAX = (
    256  # model names in URLs are the client's choice; what comes on top is counted under one name
)
_TEXT_CHARS_MAX = 4096


@dataclass(slots=True)
class Failure:
    """One kind of failure since the last report.

    Attributes:
        model: its name in the URL, empty when there was none.
        code: of the typed error, or `internal`.
        count: how many.
        text: of the last one; a traceback when it was not a typed error.
    """

    model: str
    code: str
    count: int
    text: str


class Failures:
    """Collects failures between two reports."""

    def __init__(self) -> None:
        self._by_kind: dict[tuple[str, str], Failure] = {}

    def add(self, model: str, error: Exception) -> None:
        """Count one failed request."""
        if isinstance(error, GraphoptError):
            code, text = error.code, str(error)
        else:
            code, text = "internal", "".join(traceback.format_exception(error))
        key = (model[:256], code)
        if key not in self._by_kind and len(self._by_kind) >= _KINDS_MAX:
            key = ("", code)
        failure = self._by_kind.setdefault(key, Failure(*key, 0, ""))
        failure.count += 1
        failure.text = text[-_TEXT_CHARS_MAX:]

    def take(self) -> list[Failure]:
        """All kinds counted since the last call."""
        failures = list(self._by_kind.values())
        self._by_kind.clear()
        return failures
