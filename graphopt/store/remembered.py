"""Delta ids remembered for idempotent retry: the newest `limits.DELTA_IDS_KEPT_MAX` of each model.

The index lives in memory and is rebuilt from journal rows, so that an append writes one row and no
index. When compaction drops delta rows, their ids are appended to the chain as one row of kind
`IDS`; the chain then covers them like everything else. A model's ids end with it: after `unload`,
the same id is a new delta to a new graph.
"""

import json
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from graphopt import limits
from graphopt.store.chain import ANCHOR, FORK, IDS, LOAD, UNLOAD, Entry, Record

_IDS_ROWS_MAX = 8  # rows of kind `IDS` a model may have before they are merged into one


@dataclass(frozen=True, slots=True)
class Remembered:
    """An acknowledged delta: where it went, what it was (`content_sha`) and what was answered."""

    delta_id: str
    seq: int
    revision: int
    content_sha: str
    answer: str
    wall_ns: int


@dataclass(slots=True)
class _Model:
    by_id: dict[str, Remembered]
    order: deque[Remembered]  # oldest first
    ids_rows: dict[int, int]  # seq of an `IDS` row -> seq of the youngest delta in it


class DeltaIds:
    """The remembered ids of all models. `add` rows in order of `seq`; reading needs no lock."""

    def __init__(self) -> None:
        self._models: dict[str, _Model] = {}

    def find(self, model: str, delta_id: str) -> Remembered | None:
        """The delta of that id, or None when it was never seen or is beyond the bound."""
        known = self._models.get(model)
        return known.by_id.get(delta_id) if known else None

    def add(self, row: Record) -> None:
        """Take note of one row of the journal."""
        if row.kind in (LOAD, FORK, UNLOAD):
            self._models.pop(row.model, None)
        if row.kind in (UNLOAD, ANCHOR):
            return
        known = self._models.setdefault(row.model, _Model({}, deque(), {}))
        if row.kind == IDS:
            self._restore(known, row)
        elif row.delta_id is not None:
            self._remember(known, _of(row, row.delta_id))

    def compacted(self, dropped: set[int]) -> tuple[list[Entry], list[int]]:
        """What a compaction that drops `dropped` must do so that no remembered id is lost.

        Returns: `IDS` entries to append, and the sequence numbers of `IDS` rows that are not needed
            any more.
        """
        entries: list[Entry] = []
        useless: list[int] = []
        for model, known in self._models.items():
            oldest_seq = known.order[0].seq if known.order else 0
            merge = len(known.ids_rows) >= _IDS_ROWS_MAX
            useless += [
                s for s, youngest in known.ids_rows.items() if merge or youngest < oldest_seq
            ]
            moved = [d for d in known.order if d.seq in dropped]
            if merge:
                restored_to = max(known.ids_rows.values())
                moved = [d for d in known.order if d.seq <= restored_to or d.seq in dropped]
            if moved:
                entries.append(_ids_entry(model, moved))
        return entries, useless

    def needs(self, model: str, seq: int) -> bool:
        """Whether the `IDS` row `seq` belongs to a loaded model."""
        known = self._models.get(model)
        return known is not None and seq in known.ids_rows

    def replaced(self, appended: Iterable[Record], useless: Iterable[int]) -> None:
        """Take note that the compaction proposed by `compacted` is durable."""
        gone = set(useless)
        for known in self._models.values():
            known.ids_rows = {s: y for s, y in known.ids_rows.items() if s not in gone}
        for row in appended:
            self._models[row.model].ids_rows[row.seq] = _entries_of(row)[-1].seq

    def _restore(self, known: _Model, row: Record) -> None:
        entries = _entries_of(row)
        known.ids_rows[row.seq] = entries[-1].seq
        merged = {d.seq: d for d in (*known.order, *entries)}
        known.by_id.clear()
        known.order.clear()
        for seq in sorted(merged):
            self._remember(known, merged[seq])

    def _remember(self, known: _Model, delta: Remembered) -> None:
        known.by_id[delta.delta_id] = delta
        known.order.append(delta)
        if len(known.order) > limits.DELTA_IDS_KEPT_MAX:
            oldest = known.order.popleft()
            if known.by_id[oldest.delta_id] is oldest:  # a forgotten id may have been used anew
                del known.by_id[oldest.delta_id]


def _of(row: Record, delta_id: str) -> Remembered:
    return Remembered(delta_id, row.seq, row.revision, row.content_sha, row.answer, row.wall_ns)


def _ids_entry(model: str, deltas: list[Remembered]) -> Entry:
    rows = [[d.delta_id, d.seq, d.revision, d.content_sha, d.answer, d.wall_ns] for d in deltas]
    return Entry(IDS, model, deltas[-1].revision, json.dumps(rows, separators=(",", ":")))


def _entries_of(row: Record) -> list[Remembered]:
    return [Remembered(*fields) for fields in json.loads(row.body)]
