"""The pursuit of one proposed plan: from its first missing artifact to the decision about it.

What is missing is built and loaded, the plan put together and warmed, compared with the published
one step by step where that is all there is to ask, else tried, and published under watch. A coroutine
of the background thread: it waits for the builder's answers and for the switch's verdict, and closed
on the way it leaves behind what was known before.

Deliberately absent: which plans to pursue (`prospects`), and when a plan is faster (the switch).
"""

from collections.abc import Callable, Set
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial

from graphopt.analysis.facts import Facts
from graphopt.engine.assembly import overlays_of
from graphopt.engine.builder_link import BuilderLink
from graphopt.engine.costs import Costs
from graphopt.engine.findings import (
    Findings,
    State,
    judged,
    with_figures,
    with_keys,
)
from graphopt.engine.gather import REASONS_KEPT, Gathering, gather
from graphopt.engine.improve import FusedStage, Waiting
from graphopt.engine.kinds import kind_of
from graphopt.engine.live import LiveModel
from graphopt.engine.pins import Pins
from graphopt.engine.precedent import has_run, has_won, is_alike, nodes_of
from graphopt.engine.prospects import Proposal, Prospects
from graphopt.engine.step_comparison import compare_steps
from graphopt.engine.supply import Supply
from graphopt.engine.traffic import latency_of
from graphopt.engine.warming import look_ahead, warm
from graphopt.executor.arrangement import Arrangement, ArtifactKey, Runs
from graphopt.executor.beginnings import Beginnings
from graphopt.executor.step_trial import TierAndKey
from graphopt.executor.switch import Outcome
from graphopt.tables import bytes_word

RETRY_S = 0.1  # until a switch that is not ready is asked again
COVERED_MIN = (
    0.5  # of the nodes that a plan wants on a runtime: with fewer built it is another plan
)
WATCHED_MIN = 50  # requests after which a plan under watch may give way to the next trial
UNWATCHED_S = 1.0  # or so long, where there is hardly any traffic


@dataclass(frozen=True, slots=True)
class Means:
    """What campaigns work with: one of each for all models of a process."""

    fused: FusedStage
    link: BuilderLink | None
    supply: Supply
    pins: Pins
    costs: Costs
    in_use: Callable[[], set[ArtifactKey]]  # artifacts that any model's plans run on or wait for
    others_serve: Callable[[LiveModel], bool]  # whether models other than this one have requests
    now_s: Callable[[], float]


