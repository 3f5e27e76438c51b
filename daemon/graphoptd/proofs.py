"""Proofs that the service serves, for the watchdog: parts that are asked, and how long they may be silent."""

from collections.abc import Callable
from concurrent.futures import Future

from graphopt.engine import Host

# Longer than any request may take by default; the executor's queue is a few runs long at most.
EXECUTOR_SILENT_MAX_S = 120.0
BACKGROUND_SILENT_MAX_S = 900.0  # preparing a whole large model, after another one


def proofs_of(host: Host) -> "list[Proof]":
    """One for the executor threads, one for the background; the caller runs on the event loop itself."""
    return [
        Proof("executor", EXECUTOR_SILENT_MAX_S, lambda: host.threads.submit(_nothing)),
        Proof("background", BACKGROUND_SILENT_MAX_S, host.reach_background),
    ]


class Proof:
    """One part of the service, asked again and again; it holds while answers come in time."""

    def __init__(self, name: str, silent_max_s: float, ask: Callable[[], "Future[None]"]) -> None:
        self.name = name
        self.told = False
        self._silent_max_s = silent_max_s
        self._ask = ask
        self._asked: Future[None] | None = None
        self._asked_s = 0.0

    def holds(self, now_s: float) -> bool:
        """Whether the part has answered lately; asks it again when it has."""
        if self._asked is None or self._asked.done():
            self._asked, self._asked_s = self._ask(), now_s
            self.told = False
            return True
        return self.silent_s(now_s) < self._silent_max_s

    def silent_s(self, now_s: float) -> float:
        """Seconds since it was asked what it has not answered yet."""
        return now_s - self._asked_s


def _nothing() -> None:
    """What an executor thread is asked to do."""
