"""A campaign: the way of one revision from its live-path plan to the best plan of this host.

First the choice remembered for this very graph, then the `fused` steps; else the builder proposes
plans, and one after the other is built where artifacts are missing, loaded, put together, warmed,
tried against the published plan and published under watch. After a delta that left most of what ran
in place the `fused` steps come second: by then the runtime has what it touched. What is nearly there
comes before what is to be built whole. A coroutine of the background thread: it
waits for the builder's answers and for verdicts, and it is closed when a delta makes another
revision. Artifacts and findings outlive it, so the next revision's campaign does only what changed.

Deliberately absent: what is worth proposing (the planner), and when a plan is faster (the switch).
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from graphopt.analysis.facts import Facts
from graphopt.engine.assembly import Keyed, artifact_key, overlays_of, pieces_of
from graphopt.engine.builder_link import BuilderLink
from graphopt.engine.completion import completed
from graphopt.engine.costs import Costs
from graphopt.engine.findings import (
    Finding,
    Findings,
    State,
    judged,
    with_figures,
    with_keys,
)
from graphopt.engine.gather import REASONS_KEPT, Gathering, gather
from graphopt.engine.improve import FusedStage, Waiting
from graphopt.engine.live import LiveModel, MovedOnError
from graphopt.engine.pins import Pins
from graphopt.engine.precedent import NEAR, has_run, has_won, is_alike, nodes_of, share_of
from graphopt.engine.step_comparison import compare_steps
from graphopt.engine.supply import Supply
from graphopt.engine.traffic import hot_shapes, request_seconds
from graphopt.engine.warming import look_ahead, warm
from graphopt.errors import BuilderError
from graphopt.executor.arrangement import Arrangement, ArtifactKey, Overlay
from graphopt.executor.step_trial import Beginnings
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


class Campaign:
    """One revision's campaign. `step` is called on the background thread until `is_over`."""

    def __init__(
        self, model: LiveModel, means: Means, findings: Findings, *, restores: bool = False
    ) -> None:
        """`restores`: a pin from before this process holds the model, and its plan may come back."""
        self.model = model
        self.findings = findings
        self.is_over = False
        self._restores = restores
        self._means = means
        self.revision, self._facts = model.at_hand()
        self.restless = model.churn.restless()
        self._limits = model.settings.limits(model.name)
        self._keys: dict[Hashable, Keyed] = {}  # of the proposed plans, by label and runs
        self._course = self._run()
        self._waits_for: Future[Any] | None = None
        self._before: Finding | None = None  # of what is pursued: that it ran until now
        self._judged: tuple[Finding, bool] | None = None  # what the switch has, and whether it runs
        self._verdict: Future[Outcome] | None = None
        self._gathering = Gathering()  # for the plan at hand
        self.wanted: frozenset[ArtifactKey] = frozenset()  # to be kept in memory for it

    def step(self, wake: Callable[[], None]) -> float | None:
        """Goes on as far as possible.

        Returns seconds after which to call again; None when `wake` will be called, or it is over.
        """
        value: Any = None
        while not self.is_over:
            if self.model.revision != self.revision:
                self.close()
                return None
            if self._waits_for is not None:
                if not self._waits_for.done():
                    return None
                waited, self._waits_for = self._waits_for, None
                value = waited
            try:
                asked = self._resume(value)
            except StopIteration:
                self.is_over, self.wanted = True, frozenset()
                return None
            except MovedOnError:
                self.close()
                return None
            except Exception:  # told by whoever runs the step; nobody must wait for the rest
                self.close()
                raise
            value = None
            if isinstance(asked, Future):
                self._waits_for = asked
                asked.add_done_callback(lambda _: wake())
            else:
                return 0.0 if asked is None else asked
        return None

    def take(self, outcome: Outcome) -> None:
        """A decision of the switch about this model's plans, of which one may be waited for.

        A publication is noted even where a delta has ended the campaign since: it happened.
        """
        if self._judged is None or outcome.key != self._judged[0].key:
            return
        finding = judged(self._judged[0], outcome, runs=self._judged[1])
        if outcome.decision == "published":
            self.findings.choose(finding)
            # By a trial, or step by step: what was not proven is among the steps that were compared
            self._means.supply.prove(finding.family, finding.structures)
        elif not self.is_over:
            self.findings.note(finding)
            self._put_back()
        self._judged = None
        if self._verdict is not None and not self._verdict.done():
            self._verdict.set_result(outcome)

    def close(self) -> None:
        """Ends it where it is."""
        if not self.is_over:
            self.is_over, self.wanted = True, frozenset()
            self._course.close()
            self._put_back()
            for future in self._gathering.asked:
                future.cancel()

    def _put_back(self) -> None:
        """What ran is still known to, where nothing was concluded about what was to take its place."""
        before = self._before
        now = self.findings.get(before.label) if before is not None else None
        if before is not None and now is not None and now.state in ("building", "on trial"):
            self.findings.note(before)

    def _resume(self, done: Any) -> Any:
        if not isinstance(done, Future):
            return self._course.send(None)
        error = done.exception() if not done.cancelled() else BuilderError("taken back")
        return self._course.throw(error) if error is not None else self._course.send(done.result())

    # -- the course

    def _run(self) -> Waiting:
        link, facts = self._means.link, self._facts
        has_runtimes = link is not None and bool(self._means.supply.versions())
        # First, because it needs no builder: a restart is back on its plan before that has started
        recalled = False
        if has_runtimes and not self.model.arrangement_of(facts).overlays:
            recalled = self._recall(facts)
        # After a delta what is at hand but for a layer or two is there before the `fused` steps were
        waits = has_runtimes and not recalled and self.findings.chosen is not None
        if not waits:
            yield from self._prepare_fused()
        if link is None or not has_runtimes:
            return
        if recalled and not hot_shapes(self.model.slot).buckets:
            return
        plans = yield from self._propose(link, facts)
        is_blind = bool(facts.graph.symbols) and not self.model.requests()
        for plan in self._in_order(plans, facts):
            if waits and not self._is_at_hand(plan, facts):
                waits = False
                yield from self._prepare_fused()
            has_runtime = bool(self.model.arrangement_of(facts).overlays)
            if is_blind and has_runtime and not self._is_chosen(plan):
                break  # in what shapes to compare the others, only requests can tell
            part = self._completed(plan, facts)
            if part is not None:
                yield from self._pursue(part, facts)
            if self._is_open(plan, facts):
                yield from self._pursue(plan, facts)
        if waits:
            yield from self._prepare_fused()
        self._conclude(facts)

    def _prepare_fused(self) -> Waiting:
        if self._may_prepare("fused"):
            yield from self._means.fused.course(self.model)

    def _propose(self, link: BuilderLink, facts: Facts) -> Waiting:
        """The plans that the builder proposes; none when it cannot."""
        shapes = hot_shapes(self.model.slot)
        link.set_requests(self.model.name, self.model.requests())
        document = {
            "backends": list(self._means.supply.versions()),
            "threads": self._limits.budget.each,
            "streams": self._limits.budget.workers,
            "buckets": list(shapes.buckets),
            "buckets_share": shapes.share,
            "restless": sorted(self.restless),
            "latency_s": self._latency_s(),
        }
        try:
            proposal = yield link.propose(self.model.name, self.revision, document)
        except BuilderError as error:
            self.model.settings.events(
                "builder.failed", {"job": f"propose {self.model.name}", "message": str(error)}
            )
            return []
        return proposal["plans"]

    def _recall(self, facts: Facts) -> bool:
        """Publishes what was chosen for this very graph before, if its artifacts are at hand.

        Under watch, as any plan whose cost is known.
        """
        chosen = self._means.supply.recall(self.model.name, facts, self._limits)
        if chosen is None:
            return False
        label, keyed = chosen
        if any(not self.restless.isdisjoint(run) for run in _runs(keyed)):
            return False  # the next edit would drop it
        overlays = overlays_of(facts, keyed, self._means.supply.loaded)
        if not overlays or not self._may_prepare(keyed[0][0].backend):
            return False
        old = self.model.arrangement_of(facts)
        new = Arrangement.of(old.base, overlays)
        finding = Finding(label, "chosen", "chosen before for this graph", self.revision)
        finding = with_keys(finding, facts, keyed)
        if warm(new.plan, Beginnings(old.plan, self.model.inputs_of_shapes()))[1]:
            return False
        self.model.introduce(new)
        if self.model.switch.consider(
            new.plan, finding.key, expected=old.plan, known=finding.reason
        ):
            return False
        self.model.attend()  # to have it told
        self.findings.choose(with_figures(finding, self.findings.get(label)))
        return True

    def _pursue(self, plan: Mapping[str, Any], facts: Facts) -> Waiting:
        """Builds one proposed plan and has it judged."""
        before = self._precedent(plan)
        finding = Finding(plan["label"], "building", revision=self.revision, family=plan["family"])
        keyed = self._keyed(facts, plan)
        finding = with_keys(finding, facts, keyed)
        self.wanted = frozenset(key for _, key in keyed)
        pin = self._means.pins.get(self.model.name)
        is_of_tiers = pin is not None and pin.tiers is not None  # some may harm the builder
        if is_of_tiers and self._is_held(finding, plan["backend"], before):
            return
        self._put_back()  # where nothing came of the one before
        is_itself = before is not None and before.label == finding.label and has_run(before)
        self._before = before if is_itself else None
        self.findings.note(finding)
        gathered = self._gathering = Gathering(self._limits.memory_bytes_max)
        assert self._means.link is not None
        begun = Beginnings(self.model.slot.plan, self.model.inputs_of_shapes())
        yield from gather(
            self.model, facts, self._means.link, self._means.supply, keyed, gathered,
            partial(look_ahead, begun, before),
        )  # fmt: skip
        finding = replace(
            finding, build_s=gathered.build_s, resident_bytes=gathered.resident_bytes,
            reason="; ".join(gathered.reasons[:REASONS_KEPT]),
        )  # fmt: skip
        if gathered.is_too_large:
            yield from self._give_up(finding, keyed, gathered)
            return
        if not gathered.is_decided:
            self.findings.note(finding)  # still `building`: the next campaign asks again
            return
        old = self.model.arrangement_of(facts)
        overlays = overlays_of(facts, keyed, self._means.supply.loaded, old.overlays)
        new = Arrangement.of(old.base, overlays)
        if new.plan.id == old.plan.id and overlays:
            self.findings.choose(with_figures(replace(finding, state="chosen"), before))
            return
        if _nodes(overlays) < COVERED_MIN * sum(nodes_of(facts, run) for run in _runs(keyed)):
            self.findings.note(replace(finding, state="failed"))
            return
        if self._is_held(finding, plan["backend"], before):
            return
        if old.plan is not begun.plan:
            begun = Beginnings(old.plan, begun.inputs)
        ran, reason = warm(new.plan, begun)
        if reason:
            self._refuse(plan["backend"], new, reason)
        if reason or not ran:
            state: State = "failed" if reason else "building"
            reason = reason or "no request to try it on"
            self.findings.note(replace(finding, state=state, reason=reason))
            return
        proven, known = self._means.supply.proven(finding.family), ""
        if has_won(finding, before, proven):
            known = "it won with regions of this structure before"
        elif is_alike(facts, finding, before, keyed, proven):
            known = yield from compare_steps(
                self.model, begun, new.plan, {(plan["backend"], key) for key in proven},
                self._means.others_serve, self._means.now_s,
            )  # fmt: skip
        del begun  # a judgement takes long, and its values are large
        runs = (
            before is not None
            and (before.label, before.state) == (finding.label, "chosen")
            and bool(old.overlays)
        )
        chosen = self.findings.chosen
        against = chosen.label if chosen is not None and old.overlays else ""
        finding = with_figures(replace(finding, state="on trial", against=against), before)
        yield from self._judge(finding, old, new, known=known, runs=runs)

    def _give_up(self, finding: Finding, keyed: Keyed, gathered: Gathering) -> Waiting:
        """Says that a plan holds too much memory, and lets go of what no other plan needs.

        One artifact at a time, as `Supply.trim` does.
        """
        keys = {key for _, key in keyed}
        least = "" if gathered.loaded == keys else "at least "
        reason = (
            f"its artifacts hold {least}{bytes_word(gathered.resident_bytes)}, above "
            f"memory_bytes_max of {bytes_word(gathered.bytes_max or 0)}"
        )
        self.findings.note(replace(finding, state="failed", reason=reason))
        self.wanted = frozenset()
        for key in gathered.loaded:
            if key not in self._means.in_use():
                self._means.supply.release(key)
                yield None

    def _is_held(self, finding: Finding, backend: str, before: Finding | None) -> bool:
        """Whether a pin is against a plan on `backend`, which is then noted."""
        pin = self._means.pins.get(self.model.name)
        if pin is None or pin.allows(backend):
            return False
        reason = f"pinned by {pin.owner}: {pin.reason}"
        held = replace(finding, state="held", reason=reason)
        self.findings.note(with_figures(held, before))
        return True

    def _judge(
        self, finding: Finding, old: Arrangement, new: Arrangement, *, known: str, runs: bool
    ) -> Waiting:
        """Has the switch decide. `known`: why no trial is needed; `runs`: see `judged`."""
        model, switch = self.model, self.model.switch
        self.findings.note(finding)
        key = finding.key
        model.forget_candidates()  # those that lost
        model.introduce(new)
        waited_s, latency_s = 0.0, None if known else self._latency_s()
        while why := switch.consider(
            new.plan, key, expected=old.plan, known=known, latency_s=latency_s
        ):
            is_away = switch.is_away(key)
            state: State = ("chosen" if runs else "no gain") if is_away else "on trial"
            self.findings.note(replace(finding, state=state, reason=why))
            if model.slot.plan is not old.plan or is_away:
                return
            if switch.phase == "watch" and (
                switch.watched_requests >= WATCHED_MIN or waited_s >= UNWATCHED_S
            ):
                switch.pause()
                continue
            waited_s += RETRY_S
            yield RETRY_S
        self._judged, self._verdict = (finding, runs), Future()
        model.attend()
        yield self._verdict
        self._verdict = None

    # -- helpers

    def _may_prepare(self, tier: str) -> bool:
        """Whether steps that need no trial may go live on a tier: not while a pin is against it.

        A restart loses the plan that a pin holds; what was chosen last for this graph is that plan.
        """
        pin = self._means.pins.get(self.model.name)
        return pin is None or pin.allows(tier) or (self._restores and pin.tiers is None)

    def _in_order(
        self, plans: Sequence[Mapping[str, Any]], facts: Facts
    ) -> list[Mapping[str, Any]]:
        """What is at hand but for little comes first, and of that what was chosen last."""
        return sorted(
            plans, key=lambda plan: (not self._is_at_hand(plan, facts), not self._is_chosen(plan))
        )

    def _is_chosen(self, plan: Mapping[str, Any]) -> bool:
        """Whether a plan was chosen, or another one of its family."""
        chosen = self.findings.chosen
        return chosen is not None and plan["family"] in (chosen.label, chosen.family)

    def _precedent(self, plan: Mapping[str, Any]) -> Finding | None:
        """What is known about a plan: of its family the one that runs, else the one of its label."""
        if self._is_chosen(plan):
            return self.findings.chosen
        return self.findings.get(plan["label"]) or self.findings.get(plan["family"])

    def _completed(self, plan: Mapping[str, Any], facts: Facts) -> Mapping[str, Any] | None:
        """The way that runs with what a delta took away from it, where `plan` is that and more."""
        chosen = self.findings.chosen
        if chosen is None or not self._is_chosen(plan):
            return None
        return completed(plan, chosen, self.model.arrangement_of(facts))

    def _is_at_hand(self, plan: Mapping[str, Any], facts: Facts) -> bool:
        """Whether hardly anything of a plan has to be built."""
        keyed = self._keyed(facts, plan)
        return share_of(facts, keyed, self._means.supply.is_at_hand) >= 1.0 - NEAR

    def _is_open(self, plan: Mapping[str, Any], facts: Facts) -> bool:
        """Whether a plan is worth another look.

        Not when it was concluded on nearly the same regions, and a whole graph only on the runtime
        that won by layers.
        """
        chosen = self.findings.chosen
        found = self.findings.get(plan["label"]) or self.findings.get(plan["family"])
        is_bare = not self.model.arrangement_of(facts).overlays
        if is_bare and found is not None and (found.state == "replaced" or found.against):
            return True  # a delta took away what it had lost against
        by_layers = chosen is not None and " layers" in chosen.label
        if chosen is not None and by_layers and plan["layout"] == "whole":
            is_rival = chosen.label.startswith(plan["backend"])
            if not is_rival:
                return False
        if found is None or found.state in ("building", "on trial", "held", "chosen"):
            return True
        if found.state == "replaced" and self._is_chosen(plan):
            return True  # by the same way with other blocks left out around edits
        fresh = with_keys(found, facts, self._keyed(facts, plan))
        return not found.stands_for(fresh.blocks, fresh.shapes)

    def _keyed(self, facts: Facts, plan: Mapping[str, Any]) -> Keyed:
        """The pieces of a proposed plan with their keys; made once a campaign."""
        name = plan["label"], tuple(tuple(region["blocks"]) for region in plan["regions"])
        found = self._keys.get(name)
        if found is None:
            versions = self._means.supply.versions()
            found = self._keys[name] = [
                (piece, artifact_key(facts, piece, versions[piece.backend]))
                for piece in pieces_of(plan)
            ]
        return found

    def _latency_s(self) -> float | None:
        """What a request takes: of the plan that runs, else of the last one that was tried."""
        found, chosen = request_seconds(self.model.slot), self.findings.chosen
        if found is None and chosen is not None:
            found = chosen.latency_s
        if found is None and not self.model.slot.is_busy():
            with suppress(Exception):  # a made-up input may be one that the model cannot take
                found = self.model.time_once(self.model.inputs_to_try()[0])
        return found

    def _refuse(self, backend: str, arrangement: Arrangement, reason: str) -> None:
        fields = {
            "graph": self.model.name, "revision": self.revision, "tier": backend,
            "plan_id": arrangement.plan.id, "stage": "load", "reason": reason,
        }  # fmt: skip
        self.model.settings.events("plan.refused", fields)

    def _conclude(self, facts: Facts) -> None:
        """Everything proposed was looked at: what runs is remembered, and what lies under it goes."""
        self._put_back()
        chosen = self.findings.chosen
        published = self.model.arrangement_of(facts)
        self._means.costs.measure(self.model, facts, published)
        if chosen is not None and published.overlays:
            self._means.supply.remember(self.model.name, facts, chosen.label, published)
            self.model.lighten(facts)


def _runs(keyed: Keyed) -> set[tuple[str, ...]]:
    return {piece.blocks for piece, _ in keyed}


def _nodes(overlays: Sequence[Overlay]) -> int:
    return sum(len(overlay.step.nodes) for overlay in overlays)
