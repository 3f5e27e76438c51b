"""From a candidate plan to the last good one, and back: what trial, guard and hysteresis decide, done.

    idle -- consider --> trial -- better --> watch -- enough requests --> idle, the plan is good
                           |                 |   ^
                           |               alarm | not worse: the host is slower, new baseline
                           |                 v   |
                        refused           confirmation -- last good is faster --> rolled back

A shape in which the plan was never compared starts a confirmation too. A candidate whose cost is
known is published without a trial, and watched all the same. A plan that fails a request which the
other plan serves is out at once (`Slot`), and this takes note of it.

One `Switch` a model; every method is called from one thread, the background. It makes no events and
starts nothing: it returns frozen records, and is to be called again when `Slot.wake` says so, or from
time to time while `phase` is not idle.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from graphopt.executor.guard import Alarm, Baseline, Guard, Hysteresis, baseline_of
from graphopt.executor.idle_trial import IdleTrial, Inputs
from graphopt.executor.latency import Bucket, Sample
from graphopt.executor.plan import Plan
from graphopt.executor.publish import Slot
from graphopt.executor.trial import ACCEPTANCE, CONFIRMATION, Trial, TrialResult, TrialSettings

PROBATION_REQUESTS = 500  # under watch until a plan counts as good: ten times what a 2x alarm takes

Phase = Literal["idle", "trial", "watch", "confirmation"]
Decision = Literal["published", "refused", "confirmed", "rolled_back", "kept", "cancelled"]
Cause = Literal["known_cost", "trial", "watch", "fault", "superseded"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One decision about the speed of a plan, with its figures; what is absent is None.

    Attributes:
        decision: published (it is watched now), refused (no gain, slower, or it failed a request of
            its trial), confirmed (good from now on), rolled_back, kept (an alarm was the host's),
            cancelled (a delta or another plan came first).
        cause: what it rests on.
        plan: the id of the plan that was judged.
        other: the id of the plan it was compared with or replaced by.
        key: the candidate's, as given to `consider`.
        reason: for people.
        trial: of the trial or confirmation behind it.
        alarm: of the watch.
        backoff_s: how long the candidate is not tried again.
    """

    decision: Decision
    cause: Cause
    plan: str
    other: str
    key: Hashable
    reason: str
    trial: TrialResult | None = None
    alarm: Alarm | None = None
    backoff_s: float | None = None

    def fields(self) -> dict[str, Any]:
        """As JSON values, for an event; absent figures are left out."""
        found: dict[str, Any] = {
            "plan_id": self.plan,
            "other_plan_id": self.other,
            "cause": self.cause,
            "reason": self.reason,
        }
        if self.trial is not None:
            found["trial"] = {
                name: value for name, value in asdict(self.trial).items() if value is not None
            }
        if self.alarm is not None:
            found["alarm"] = asdict(self.alarm)
        if self.backoff_s is not None:
            found["backoff_s"] = self.backoff_s
        return found


