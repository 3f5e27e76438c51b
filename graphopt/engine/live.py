"""One live model: its revisions, its published plan, and the one way from one to the next.

`apply` is the live path (DESIGN section 4): validate, apply, infer the affected cone, plan the
affected blocks with what needs no build, journal, publish, answer. Anything that raises leaves the
model as it was. One writer at a time; requests never wait for it.
"""

import json
import threading
from collections.abc import Callable, Mapping, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch

from graphopt.analysis.check import check_facts
from graphopt.analysis.facts import Facts, Update, analyse, update
from graphopt.delta import Applied as GraphApplied
from graphopt.delta import Delta, apply_fully, difference
from graphopt.engine.captured import Captured
from graphopt.engine.churn import Churn
from graphopt.engine.give_way import Between, alone
from graphopt.engine.identity import delta_digest
from graphopt.engine.interface import changes_interface, check_interface, check_outputs
from graphopt.engine.ledger import Commit, Ledger, Recovered
from graphopt.engine.past import Past
from graphopt.engine.records import Applied, DryRun, EngineSettings, Foreseen, Result, RevisionInfo
from graphopt.engine.shelf import Shelf
from graphopt.engine.summary import summary_of
from graphopt.errors import DeltaError, GraphoptError
from graphopt.executor.arrangement import Arrangement
from graphopt.executor.beginnings import Beginnings, Crossings
from graphopt.executor.build import (
    EagerBuilder,
    MakeStep,
    bind_run,
    build_plan,
    replan,
    weight_key,
)
from graphopt.executor.guard import Hysteresis
from graphopt.executor.plan import Plan, Step, run_plan
from graphopt.executor.publish import Answer, Slot
from graphopt.executor.runs import run_of, run_region
from graphopt.executor.samples import sample_inputs
from graphopt.executor.shares import Share
from graphopt.executor.switch import Switch
from graphopt.graph import Graph

SWITCH_DWELL_S = 2.0  # a plan stays at least so long: about a hundred requests of a model of 20 ms


Foresee = Callable[[Facts, Arrangement, Facts, Arrangement], Foreseen | None]


class MovedOnError(Exception):
    """A delta made another revision while something was being made for this one."""


@dataclass(frozen=True, slots=True)
class Clocks:
    """Where the engine gets time from: `monotonic_s` measures, `wall_s` labels, `pause` sleeps."""

    monotonic_s: Callable[[], float]
    wall_s: Callable[[], float]
    pause: Callable[[float], None]