class Pursuit:
    """One proposed plan on one revision."""

    def __init__(
        self,
        model: LiveModel,
        facts: Facts,
        means: Means,
        findings: Findings,
        prospects: Prospects,
        plan: Proposal,
    ) -> None:
        """Does nothing yet.

        Args:
            model: whose plan it is.
            facts: of the revision that the plan was proposed for.
            means: of all campaigns.
            findings: about the model, for what becomes of it.
            prospects: what is known about the plan from before.
            plan: as proposed.
        """
        self._model = model
        self._facts = facts
        self._means = means
        self._findings = findings
        self._backend: str = plan["backend"]  # several, where its regions are on several
        self._keyed = prospects.keyed(plan)
        self._before = prospects.precedent(plan)
        self._finding = prospects.fresh(plan)
        # Artifacts to be kept in memory for it
        self.wanted = frozenset(key for _, key in self._keyed)
        self._gathering = Gathering(model.settings.limits(model.name).memory_bytes_max)
        self._verdict: Future[Outcome] | None = None
        self._judged: tuple[str, Runs] = ("", ())  # the plan that the switch was given: id, runs
        self._has_part_published = False  # regions of this way of running, when it was given

    def course(self) -> Waiting:
        """Builds the plan and has it judged; every end of it is a finding."""
        pin = self._means.pins.get(self._model.name)
        is_of_tiers = pin is not None and pin.tiers is not None  # some may harm the builder
        if is_of_tiers and self._is_held():
            return
        try:
            self._findings.note(self._finding)
            begun = self._model.beginnings(self._facts, self._model.slot.plan)
            if not (yield from self._gather(begun)):
                return
            old = self._model.arrangement_of(self._facts)
            new = self._put_together(old)
            if new is None:
                return
            if old.plan is not begun.plan:
                begun = self._model.beginnings(self._facts, old.plan)
            if not self._warm(new, begun):
                return
            new, known = yield from self._compare(old, new, begun)
            del begun  # a judgement takes long, and its values are large
            yield from self._judge(old, new, known)
        finally:
            self._gathering.take_back()
            self._verdict = None
            self._put_back()

    def take(self, outcome: Outcome) -> None:
        """A decision of the switch about the model's plans, which need not be about this one.

        A publication is noted even where the pursuit has ended since: it happened.
        """
        # By plan: the end of a watch may be of the same key, and is told with what came after it
        plan_id, runs = self._judged
        if outcome.plan != plan_id:
            return
        self._judged = ("", ())
        finding = judged(self._finding, outcome, runs=self._has_part_published)
        if outcome.decision == "published":
            self._findings.choose(finding)
            # By a trial, or step by step: what was not proven is among the steps that were compared
            supply = self._means.supply
            supply.prove(finding.family, finding.kinds)
            # Now, and not when all proposals were looked at: the process may end before
            supply.remember(self._model.name, self._facts, finding.label, runs)
        elif self._verdict is not None:
            self._findings.note(finding)
        if self._verdict is not None:
            self._verdict.set_result(outcome)

    # -- the stages

    def _gather(self, begun: Beginnings) -> Waiting:
        """Whether everything that can be built is there, or has been found not to be possible."""
        assert self._means.link is not None
        gathered = self._gathering
        yield from gather(
            self._model, self._facts, self._means.link, self._means.supply, self._keyed, gathered,
            partial(look_ahead, begun, self._before),
        )  # fmt: skip
        self._finding = replace(
            self._finding, build_s=gathered.build_s, resident_bytes=gathered.resident_bytes,
            reason="; ".join(gathered.reasons[:REASONS_KEPT]),
        )  # fmt: skip
        if gathered.is_too_large:
            yield from self._give_up()
            return False
        if not gathered.is_decided:
            self._findings.note(self._finding)  # still `building`: the next campaign asks again
            return False
        return True

    def _give_up(self) -> Waiting:
        """Says that a plan holds too much memory, and lets go of what no other plan needs.

        One artifact at a time, as `Supply.trim` does.
        """
        gathered = self._gathering
        least = "" if gathered.loaded == self.wanted else "at least "
        self._end(
            "failed",
            f"its artifacts hold {least}{bytes_word(gathered.resident_bytes)}, above "
            f"memory_bytes_max of {bytes_word(gathered.bytes_max or 0)}",
        )
        self.wanted = frozenset()
        for key in gathered.loaded:
            if key not in self._means.in_use():
                self._means.supply.release(key)
                yield None

    def _put_together(self, old: Arrangement) -> Arrangement | None:
        """The plan as the builder's answers allow it; None when it is not to be tried."""
        overlays = overlays_of(self._facts, self._keyed, self._means.supply.loaded, old.overlays)
        new = Arrangement.of(old.base, overlays)
        if new.plan.id == old.plan.id and overlays:
            finding = replace(self._finding, state="chosen")
            self._findings.choose(with_figures(finding, self._before))
            return None
        runs = {piece.blocks for piece, _ in self._keyed}
        covered = sum(len(overlay.step.nodes) for overlay in overlays)
        if covered < COVERED_MIN * sum(nodes_of(self._facts, run) for run in runs):
            self._end("failed")
            return None
        return None if self._is_held() else new

    def _warm(self, new: Arrangement, begun: Beginnings) -> bool:
        """Whether the plan runs."""
        ran, reason = warm(new.plan, begun)
        if reason:
            fields = {
                "graph": self._model.name, "revision": self._finding.revision,
                "tier": self._backend, "plan_id": new.plan.id, "stage": "load", "reason": reason,
            }  # fmt: skip
            self._model.settings.events("plan.refused", fields)
            self._end("failed", reason)
        elif not ran:
            self._end("building", "no request to try it on")
        return bool(ran) and not reason

    def _compare(self, old: Arrangement, new: Arrangement, begun: Beginnings) -> Waiting:
        """The plan to be judged, and why it needs no trial; empty when it does.

        It is `new`, or without those of its regions that have still to win something.
        """
        proven = self._means.supply.proven(self._finding.family)
        if has_won(self._finding, self._before, proven):
            return new, "it won with regions of this kind before"
        if not is_alike(self._facts, self._finding, self._before, self._keyed, proven):
            return new, ""
        won = [
            (piece, key) for piece, key in self._keyed
            if kind_of(self._facts, piece.blocks) in proven
        ]  # fmt: skip
        proven_steps = {(piece.backend, key[0]) for piece, key in won}
        known = yield from compare_steps(
            self._model, begun, new.plan, proven_steps,
            self._means.others_serve, self._means.now_s,
        )  # fmt: skip
        if known:
            return new, known
        part = _without_others(old, new, proven_steps)
        if part is None:
            return new, ""
        self._keyed = won
        self._finding = with_keys(self._finding, self._facts, won)
        return part, "it won with regions of these kinds before, and is without the new ones"

    def _judge(self, old: Arrangement, new: Arrangement, known: str) -> Waiting:
        """Has the switch decide. `known`: why no trial is needed."""
        model, switch, chosen = self._model, self._model.switch, self._findings.chosen
        before = self._before
        self._has_part_published = (
            before is not None
            and (before.label, before.state) == (self._finding.label, "chosen")
            and bool(old.overlays)
        )
        against = chosen.label if chosen is not None and old.overlays else ""
        finding = replace(self._finding, state="on trial", against=against)
        finding = self._finding = with_figures(finding, before)
        self._findings.note(finding)
        model.forget_candidates()  # those that lost
        model.introduce(new)
        waited_s, latency_s = 0.0, None if known else latency_of(model, self._findings)
        while why := switch.consider(
            new.plan, finding.key, expected=old.plan, known=known, latency_s=latency_s
        ):
            is_away = switch.is_away(finding.key)
            stands: State = "chosen" if self._has_part_published else "no gain"
            self._findings.note(
                replace(finding, state=stands if is_away else "on trial", reason=why)
            )
            if model.slot.plan is not old.plan or is_away:
                return
            if switch.phase == "watch" and (
                switch.watched_requests >= WATCHED_MIN or waited_s >= UNWATCHED_S
            ):
                switch.pause()
                continue
            waited_s += RETRY_S
            yield RETRY_S
        # Not the plan itself: nobody else may keep it
        self._judged, self._verdict = (new.plan.id, new.runs()), Future()
        model.attend()
        yield self._verdict

    # -- what is found

    def _is_held(self) -> bool:
        """Whether a pin is against the plan's tier, which is then noted."""
        pin = self._means.pins.get(self._model.name)
        if pin is None or all(pin.allows(piece.backend) for piece, _ in self._keyed):
            return False
        reason = f"pinned by {pin.owner}: {pin.reason}"
        held = replace(self._finding, state="held", reason=reason)
        self._findings.note(with_figures(held, self._before))
        return True

    def _end(self, state: State, reason: str = "") -> None:
        self._findings.note(
            replace(self._finding, state=state, reason=reason or self._finding.reason)
        )

    def _put_back(self) -> None:
        """What ran is still known to, where nothing was concluded about what was to take its place."""
        before, now = self._before, self._findings.get(self._finding.label)
        is_itself = before is not None and before.label == self._finding.label
        if before is None or not is_itself or not has_run(before) or now is None:
            return
        if now.state in ("building", "on trial"):
            self._findings.note(before)


def _without_others(
    old: Arrangement, new: Arrangement, proven: Set[TierAndKey]
) -> Arrangement | None:
    """`new` without the regions that are not proven; None where it has nothing over `old` then."""
    kept = [each for each in new.overlays if (each.step.tier, each.step.key) in proven]
    part = Arrangement.of(new.base, kept)
    before, after = set(map(id, old.overlays)), set(map(id, kept))
    return part if before < after else None