class Switch:
    """The judge of one model's plans."""

    def __init__(
        self,
        slot: Slot,
        hysteresis: Hysteresis,
        monotonic_s: Callable[[], float],
        trial: TrialSettings = ACCEPTANCE,
        confirmation: TrialSettings = CONFIRMATION,
        probation_requests: int = PROBATION_REQUESTS,
    ) -> None:
        self.phase: Phase = "idle"
        self._slot = slot
        self._hysteresis = hysteresis
        self._now_s = monotonic_s
        self._settings = trial
        self._confirmation = confirmation
        self._probation_requests = probation_requests
        self._paused: tuple[Hashable, Plan, Plan, Guard] | None = None
        self._said: list[Outcome] = []  # decided in `consider`, told by the next `step`
        # Of the plan that was published last for its speed
        self._switched_revision: int | None = None
        self._key: Hashable = None
        self._current: Plan | None = (
            None  # what the plan on trial, or under alarm, is compared with
        )
        self._plan: Plan | None = None  # the one that is judged
        self._trial: Trial | None = None
        self._idle: IdleTrial | None = None
        self._guard: Guard | None = None
        self._alarm: Alarm | None = None

    def consider(
        self,
        candidate: Plan,
        key: Hashable,
        *,
        expected: Plan,
        known: str = "",
        weights: Mapping[Bucket, float] | None = None,
        latency_s: float | None = None,
    ) -> str:
        """Begins the trial of a verified candidate against the published plan `expected`.

        Args:
            candidate: of the same revision, warm.
            key: names what it is made of, for back-off; equal for equal candidates.
            expected: the plan it was derived from.
            known: why it is known to be faster without a trial; if so it is published and watched.
            weights: traffic by bucket; by default what the trial sees.
            latency_s: what a request takes now, for a trial of fitting length.

        Returns an empty string when that was done, otherwise why not now. The next `step` tells of a
        publication.
        """
        if self.phase != "idle" and (lost := self._superseded()) is not None:
            self._said.append(lost)  # a delta came since the last step
        if self.phase != "idle":
            return f"another plan is in {self.phase}"
        # What a delta published has nobody to flap with
        dwells = expected.revision == self._switched_revision
        if why := self._hysteresis.why_not(key, self._now_s(), dwells=dwells):
            return why
        self._key, self._plan, self._current = key, candidate, expected
        if known:
            if not self._slot.publish(candidate, expected=expected):
                self._clear()
                return "another plan was published"
            self._switched(candidate)
            self._said.append(
                Outcome("published", "known_cost", candidate.id, expected.id, key, known)
            )
            self._watch(None)
            return ""
        settings = self._settings
        if latency_s is not None:
            settings = settings.for_requests_of(latency_s)
        trial = Trial(expected.id, candidate.id, settings, weights)
        if not self._slot.begin_trial(trial, candidate, expected):
            self._clear()
            return "another plan was published"
        self.phase, self._trial = "trial", trial
        return ""

    def step(
        self, captured: Sequence[Inputs] = (), budget_s: float = math.inf
    ) -> tuple[Outcome, ...]:
        """Takes in what requests took and decides what can be decided.

        Args:
            captured: inputs to try plans on while no request runs; works on them until there is a
                verdict or a request comes.
            budget_s: seconds after which the work on them stops.
        """
        samples = self._slot.latencies.drain()
        outcomes = [*self._said, *self._take_faults()]
        self._said.clear()
        if self.phase == "idle":
            self._resume()
            return tuple(outcomes)
        if (lost := self._superseded()) is not None:
            return (*outcomes, lost)
        if self.phase == "watch":
            outcome = self._step_watch(samples)
        else:
            result = self._judge(captured if not samples else (), budget_s)
            if result is None:
                outcome = None
            elif self.phase == "trial":
                outcome = self._end_trial(result)
            else:
                outcome = self._end_confirmation(result)
        return tuple(outcomes) if outcome is None else (*outcomes, outcome)

    def is_away(self, key: Hashable) -> bool:
        """Whether a candidate failed on performance and may not be tried yet."""
        return self._hysteresis.is_away(key, self._now_s())

    @property
    def watched_requests(self) -> int:
        """Requests that the plan under watch has served; 0 in other phases."""
        return self._guard.requests if self._guard is not None and self.phase == "watch" else 0

    def pause(self) -> None:
        """Suspends a watch, so that another candidate may be tried against the plan under it.

        Without a better one the watch goes on where it was; the last good plan stays what it is.
        """
        if self.phase == "watch":
            plan, current = self._both()
            assert self._guard is not None
            self._paused = (self._key, plan, current, self._guard)
            self._clear()

    def _resume(self) -> None:
        """Goes on with a watch that was suspended, if its plan is still the published one."""
        paused, self._paused = self._paused, None
        if paused is not None and self._slot.plan is paused[1]:
            self._key, self._plan, self._current, self._guard = paused
            self._guard.rearm()
            self.phase = "watch"
            self._slot.watch(paused[1])

    def cancel(self, reason: str) -> None:
        """Ends a trial, as before the model is unloaded; a plan under watch stays published."""
        if self._trial is not None:
            self._trial.cancel(reason)
            self._slot.end_trial()
        self._clear()

    # -- trial

    def _judge(self, captured: Sequence[Inputs], budget_s: float) -> TrialResult | None:
        assert self._trial is not None
        plan, current = self._both()
        result = self._trial.judge()
        if result is not None or not captured or self._slot.is_busy():
            return result
        if self._idle is None:
            old, new = (current, plan) if self.phase == "trial" else (plan, current)
            self._idle = IdleTrial(self._trial, old, new, captured, self._slot, self._now_s)
        return self._idle.run(budget_s)

    def _end_trial(self, result: TrialResult) -> Outcome:
        plan, current, key, now_s = *self._both(), self._key, self._now_s()
        if result.verdict == "better" and self._slot.publish(plan, expected=current):
            self._switched(plan)
            self._paused = None
            self._watch(result)
            return Outcome("published", "trial", plan.id, current.id, key, result.reason, result)
        self._slot.end_trial()
        self._clear()
        self._resume()
        if result.verdict in ("better", "cancelled"):
            return Outcome(
                "cancelled", "superseded", plan.id, current.id, key, result.reason, result
            )
        cause: Cause = "fault" if result.verdict == "failed" else "trial"
        backoff_s = self._hysteresis.failed(key, now_s)
        reason = f"{result.verdict}: {result.reason}"
        return Outcome(
            "refused", cause, plan.id, current.id, key, reason, result, backoff_s=backoff_s
        )

    # -- watch

    def _watch(self, result: TrialResult | None) -> None:
        """Begins the watch of the plan that was just published."""
        plan, current = self._both()
        found: dict[Bucket, Baseline] = {}
        ratios = {}
        if result is not None:
            for line in result.buckets:
                ratios[line.bucket] = line.ratio
                found[line.bucket] = Baseline(line.candidate_s, line.spread)
        for bucket, statistics in self._slot.latencies.by_bucket(current.id).items():
            baseline = baseline_of(statistics, ratios.get(bucket, 1.0))
            if baseline is not None:
                found[bucket] = baseline  # under the load there is: better than an idle trial's
        self._guard = Guard(plan.id, found)
        self._trial = self._idle = None
        self.phase = "watch"
        self._slot.watch(plan)

    def _step_watch(self, samples: Sequence[Sample]) -> Outcome | None:
        plan, current = self._both()
        assert self._guard is not None
        for plan_id, bucket, latency_s in samples:
            if plan_id != plan.id:
                continue
            alarm = self._guard.observe(bucket, latency_s)
            if alarm is not None and self._confirm(alarm):
                return None
        if self._guard.take_newcomer() is not None and self._confirm(None):
            return None
        if self._guard.requests < self._probation_requests:
            return None
        key, requests = self._key, self._guard.requests
        if not self._slot.confirm(plan):
            return self._superseded()
        self._hysteresis.succeeded(key)
        self._clear()
        reason = f"no lasting slow-down in {requests} requests"
        return Outcome("confirmed", "watch", plan.id, current.id, key, reason)

    def _confirm(self, alarm: Alarm | None) -> bool:
        """Begins the trial of the last good plan against the one under alarm, or in a new shape."""
        plan, good = self._both()[0], self._slot.last_good
        if good is plan or good.revision != plan.revision:
            return False
        trial = Trial(plan.id, good.id, self._confirmation)
        if not self._slot.begin_trial(trial, good, expected=plan):
            return False
        self._trial, self._idle, self._current, self._alarm = trial, None, good, alarm
        self.phase = "confirmation"
        return True

    def _end_confirmation(self, result: TrialResult) -> Outcome:
        plan, good = self._both()
        key, alarm, now_s = self._key, self._alarm, self._now_s()
        if result.verdict == "better" and self._slot.roll_back(plan) is not None:
            self._clear()
            backoff_s = self._hysteresis.reversed(key, now_s)
            return Outcome(
                "rolled_back",
                "watch",
                plan.id,
                good.id,
                key,
                result.reason,
                result,
                alarm,
                backoff_s,
            )
        self._slot.end_trial()
        assert self._guard is not None
        if result.ratio is None or result.ratio < 1.0 - result.margin:
            self._guard.rearm()  # likely, not certain: the next alarm asks again
        else:
            lines = result.buckets
            now = {line.bucket: Baseline(line.current_s, line.spread) for line in lines}
            if alarm is not None and alarm.bucket in now:
                # What requests took, which may be more than captured inputs on an idle host
                seen = now[alarm.bucket]
                least_s = max(seen.median_s, alarm.observed_s)
                now[alarm.bucket] = Baseline(least_s, seen.log_spread)
            self._guard.rebase(now)
        self._trial = self._idle = self._alarm = None
        self.phase = "watch"
        self._slot.watch(plan)
        reason = f"{good.id} is not faster with certainty: {result.reason}"
        return Outcome("kept", "watch", plan.id, good.id, key, reason, result, alarm)

    # -- helpers

    def _switched(self, plan: Plan) -> None:
        self._hysteresis.switched(self._now_s())
        self._switched_revision = plan.revision

    def _take_faults(self) -> list[Outcome]:
        found = []
        while self._slot.faults:
            fault = self._slot.faults.popleft()
            key, backoff_s = None, None
            if self._plan is not None and self._plan.id == fault.plan:
                key = self._key
                backoff_s = self._hysteresis.reversed(key, self._now_s())
                self._clear()
            found.append(
                Outcome(
                    "rolled_back",
                    "fault",
                    fault.plan,
                    fault.good,
                    key,
                    fault.reason,
                    backoff_s=backoff_s,
                )
            )
        return found

    def _superseded(self) -> Outcome | None:
        """What is to be said when the plan that is judged, or judged against, is published no more."""
        plan, current = self._both()
        expected = current if self.phase == "trial" else plan
        if self._slot.plan is expected:
            return None
        key, phase = self._key, self.phase
        self._clear()
        return Outcome(
            "cancelled",
            "superseded",
            plan.id,
            self._slot.plan.id,
            key,
            f"another plan in its {phase}",
        )

    def _both(self) -> tuple[Plan, Plan]:
        assert self._plan is not None
        assert self._current is not None
        return self._plan, self._current

    def _clear(self) -> None:
        """Forgets the plans: a record must not keep one in memory."""
        self.phase = "idle"
        self._key = self._plan = self._current = None
        self._trial = self._idle = self._guard = self._alarm = None
