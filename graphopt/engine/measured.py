"""What was measured and chosen on this host, kept between processes: costs of regions, plans of graphs.

    CACHE/measured.json     replaced whole by `save`

Beside the artifacts, and as expendable: a file that is missing, damaged or of another schema means
that nothing is known. A cost is known for exactly one (region key, shape bucket, backend, version,
options, host); nothing is carried over to a neighbour. Deliberately absent: predicting (a cost model)
and choosing.
"""

import json
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphopt.engine.artifact_entry import write_whole
from graphopt.errors import GraphoptError
from graphopt.executor.arrangement import ArtifactKey, Runs
from graphopt.safe_file import parse_json_object, read_bounded

SCHEMA = 1
FILE = "measured.json"
FILE_BYTES_MAX = 32 << 20
COSTS_MAX = 20_000  # about 5 MB; the least recently measured given up first
MODELS_MAX = 256
GRAPHS_MAX = 8  # of a model: revisions it may be rolled back to, or started at
LABELS_MAX = 256
KINDS_MAX = 4_096  # of a label
STEPS_MAX = 4_096  # of a plan that is remembered

Bucket = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CostKey:
    """What a cost is the cost of."""

    region: str
    bucket: Bucket
    backend: str
    version: str
    options: str
    host: str


@dataclass(frozen=True, slots=True)
class Cost:
    """A measured median in seconds, of how many runs, and when (seconds since the epoch)."""

    median_s: float
    runs: int
    wall_s: float


@dataclass(frozen=True, slots=True)
class KnownPlan:
    """What ran for a graph, with a label for people."""

    label: str
    steps: Runs