class LiveModel:
    """A model that serves while it is edited. Made by `Host`."""

    def __init__(
        self,
        name: str,
        recovered: Recovered,
        eager: EagerBuilder,
        shelf: Shelf,
        settings: EngineSettings,
        clocks: Clocks,
        ledger: Ledger,
        improve: "Callable[[LiveModel, Delta], None]",
    ) -> None:
        self.name = name
        self.settings = settings
        budget = settings.limits(name).budget
        self.share = Share(budget.workers, budget.each)  # of the executor threads
        self.ledger = ledger
        self.past = Past(name, recovered, ledger)
        revision, graph = self.past.newest()
        self.facts = analyse(graph)
        check_outputs(self.facts)
        self.captured = Captured()
        self._crossings = Crossings()
        self.churn = Churn(clocks.monotonic_s)
        self._eager = eager
        self._shelf = shelf
        self._clocks = clocks
        self._improve = improve
        self.attend: Callable[[], None] = _nobody  # has the switch looked after, soon
        self.foresee: Foresee = _nothing
        self.give_way: Callable[[], AbstractContextManager[Between]] = alone
        self._writing = threading.RLock()
        self._unproven = set(self.facts.regions)  # blocks the better path has not looked at
        base = build_plan(self.facts, revision, self.live_step)
        # Of every plan that has a role in the slot
        self._known: tuple[Arrangement, ...] = (Arrangement.of(base),)
        self.slot = Slot(base, clocks.monotonic_s)
        self.switch = Switch(self.slot, Hysteresis(SWITCH_DWELL_S), clocks.monotonic_s)

    # -- serving

    def run(self, inputs: Mapping[str, torch.Tensor]) -> Result:
        """Runs one request in this thread on the published plan.

        RequestError when the inputs do not fit.
        """
        outputs, plan = self.answer(inputs)
        return Result(outputs, plan.revision, plan.id)

    def answer(self, inputs: Mapping[str, torch.Tensor]) -> Answer:
        """What `run` does, as the slot answers it."""
        answer = self.slot.run(inputs)
        self.captured.add(inputs)
        return answer

    @property
    def graph(self) -> Graph:
        """The current graph."""
        return self.facts.graph

    @property
    def revision(self) -> int:
        """The revision that every newly admitted request runs."""
        return self.slot.plan.revision

    @property
    def arrangement(self) -> Arrangement:
        """What the published plan is made of."""
        while True:  # another plan may be published between the two reads
            plan = self.slot.plan
            for known in reversed(self._known):
                if known.plan is plan:
                    return known

    def at_hand(self) -> tuple[int, Facts]:
        """The current revision and its facts, which a delta changes one after the other."""
        with self._writing:
            return self.revision, self.facts

    def arrangement_of(self, facts: Facts) -> Arrangement:
        """What is published for the graph of `facts`.

        Only this one may be given overlays made from those facts: over the base of a later revision
        they would answer for it with what it was before. MovedOnError when there is a later one.
        """
        published = self.arrangement
        if published.plan.graph is not facts.graph:
            raise MovedOnError
        return published

    def known(self) -> tuple[Arrangement, ...]:
        """Of the plans that requests may run, or that a rollback would go to."""
        return self._known

    def forget_candidates(self) -> None:
        """Lets go of arrangements whose plan has no role any more, unless one is being judged.

        Not while a campaign is under way: it introduces a plan before that has a role.
        """
        with self._writing:
            if self.switch.phase in ("idle", "watch"):
                self._keep_roles()

    def _keep_roles(self) -> None:
        roles = (self.slot.plan, self.slot.last_good)
        kept = (each for each in self._known if any(each.plan is plan for plan in roles))
        self._known = tuple(kept)

    def inputs_to_try(self) -> list[Mapping[str, torch.Tensor]]:
        """Inputs for plans without traffic: of real requests, else made up."""
        return self.requests() or [sample_inputs(self.facts)]

    def inputs_of_shapes(self) -> list[Mapping[str, torch.Tensor]]:
        """One of them for each shape."""
        kept = self.captured.collect(self.slot.plan)
        return [row[-1] for row in kept.values()] or [sample_inputs(self.facts)]

    def beginnings(self, facts: Facts, plan: Plan) -> Beginnings:
        """Where the steps of `plan`, of the graph of `facts`, begin on one input of each shape."""
        return Beginnings(plan, self.inputs_of_shapes(), facts, self._crossings)

    def requests(self) -> list[Mapping[str, torch.Tensor]]:
        """Inputs of some real requests, of every shape that was met."""
        kept = self.captured.collect(self.slot.plan)
        return [inputs for row in kept.values() for inputs in row]

    def introduce(self, candidate: Arrangement) -> None:
        """Makes an arrangement known before its plan may be published.

        Nothing is let go here: a plan on trial has no role yet, and may be published at any moment.
        """
        with self._writing:
            self._known = (*self._known, candidate)

    # -- editing

    def apply(self, delta: Delta, kind: str = "delta", summary: str = "") -> Applied:
        """Makes the next revision; live when it returns.

        Raises DeltaError subclasses, and then nothing has changed.
        """
        start_s = self._clocks.monotonic_s()
        with self._writing:
            known = self.past.find_repeat(delta)
            if known is not None:
                return known
            try:
                with self.give_way() as between:
                    return self._apply(delta, kind, summary, start_s, between)
            except GraphoptError as error:
                self.settings.events(
                    "delta.rejected",
                    {
                        "graph": self.name,
                        "revision": self.revision,
                        "delta": delta.id,
                        "code": error.code,
                        "message": str(error),
                    },
                )
                raise

    def dry_run(self, delta: Delta) -> DryRun:
        """What `apply` would do; raises what it would raise."""
        with self._writing, self.give_way() as between:
            applied, new = self._next(delta, between)
            facts, old = self.facts, self.arrangement
        graph = applied.graph
        after, _ = old.after(new, old.plan.revision + 1, self.live_step)
        have = {constant.digest for constant in facts.graph.constants.values()}
        staged = {
            name: graph.constants[name]
            for name in applied.change.constants
            if name in graph.constants
        }
        return DryRun(
            self.revision,
            tuple(sorted(applied.change.nodes | applied.change.removed)),
            len(new.reran.get("type", ())),
            tuple(sorted(_replanned(new))),
            len(new.facts.regions) - len(_replanned(new)),
            sum(c.tensor.nbytes for c in staged.values() if c.digest not in have),
            changes_interface(facts, new.facts),
            self.foresee(facts, old, new.facts, after),
        )

    def rollback(self, revision: int) -> Applied:
        """A new revision whose graph equals that of `revision`.

        PreconditionError when it is not kept any more.
        """
        target = self.past.graph_at(revision)
        with self._writing:
            delta = difference(self.graph, target)
            allowed = Delta(delta.edits, allow_interface_change=True)
            return self.apply(allowed, "rollback", f"rollback to revision {revision}")

    def snapshot(self, write: Callable[[str, Graph, int], None]) -> None:
        """Calls `write(name, graph, revision)` with a consistent pair."""
        with self._writing:
            graph, revision = self.graph, self.revision
        write(self.name, graph, revision)

    # -- plans

    def live_step(self, facts: Facts, block: str) -> Step:
        """The best step that can go live at once: verified for exactly this region and these
        weights, else eager.
        """
        run = run_of(facts, block)
        if run[0] == block:
            region = run_region(facts, run)
            found = self._shelf.find((region.key, weight_key(facts.graph, region)))
            if found is not None:
                return bind_run(facts, run, region, found.tier, found.function, found.constants)
        return self._eager(facts, block)

    def take_unproven(self) -> tuple[Arrangement, Facts, set[str]]:
        """What is published, its facts, and the blocks that changed since the last call and that no
        overlay covers.
        """
        with self._writing:
            blocks, self._unproven = self._unproven, set()
            return self.arrangement, self.facts, blocks - self.arrangement.covered()

    def give_back(self, blocks: set[str]) -> None:
        """Blocks of `take_unproven` that were not looked at because the model moved on."""
        with self._writing:
            self._unproven |= blocks

    def publish_base(self, old: Arrangement, facts: Facts, blocks: set[str]) -> bool:
        """Publishes `old` with what the shelf now holds for `blocks` of its base.

        False when the model has moved on.
        """
        return self.publish(old, self.remade(old, facts, blocks))

    def remade(
        self, old: Arrangement, facts: Facts, blocks: Set[str], make: MakeStep | None = None
    ) -> Arrangement:
        """`old` with `blocks` of its base made anew: by `make`, else as the live path has them now."""
        none: frozenset[str] = frozenset()
        change = Update(facts, {}, frozenset(blocks), none, none, none)
        base, _ = replan(old.base, change, old.plan.revision, make or self.live_step)
        return Arrangement.of(base, old.overlays)

    def bare(self, old: Arrangement, facts: Facts, blocks: Set[str]) -> Arrangement:
        """`old` with `blocks` of its base on `eager`."""
        return self.remade(old, facts, blocks, self._eager)

    def publish(self, old: Arrangement, new: Arrangement) -> bool:
        """Publishes `new`, made of `old` for the same revision; False when the model has moved on.

        It counts as good at once. What is published is made before the writer's lock is taken:
        deltas do not wait for it.
        """
        with self._writing:
            if new.plan.id == old.plan.id:
                new = Arrangement(new.base, new.overlays, old.plan)
                self._known = tuple(new if each is old else each for each in self._known)
                return self.slot.plan is old.plan
            self.introduce(new)
            if not self.slot.publish(new.plan, expected=old.plan):
                return False
            self.slot.confirm(new.plan)
        self.settings.events("plan.published", self.publication(new.plan, old.plan.id))
        return True

    def publication(self, plan: Plan, from_plan_id: str) -> dict[str, object]:
        """The fields of `plan.published`."""
        return {
            "graph": self.name,
            "revision": plan.revision,
            "plan_id": plan.id,
            "from_plan_id": from_plan_id,
            "tiers": plan.tiers(),
        }

    def lighten(self, facts: Facts) -> bool:
        """Lets go of what lies unused under the overlays: the base there falls back to `eager`.

        MovedOnError when `facts` are not the current ones.
        """
        old = self.arrangement_of(facts)
        return self.publish(old, self.bare(old, facts, old.covered()))

    def keep_to(self, allows: Callable[[str], bool]) -> bool:
        """Publishes what is published without the steps on tiers that `allows` refuses.

        The base shows through where an overlay goes, and falls back to `eager` where it was
        refused itself. False when the model has moved on.
        """
        with self._writing:
            old, facts = self.arrangement, self.facts
        kept = [overlay for overlay in old.overlays if allows(overlay.step.tier)]
        bare = {b for o in old.overlays if not allows(o.step.tier) for b in o.step.blocks}
        bare |= {b for step in old.base.steps if not allows(step.tier) for b in step.blocks}
        if not bare:
            return True
        make = self.live_step if allows("fused") else self._eager
        base = self.remade(old, facts, bare, make).base
        if not self.publish(old, Arrangement.of(base, kept)):
            return False
        self.give_back(bare)
        return True

    def time_once(self, inputs: Mapping[str, torch.Tensor]) -> float:
        """Seconds of one request with `inputs` on the published plan, after one that does not count."""
        plan = self.slot.plan
        run_plan(plan, inputs)
        start_s = self._clocks.monotonic_s()
        run_plan(plan, inputs)
        return self._clocks.monotonic_s() - start_s

    # -- helpers

    def _next(self, delta: Delta, between: Between) -> tuple[GraphApplied, Update]:
        if delta.graph is not None and delta.graph != self.name:
            raise DeltaError(
                f"the delta is for graph {delta.graph!r}, this is {self.name!r}",
                where="graph",
                remedy="send it there",
            )
        delta.check_revision(self.revision)
        facts = self.facts
        applied = apply_fully(facts.graph, delta, facts.type_of, between)
        between()
        new = update(facts, applied.graph, applied.change, between)
        between()
        check_outputs(new.facts)
        if not delta.allow_interface_change and (
            applied.change.outputs or applied.change.inputs or "type" in new.reran
        ):
            check_interface(facts, new.facts)
        if self.settings.verify:
            check_facts(new.facts)
        return applied, new

    def _apply(
        self, delta: Delta, kind: str, summary: str, start_s: float, between: Between
    ) -> Applied:
        applied, new = self._next(delta, between)
        revision = self.revision + 1
        old = self.arrangement

        def make(facts: Facts, block: str) -> Step:
            between()
            return self.live_step(facts, block)

        arrangement, replanned = old.after(new, revision, make)
        between()
        answer = Applied(
            revision,
            len(applied.change.nodes | applied.change.removed),
            len(new.reran.get("type", ())),
            replanned,
            len(new.facts.regions) - replanned,
            0.0,
        )
        digest = delta_digest(delta) if delta.id is not None else ""
        text = summary or summary_of(delta)
        said = json.dumps(answer.fields())
        between()
        self.ledger.commit(Commit(self.name, revision, applied, kind, text, digest, said), between)
        # No pause from here on: a Ctrl-C that falls into one must not part what is durable from what is live
        plan = self._publish(old, arrangement, new)
        live_s = self._clocks.monotonic_s() - start_s
        self.past.note(
            RevisionInfo(revision, kind, text, delta.id, applied.graph.hash, self._clocks.wall_s())
        )
        done = replace(answer, live_s=live_s)
        self.settings.events(
            "delta.applied",
            {
                "graph": self.name,
                "delta": delta.id,
                "kind": kind,
                "summary": text,
                "plan": plan.id,
                **done.fields(),
            },
        )
        self._improve(self, applied.expansion)
        return done

    def _publish(self, old: Arrangement, arrangement: Arrangement, new: Update) -> Plan:
        uncovered = old.covered() - arrangement.covered()
        self.introduce(arrangement)
        self.facts = new.facts
        while not self.slot.publish(arrangement.plan, expected=old.plan):
            # A trial ended, or a rollback came between: what it left is what the delta starts from
            old, revision = self.arrangement, arrangement.plan.revision
            arrangement, _ = old.after(new, revision, self.live_step)
            self.introduce(arrangement)
        changed = new.regions_changed | new.weights_changed
        self.churn.note(arrangement.plan.revision, changed, new.regions_gone)
        self._keep_roles()  # a trial of the old revision publishes nothing any more
        self._unproven |= _replanned(new)
        self._unproven.update(block for block in uncovered if block in new.facts.regions)
        self.past.keep(arrangement.plan.revision, new.facts.graph)
        return arrangement.plan


def _nobody() -> None:
    """Nobody looks after the switch of a model that is not on the better path."""


def _nothing(*_: object) -> None:
    """What a model of no host foresees."""


def _replanned(new: Update) -> frozenset[str]:
    return new.regions_changed | new.weights_changed | new.released
