"""Every bound of the store (law 9), with its reason, and the check of what is appended."""

import re
from collections.abc import Sequence

from graphopt import limits
from graphopt.errors import LimitError
from graphopt.store.chain import Entry

# An `Applied` as JSON takes about 200; times the ids kept, this stays at 10 MB a model.
ANSWER_CHARS_MAX = 1_024
# Rows of one transaction; 32 bring the cost of a row down to 30 to 45 us already.
APPEND_RECORDS_MAX = 1_024
# As many constants as a 50,000-node graph may have.
BLOBS_PER_ROW_MAX = 65_536
# A 16 MiB delta document with its expansion; SQLite itself stops at 1 GB.
BODY_CHARS_MAX = 64 << 20
# A WAL this long is replayed in about 10 ms when the process was killed.
CHECKPOINT_DUE_BYTES = 1 << 20
# Rows in memory at a time while the journal is read: 256 MB at worst, with expanded 16 MiB documents.
READ_ROWS = 16
# Increments on a model's base; keeps recovery below 2 s when one takes 2 ms to apply.
SNAPSHOT_DUE_ROWS = 1_000
# Appends checkpoint by themselves when the caller was not idle for this long.
WAL_BYTES_MAX = 64 << 20

_KIND = re.compile(r"[a-z][a-z_]{0,31}")


def check_bounds(entries: Sequence[Entry]) -> None:
    """Raise `LimitError`, or `ValueError` for a kind that is none."""
    if len(entries) > APPEND_RECORDS_MAX:
        raise LimitError(f"{len(entries)} rows in one append; at most {APPEND_RECORDS_MAX}")
    for entry in entries:
        if not _KIND.fullmatch(entry.kind):
            raise ValueError(f"not a kind of row: {entry.kind!r}")
        lengths = (
            ("model name", len(entry.model), limits.NAME_CHARS_MAX),
            ("delta id", len(entry.delta_id or ""), limits.NAME_CHARS_MAX),
            ("content sha", len(entry.content_sha), 64),
            ("answer", len(entry.answer), ANSWER_CHARS_MAX),
            ("body", len(entry.body), BODY_CHARS_MAX),
            ("list of blobs", len(entry.blobs), BLOBS_PER_ROW_MAX),
        )
        for what, length, length_max in lengths:
            if length > length_max:
                raise LimitError(
                    f"the {what} has length {length}; at most {length_max}", where=entry.model
                )
