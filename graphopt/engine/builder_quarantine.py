"""Candidates that brought a builder down, with their evidence, in one small JSON file.

They are not tried again, by this engine or the next one in the same folder; deleting the file lifts
the ban. A file that cannot be read counts as empty: a ban is a saving, not a safety.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from graphopt.builder.records import FUSED, quarantine_key
from graphopt.engine.builder_jobs import Pending
from graphopt.executor.backend import Options

ENTRIES_MAX = 256  # oldest forgotten first; each is tried once more then
_FILE = "quarantine.json"
_WORDS_CHARS_MAX = 2_000


@dataclass(frozen=True, slots=True)
class Quarantined:
    """One candidate and what it did: `signal` that ended the builder (0: none), its last words.

    `region` is the key of the region it builds, or the subject of a trial
    (`graphopt.executor.backends.trials`), whose options are the plain ones and whose weights are none.
    """

    region: str
    weights: str
    backend: str
    version: str
    options: Mapping[str, Any]
    reason: str
    signal: int
    last_words: str

    @property
    def key(self) -> str:
        """What is banned: see `graphopt.builder.records.quarantine_key`."""
        return quarantine_key(self.region, self.backend, self.version, self.options)


class Quarantine:
    """The file and its entries by key. One thread."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / _FILE
        self._entries: dict[str, Quarantined] = {}
        with suppress(OSError, ValueError, TypeError):
            found = [Quarantined(**entry) for entry in json.loads(self._path.read_text())]
            self._entries = {entry.key: entry for entry in found}

    def reasons(self) -> dict[str, str]:
        """Why each key is banned."""
        return {key: entry.reason for key, entry in self._entries.items()}

    def entries(self) -> tuple[Quarantined, ...]:
        """All of them, oldest first."""
        return tuple(self._entries.values())

    def add(self, entry: Quarantined) -> None:
        """Bans a candidate and remembers it on disk, where the disk lets it."""
        self._entries[entry.key] = entry
        while len(self._entries) > ENTRIES_MAX:
            del self._entries[next(iter(self._entries))]
        temporary = self._path.with_suffix(".tmp")
        with suppress(OSError):
            temporary.write_text(json.dumps([asdict(each) for each in self._entries.values()]))
            os.replace(temporary, self._path)


def candidate_of(job: Pending, reason: str, signal: int, words: str) -> Quarantined | None:
    """What a job was at when it brought its builder down: a backend's trial, or what it builds; None
    for a plan, which is no candidate.
    """
    plain = Options().document()
    if job.trial is not None:
        subject, backend, version = (job.trial[name] for name in ("subject", "backend", "version"))
        return Quarantined(subject, "", backend, version, plain, reason, signal, words)
    keys, message = job.started, job.message
    if message["op"] == "propose":
        return None
    return Quarantined(
        keys["region"], keys["weights"], message.get("backend", FUSED), keys["version"],
        message.get("options", plain), reason, signal, words,
    )  # fmt: skip


def last_words(text: str) -> str:
    """The end of what a builder printed, short enough to keep: without faulthandler's list of modules."""
    lines = [line for line in text.splitlines() if not line.startswith("Extension modules:")]
    return "\n".join(lines)[-_WORDS_CHARS_MAX:].strip()
