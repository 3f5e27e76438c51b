"""One store publishes a plan.

Readers take no lock; what is replaced is let go when nobody can be running it.

A request notes the epoch, then loads the plan. The writer stores the new plan, then raises the
epoch. So a request that noted epoch `e` can hold only plans that were current at `e` or later, and
a plan replaced when the epoch became `e` is free once every running request has noted `e` or a
later one (epoch-based reclamation, Fraser, "Practical lock-freedom", 2004). The references that
running requests hold keep memory safe in any case; epochs decide *when* to drop, so that no request
thread ever pays for tearing down a runtime.
"""

import threading
import time
from collections import deque
from collections.abc import Mapping
from weakref import WeakSet

import torch

from graphopt.executor.plan import Plan, run_plan
from graphopt.limits import PLANS_RETIRED_MAX

IDLE = float("inf")  # what a reader that runs nothing has noted


class Reader:
    """What one thread has noted. Written by its thread, read by the writer."""

    __slots__ = ("__weakref__", "depth", "epoch")

    def __init__(self) -> None:
        self.epoch: float = IDLE
        self.depth = 0


class Slot:
    """The published plan of one model, and the plans it replaced."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.last_good = plan
        self.epoch = 0
        self.publish_s = 0.0  # what the last publication took, seconds
        self._local = threading.local()
        self._readers: WeakSet[Reader] = WeakSet()
        self._lock = threading.Lock()  # writers, and threads on their first request
        self._retired: deque[tuple[int, Plan]] = deque()

    def run(self, inputs: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], Plan]:
        """Runs the published plan in this thread.

        Returns the outputs by name and the plan that made them.
        """
        try:
            reader: Reader = self._local.reader
        except AttributeError:
            reader = self._register()
        reader.depth += 1
        if reader.depth == 1:
            reader.epoch = self.epoch  # before the plan is loaded: see the module docstring
        plan = self.plan
        try:
            with torch._C._InferenceMode(True):
                return run_plan(plan, inputs), plan
        finally:
            reader.depth -= 1
            if reader.depth == 0:
                reader.epoch = IDLE

    def publish(self, plan: Plan) -> None:
        """Makes `plan` the one that every request admitted from now on runs."""
        with self._lock:
            old = self.plan
            start_s = time.perf_counter()
            self.plan = plan
            self.epoch += 1
            self.publish_s = time.perf_counter() - start_s
            if plan.revision != old.revision:
                self.last_good = plan  # the live-path plan of a revision is its first good one
            self._retired.append((self.epoch, old))
            # Beyond the bound the requests' own references decide: a plan that one still runs is torn
            # down in its thread, any other one here and now.
            while len(self._retired) > PLANS_RETIRED_MAX:
                self._retired.popleft()

    def reap(self) -> int:
        """Drops replaced plans that no running request can hold; returns how many are left.

        Call it from a thread that serves no requests. What later plans do not share goes with a plan;
        tearing down a runtime can hold the GIL for milliseconds, so one plan at a time goes, and
        only while no request runs.
        """
        with self._lock:
            oldest = min((reader.epoch for reader in self._readers), default=IDLE)
            while self._retired and self._retired[0][0] <= oldest and not self.is_busy():
                self._retired.popleft()
            return len(self._retired)

    def is_busy(self) -> bool:
        """Whether a request is running now."""
        return any(reader.epoch != IDLE for reader in list(self._readers))

    def _register(self) -> Reader:
        reader = Reader()
        with self._lock:
            self._readers.add(reader)
        self._local.reader = reader
        return reader