class Measured:
    """The record of one folder; called from one thread. `save` writes it when it has changed."""

    def __init__(
        self, folder: Path, host: str, wall_s: Callable[[], float], on_drop: Callable[[str], None]
    ) -> None:
        """Reads what is there.

        Args:
            folder: CACHE.
            host: see `host_fingerprint`; what was measured or chosen on another one is left out.
            wall_s: seconds since the epoch.
            on_drop: told why a record that is there could not be read.
        """
        self._path = folder / FILE
        self._host = host
        self._wall_s = wall_s
        self._costs: OrderedDict[CostKey, Cost] = OrderedDict()
        self._plans: OrderedDict[str, OrderedDict[str, KnownPlan]] = OrderedDict()
        self._proven: OrderedDict[str, OrderedDict[str, None]] = OrderedDict()
        self._is_changed = False
        for leftover in folder.glob(f"{FILE}.*"):  # of an interrupted `save`
            leftover.unlink(missing_ok=True)
        try:
            self._read()
        except FileNotFoundError:
            return
        except (GraphoptError, KeyError, TypeError, ValueError, AttributeError) as error:
            self._costs.clear()
            self._plans.clear()
            self._proven.clear()
            on_drop(f"{FILE}: {error}")

    # -- costs

    def note_cost(self, key: CostKey, median_s: float, runs: int) -> None:
        """A measurement replaces an older one; ValueError unless it is finite and above zero."""
        if not (math.isfinite(median_s) and median_s > 0.0):
            raise ValueError(f"a cost of {median_s} s")
        self._costs.pop(key, None)
        self._costs[key] = Cost(median_s, runs, self._wall_s())
        _trim(self._costs, COSTS_MAX)
        self._is_changed = True

    def cost(self, key: CostKey, age_max_s: float = math.inf) -> Cost | None:
        """What was measured; None when nothing was, or longer ago than `age_max_s`."""
        found = self._costs.get(key)
        if found is None or self._wall_s() - found.wall_s > age_max_s:
            return None
        return found

    # -- plans

    def remember(self, model: str, graph_hash: str, plan: KnownPlan) -> None:
        """`plan` is the last good one of a graph; a plan of more than `STEPS_MAX` steps is not kept."""
        if len(plan.steps) > STEPS_MAX:
            return
        graphs = self._plans.setdefault(model, OrderedDict())
        self._plans.move_to_end(model)
        if graphs.get(graph_hash) == plan and next(reversed(graphs)) == graph_hash:
            return
        graphs.pop(graph_hash, None)
        graphs[graph_hash] = plan
        _trim(graphs, GRAPHS_MAX)
        _trim(self._plans, MODELS_MAX)
        self._is_changed = True

    def recall(self, model: str, graph_hash: str) -> KnownPlan | None:
        """What ran for this very graph, under this name or, a model being renamed or forked, another."""
        own = self._plans.get(model, OrderedDict())
        for graphs in (own, *reversed(self._plans.values())):
            if graph_hash in graphs:
                return graphs[graph_hash]
        return None

    def latest(self, model: str) -> KnownPlan | None:
        """What ran last under this name, whichever its graph was."""
        graphs = self._plans.get(model)
        return graphs[next(reversed(graphs))] if graphs else None

    def forget(self, model: str, label: str) -> None:
        """A way of running a model was taken back: no graph of it is started on that. An empty label:
        it is not known which way it was, so on none.
        """
        graphs = self._plans.get(model, OrderedDict())
        for graph_hash in [each for each, plan in graphs.items() if label in ("", plan.label)]:
            del graphs[graph_hash]
            self._is_changed = True

    def wanted(self) -> frozenset[ArtifactKey]:
        """The artifacts of the youngest plan of each model: what a restart would load."""
        youngest = (next(reversed(graphs.values())) for graphs in self._plans.values() if graphs)
        return frozenset(key for plan in youngest for _, key in plan.steps)

    # -- ways of running that were chosen by trial

    def prove(self, label: str, kinds: Iterable[str]) -> None:
        """A way of running was chosen by trial with regions of these kinds."""
        known = self._proven.setdefault(label, OrderedDict())
        self._proven.move_to_end(label)
        for kind in kinds:
            if kind not in known:
                known[kind] = None
                self._is_changed = True
        _trim(known, KINDS_MAX)
        _trim(self._proven, LABELS_MAX)

    def disprove(self, label: str) -> None:
        """It was taken back: nothing is proven about it."""
        if self._proven.pop(label, None) is not None:
            self._is_changed = True

    def proven(self, label: str) -> frozenset[str]:
        """The kinds of regions with which a way of running was chosen on this host."""
        return frozenset(self._proven.get(label, ()))

    # -- the file

    def save(self) -> bool:
        """Writes the record when it has changed; False when it could not be written (it is a cache)."""
        if not self._is_changed:
            return True
        document = {
            "schema": SCHEMA,
            "host": self._host,
            "costs": [
                [
                    k.region,
                    list(k.bucket),
                    k.backend,
                    k.version,
                    k.options,
                    c.median_s,
                    c.runs,
                    c.wall_s,
                ]
                for k, c in self._costs.items()
                if k.host == self._host
            ],
            "plans": {
                model: [
                    [graph, plan.label, [[list(blocks), list(key)] for blocks, key in plan.steps]]
                    for graph, plan in graphs.items()
                ]
                for model, graphs in self._plans.items()
            },
            "proven": {label: list(known) for label, known in self._proven.items()},
        }
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_whole(self._path, json.dumps(document, separators=(",", ":")).encode())
        except OSError:
            return False
        self._is_changed = False
        return True

    def _read(self) -> None:
        if not self._path.exists():
            raise FileNotFoundError
        text = read_bounded(self._path, FILE_BYTES_MAX, label=FILE)
        document: dict[str, Any] = parse_json_object(text, label=FILE)
        if document["schema"] != SCHEMA:
            raise ValueError(f"schema {document['schema']}, this one is {SCHEMA}")
        if document["host"] != self._host:
            raise ValueError(f"measured on another host: {document['host']}")
        for region, bucket, backend, version, options, median_s, runs, wall_s in document["costs"]:
            sizes = tuple(map(int, bucket))
            key = CostKey(str(region), sizes, str(backend), str(version), str(options), self._host)
            self._costs[key] = Cost(float(median_s), int(runs), float(wall_s))
        for model, graphs in document["plans"].items():
            known = self._plans[str(model)] = OrderedDict()
            for graph, label, steps in graphs:
                rows = ((tuple(map(str, blocks)), tuple(map(str, key))) for blocks, key in steps)
                known[str(graph)] = KnownPlan(str(label), tuple(rows))
        for label, structures in document["proven"].items():
            self._proven[str(label)] = OrderedDict.fromkeys(map(str, structures))
        _trim(self._costs, COSTS_MAX)
        _trim(self._plans, MODELS_MAX)


def _trim(known: OrderedDict[Any, Any], count_max: int) -> None:
    while len(known) > count_max:
        known.popitem(last=False)
