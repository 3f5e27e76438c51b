"""A campaign: the way of one revision from its live-path plan to the best plan of this host.

First the choice remembered for this very graph, then the `fused` steps; else the builder proposes
plans, and one after the other is pursued. After a delta that left most of what ran in place the
`fused` steps come second: by then the runtime has what it touched. A coroutine of the background
thread: it waits for the builder's answers and for verdicts, and it is closed when a delta makes
another revision. Artifacts and findings outlive it, so the next revision's campaign does only what
changed.

Deliberately absent: what is worth proposing (the planner), which of that is worth a look
(`prospects`), and what becomes of one plan (`pursuit`).
"""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from graphopt.analysis.facts import Facts
from graphopt.engine.assembly import overlays_of
from graphopt.engine.builder_link import BuilderLink
from graphopt.engine.findings import Finding, Findings, with_figures, with_keys
from graphopt.engine.fused_comparison import drop_without_gain
from graphopt.engine.improve import Waiting
from graphopt.engine.live import LiveModel, MovedOnError
from graphopt.engine.prospects import Proposal, Prospects
from graphopt.engine.pursuit import Means, Pursuit
from graphopt.engine.supply import Recalled
from graphopt.engine.traffic import hot_shapes, latency_of
from graphopt.engine.warming import look_behind, warm
from graphopt.errors import BuilderError
from graphopt.executor.arrangement import Arrangement, ArtifactKey
from graphopt.executor.switch import Outcome


