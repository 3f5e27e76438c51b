"""Which models of the configuration are to be loaded, and loading them.

The journal is the truth for what is loaded: a name in `models:` counts only while the state folder
has never seen it. A model that was unloaded leaves the journal in time, so the names ever seen are
kept in a small file beside it. Losing the file loads an unloaded model once more, and no more.
"""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from graphopt.bundle import load_bundle
from graphopt.engine import Host
from graphopt.graph import Graph
from graphoptd.settings import Settings

FILE = "models-seen.json"


class ConfiguredModels:
    """The names in `models:`, against a host and its state folder."""

    def __init__(self, host: Host, state: Path) -> None:
        self._host = host
        self._path = state / FILE
        self._seen = _read(self._path)

    def wanted(self, settings: Settings) -> list[str]:
        """Names to load: configured, not live and never seen."""
        known = self._seen | self._host.models().keys()
        return [name for name in settings.models if name not in known]

    def read(self, settings: Settings, name: str) -> Graph:
        """The graph of a configured model. Raises BundleError and LimitError."""
        return load_bundle(settings.models[name].bundle)

    def load(self, name: str, graph: Graph) -> None:
        """Make it live. Raises GraphoptError."""
        self._host.load(graph, name)
        self.note()

    def note(self) -> None:
        """Remember every live name; cheap when there is nothing new."""
        live = self._host.models().keys()
        if live <= self._seen:
            return
        self._seen |= live
        _write(self._path, sorted(self._seen))


def _read(path: Path) -> set[str]:
    try:
        names = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return set()
    return {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()


def _write(path: Path, names: Iterable[str]) -> None:
    draft = path.with_name(f".{path.name}")
    with suppress(OSError):  # a full disk: the journal still says what is loaded
        draft.write_text(json.dumps(list(names)))
        os.replace(draft, path)
