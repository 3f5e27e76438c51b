"""All live models of one process: they share threads, compiled blocks, verified candidates and the
state folder.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import torch

from graphopt.costs.model import CostModel, default_model
from graphopt.delta import Delta
from graphopt.draft import Draft
from graphopt.engine.better_path import BetterPath
from graphopt.engine.give_way import GiveWay
from graphopt.engine.ledger import JournalLedger, MemoryLedger, Recovered
from graphopt.engine.live import Clocks, LiveModel
from graphopt.engine.records import EngineSettings, Result, RevisionInfo
from graphopt.engine.shelf import Shelf
from graphopt.errors import DeltaError, ModelExistsError, ModelNotFoundError, nearest
from graphopt.executor.build import EagerBuilder
from graphopt.executor.publish import Slot
from graphopt.executor.threads import BackgroundThread, ExecutorThreads
from graphopt.graph import Graph
from graphopt.limits import NAME_CHARS_MAX
from graphopt.store import StateFolder

SYSTEM_CLOCKS = Clocks(time.perf_counter, time.time, time.sleep)


class Host:
    """The models of one process, by name.

    With `state_dir`, what was acknowledged before is live again when the constructor returns.
    Raises StateError subclasses.
    """

    def __init__(
        self,
        settings: EngineSettings | None = None,
        state_dir: str | Path | None = None,
        clocks: Clocks = SYSTEM_CLOCKS,
        cost_model: CostModel | None = None,
    ) -> None:
        """`cost_model` None takes the default one that is installed, if any."""
        self.settings = settings or EngineSettings()
        self.clocks = clocks
        self._eager = EagerBuilder()
        self._shelf = Shelf()
        self._models: dict[str, LiveModel] = {}
        self._changing = threading.Lock()  # one load, unload or fork at a time
        self.folder = (
            StateFolder.open(state_dir, wall_ns=time.time_ns) if state_dir is not None else None
        )
        self._journal = JournalLedger(self.folder) if self.folder is not None else None
        self._memory = MemoryLedger()
        self.threads = _executor_threads(self.settings)
        self._background = BackgroundThread(
            "graphopt-background",
            self.settings.intra_op,
            self._on_background_error,
            clocks.monotonic_s,
        )
        try:
            if cost_model is None:
                cost_model = default_model(self.folder.path if self.folder is not None else None)
            self.better = BetterPath(
                self.settings,
                clocks,
                self._background,
                self._shelf,
                self.folder.path if self.folder is not None else None,
                self._journal.blob_path if self._journal is not None else None,
                cost_model,
            )
        except BaseException:
            self._let_go()
            raise
        try:
            self._recover()
        except BaseException:
            self.close()
            raise

    # -- models

    def load(self, graph: Graph, name: str | None = None) -> LiveModel:
        """Makes `graph` live as `name` (its own by default); journaled.

        ModelExistsError when the name is taken.
        """
        name = name or graph.name
        _check_name(name)
        with self._changing:
            self._check_free(name)
            draft = Draft(graph)
            draft.name = name
            model = self._make(name, self._begin(draft.finish(), "load"))
            if self._journal is not None:
                self._journal.load(name, model.graph, 1)
            return self._add(model, "model.loaded")

    def unload(self, name: str) -> None:
        """Takes the model down; requests that run finish on their plan."""
        with self._changing:
            model = self.get(name)
            if self._journal is not None:
                self._journal.unload(name, model.revision)
            del self._models[name]
            self.better.forget(name)
        self.settings.events("model.unloaded", {"graph": name, "revision": model.revision})

    def fork(self, name: str, new: str) -> LiveModel:
        """A second live model under the name `new`, equal to `name` now.

        They share constants and compiled steps.
        """
        _check_name(new)
        with self._changing:
            self._check_free(new)
            source = self.get(name)
            draft = Draft(source.graph)
            draft.name = new
            model = self._make(new, self._begin(draft.finish(), "fork"))
            if self._journal is not None:
                self._journal.fork(name, new, model.graph, 1)
            return self._add(model, "model.forked", like=name)

    def get(self, name: str) -> LiveModel:
        """The live model `name`; ModelNotFoundError with the nearest names."""
        model = self._models.get(name)
        if model is None:
            remedy = (
                nearest(name, self._models) or f"loaded are {', '.join(self._models) or 'none'}"
            )
            raise ModelNotFoundError(f"no model {name!r} is loaded", where=name, remedy=remedy)
        return model

    def models(self) -> dict[str, LiveModel]:
        """The live models by name."""
        return dict(self._models)

    # -- work

    def submit(self, model: LiveModel, inputs: Mapping[str, torch.Tensor]) -> "Future[Result]":
        """Runs a request on an executor thread."""
        return self.threads.submit(lambda: model.run(inputs), model.share)

    def settle(self, timeout_s: float | None = None) -> bool:
        """Waits until the background has nothing better to offer; False when the time passed first.

        `better.status()` then says whether the builder is starved.
        """
        start_s = self.clocks.monotonic_s()
        if not self.better.wait_settled(timeout_s):
            return False
        left_s = None
        if timeout_s is not None:
            left_s = max(0.0, timeout_s - (self.clocks.monotonic_s() - start_s))
        return self._background.wait_idle(left_s)

    def reach_background(self) -> "Future[None]":
        """Done once the background has got through what was queued before: a proof that it lives."""
        reached: Future[None] = Future()
        self._background.submit("proof of life", lambda: reached.set_result(None))
        return reached

    def explain_block(self, model: LiveModel, block: str) -> str:
        """Why a block runs on the tier it runs on."""
        return self.better.why_eager(model, block)

    def close(self) -> None:
        """Ends the threads and lets go of the state folder; queued requests are run first."""
        self._background.close()
        self.better.close()
        self._let_go()

    # -- helpers

    def _let_go(self) -> None:
        self._background.close()
        self.threads.close()
        self._models.clear()
        if self.folder is not None:
            self.folder.close()

    def _begin(self, graph: Graph, kind: str) -> Recovered:
        line = RevisionInfo(1, kind, "", None, graph.hash, self.clocks.wall_s())
        return Recovered(OrderedDict({1: graph}), [line])

    def _make(self, name: str, recovered: Recovered) -> LiveModel:
        ledger = self._journal or self._memory
        model = LiveModel(
            name,
            recovered,
            self._eager,
            self._shelf,
            self.settings,
            self.clocks,
            ledger,
            self._schedule,
        )
        model.foresee = partial(self.better.costs.foresee, model)
        model.give_way = GiveWay(self._slots, self.clocks.monotonic_s, self.clocks.pause).start
        return model

    def _slots(self) -> list[Slot]:
        return [model.slot for model in list(self._models.values())]

    def _add(self, model: LiveModel, event: str, **fields: str) -> LiveModel:
        self._models[model.name] = model
        self.settings.events(
            event,
            {"graph": model.name, "revision": model.revision, "nodes": len(model.graph), **fields},
        )
        self._schedule(model)
        return model

    def _recover(self) -> None:
        if self._journal is None:
            return
        for name, recovered in self._journal.recover().items():
            self._add(self._make(name, recovered), "model.recovered")

    def _schedule(self, model: LiveModel, expansion: Delta | None = None) -> None:
        self.better.follow(model, expansion)
        self._background.submit(f"tend {model.name}", lambda: self._tend(model))

    def _tend(self, model: LiveModel) -> None:
        """Housekeeping after a change, off the live path: old plans let go, a snapshot when one is
        due.
        """
        model.slot.reap()
        if self._shelf.wants_trim():
            models = self.models().values()
            used = {
                (step.key, step.weights)
                for other in models
                for known in other.known()
                for step in (*known.base.steps, *known.plan.steps)
            }
            self._shelf.trim(used.__contains__)
        if self._journal is not None and model.name in self._models:
            if self._journal.is_snapshot_due(model.name):
                model.snapshot(self._journal.snapshot)
            self._journal.checkpoint()

    def _check_free(self, name: str) -> None:
        if name in self._models:
            raise ModelExistsError(
                f"a model {name!r} is loaded already",
                where=name,
                remedy="unload it, or choose another name",
            )

    def _on_background_error(self, key: str, error: Exception) -> None:
        self.settings.events(
            "builder.failed", {"job": key, "message": f"{type(error).__name__}: {error}"}
        )


def _executor_threads(settings: EngineSettings) -> ExecutorThreads:
    """As many threads as the narrowest requests could use, so that CPUs run out before threads do."""
    budgets = settings.budgets()
    cpus = max(budget.workers * budget.each for budget in budgets)
    count = cpus // min(budget.each for budget in budgets)
    return ExecutorThreads(count, settings.intra_op, cpus if len(budgets) > 1 else None)


def _check_name(name: str) -> None:
    if (
        not name
        or len(name) > NAME_CHARS_MAX
        or not all(c.isalnum() or c in "._-" for c in name)
        or name[0] in ".-"
    ):
        raise DeltaError(
            f"{name!r} is no model name", where="name", remedy="use letters, digits, dot, _ and -"
        )
