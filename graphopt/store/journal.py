"""The journal: one SQLite table of hash-chained rows, in WAL mode with `synchronous=FULL`.

A commit is durable when `append` returns. Exactly one connection exists, in exclusive locking mode
(SQLite up to 3.51.2 can corrupt a WAL that two connections reset; exclusive mode also keeps the WAL
index in memory, so no file is mapped), and a lock lets one thread use it at a time. Checkpoints are
made by the caller when it is idle.

Order of the steps that must survive a crash at any point:

* Opening. Rows, chain and witness are verified before anything is written. Then a checkpoint: the
  tail that was recovered may lie in the page cache only (the process was killed between write and
  sync), and a client that sends its delta again is answered from it.
* Appending. Blobs are durable before (`append` refuses a row whose blob is not there); INSERT,
  COMMIT (syncs the WAL); then the witness, then the caller acknowledges.
* Compaction. One transaction inserts the remembered ids, deletes rows and inserts their anchors;
  only when it is durable are references returned, and only with them are blobs deleted. A crash
  before the commit leaves the old journal and all its blobs; one after it leaves blobs that the
  next collection finds.
* After a failed sync or commit nothing more is written, and the connection is never closed: closing
  would checkpoint from pages that the kernel holds for clean. It ends with the process.

Absent on purpose: reading by a second process (look at a copy), shrinking of the file (free pages
are used again).
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from graphopt.errors import (
    DuplicateDeltaError,
    ModelExistsError,
    ModelNotFoundError,
    StateCorruptError,
    StateError,
)
from graphopt.store import compaction
from graphopt.store.blobs import Blobs, References
from graphopt.store.bounds import READ_ROWS, WAL_BYTES_MAX, check_bounds
from graphopt.store.chain import (
    BASES,
    FORK,
    GENESIS,
    IDS,
    INTERNAL,
    LOAD,
    UNLOAD,
    Entry,
    Record,
    Row,
    corrupt,
    first_seq,
    record_of,
    sealed,
    verified,
)
from graphopt.store.database import Database
from graphopt.store.disk import Health
from graphopt.store.remembered import DeltaIds, Remembered
from graphopt.store.witness import Head, Witness

_PAGE_BYTES = 4_096


@dataclass(frozen=True, slots=True)
class JournalStatus:
    """Where the journal stands.

    Attributes:
        head: The youngest row.
        rows_since_base: Loaded model to the rows since its last base; snapshot at
            `SNAPSHOT_DUE_ROWS`.
        wal_bytes: Bytes written since the last checkpoint, estimated; checkpoint at
            `CHECKPOINT_DUE_BYTES`.
    """

    head: Head
    rows_since_base: Mapping[str, int]
    wal_bytes: int


class Journal:
    """The journal of one state folder. Any thread may call any method; they wait for each other."""

    def __init__(
        self, path: Path, witness: Path, blobs: Blobs, health: Health, wall_ns: Callable[[], int]
    ) -> None:
        """Open, verify, and make durable what is there.

        Raises:
            StateCorruptError: The journal is not what was written; nothing was changed.
            StateNewerError: A newer program wrote it.
        """
        self._path = path
        self._blobs = blobs
        self._health = health
        self._wall_ns = wall_ns
        self._lock = threading.Lock()
        self._compactions = 0
        self._wal_bytes = 0
        self._head = Head(0, GENESIS)
        self._ids = DeltaIds()
        self._rows_since_base: dict[str, int] = {}
        self._witness = Witness(witness)
        self._database = Database(path, health)
        try:
            seen = self._witness.read() or self._head
            self._database.open(fresh=seen.seq == 0)
            self._recover(seen)
            self._checkpoint()
        except BaseException as error:
            if isinstance(error, StateCorruptError):
                self._database.keep_wal()
            self.close()
            raise
        self._witness.write(self._head)

    def append(
        self, entries: Sequence[Entry], between: Callable[[], None] = lambda: None
    ) -> list[int]:
        """Commit `entries` in one transaction and return their sequence numbers; durable on return.

        `between` is called between two pieces of work, before anything is written: it may raise.

        Raises:
            DuplicateDeltaError: A delta id is remembered already (ask `find_delta` first).
            ModelNotFoundError, ModelExistsError: A row for a model that is not loaded; a load of
                one that is.
            LimitError: A bound of this module.
            StateCorruptError: A row names a blob that was not put.
            StateFullError: No space; nothing was kept, the store goes on.
            StateFailedError: The commit failed, now or before. Whether these entries are there, the
                next start tells.
            ValueError: A kind that is none, or text that UTF-8 cannot hold.
        """
        check_bounds(entries)
        digests = tuple(d for entry in entries for d in dict.fromkeys(entry.blobs))
        with self._lock:
            self._health.check()
            self._check_models(entries)
            if self._wal_bytes > WAL_BYTES_MAX:
                self._checkpoint()
            with self._blobs.pinned(set(digests)):
                between()
                rows = self._sealed(entries)
                between()
                if rows:
                    with self._database.transaction():
                        self._database.insert(rows)
                    self._advance(rows)
                    self._blobs.settle(digests, self._head.seq)
        return [row[0] for row in rows]

    def records(self, after_seq: int = 0) -> Iterator[Record]:
        """The rows after `after_seq`, in order, each verified before it is yielded.

        Rows that compaction dropped are not there; sequence numbers then have holes.

        Raises:
            StateCorruptError: Naming the first bad row, after all good ones before it were yielded.
            StateError: The journal was compacted meanwhile; start again.
        """
        for record in self._all(after_seq):
            if record.kind not in INTERNAL and record.seq > after_seq:
                yield record

    def lineages(self) -> dict[str, compaction.Lineage]:
        """Per loaded model its base and the increments to apply to it; verified as by `records`."""
        return compaction.lineages(self.records())

    def find_delta(self, model: str, delta_id: str) -> Remembered | None:
        """The acknowledged delta of that id, or None: never seen, or beyond `DELTA_IDS_KEPT_MAX`.

        The caller compares `content_sha`: equal means the same delta sent again, to be answered
        with `answer`.
        """
        return self._ids.find(model, delta_id)

    def status(self) -> JournalStatus:
        """Head, rows since each model's base, and WAL length."""
        with self._lock:
            return JournalStatus(self._head, dict(self._rows_since_base), self._wal_bytes)

    def checkpoint(self) -> None:
        """Move the WAL into the database file, so that it is used again from its start. Call when idle.

        Raises:
            StateFullError: No space; the WAL stays as it is, to be tried again.
            StateFailedError: A sync failed, now or before.
        """
        with self._lock:
            self._health.check()
            self._checkpoint()

    def compact(self, reach: Mapping[str, int] | None = None) -> References:
        """Drop rows that snapshots and unloads supersede; returns what the others name.

        Args:
            reach: Model name to the oldest revision that must stay reachable by replay; default:
                none but the current.

        Raises:
            StateError: As `append`; nothing was dropped.
        """
        compactions = self._compactions
        outlines = [compaction.outline(row) for row in self._all(0)]  # appends go on meanwhile
        with self._lock:
            self._health.check()
            if compactions != self._compactions:
                raise _compacted_meanwhile()
            read = Head(outlines[-1].seq, outlines[-1].sha) if outlines else Head(0, GENESIS)
            rest = verified(self._rows_after(read.seq), read.sha, read.seq + 1)
            outlines += [compaction.outline(row) for row in rest]
            kept = compaction.needed(outlines, reach or {})
            dropped = {o.seq for o in outlines} - kept
            ids, useless = self._ids.compacted(dropped)
            kept |= {o.seq for o in outlines if o.kind == IDS and self._ids.needs(o.model, o.seq)}
            kept -= set(useless)
            anchors = list(compaction.anchors(outlines, kept))
            if anchors:
                self._replace(anchors, ids, useless)
            named = (d for o in outlines if o.seq in kept for d in o.blobs)
            return References(self._head.seq, frozenset(named))

    def close(self) -> None:
        """Checkpoint and close. After a failure the connection stays open until the process ends."""
        with self._lock:
            self._database.close()
            self._witness.close()

    def _recover(self, seen: Head) -> None:
        """Verify every row against the chain and the witness, and rebuild what is kept in memory."""
        for record in verified(self._rows_after(0), GENESIS, 1):
            if record.seq == seen.seq and record.sha != seen.sha:
                raise corrupt(record.seq, f"{self._path} is not the journal that was acknowledged")
            self._head = Head(record.seq, record.sha)
            self._note(record)
        if seen.seq > self._head.seq:
            raise corrupt(
                self._head.seq + 1,
                f"{self._path} ends before row {seen.seq}, which was acknowledged",
            )

    def _rows_after(self, after_seq: int) -> Iterator[Row]:
        while page := self._database.rows(after_seq, READ_ROWS):
            yield from page
            after_seq = page[-1][0]

    def _note(self, record: Record) -> None:
        """Keep the in-memory account of a row that is durable."""
        self._ids.add(record)
        if record.kind == UNLOAD:
            self._rows_since_base.pop(record.model, None)
        elif record.kind in BASES:
            self._rows_since_base[record.model] = 0
        elif record.kind not in INTERNAL:
            self._rows_since_base[record.model] = self._rows_since_base.get(record.model, 0) + 1

    def _all(self, after_seq: int) -> Iterator[Record]:
        """Anchors and id rows too. The last row must be the head, so a lost end is found as well."""
        compactions = self._compactions
        parent_sha = GENESIS if after_seq == 0 else None
        next_seq = max(1, after_seq)
        while True:
            with self._lock:
                if compactions != self._compactions:
                    raise _compacted_meanwhile()
                head = self._head
                page = self._database.rows(next_seq - 1, READ_ROWS)
            for record in verified(page, parent_sha, next_seq):
                yield record
                parent_sha, next_seq = record.sha, record.seq + 1
            if len(page) < READ_ROWS:
                break
        if next_seq <= head.seq or (parent_sha is not None and parent_sha != head.sha):
            raise corrupt(next_seq, "the journal ends before its head")

    def _check_models(self, entries: Sequence[Entry]) -> None:
        """Only what recovery can use is let in: increments of loaded models, each delta id once."""
        loaded = set(self._rows_since_base)
        used: set[tuple[str, str]] = set()
        for entry in entries:
            if entry.kind in (LOAD, FORK):
                if entry.model in loaded:
                    raise ModelExistsError("the model is loaded already", where=entry.model)
                loaded.add(entry.model)
            elif entry.model not in loaded:
                raise ModelNotFoundError("the model is not loaded", where=entry.model)
            if entry.kind == UNLOAD:
                loaded.discard(entry.model)
            if entry.delta_id is None:
                continue
            if (entry.model, entry.delta_id) in used or self._ids.find(entry.model, entry.delta_id):
                raise DuplicateDeltaError("the delta id was used before", where=entry.delta_id)
            used.add((entry.model, entry.delta_id))

    def _sealed(self, entries: Iterable[Entry]) -> list[Row]:
        rows: list[Row] = []
        parent_sha, wall_ns = self._head.sha, self._wall_ns()
        for seq, entry in enumerate(entries, self._head.seq + 1):
            rows.append(sealed(entry, seq, parent_sha, wall_ns))
            parent_sha = rows[-1][2]
        return rows

    def _advance(self, rows: Sequence[Row]) -> list[Record]:
        """Rows are durable: make them the head, tell the witness, and account for them."""
        records = [record_of(row) for row in rows]
        self._head = Head(records[-1].seq, records[-1].sha)
        self._witness.write(self._head)
        self._wal_bytes += sum(2 * _PAGE_BYTES + len(r.body) for r in records)
        for record in records:
            if record.kind != IDS:
                self._note(record)
        return records

    def _replace(
        self, anchors: Sequence[Row], ids: Sequence[Entry], useless: Sequence[int]
    ) -> None:
        """The one transaction of a compaction."""
        rows = self._sealed(ids)
        with self._database.transaction():
            self._database.insert(rows)
            for row in anchors:
                self._database.delete(first_seq(record_of(row)), row[0])
            self._database.insert(anchors)
        self._compactions += 1
        self._ids.replaced(self._advance(rows) if rows else (), useless)

    def _checkpoint(self) -> None:
        self._database.checkpoint()
        self._wal_bytes = 0


def _compacted_meanwhile() -> StateError:
    return StateError("the journal was compacted while it was read", remedy="read again")
