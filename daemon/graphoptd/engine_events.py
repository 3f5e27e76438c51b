"""The engine's events, said in the log's words.

The engine reports each event as a name and plain fields, from whatever thread it happens on. Here
they become lines of the closed list (`event_table`): units are converted, ids get the names the log
uses, and the proofs of single blocks, of which one change has dozens, are counted into one
`plan.verified` a revision.

What the engine does not know, who asked and by which way, comes from `origin`, which is asked on the
thread the event happens on.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

from graphopt.errors import StateFailedError
from graphoptd.better_events import BETTER, better_fields, cut, emit_better, number
from graphoptd.events import LOGGER, emit

Fields = Mapping[str, Any]
_NOBODY: Fields = MappingProxyType({})


@dataclass(slots=True)
class _Proofs:
    """Verified blocks of one revision that no line has told of yet."""

    revision: int
    blocks: int = 0
    error_max: float = 0.0
    tolerance: float = 0.0


class EngineEvents:
    """The event sink of the engine; safe from any thread, never raises.

    Args:
        origin: `source` and `peer_uid` of what the calling thread is doing, or nothing.
        failed: called, on the thread of the event, when the store takes no more writes.
    """

    def __init__(
        self,
        origin: Callable[[], Fields] = lambda: _NOBODY,
        failed: Callable[[], None] = lambda: None,
    ) -> None:
        self._origin = origin
        self._failed_store = failed
        self._lock = threading.Lock()
        self._proofs: dict[str, _Proofs] = {}
        self._lines: dict[str, Callable[[Fields], None]] = {
            "model.loaded": self._loaded,
            "model.recovered": self._recovered,
            "model.forked": self._forked,
            "model.unloaded": self._unloaded,
            "delta.applied": self._applied,
            "delta.rejected": self._rejected,
            "plan.verified": self._verified,
            "plan.refused": self._refused,
            "plan.published": self._published,
            "builder.failed": self._failed,
            **{name: partial(emit_better, name) for name in BETTER},
        }

    def __call__(self, name: str, fields: Fields) -> None:
        """Say it. A defect of this mapping is logged, never raised into the engine."""
        try:
            line = self._lines.get(name)
            if line is None:
                raise ValueError(f"the engine said {name!r}, which this version does not know")
            line(fields)
        except Exception:
            LOGGER.exception("event %s could not be logged", name)

    def _loaded(self, fields: Fields) -> None:
        emit("model.loaded", **_of(fields, "graph revision nodes"), **self._origin())

    def _recovered(self, fields: Fields) -> None:
        emit("model.loaded", **_of(fields, "graph revision nodes"), source="recovery")

    def _forked(self, fields: Fields) -> None:
        peer_uid = self._origin().get("peer_uid")
        emit(
            "model.forked",
            **_of(fields, "graph revision"),
            from_graph=fields["like"],
            peer_uid=peer_uid,
        )

    def _unloaded(self, fields: Fields) -> None:
        self._tell_proofs(fields["graph"])
        emit("model.unloaded", **_of(fields, "graph revision"), **self._origin())

    def _applied(self, fields: Fields) -> None:
        emit(
            "delta.applied",
            **_of(fields, "graph revision kind summary edits"),
            **_of(fields, "affected_nodes inferred_nodes blocks_replanned blocks_reused"),
            delta_id=fields.get("delta"),
            plan_id=fields.get("plan_id") or fields.get("plan"),
            from_revision=fields["revision"] - 1,
            live_ms=round(fields["live_s"] * 1e3, 3),
            **self._origin(),
        )

    def _rejected(self, fields: Fields) -> None:
        emit(
            "delta.rejected",
            **_of(fields, "graph revision code where remedy"),
            message=cut(fields["message"]),
            delta_id=fields.get("delta"),
            **self._origin(),
        )
        if fields["code"] == StateFailedError.code:
            self._failed_store()

    def _verified(self, fields: Fields) -> None:
        graph, revision = fields["graph"], fields["revision"]
        with self._lock:
            known = self._proofs.get(graph)
        if known is not None and known.revision != revision:
            self._tell_proofs(graph)
        with self._lock:
            proofs = self._proofs.setdefault(graph, _Proofs(revision))
            proofs.blocks += 1
            proofs.error_max = max(proofs.error_max, float(fields.get("max_error") or 0.0))
            proofs.tolerance = max(proofs.tolerance, float(fields.get("allowed") or 0.0))

    def _refused(self, fields: Fields) -> None:
        emit("plan.refused", **better_fields(fields))

    def _published(self, fields: Fields) -> None:
        self._tell_proofs(fields["graph"])
        emit("plan.published", **better_fields(fields))

    def _failed(self, fields: Fields) -> None:
        emit("builder.failed", job=fields["job"], message=cut(fields["message"]))

    def _tell_proofs(self, graph: str) -> None:
        with self._lock:
            proofs = self._proofs.pop(graph, None)
        if proofs is not None:
            emit(
                "plan.verified",
                graph=graph,
                revision=proofs.revision,
                blocks=proofs.blocks,
                error_max=number(proofs.error_max),
                tolerance=number(proofs.tolerance),
            )


def _of(fields: Fields, names: str) -> dict[str, Any]:
    return {name: fields[name] for name in names.split() if fields.get(name) is not None}
