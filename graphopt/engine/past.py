"""What a live model remembers of what it was: graphs to roll back to, a line for each revision, and the
deltas that may be sent again.
"""

import json
from collections import deque

from graphopt.delta import Delta
from graphopt.engine.identity import delta_digest
from graphopt.engine.ledger import HISTORY_LINES_MAX, Ledger, Recovered
from graphopt.engine.records import Applied, RevisionInfo
from graphopt.errors import DuplicateDeltaError, PreconditionError
from graphopt.graph import Graph
from graphopt.limits import REVISIONS_KEPT_MAX


class Past:
    """The past of one model. Its writer adds; any thread may look."""

    def __init__(self, model: str, recovered: Recovered, ledger: Ledger) -> None:
        self._model = model
        self._graphs = recovered.graphs
        self._lines: deque[RevisionInfo] = deque(recovered.history, maxlen=HISTORY_LINES_MAX)
        self._ledger = ledger

    def newest(self) -> tuple[int, Graph]:
        """The last revision and its graph."""
        return next(reversed(self._graphs.items()))

    def keep(self, revision: int, graph: Graph) -> None:
        """The graph of the next revision; the oldest ones are let go."""
        self._graphs[revision] = graph
        while len(self._graphs) > REVISIONS_KEPT_MAX:
            self._graphs.popitem(last=False)

    def note(self, line: RevisionInfo) -> None:
        """What led to the next revision."""
        self._lines.append(line)

    def lines(self) -> list[RevisionInfo]:
        """The last revisions, oldest first."""
        return list(self._lines)

    def graph_at(self, revision: int) -> Graph:
        """The graph of a revision, from memory or replayed from the journal.

        PreconditionError when neither reaches so far back.
        """
        graph = self._graphs.get(revision) or self._ledger.graph_at(self._model, revision)
        if graph is None:
            kept = list(self._graphs)
            raise PreconditionError(
                f"revision {revision} is not kept",
                where=self._model,
                remedy=f"kept are {kept[0]} to {kept[-1]}",
            )
        return graph

    def find_repeat(self, delta: Delta) -> Applied | None:
        """The answer to `delta` if it was applied before under the id it has; None if it was not.

        DuplicateDeltaError when another delta has that id.
        """
        if delta.id is None:
            return None
        known = self._ledger.find(self._model, delta.id)
        if known is None:
            return None
        if known[0] != delta_digest(delta):
            raise DuplicateDeltaError(
                f"delta id {delta.id!r} was used before for another delta",
                where="id",
                remedy="give this delta an id of its own",
            )
        return Applied(**json.loads(known[1]))
