"""The hash chain: what a journal row is, what its sha covers, and how a sequence of rows is verified.

Each row's sha covers its sequence number, the sha of the row before it and every other field, so
one sha, the head, stands for the whole history. A row that compaction drops takes part in the chain
no longer; an *anchor* stands for each run of dropped rows and bears the first sequence number of
the run, the sha before it and the sha of its last row. Rows and anchors together always count 1, 2,
3 ... without a hole.

The chain guards against bit rot, lost and reordered rows. It is not a signature: who can write the
file can write a new chain.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from graphopt.errors import StateCorruptError

GENESIS = "0" * 64  # parent of the first row

LOAD = "load"  # a model begins; its blobs hold the whole graph
FORK = "fork"  # as `load`, copied from another model: self-contained, so that models recover apart
SNAPSHOT = "snapshot"  # the whole graph of a model at `revision`; supersedes its rows up to there
UNLOAD = "unload"  # a model ends
DELTA = "delta"  # the usual increment; any other kind that is not listed here is one too
BASES = frozenset({LOAD, FORK, SNAPSHOT})

ANCHOR = "~anchor"  # stands for a run of dropped rows
IDS = "~ids"  # delta ids remembered of dropped rows; see `remembered`
INTERNAL = frozenset({ANCHOR, IDS})


@dataclass(frozen=True, slots=True)
class Entry:
    """What a caller appends.

    Attributes:
        kind: `LOAD`, `FORK`, `SNAPSHOT`, `UNLOAD`, or an increment such as `DELTA` (`[a-z_]+`).
        model: The model's name.
        revision: The revision after this row; of a snapshot, the revision it holds.
        body: Canonical JSON text, opaque to the store.
        blobs: Digests of the blobs the row needs; each must have been put.
        delta_id: The client's id for idempotent retry, or None.
        content_sha: What the client sent, as a sha256 in hex; the same id with another one is
            another delta. Empty: the store takes the sha256 of body and blobs.
        answer: Short text to answer a retry with, also after compaction dropped the row.
    """

    kind: str
    model: str
    revision: int
    body: str
    blobs: tuple[str, ...] = ()
    delta_id: str | None = None
    content_sha: str = ""
    answer: str = ""


@dataclass(frozen=True, slots=True)
class Record:
    """One verified row: an `Entry` with its place in the chain and its wall time in nanoseconds."""

    seq: int
    parent_sha: str
    sha: str
    kind: str
    model: str
    revision: int
    delta_id: str | None
    content_sha: str
    answer: str
    wall_ns: int
    blobs: tuple[str, ...]
    body: str


Row = tuple[
    int, str, str, str, str, int, str | None, str, str, int, str, str
]  # as SQLite holds a record


def content_sha(body: str, blobs: Iterable[str]) -> str:
    """The identity of a row's content: sha256 in hex over its body and the blobs it names."""
    return hashlib.sha256(_encoded((body, *blobs))).hexdigest()


def sealed(entry: Entry, seq: int, parent_sha: str, wall_ns: int) -> Row:
    """The row of `entry` at `seq`, its sha computed."""
    identity = entry.content_sha or content_sha(entry.body, entry.blobs)
    blobs = json.dumps(entry.blobs, separators=(",", ":"))
    fields = (entry.kind, entry.model, entry.revision, entry.delta_id, identity, entry.answer)
    sha = _sha(seq, parent_sha, (*fields, wall_ns, blobs, entry.body))
    return (seq, parent_sha, sha, *fields, wall_ns, blobs, entry.body)


def anchor(first_seq: int, last_seq: int, parent_sha: str, last_sha: str) -> Row:
    """The row that stands for the dropped rows `first_seq` to `last_seq`."""
    seal = _anchor_seal(first_seq, last_seq, parent_sha, last_sha)
    body = json.dumps({"first": first_seq}, separators=(",", ":"))
    return (last_seq, parent_sha, last_sha, ANCHOR, "", 0, None, seal, "", 0, "[]", body)


def first_seq(row: Record) -> int:
    """The first sequence number that `row` stands for: its own, unless it is an anchor."""
    return int(json.loads(row.body)["first"]) if row.kind == ANCHOR else row.seq


def verified(rows: Iterable[Row], parent_sha: str | None, seq: int) -> Iterator[Record]:
    """Check each row before it is handed on.

    Args:
        rows: Rows in order of `seq`, as read from SQLite; nothing about them is trusted.
        parent_sha: The sha before the first row, or None to begin in the middle of a chain.
        seq: The sequence number the first row must have (an anchor: must begin with, or before when
            `parent_sha` is None).

    Raises:
        StateCorruptError: Naming the first row that is not what was written. Rows before it were
            handed on and are good.
    """
    for row in rows:
        record = _checked(row, seq)
        begins = first_seq(record)
        linked = parent_sha is None or (record.parent_sha == parent_sha and begins == seq)
        if not linked or not begins <= seq <= record.seq:
            raise corrupt(
                seq, "the chain is broken: a row is missing or is not the one that was written"
            )
        yield record
        parent_sha, seq = record.sha, record.seq + 1


def corrupt(seq: int, reason: str) -> StateCorruptError:
    """The error that refuses the journal from row `seq` on."""
    return StateCorruptError(
        reason,
        where=f"journal row {seq}",
        remedy="restore the state folder from a backup; rows before this one are good",
    )


def record_of(row: Row) -> Record:
    """`row` with its list of blobs decoded; not verified."""
    *fields, blobs, body = row
    return Record(*fields, tuple(json.loads(blobs)), body)  # type: ignore[arg-type, call-arg]


def _checked(row: Row, expected_seq: int) -> Record:
    """`row` as a record when its sha is right; a flipped column type changes the sha too."""
    try:
        seq, parent_sha, sha = row[:3]
        record = record_of(row)
        if record.kind == ANCHOR:
            right = row == anchor(first_seq(record), seq, parent_sha, sha)
        else:
            right = sha == _sha(seq, parent_sha, row[3:])
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise corrupt(expected_seq, f"the row cannot be read: {error}") from error
    if not right:
        raise corrupt(expected_seq, "the row's content does not match its sha")
    return record


def _sha(seq: int, parent_sha: str, fields: tuple[str | int | None, ...]) -> str:
    return hashlib.sha256(_encoded((seq, parent_sha, *fields))).hexdigest()


def _anchor_seal(first_seq: int, last_seq: int, parent_sha: str, last_sha: str) -> str:
    return _sha(last_seq, parent_sha, (ANCHOR, first_seq, last_sha))


def _encoded(fields: Iterable[str | int | None]) -> bytes:
    """Type and length before each field, so that no two lists of fields encode alike."""
    parts: list[bytes] = []
    for field in fields:
        raw = b"" if field is None else str(field).encode()
        mark = b"n" if field is None else b"s" if isinstance(field, str) else b"i"
        parts += [b"%s%d:" % (mark, len(raw)), raw]
    return b"".join(parts)
