"""A small engine over the store: the same operations, whoever runs them, and what must be true afterwards.

A model is the tuple of tags its deltas added. A base row names one blob with the tags so far; a delta
with a `heavy` tag names a blob of its own. `states_of` gives the state after each operation.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from graphopt.store import DELTA, FORK, LOAD, SNAPSHOT, UNLOAD, Entry, StateFolder

Models = dict[str, tuple[int, tuple[str, ...]]]  # name -> revision, tags


class Op(NamedTuple):
    kind: str  # a row kind, or checkpoint, compact
    model: str = ""
    tag: str = ""
    lag: int = 0  # of a snapshot: revisions it is behind; of a fork: unused


@dataclass
class Engine:
    """Turns operations into puts and appends, and knows the state they lead to."""

    folder: StateFolder | None = None
    models: Models = field(default_factory=dict)
    history: dict[str, dict[int, tuple[str, ...]]] = field(default_factory=dict)

    def apply(self, op: Op) -> None:
        if op.kind == "checkpoint":
            if self.folder:
                self.folder.journal.checkpoint()
        elif op.kind == "compact":
            if self.folder:
                self.folder.compact()
        elif op.kind in (LOAD, FORK):
            tags = self.models[op.tag][1] if op.kind == FORK else (op.tag,)
            self._append(op, 0, tags)
            self.models[op.model] = (0, tags)
            self.history[op.model] = {0: tags}
        elif op.kind == DELTA:
            revision, tags = self.models[op.model]
            self._append(op, revision + 1, (op.tag,) if "heavy" in op.tag else None)
            self.models[op.model] = (revision + 1, (*tags, op.tag))
            self.history[op.model][revision + 1] = (*tags, op.tag)
        elif op.kind == SNAPSHOT:
            revision = max(0, self.models[op.model][0] - op.lag)
            self._append(op, revision, self.history[op.model][revision])
        elif op.kind == UNLOAD:
            self._append(op, self.models[op.model][0], None)
            del self.models[op.model]

    def _append(self, op: Op, revision: int, blob: tuple[str, ...] | None) -> None:
        if self.folder is None:
            return
        digests = () if blob is None else (self.folder.blobs.put(json.dumps(blob).encode()),)
        delta_id = f"id-{op.tag}" if op.kind == DELTA else None
        body = json.dumps({"tag": op.tag, "model": op.model})
        entry = Entry(op.kind, op.model, revision, body, digests, delta_id, answer=f"to {revision}")
        self.folder.journal.append([entry])


def states_of(ops: list[Op]) -> Iterator[Models]:
    """The state before the first operation, after the first one, ..."""
    engine = Engine()
    yield dict(engine.models)
    for op in ops:
        engine.apply(op)
        yield dict(engine.models)


def recovered(folder: StateFolder) -> Models:
    """The state that the rows and blobs of `folder` lead to; every blob that is named must be whole."""
    models: Models = {}
    for model, lineage in folder.journal.lineages().items():
        tags = tuple(json.loads(folder.blobs.read(lineage.base.blobs[0])))
        revision = lineage.base.revision
        for row in lineage.increments:
            for digest in row.blobs:
                folder.blobs.verify(digest)
            assert row.revision == revision + 1
            revision, tags = row.revision, (*tags, json.loads(row.body)["tag"])
        models[model] = (revision, tags)
    return models


def script(deltas: int) -> list[Op]:
    """A fixed sequence that meets every kind of row, with snapshots, compactions and checkpoints between."""
    ops = [Op(LOAD, "a", "base-a"), Op(LOAD, "b", "base-b")]
    for i in range(deltas):
        ops.append(Op(DELTA, "ab"[i % 2], f"{'heavy' if i % 3 == 0 else 'light'}-{i}"))
        if i % 5 == 3:
            ops += [Op(SNAPSHOT, "ab"[i % 2], lag=1), Op("compact")]
        if i % 7 == 4:
            ops += [
                Op("checkpoint"),
                Op(FORK, f"fork{i}", "a"),
                Op(DELTA, f"fork{i}", f"forked-{i}"),
            ]
    ops += [Op(UNLOAD, "b"), Op(SNAPSHOT, "a"), Op("compact"), Op(DELTA, "a", "last")]
    return ops
