"""How deltas become durable: the engine's side of the journal.

A body is a canonical JSON document; tensors lie beside it in safetensors blobs keyed by content
hash. A base (`load`, `fork`, `snapshot`) is the graph's text in one blob and the tensor blobs its
constants lie in, so that a snapshot of an unchanged gigabyte costs one text. Without a state folder
the ledger remembers delta ids and nothing else.
"""

import json
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from graphopt.constants import constant_of, tensor_digest
from graphopt.delta import Applied, PutConstant, apply
from graphopt.delta_document import decode_delta, encode_delta
from graphopt.documents import from_value
from graphopt.draft import Draft
from graphopt.engine.give_way import Between, go_on
from graphopt.engine.records import RevisionInfo
from graphopt.errors import StateCorruptError
from graphopt.graph import Constant, Graph
from graphopt.limits import DELTA_IDS_KEPT_MAX, REVISIONS_KEPT_MAX
from graphopt.safe_file import Source
from graphopt.safetensors_file import read_tensors, write_tensors
from graphopt.store import (
    CHECKPOINT_DUE_BYTES,
    DELTA,
    FORK,
    LOAD,
    SNAPSHOT,
    SNAPSHOT_DUE_ROWS,
    UNLOAD,
    Entry,
    Lineage,
    Record,
    StateFolder,
)
from graphopt.text import print_graph
from graphopt.text_parser import parse_graph

HISTORY_LINES_MAX = 1_000  # lines of `history` kept in memory; the journal has them all


@dataclass(frozen=True, slots=True)
class Recovered:
    """A model as the journal has it: the graphs of its last revisions, the current one last, and
    its history.
    """

    graphs: "OrderedDict[int, Graph]"
    history: list[RevisionInfo]


@dataclass(frozen=True, slots=True)
class Commit:
    """A delta on its way into the journal: what it came down to, what history says, what a retry gets."""

    model: str
    revision: int
    applied: Applied
    kind: str
    summary: str
    content_sha: str  # of what the client meant; empty for a delta without an id
    answer: str  # JSON


class Ledger(Protocol):
    """Where a model's changes are made durable before they go live."""

    def find(self, model: str, delta_id: str) -> tuple[str, str] | None:
        """(content hash, answer) of an acknowledged delta of that id."""

    def commit(self, change: Commit, between: Between = go_on) -> None:
        """Durable on return; raises StateError and then the delta must not go live. `between` gives
        way to requests.
        """

    def graph_at(self, model: str, revision: int) -> Graph | None:
        """The graph of an older revision, where the ledger can still make it."""


