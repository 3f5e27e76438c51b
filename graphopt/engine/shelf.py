"""Verified candidates at hand, by exactly what they were verified for.

A step may go live at once only when its candidate was verified for this region and these weights
(law 6). The shelf keeps such candidates after their plan is gone, so that undoing a delta finds
what ran before it.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

UNUSED_BYTES_MAX = (
    256 << 20
)  # weights of candidates kept beyond those in use: about the layers a few deltas touched

MANY = 1 << 30

Key = tuple[str, ...]  # region key, weight key, and what else tells candidates apart


@dataclass(frozen=True, slots=True)
class Candidate:
    """A verified function with its constants; `size_bytes` is what its weights take."""

    tier: str
    function: Any
    constants: tuple[Any, ...]
    size_bytes: int


class Shelf:
    """Candidates by key, the least recently used given up first."""

    def __init__(self, unused_bytes_max: int = UNUSED_BYTES_MAX) -> None:
        self._unused_bytes_max = unused_bytes_max
        self._candidates: OrderedDict[Key, Candidate] = OrderedDict()
        self._lock = threading.Lock()
        self._grown = False  # since the last trim

    def wants_trim(self) -> bool:
        """Whether `trim` could find anything: candidates came in and together they exceed the bound."""
        with self._lock:
            size = (
                sum(candidate.size_bytes for candidate in self._candidates.values())
                if self._grown
                else 0
            )
            return size > self._unused_bytes_max

    def find(self, key: Key) -> Candidate | None:
        """The candidate verified for exactly `key`."""
        with self._lock:
            found = self._candidates.get(key)
            if found is not None:
                self._candidates.move_to_end(key)
            return found

    def keys(self) -> set[Key]:
        """What is kept."""
        with self._lock:
            return set(self._candidates)

    def put(self, key: Key, candidate: Candidate) -> None:
        """Keeps a candidate that was verified."""
        with self._lock:
            self._candidates[key] = candidate
            self._grown = True

    def drop(self, key: Key) -> None:
        """Forgets a candidate, as after a rollback."""
        with self._lock:
            self._candidates.pop(key, None)

    def trim(self, is_used: Callable[[Key], bool], count_max: int = MANY) -> list[int]:
        """Gives up candidates no live plan uses, oldest first, down to the bound on those.

        At most `count_max` at a time; returns the sizes of those that went, bytes.
        """
        gone: list[Candidate] = []  # torn down after the lock is free
        with self._lock:
            self._grown = False
            unused = [key for key in self._candidates if not is_used(key)]
            excess = sum(self._candidates[key].size_bytes for key in unused)
            excess -= self._unused_bytes_max
            for key in unused:
                if excess <= 0 or len(gone) >= count_max:
                    break
                gone.append(self._candidates.pop(key))
                excess -= gone[-1].size_bytes
        return [candidate.size_bytes for candidate in gone]
