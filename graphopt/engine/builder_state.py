"""What the builder knows of each model, and the messages that bring it up to date.

Callers on the live path note a revision in a microsecond; text and deltas are written later, on the
link's own thread, and only for models that have jobs. The builder gets the whole text once, then
deltas; after a restart, a gap or a long silence the text again.
"""

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from graphopt.delta import Delta, PutConstant
from graphopt.delta_document import encode_delta
from graphopt.engine.builder_files import ConstantFiles, write_inputs, write_text
from graphopt.errors import BuilderError
from graphopt.graph import Constant, Graph

CHAIN_MAX = 64  # deltas kept for a model that has no jobs; beyond that the text is less to read
UNACKED_MAX = 16  # state messages sent and not yet taken in
REQUESTS_MAX = 32  # captured requests kept for one model

Message = dict[str, Any]


@dataclass(slots=True)
class _Followed:
    """One model. `sent` is the revision the builder has when it has read everything."""

    graph: Graph
    revision: int
    chain: "deque[tuple[int, int, Delta]]" = field(default_factory=deque)  # since, revision, delta
    sent: int | None = None
    unacked: int = 0
    text: Path | None = None
    requests: Sequence[Mapping[str, torch.Tensor]] = ()
    has_new_requests: bool = False
    request_files: tuple[Path, ...] = ()
    are_requests_sent: bool = True


class BuilderState:
    """All followed models by name. `revise`, `set_requests` and `forget` may be called by any thread."""

    def __init__(self, folder: Path, constants: ConstantFiles, hurry: threading.Event) -> None:
        self._folder = folder
        self._constants = constants
        self._hurry = hurry  # set when the engine closes
        self._lock = threading.Lock()
        self._models: dict[str, _Followed] = {}
        self._gone: list[_Followed] = []
        self._forgotten: list[str] = []
        self._texts = 0

    def revise(self, name: str, revision: int, graph: Graph, expansion: Delta | None) -> None:
        """Notes that `name` is at `revision` now; `expansion` are the primitives that led there.

        None, or a gap since the last revision, costs a text. O(1).
        """
        with self._lock:
            known = self._models.get(name)
            if known is None:
                self._models[name] = _Followed(graph, revision)
                return
            is_next = expansion is not None and revision == known.revision + 1
            if not is_next or len(known.chain) >= CHAIN_MAX or known.sent is None:
                known.sent = None
                known.chain.clear()
            else:
                assert expansion is not None
                known.chain.append((known.revision, revision, expansion))
            known.graph, known.revision = graph, revision

    def set_requests(self, name: str, requests: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Replaces the real inputs that candidates of `name` are verified on."""
        with self._lock:
            known = self._models.get(name)
            if known is not None:
                known.requests = tuple(requests[:REQUESTS_MAX])
                known.has_new_requests = True

    def forget(self, name: str) -> None:
        """`name` is unloaded."""
        with self._lock:
            known = self._models.pop(name, None)
            if known is not None:
                self._gone.append(known)
                self._forgotten.append(name)

    # -- the link's thread

    def revision(self, name: str) -> int | None:
        """The newest revision noted."""
        with self._lock:
            known = self._models.get(name)
            return known.revision if known else None

    def is_sent(self, name: str) -> bool:
        """Whether the builder has been told all there is."""
        with self._lock:
            known = self._models.get(name)
            return known is not None and known.sent == known.revision

    def forgotten(self) -> list[Message]:
        """Messages about models that are gone."""
        with self._lock:
            gone, self._gone = self._gone, []
            names, self._forgotten = self._forgotten, []
        for known in gone:
            for path in (*known.request_files, *((known.text,) if known.text else ())):
                path.unlink(missing_ok=True)
        return [{"op": "forget", "model": name} for name in names]

    def news(self, name: str) -> list[Message]:
        """What brings the builder up to date about `name`; empty too while it has much unread.

        Raises BuilderError when files cannot be written.
        """
        with self._lock:
            known = self._models[name]
            graph, revision, chain = known.graph, known.revision, list(known.chain)
            is_whole = known.sent is None
            if known.unacked if is_whole else known.unacked + len(chain) > UNACKED_MAX:
                return []
            known.chain.clear()
            known.sent = revision
            known.unacked += 1 if is_whole else len(chain)
        try:
            messages = (
                [self._whole(name, known, graph, revision)]
                if is_whole
                else [self._delta(name, *step) for step in chain]
            )
            return messages + self._requests(name, known)
        except Exception as error:
            with self._lock:
                known.sent = None
                known.unacked -= 1 if is_whole else len(chain)
            raise BuilderError(
                f"the builder cannot be told about {name}: {error}", where=name,
                remedy="see to the disk; the model is served without",
            ) from error  # fmt: skip

    def acknowledge(self, name: str, *, is_known: bool) -> None:
        """The builder took one message in, or could not: then it gets the text again."""
        with self._lock:
            known = self._models.get(name)
            if known is None:
                return
            known.unacked = max(0, known.unacked - 1)
            if not is_known:
                known.sent = None
                known.chain.clear()
            text, known.text = (known.text, None) if not known.unacked else (None, known.text)
        if text is not None:
            text.unlink(missing_ok=True)

    def mistrust(self, name: str) -> None:
        """The builder lacks a revision that it should have: it gets the text again."""
        with self._lock:
            known = self._models.get(name)
            if known is not None:
                known.sent = None
                known.chain.clear()

    def restart(self) -> None:
        """There is a new builder, which knows nothing."""
        with self._lock:
            self._forgotten.clear()
            for known in self._models.values():
                known.sent, known.unacked = None, 0
                known.chain.clear()
                known.are_requests_sent = not known.request_files

    def _whole(self, name: str, known: _Followed, graph: Graph, revision: int) -> Message:
        with self._lock:
            graphs = [each.graph for each in self._models.values()]
        self._constants.retain(c.digest for each in graphs for c in each.constants.values())
        constants = {c.digest: c for c in graph.constants.values()}
        files = self._constants.files(name, constants)
        self._texts += 1
        path = self._folder / f"graph-{self._texts}.txt"
        write_text(graph, path, self._hurry)
        if known.text is not None:
            known.text.unlink(missing_ok=True)
        known.text = path
        return {
            "op": "model", "model": name, "revision": revision, "text": str(path),
            "files": [str(file) for file in files],
        }  # fmt: skip

    def _delta(self, name: str, since: int, revision: int, delta: Delta) -> Message:
        puts: dict[str, Constant] = {
            edit.constant.digest: edit.constant
            for edit in delta.edits
            if isinstance(edit, PutConstant)
        }
        files = self._constants.files(name, puts) if puts else []
        return {
            "op": "delta", "model": name, "since": since, "revision": revision,
            "delta": encode_delta(delta), "files": [str(file) for file in files],
        }  # fmt: skip

    def _requests(self, name: str, known: _Followed) -> list[Message]:
        with self._lock:
            requests = known.requests if known.has_new_requests else None
            known.has_new_requests, known.requests = False, ()
        if requests is not None:
            old, new = known.request_files, [write_inputs(each, self._folder) for each in requests]
            known.request_files, known.are_requests_sent = tuple(dict.fromkeys(new)), False
            for path in set(old) - set(new):
                path.unlink(missing_ok=True)
        if known.are_requests_sent:
            return []
        known.are_requests_sent = True
        files = [str(path) for path in known.request_files]
        return [{"op": "samples", "model": name, "files": files}]