class MemoryLedger:
    """Remembers delta ids within their bound; nothing survives the process."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, str], tuple[str, str]] = OrderedDict()

    def find(self, model: str, delta_id: str) -> tuple[str, str] | None:
        """See `Ledger`."""
        return self._known.get((model, delta_id))

    def commit(self, change: Commit, between: Between = go_on) -> None:
        """See `Ledger`."""
        delta_id = change.applied.expansion.id
        if delta_id is not None:
            self._known[change.model, delta_id] = (change.content_sha, change.answer)
            if len(self._known) > DELTA_IDS_KEPT_MAX:
                self._known.popitem(last=False)

    def graph_at(self, model: str, revision: int) -> Graph | None:
        """None: nothing older is kept than what the model keeps itself."""
        return None


class JournalLedger:
    """The ledger over a state folder. Any thread may call it; calls wait for each other."""

    def __init__(self, folder: StateFolder) -> None:
        self.folder = folder
        self._lock = threading.RLock()
        self._blob_of: dict[str, dict[str, str]] = {}  # model -> constant digest -> tensor blob
        self._named: dict[
            str, list[tuple[int, frozenset[str]]]
        ] = {}  # model -> blobs of the deltas since its base

    def find(self, model: str, delta_id: str) -> tuple[str, str] | None:
        """See `Ledger`."""
        known = self.folder.journal.find_delta(model, delta_id)
        return (known.content_sha, known.answer) if known else None

    def commit(self, change: Commit, between: Between = go_on) -> None:
        """See `Ledger`. Blobs first, then the row."""
        expansion = change.applied.expansion
        puts = {
            e.constant.digest: e.constant for e in expansion.edits if isinstance(e, PutConstant)
        }
        document = {
            "kind": change.kind,
            "summary": change.summary,
            "delta": encode_delta(expansion),
        }
        between()
        body = json.dumps(document, separators=(",", ":"), allow_nan=False)
        between()
        with self._lock:
            blob_of = self._blob_of[change.model]
            new = {digest: c.tensor for digest, c in puts.items() if digest not in blob_of}
            blob = self._put_tensors(new) if new else None
            # Blobs of earlier rows whose constants this row puts again: compaction must not take
            # them away.
            named = {blob_of[d] for d in puts if d in blob_of} | ({blob} if blob else set())
            entry = Entry(
                DELTA,
                change.model,
                change.revision,
                body,
                tuple(sorted(named)),
                expansion.id,
                change.content_sha,
                change.answer,
            )
            try:
                self.folder.journal.append([entry], between)
            except BaseException:  # a Ctrl-C in a pause too
                self.folder.blobs.release([blob] if blob else [])
                raise
            if blob:
                blob_of.update(dict.fromkeys(new, blob))
            self._named[change.model].append((change.revision, frozenset(named)))

    def blob_path(self, model: str, digest: str) -> Path | None:
        """The blob that holds a constant of a model; None when it has none."""
        blob = self._blob_of.get(model, {}).get(digest)
        return self.folder.blobs.path(blob) if blob is not None else None

    def load(
        self, model: str, graph: Graph, revision: int, kind: str = LOAD, like: str | None = None
    ) -> None:
        """Journals the whole graph as a base.

        What lies in blobs already (of `like`, for a fork) is named, not written again.
        """
        with self._lock:
            known = dict(self._blob_of.get(like or model, {}))
            wanted = {constant.digest: constant.tensor for constant in graph.constants.values()}
            new = {digest: tensor for digest, tensor in wanted.items() if digest not in known}
            if new:
                known.update(dict.fromkeys(new, self._put_tensors(new)))
            text = self.folder.blobs.put(print_graph(graph).encode())
            tensors = sorted({known[digest] for digest in wanted})
            body = json.dumps({"text": text, "tensors": tensors}, separators=(",", ":"))
            self.folder.journal.append([Entry(kind, model, revision, body, (text, *tensors))])
            later = [
                (r, blobs)
                for r, blobs in self._named.get(model, [])
                if r > revision and kind == SNAPSHOT
            ]
            kept = set(tensors).union(*(blobs for _, blobs in later))
            self._blob_of[model] = {digest: blob for digest, blob in known.items() if blob in kept}
            self._named[model] = later

    def fork(self, model: str, new: str, graph: Graph, revision: int) -> None:
        """Journals `new` as a copy of `model`."""
        self.load(new, graph, revision, FORK, like=model)

    def unload(self, model: str, revision: int) -> None:
        """Journals that the model is gone."""
        with self._lock:
            self.folder.journal.append([Entry(UNLOAD, model, revision, "{}")])
            self._blob_of.pop(model, None)
            self._named.pop(model, None)

    def is_snapshot_due(self, model: str) -> bool:
        """Whether so many deltas followed the base that recovery would be slow."""
        return self.folder.journal.status().rows_since_base.get(model, 0) >= SNAPSHOT_DUE_ROWS

    def snapshot(self, model: str, graph: Graph, revision: int) -> None:
        """Journals the graph at `revision` as a base, then compacts.

        Off the live path; a delta waits while rows are dropped.
        """
        with self._lock:
            self.load(model, graph, revision, SNAPSHOT)
            self.folder.compact()

    def checkpoint(self) -> None:
        """Moves the write-ahead log into the database when it has grown. Call when idle."""
        if self.folder.journal.status().wal_bytes >= CHECKPOINT_DUE_BYTES:
            self.folder.journal.checkpoint()

    def recover(self) -> dict[str, "Recovered"]:
        """Every loaded model as acknowledged.

        StateCorruptError when content is not what was written.
        """
        return {
            name: self._recover(name, lineage)
            for name, lineage in self.folder.journal.lineages().items()
        }

    def graph_at(self, model: str, revision: int) -> Graph | None:
        """The graph of a revision since the model's base, replayed; None when it lies before."""
        lineage = self.folder.journal.lineages().get(model)
        if lineage is None:
            return None
        replay = self._replay(model, lineage, {}, {})
        return next((graph for record, graph, _ in replay if record.revision == revision), None)

    def _recover(self, name: str, lineage: Lineage) -> Recovered:
        blob_of: dict[str, str] = {}
        graphs: OrderedDict[int, Graph] = OrderedDict()
        history: list[RevisionInfo] = []
        for record, graph, body in self._replay(name, lineage, {}, blob_of):
            graphs[record.revision] = graph
            if len(graphs) > REVISIONS_KEPT_MAX:
                graphs.popitem(last=False)
            kind = body.get("kind", record.kind)
            summary = body.get("summary", "")
            info = RevisionInfo(
                record.revision,
                kind,
                summary,
                record.delta_id,
                graph.hash,
                record.wall_ns / 1e9,
            )
            history.append(info)
        self._blob_of[name] = blob_of
        self._named[name] = [
            (record.revision, frozenset(record.blobs)) for record in lineage.increments
        ]
        return Recovered(graphs, history[-HISTORY_LINES_MAX:])

    def _replay(
        self,
        name: str,
        lineage: Lineage,
        constants: dict[str, Constant],
        blob_of: dict[str, str],
    ) -> Iterator[tuple[Record, Graph, dict[str, Any]]]:
        """Each row of a lineage with the graph after it and its body.

        Fills `constants` by digest, and `blob_of` with the blob each lies in.
        """
        base = json.loads(lineage.base.body)
        for blob in base["tensors"]:
            self._read_blob(blob, constants, blob_of)
        seen = set(base["tensors"])
        text = self.folder.blobs.read(base["text"]).decode()
        graph = _renamed(parse_graph(text, constants), name)
        yield lineage.base, graph, base
        for record in lineage.increments:
            for blob in record.blobs:
                if blob not in seen:
                    self._read_blob(blob, constants, blob_of)
                    seen.add(blob)
            body = json.loads(record.body)
            document = from_value(body["delta"], source=f"journal row {record.seq}")
            graph = apply(graph, decode_delta(document, _Known(constants)))
            yield record, graph, body

    def _read_blob(
        self, blob: str, constants: dict[str, Constant], blob_of: dict[str, str]
    ) -> None:
        for key, tensor in read_tensors(
            self.folder.blobs.path(blob), label=f"blob {blob[:12]}"
        ).items():
            data = torch.view_as_complex(tensor) if key.startswith("c128:") else tensor
            digest = key.removeprefix("c128:")
            if tensor_digest(data.contiguous()) != digest:
                raise StateCorruptError(
                    f"a tensor of blob {blob} is not what was written",
                    where=digest[:12],
                    remedy="restore a backup",
                )
            constants[digest] = constant_of(data, digest=digest)
            blob_of[digest] = blob

    def _put_tensors(self, tensors: Mapping[str, torch.Tensor]) -> str:
        content = {
            f"c128:{digest}" if t.dtype is torch.complex128 else digest: torch.view_as_real(t)
            if t.dtype is torch.complex128
            else t
            for digest, t in tensors.items()
        }
        with tempfile.TemporaryFile(dir=self.folder.path) as file:
            size = write_tensors(file.fileno(), content)
            os.lseek(file.fileno(), 0, os.SEEK_SET)
            return self.folder.blobs.put_fd(file.fileno(), size)


class _Known:
    """Constants of a recovery by content hash."""

    def __init__(self, constants: Mapping[str, Constant]) -> None:
        self._constants = constants

    def files(self, path: str) -> Mapping[str, Source]:
        """None: journaled deltas name no files."""
        raise StateCorruptError(
            f"a journaled delta names the file {path!r}", where=path, remedy="restore a backup"
        )

    def constant(self, digest: str) -> Constant | None:
        """The constant of that hash."""
        return self._constants.get(digest)


def _renamed(graph: Graph, name: str) -> Graph:
    if graph.name == name:
        return graph
    draft = Draft(graph)
    draft.name = name
    return draft.finish()
