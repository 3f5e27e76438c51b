"""Durable state: what was acknowledged is there after any crash, whole, or is refused by name.

A `StateFolder` holds a `Journal` of hash-chained rows and the `Blobs` they name. Use in this order,
which is law 7:

    digest = folder.blobs.put(chunks)                  # durable folder.journal.append([Entry(DELTA,
    "minilm", 13, body, (digest,), delta_id="8f0c")])   # durable ...publish, answer...

and after a restart `folder.journal.lineages()` names per model the base and the increments to apply
to it. Off the
live path: `journal.checkpoint()` when idle, a `SNAPSHOT` row every `SNAPSHOT_DUE_ROWS`, then
`folder.compact()`. The order of steps inside each of these, and why a crash between them is
harmless, stands in `journal` and `blobs`.

Absent on purpose: what bodies mean (the engine's), artifacts (the builder's, deletable),
    replication.
"""

from graphopt.store.blobs import Blobs, References
from graphopt.store.bounds import CHECKPOINT_DUE_BYTES, SNAPSHOT_DUE_ROWS
from graphopt.store.chain import DELTA, FORK, LOAD, SNAPSHOT, UNLOAD, Entry, Record, content_sha
from graphopt.store.compaction import Lineage
from graphopt.store.folder import StateFolder
from graphopt.store.journal import Journal, JournalStatus
from graphopt.store.remembered import Remembered
from graphopt.store.witness import Head

__all__ = [
    "CHECKPOINT_DUE_BYTES",
    "DELTA",
    "FORK",
    "LOAD",
    "SNAPSHOT",
    "SNAPSHOT_DUE_ROWS",
    "UNLOAD",
    "Blobs",
    "Entry",
    "Head",
    "Journal",
    "JournalStatus",
    "Lineage",
    "Record",
    "References",
    "Remembered",
    "StateFolder",
    "content_sha",
]
