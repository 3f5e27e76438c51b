"""A trial without traffic: captured inputs, run while no request does.

Everything happens on the calling thread, which must be one that serves no requests. Before and after
each run it looks whether a request has come; one that has ends the work at once and spoils the pair,
so a request meets at most one run of the plan on trial.

The outputs of the two plans are compared on the way. The candidate's steps were verified each by
itself where they were built; this sees a candidate that was loaded wrong.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from graphopt.executor.latency import Bucket
from graphopt.executor.plan import Plan, run_steps
from graphopt.executor.trial import Trial, TrialResult

ALONE_S = 0.25  # of work at a stretch
# Of the time, where other models have requests: a trial of 5% meets few of them, and 20 pairs of 16 ms
# still end within seconds.
BESIDE_SHARE = 0.05
DIFFERENCE_MAX = 1e-3  # of an output's scale; whole plans in float32 differ by some 1e-5

Inputs = Mapping[str, torch.Tensor]


class Traffic(Protocol):
    """What the driver must know of the requests; a `Slot` does."""

    def is_busy(self) -> bool:
        """Whether a request is running now."""

    def mark(self) -> object:
        """Something that is another object once a request was served."""


class IdleTrial:
    """Drives one trial; `run` may be called again and again until it has a verdict."""

    def __init__(
        self,
        trial: Trial,
        current: Plan,
        candidate: Plan,
        inputs: Sequence[Inputs],
        traffic: Traffic,
        monotonic_s: Callable[[], float],
    ) -> None:
        self._trial = trial
        self._plans = (current, candidate)
        self._traffic = traffic
        self._now_s = monotonic_s
        self._turn = 0
        # In which shape which plan ran last, with nothing in between
        self._ran: tuple[Bucket, bool] | None = None
        self._compared: set[Bucket] = set()
        self._inputs: dict[Bucket, list[Inputs]] = {}
        for captured in inputs:
            try:
                _, symbols = current.bind(captured)
            except Exception:  # the interface has changed since it was captured
                continue
            self._inputs.setdefault(tuple(symbols.values()), []).append(captured)

    def run(self, budget_s: float = math.inf) -> TrialResult | None:
        """Works until there is a verdict, a request comes, no captured input is left, or `budget_s`
        passed.

        None in all cases but the first.
        """
        until_s = self._now_s() + budget_s
        self._ran = None
        while (result := self._trial.judge()) is None:
            if not self._inputs or not self._run_pair():
                return self._trial.judge()
            if self._now_s() >= until_s:
                return self._trial.judge()
        return result

    def _run_pair(self) -> bool:
        """One pair of one bucket; False when a request came first, or nothing came of it."""
        bucket = min(self._inputs, key=self._trial.share)
        kept = self._inputs[bucket]
        captured = kept[self._turn % len(kept)]
        took_s = {False: 0.0, True: 0.0}
        answers: dict[bool, dict[str, torch.Tensor]] = {}
        begun = self._traffic.mark()
        block = self._trial.settings.block
        first = self._trial.is_candidate(self._turn * 2 * block)
        ran, self._ran = self._ran, None
        for is_candidate in (first, not first):
            # The last of a block counts, as with live requests; behind runs of its own plan, the first
            for _ in range(1 if ran == (bucket, is_candidate) else block):
                if self._is_disturbed(begun):
                    return False
                try:
                    took_s[is_candidate], answers[is_candidate] = self._time(is_candidate, captured)
                except Exception as error:
                    return self._failed(is_candidate, bucket, captured, error)
                ran = bucket, is_candidate
        if self._is_disturbed(begun):
            return False
        self._ran = ran
        self._turn += 1
        if bucket not in self._compared:
            self._compared.add(bucket)
            if difference := _difference(answers[False], answers[True]):
                self._trial.fail(f"{difference} for {bucket}")
                return False
        self._trial.add_pair(bucket, took_s[False], took_s[True])
        return True

    def _is_disturbed(self, begun: object) -> bool:
        """Whether a request has come since `begun`, or another plan, which ends the trial."""
        return self._traffic.is_busy() or self._traffic.mark() is not begun or self._trial.is_over

    def _time(self, is_candidate: bool, captured: Inputs) -> tuple[float, dict[str, torch.Tensor]]:
        plan = self._plans[is_candidate]
        with torch._C._InferenceMode(True):
            env, symbols = plan.bind(captured)
            start_s = self._now_s()
            run_steps(plan.steps, env, symbols)
            took_s = self._now_s() - start_s
            return took_s, {name: env[key] for name, key in plan.outputs}

    def _failed(
        self, is_candidate: bool, bucket: Bucket, captured: Inputs, error: Exception
    ) -> bool:
        """The candidate's failure ends the trial where the current plan has an answer."""
        if is_candidate:
            try:
                self._time(False, captured)
            except Exception:
                pass  # the input is the fault
            else:
                self._trial.fail(f"{type(error).__name__}: {error}")
                return False
        left = [other for other in self._inputs.pop(bucket) if other is not captured]
        if left:
            self._inputs[bucket] = left
        return bool(self._inputs)


def _difference(old: Mapping[str, torch.Tensor], new: Mapping[str, torch.Tensor]) -> str:
    """Where the floating outputs of two plans differ by more than rounding explains; empty if not."""
    for name, expected in old.items():
        given = new[name]
        if (given.dtype, given.shape) != (expected.dtype, expected.shape):
            return f"output {name!r} is {given.dtype}{list(given.shape)}"
        if not expected.is_floating_point() or not expected.numel():
            continue
        finite = torch.isfinite(expected)
        if not bool(finite.any()):
            continue
        scale = float(expected[finite].abs().max())
        error = float((given.double() - expected.double())[finite].abs().max())
        if not error <= DIFFERENCE_MAX * scale:  # NaN is no less either
            return f"output {name!r} differs by {error:.3g} where its scale is {scale:.3g}"
    return ""
