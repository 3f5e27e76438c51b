"""Native code that is tried in this process before it is trusted: a crash must be told from any other.

The builder's process says what is about to be tried, so that the engine, which outlives a crash, knows
what to ban; what is banned is declined without being tried. Elsewhere nobody listens and nothing is
banned. Deliberately absent: what to try (`openvino_frontend`), and what a ban is
(`engine.builder_quarantine`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from graphopt.executor.backends.target import DeclinedError


@dataclass(frozen=True, slots=True)
class Trial:
    """What is tried: `subject` is unique for a backend and its version."""

    subject: str
    backend: str
    version: str


def _nothing(trial: Trial | None) -> None:
    return None


class Trials:
    """The trials of one process, one at a time.

    Attributes:
        announce: called with what is about to be tried, and with None when it is over.
        evidence: what a trial did when it brought a process down, None for what never did.
    """

    def __init__(self) -> None:
        self.announce: Callable[[Trial | None], None] = _nothing
        self.evidence: Callable[[Trial], str | None] = _nothing

    @contextmanager
    def trying(self, trial: Trial) -> Iterator[None]:
        """Around the native code; raises DeclinedError instead where it is banned."""
        evidence = self.evidence(trial)
        if evidence is not None:
            raise DeclinedError(f"it brought a builder down: {evidence}")
        self.announce(trial)
        try:
            yield
        finally:
            self.announce(None)


TRIALS = Trials()
"""Those of this process: backends are made by entry points, which take no arguments."""