class Campaign:
    """One revision's campaign. `step` is called on the background thread until `is_over`."""

    def __init__(
        self, model: LiveModel, means: Means, findings: Findings, *, resumes: bool = False
    ) -> None:
        """`resumes`: it is the model's first in this process, and what ran in the last one may come
        back.
        """
        self.model = model
        self.findings = findings
        self.is_over = False
        self._resumes = resumes
        self._means = means
        self.revision, self._facts = model.at_hand()
        self.restless = model.churn.restless()
        self._limits = model.settings.limits(model.name)
        self._prospects = Prospects(model, self.revision, self._facts, findings, means.supply)
        self._pursuit: Pursuit | None = None  # of the plan at hand
        self._course = self._run()
        self._waits_for: Future[Any] | None = None

    @property
    def wanted(self) -> frozenset[ArtifactKey]:
        """Artifacts to be kept in memory for the plan that is pursued."""
        if self._pursuit is None or self.is_over:
            return frozenset()
        return self._pursuit.wanted

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
                self.is_over = True
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
        """A decision of the switch about this model's plans, of which one may be waited for."""
        if self._pursuit is not None:
            self._pursuit.take(outcome)

    def close(self) -> None:
        """Ends it where it is."""
        if not self.is_over:
            self.is_over = True
            self._course.close()

    def _resume(self, done: Any) -> Any:
        if not isinstance(done, Future):
            return self._course.send(None)
        error = done.exception() if not done.cancelled() else BuilderError("taken back")
        return self._course.throw(error) if error is not None else self._course.send(done.result())

    # -- the course

    def _run(self) -> Waiting:
        link, facts, prospects = self._means.link, self._facts, self._prospects
        has_runtimes = link is not None and bool(self._means.supply.versions())
        # First, because it needs no builder: a restart is back on its plan before that has started
        recalled = None
        if has_runtimes and not self.model.arrangement_of(facts).overlays:
            recalled = self._recall(facts)
        # After a delta what is at hand but for a layer or two is there before the `fused` steps were
        waits = has_runtimes and recalled is None and self.findings.chosen is not None
        if not waits:
            yield from self._prepare_fused()
        if link is None or not has_runtimes:
            yield from self._compare_fused()
            return
        # What is missing of a plan is made for the shapes of requests, where shapes differ
        suffices = recalled is not None and (recalled.is_whole or bool(facts.graph.symbols))
        if suffices and not hot_shapes(self.model.slot).buckets:
            return
        plans = yield from self._propose(link)
        is_blind = bool(facts.graph.symbols) and not self.model.requests()
        for plan in prospects.in_order(plans):
            if waits and not prospects.is_at_hand(plan):
                waits = False
                yield from self._prepare_fused()
            has_runtime = bool(self.model.arrangement_of(facts).overlays)
            if is_blind and has_runtime and not prospects.is_chosen(plan):
                break  # in what shapes to compare the others, only requests can tell
            part = prospects.completed(plan)
            if part is not None:
                yield from self._pursue(part)
            if prospects.is_open(plan):
                yield from self._pursue(plan)
        if waits:
            yield from self._prepare_fused()
        self._conclude(facts)
        yield from self._compare_fused()  # what no runtime has taken over
        published = self.model.arrangement_of(facts)
        if published.overlays and self.model.requests():  # made-up inputs are others each time
            yield from look_behind(self.model.beginnings(facts, published.plan))

    def _prepare_fused(self) -> Waiting:
        if self._may_prepare("fused"):
            yield from self._means.fused.course(self.model)

    def _compare_fused(self) -> Waiting:
        means = self._means
        yield from drop_without_gain(
            self.model, self._facts, means.fused, means.others_serve, means.now_s
        )

    def _propose(self, link: BuilderLink) -> Waiting:
        """The plans that the builder proposes; none when it cannot."""
        shapes, chosen = hot_shapes(self.model.slot), self.findings.chosen
        link.set_requests(self.model.name, self.model.requests())
        document = {
            "backends": list(self._means.supply.versions()),
            "threads": self._limits.budget.each,
            "streams": self._limits.budget.workers,
            "buckets": list(shapes.buckets),
            "buckets_share": shapes.share,
            "restless": sorted(self.restless),
            "chosen": chosen.family if chosen is not None else None,
            "latency_s": latency_of(self.model, self.findings),
            "costs": self._means.costs.document(self.model, self._facts),
        }
        try:
            proposal = yield link.propose(self.model.name, self.revision, document)
        except BuilderError as error:
            self._tell_failed("propose", str(error))
            return []
        if "fault" in proposal:
            self._tell_failed("foresee", proposal["fault"])
        return proposal["plans"]

    def _tell_failed(self, job: str, message: str) -> None:
        fields = {"job": f"{job} {self.model.name}", "message": message}
        self.model.settings.events("builder.failed", fields)

    def _recall(self, facts: Facts) -> Recalled | None:
        """Publishes what was chosen for this very graph before, if its artifacts are at hand; in a new
        process what still fits of the last choice, too. None when there is nothing to publish.

        Under watch, as any plan whose cost is known.
        """
        recalled = self._means.supply.recall(
            self.model.name, facts, self._limits, resumes=self._resumes
        )
        if recalled is None:
            return None
        keyed = recalled.keyed
        if any(not self.restless.isdisjoint(piece.blocks) for piece, _ in keyed):
            return None  # the next edit would drop it
        overlays = overlays_of(facts, keyed, self._means.supply.loaded)
        if not overlays or not all(self._may_prepare(piece.backend) for piece, _ in keyed):
            return None
        old = self.model.arrangement_of(facts)
        new = Arrangement.of(old.base, overlays)
        reason = "chosen before for this graph"
        if not recalled.is_whole:
            reason = "chosen before the last delta, and left alone by it"
        finding = Finding(recalled.label, "chosen", reason, self.revision)
        finding = with_keys(finding, facts, keyed)
        if warm(new.plan, self.model.beginnings(facts, old.plan))[1]:
            return None
        self.model.introduce(new)
        if self.model.switch.consider(new.plan, finding.key, expected=old.plan, known=reason):
            return None
        self.model.attend()  # to have it told
        self.findings.choose(with_figures(finding, self.findings.get(recalled.label)))
        return recalled

    def _pursue(self, plan: Proposal) -> Waiting:
        pursuit = self._pursuit = Pursuit(
            self.model, self._facts, self._means, self.findings, self._prospects, plan
        )
        yield from pursuit.course()

    def _may_prepare(self, tier: str) -> bool:
        """Whether steps that need no trial may go live on a tier: not while a pin is against it.

        A restart loses the plan that a pin holds; what was chosen last for this graph is that plan.
        """
        pin = self._means.pins.get(self.model.name)
        if pin is None or pin.allows(tier):
            return True
        return (
            self._resumes and self._means.pins.is_inherited(self.model.name) and pin.tiers is None
        )

    def _conclude(self, facts: Facts) -> None:
        """Everything proposed was looked at: what runs is remembered, and what lies under it goes."""
        chosen = self.findings.chosen
        published = self.model.arrangement_of(facts)
        self._means.costs.measure(self.model, facts, published)
        if chosen is not None and published.overlays:
            self._means.supply.remember(self.model.name, facts, chosen.label, published.runs())
            self.model.lighten(facts)
