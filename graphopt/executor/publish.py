"""One store publishes a plan.

Readers take no lock; what is replaced is let go when nobody can be running it.

A request notes the epoch, then loads the plan. The writer stores the new plan, then raises the
epoch. So a request that noted epoch `e` can hold only plans that were current at `e` or later, and
a plan replaced when the epoch became `e` is free once every running request has noted `e` or a
later one (epoch-based reclamation, Fraser, "Practical lock-freedom", 2004). The references that
running requests hold keep memory safe in any case; epochs decide *when* to drop, so that no request
thread ever pays for tearing down a runtime.

Up to three plans have a role here: the published one, the last good one, and the candidate of a
trial. A plan is retired when it leaves its last role. While nothing is tried or watched, a request
pays for that with one test for None; what it took is always noted (`latency`).

A request that a plan on trial or under watch fails is served again by the other plan, and when that
one succeeds, the failed plan is out at once.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from weakref import WeakSet

import torch

from graphopt.executor.latency import Latencies
from graphopt.executor.plan import Plan, run_steps
from graphopt.executor.trial import Trial
from graphopt.limits import PLANS_RETIRED_MAX

IDLE = float("inf")  # what a reader that runs nothing has noted
WAKE_EVERY = 4  # requests of a trial or watch between two calls of `Slot.wake`
FAULTS_MAX = 16  # kept until somebody asks; each rollback is one, and dwell keeps them rare
# Outputs up to this size are looked at for NaN. Of 64 KB behind a BERT-mini a sum takes 100 us, and a look at
# each element 275.
FINITE_ELEMENTS_MAX = 1 << 16

Answer = tuple[dict[str, torch.Tensor], Plan]


@dataclass(frozen=True, slots=True)
class Fault:
    """A published plan was taken back in a request thread: it failed a request, `good` served it."""

    plan: str
    good: str
    reason: str


class Reader:
    """What one thread has noted. Written by its thread, read by the writer."""

    __slots__ = ("__weakref__", "depth", "epoch")

    def __init__(self) -> None:
        self.epoch: float = IDLE
        self.depth = 0


class _Route:
    """Where requests go while a plan is on trial or under watch."""

    __slots__ = ("candidate", "checks_finite", "current", "served", "trial")

    def __init__(self, current: Plan, candidate: Plan | None, trial: Trial | None) -> None:
        self.current = current
        self.candidate = candidate
        self.trial = trial
        self.served = 0  # about; a lost count delays a wake by one request
        self.checks_finite = True


class Slot:
    """The published plan of one model, the last good one, and the plans they replaced.

    Attributes:
        plan: what every request admitted now runs, unless a trial is on.
        last_good: the last plan of this revision that proved good; where a rollback goes.
        latencies: what requests took.
        faults: plans that were taken back in a request thread, for the background to take note of.
        wake: called from request threads when there is something to judge; must be quick.
        publish_s: what the last publication took, seconds.
    """

    def __init__(self, plan: Plan, monotonic_s: Callable[[], float] = time.perf_counter) -> None:
        self.plan = plan
        self.last_good = plan
        self.latencies = Latencies()
        self.faults: deque[Fault] = deque(maxlen=FAULTS_MAX)
        self.wake: Callable[[], None] = _ignore
        self.epoch = 0
        self.publish_s = 0.0
        self._now_s = monotonic_s
        self._note = self.latencies.add
        self._route: _Route | None = None
        self._local = threading.local()
        self._readers: WeakSet[Reader] = WeakSet()
        self._lock = threading.Lock()  # writers, and threads on their first request
        self._retired: deque[tuple[int, Plan]] = deque()

    # -- requests

    def run(self, inputs: Mapping[str, torch.Tensor]) -> Answer:
        """Runs one request in this thread.

        Returns the outputs by name and the plan that made them.
        """
        try:
            reader: Reader = self._local.reader
        except AttributeError:
            reader = self._register()
        depth = reader.depth  # a step may call its own model
        reader.depth = depth + 1
        if not depth:
            reader.epoch = self.epoch  # before the plan is loaded: see the module docstring
        try:
            with torch._C._InferenceMode(True):
                route = self._route
                if route is not None:
                    return self._run_routed(route, inputs)
                plan = self.plan
                env, symbols = plan.bind(inputs)
                now_s = self._now_s
                start_s = now_s()
                try:
                    run_steps(plan.steps, env, symbols)
                except Exception as error:
                    return self._serve_again(plan, self.last_good, inputs, error)
                self._note((plan.id, symbols, now_s() - start_s))
                outputs = {}
                for name, key in plan.outputs:
                    outputs[name] = env[key]  # 0.1 us less than a comprehension
                return outputs, plan
        finally:
            reader.depth = depth
            if not depth:
                reader.epoch = IDLE

    def is_busy(self) -> bool:
        """Whether a request is running now."""
        return any(reader.epoch != IDLE for reader in list(self._readers))

    def mark(self) -> object:
        """Something that is another object once a request was served; valid until samples are drained."""
        return self.latencies.newest()

    # -- the writer

    def publish(self, plan: Plan, expected: Plan | None = None) -> bool:
        """Makes `plan` the one that every request admitted from now on runs; ends any trial or watch.

        False, and nothing is done, when the published plan is not `expected` (None: whatever it is).
        The plan of a new revision is its first good one; another one becomes it by `confirm`.
        """
        with self._lock:
            if expected is not None and self.plan is not expected:
                return False
            roles, old = self._roles(), self.plan
            trial = self._route.trial if self._route is not None else None
            start_s = self._now_s()
            self._route = None
            self.plan = plan
            self.epoch += 1
            self.publish_s = self._now_s() - start_s
            if plan.revision != old.revision:
                self.last_good = plan
            self._retire(roles)
            # Beyond the bound the requests' own references decide: a plan that one still runs is torn
            # down in its thread, any other one here and now.
            while len(self._retired) > PLANS_RETIRED_MAX:
                self._retired.popleft()
        if trial is not None:
            trial.cancel("another plan was published")  # of no effect after its verdict
        return True

    def confirm(self, plan: Plan) -> bool:
        """Makes the published `plan` the last good one and ends its watch; False when another is
        published.
        """
        with self._lock:
            if self.plan is not plan:
                return False
            roles = self._roles()
            self._route = None
            self.last_good = plan
            self._leave(roles)
            return True

    def roll_back(self, plan: Plan) -> Plan | None:
        """Publishes the last good plan in the place of `plan`, which is what it returns.

        None, and nothing is done, when `plan` is not published any more or is itself the last good.
        """
        with self._lock:
            good = self.last_good
            if self.plan is not plan or good is plan:
                return None
            self._step_back(plan, good)
            return good

    def begin_trial(self, trial: Trial, candidate: Plan, expected: Plan) -> bool:
        """Deals the requests from now on to the published plan and `candidate`, as `trial` says.

        False when the published plan is not `expected`, or a trial is on. ValueError when the two
        are not of one revision: a request must never see two.
        """
        if candidate.revision != expected.revision:
            raise ValueError(f"{candidate} is on trial against {expected}, another revision")
        with self._lock:
            busy = self._route is not None and self._route.trial is not None
            if self.plan is not expected or busy:
                return False
            self._route = _Route(expected, candidate, trial)
            return True

    def end_trial(self) -> None:
        """Sends every request to the published plan again; the candidate is retired."""
        with self._lock:
            roles = self._roles()
            self._route = None
            self._leave(roles)

    def watch(self, plan: Plan) -> bool:
        """Has `wake` called every few requests while `plan` is published, until `confirm`.

        Outputs are looked at for NaN meanwhile. False when another plan is published, or a trial is on.
        """
        with self._lock:
            trying = self._route is not None and self._route.trial is not None
            if self.plan is not plan or trying:
                return False
            self._route = _Route(plan, None, None)
            return True

    def reap(self) -> int:
        """Drops replaced plans that no running request can hold; returns how many are left.

        Call it from a thread that serves no requests. What later plans do not share goes with a plan;
        tearing down a runtime can hold the GIL for milliseconds, so one plan at a time goes, only
        while no request runs, and no writer waits for it.
        """
        while True:
            with self._lock:
                oldest = min((reader.epoch for reader in self._readers), default=IDLE)
                if not self._retired or self._retired[0][0] > oldest or self.is_busy():
                    return len(self._retired)
                gone = self._retired.popleft()
            del gone

    # -- helpers

    def _run_routed(self, route: _Route, inputs: Mapping[str, torch.Tensor]) -> Answer:
        plan, other, trial, position = route.current, self.last_good, route.trial, -1
        env, symbols = plan.bind(inputs)
        bucket = tuple(symbols.values())
        if trial is not None and route.candidate is not None:
            position = trial.take(bucket)
            if trial.is_candidate(position):
                plan, other = route.candidate, plan
        start_s = self._now_s()
        try:
            run_steps(plan.steps, env, symbols)
        except Exception as error:
            return self._serve_again(plan, other, inputs, error)
        took_s = self._now_s() - start_s
        outputs = {name: env[key] for name, key in plan.outputs}
        if route.checks_finite and other is not plan:
            wrong = _not_finite(outputs)
            if wrong is not None:
                route.checks_finite = False  # a model may well answer infinity: ask once
                fault = ArithmeticError(f"output {wrong!r} is not finite")
                again = self._serve_again(plan, other, inputs, fault, _not_finite)
                return again if again[1] is not plan else (outputs, plan)
        self._note((plan.id, symbols, took_s))
        if trial is not None and position >= 0:
            trial.add(bucket, position, took_s)
        route.served += 1
        if route.served % WAKE_EVERY == 0:
            self.wake()
        return outputs, plan

    def _serve_again(
        self,
        plan: Plan,
        other: Plan,
        inputs: Mapping[str, torch.Tensor],
        error: Exception,
        is_wrong: Callable[[Mapping[str, torch.Tensor]], str | None] = lambda _: None,
    ) -> Answer:
        """The answer of `other` to a request that `plan` failed with `error`; `plan` is then taken out.

        When `other` fails too (or its answer is wrong in the same way), it is the request's fault.
        """
        if other is plan or other.revision != plan.revision:
            raise error
        env, symbols = other.bind(inputs)
        try:
            run_steps(other.steps, env, symbols)
        except Exception:
            raise error from None
        outputs = {name: env[key] for name, key in other.outputs}
        if is_wrong(outputs) is not None:
            return outputs, plan
        self._take_out(plan, f"{type(error).__name__}: {error}")
        return outputs, other

    def _take_out(self, plan: Plan, reason: str) -> None:
        with self._lock:
            route, good = self._route, self.last_good
            trial = None
            if route is not None and route.candidate is plan:
                trial, roles = route.trial, self._roles()
                self._route = None
                self._leave(roles)
            elif self.plan is plan and good is not plan:
                self._step_back(plan, good)
                self.faults.append(Fault(plan.id, good.id, reason))
        if trial is not None:
            trial.fail(reason)
        self.wake()

    def _step_back(self, plan: Plan, good: Plan) -> None:
        roles = self._roles()
        trial = self._route.trial if self._route is not None else None
        self._route = None
        self.plan = good
        self._leave(roles)
        if trial is not None:
            trial.cancel(f"{plan.id} was taken back")

    def _roles(self) -> tuple[Plan, ...]:
        """The plans that a request could be given, or that are kept for a rollback."""
        candidate = self._route.candidate if self._route is not None else None
        return tuple(plan for plan in (self.plan, self.last_good, candidate) if plan is not None)

    def _leave(self, roles: tuple[Plan, ...]) -> None:
        """Begins a new epoch and retires what had a role in the one before and has none now."""
        self.epoch += 1
        self._retire(roles)

    def _retire(self, roles: tuple[Plan, ...]) -> None:
        kept = self._roles()
        for i, plan in enumerate(roles):
            if all(plan is not other for other in (*kept, *roles[:i])):
                self._retired.append((self.epoch, plan))

    def _register(self) -> Reader:
        reader = Reader()
        with self._lock:
            self._readers.add(reader)
        self._local.reader = reader
        return reader


def _ignore() -> None:
    """The wake of a slot that nobody judges."""


def _not_finite(outputs: Mapping[str, torch.Tensor]) -> str | None:
    """The first small floating output with a NaN or infinity."""
    for name, value in outputs.items():
        if (
            value.is_floating_point()
            and value.numel() <= FINITE_ELEMENTS_MAX
            and not isfinite(value.sum())
            and not bool(torch.isfinite(value).all())  # a sum of large numbers is infinite as well
        ):
            return name
    return None
