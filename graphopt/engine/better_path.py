"""The better path of a process: which models have a campaign, who wakes it, and what becomes of verdicts.

All of it happens on the background thread, in jobs of a few milliseconds; request threads and the
builder's link only wake it. A model's campaign starts when it is loaded, after each delta, when its
traffic has other hot shapes, when a pin ends, and when a block that was edited often is left alone.
"""

import itertools
import math
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from graphopt.builder.workshop import register
from graphopt.costs.model import CostModel
from graphopt.delta import Delta
from graphopt.engine.builder_files import BlobConstants, ScratchConstants
from graphopt.engine.builder_link import BuilderLink, BuilderSettings, BuilderStatus
from graphopt.engine.campaign import Campaign
from graphopt.engine.costs import Costs
from graphopt.engine.findings import Findings
from graphopt.engine.improve import FusedStage
from graphopt.engine.live import Clocks, LiveModel
from graphopt.engine.pins import LIVE_TIERS, Pin, Pins, check_tiers
from graphopt.engine.pursuit import Means
from graphopt.engine.records import EngineSettings
from graphopt.engine.shelf import Shelf
from graphopt.engine.supply import Supply
from graphopt.engine.traffic import HotShapes, hot_shapes
from graphopt.executor.idle_trial import ALONE_S, BESIDE_SHARE
from graphopt.executor.switch import Outcome
from graphopt.executor.threads import BackgroundThread, keep_thread_count

TICK_S = 2.0  # between looks at what nobody tells: traffic, pins, plans under watch
TRIAL_S = 0.02  # between looks at a trial
# Deltas closer together than this are a burst, within which no campaign would live to its end: one
# begins when none came for CALM_S, or PATIENCE_S after the last one. A lone delta's begins at once.
BURST_S, CALM_S, PATIENCE_S = 0.5, 0.1, 2.0
_EVENTS = {
    "published": "plan.published", "refused": "plan.declined", "confirmed": "plan.confirmed",
    "rolled_back": "plan.rolled_back", "kept": "plan.kept",
}  # fmt: skip

FindBlob = Callable[[str, str], Path | None]


@dataclass(slots=True)
class _Course:
    """A model and where it is on the better path."""

    model: LiveModel
    findings: Findings = field(default_factory=Findings)
    campaign: Campaign | None = None
    shapes: HotShapes = field(default_factory=HotShapes)
    pinned_until_s: float | None = None
    is_stale: bool = False  # the campaign is to start anew
    is_begun: bool = False  # it had a campaign in this process
    edited_s: float = -math.inf  # when the last delta came
    calm_s: float = -math.inf  # when its burst is over, if no other delta comes
    waits_since_s: float = -math.inf  # for calm
    is_waiting: bool = False  # a look at whether it is calm is due
    mark: object = None  # of the slot, when it was last asked whether the model has requests


class BetterPath:
    """The campaigns of all models of a process."""

    def __init__(
        self,
        settings: EngineSettings,
        clocks: Clocks,
        background: BackgroundThread,
        shelf: Shelf,
        folder: Path | None,
        find_blob: FindBlob | None,
        cost_model: CostModel | None = None,
    ) -> None:
        """Starts no process before the first job.

        Args:
            settings: of the engine.
            clocks: of the engine.
            background: the thread that everything here runs on.
            shelf: of proven `fused` steps, shared with the live path.
            folder: of the state, for artifacts, quarantine and pins; None keeps them in a temporary
                folder as long as the engine lives.
            find_blob: where a model's constant lies as a file, where there is a state folder.
            cost_model: predicts what is not measured; None predicts nothing.
        """
        self.settings = settings
        self._background = background
        self._courses: dict[str, _Course] = {}
        self._changed = threading.Condition()
        self._looks = itertools.count()
        self._now_s = clocks.monotonic_s
        self._is_closed = False
        self._scratch = Path(tempfile.mkdtemp(prefix="graphopt-"))
        home = folder if folder is not None else self._scratch
        self.pins = Pins(folder, clocks.wall_s, settings.events)
        self.link: BuilderLink | None = None
        if settings.builder:
            register(settings.extra_backends)
            scratch = ScratchConstants(self._scratch / "constants")
            files = BlobConstants(find_blob, scratch) if find_blob is not None else scratch
            self.link = BuilderLink(
                home / "builder", files, clocks.monotonic_s,
                BuilderSettings(
                    floor_pct=settings.builder_floor_pct, backends=settings.extra_backends,
                    path=settings.extra_path,
                ), settings.events,
            )  # fmt: skip
        self._fused = FusedStage(shelf, self.link)
        self.supply = Supply(home, settings, clocks)
        self.costs = Costs(cost_model, self.supply, settings.limits, clocks.monotonic_s)
        self._means = Means(
            self._fused, self.link, self.supply, self.pins, self.costs, self.artifacts_in_use,
            self._others_serve, clocks.monotonic_s,
        )  # fmt: skip
        self._background.submit_after(TICK_S, "tick", self._tick)

    # -- what the host tells

    def follow(self, model: LiveModel, expansion: Delta | None = None) -> None:
        """A model is there, or has another revision, reached by the primitives of `expansion`.

        Costs microseconds: it is on the live path.
        """
        if not self.settings.improve:
            return
        course = self._courses.get(model.name)
        if course is None or course.model is not model:
            course = self._courses[model.name] = _Course(model)
            model.slot.wake = partial(self._wake_switch, course)
            model.attend = model.slot.wake
        if self.link is not None:
            self.link.revise(model.name, model.revision, model.graph, expansion)
        now_s = self._now_s()
        is_burst = now_s - course.edited_s < BURST_S
        course.edited_s = now_s
        if not is_burst:
            course.waits_since_s = now_s
        else:
            course.calm_s = min(now_s + CALM_S, course.waits_since_s + PATIENCE_S)
            if course.is_waiting:
                return
        self._wake(course)

    def forget(self, name: str) -> None:
        """The model is gone."""
        course = self._courses.pop(name, None)
        if course is not None:
            self._background.submit(f"end {name}", lambda: self._end(course))
        if self.link is not None:
            self.link.forget(name)
        self.pins.forget(name)

    def pin(
        self,
        name: str,
        owner: str,
        reason: str,
        duration_s: float,
        tiers: tuple[str, ...] | None = None,
    ) -> Pin:
        """Pins a model; in force when the background thread has got to it.

        A trial under way ends. A pin of tiers takes off what runs on others: the live path's steps
        show through there. Raises PinError for a tier that is unknown, no reason, or no end.
        """
        check_tiers(tiers or (), (*LIVE_TIERS, *self.supply.offered()), where=name)
        pin = self.pins.set(name, owner, reason, duration_s, tiers)
        self.look_again(name)
        return pin

    def unpin(self, name: str, owner: str) -> Pin:
        """Takes the pin away, and the model's campaign starts anew. PinError when there is none."""
        pin = self.pins.clear(name, owner)
        self.look_again(name)
        return pin

    def look_again(self, name: str) -> None:
        """Something outside changed for a model, as a pin: its campaign starts anew."""
        course = self._courses.get(name)
        if course is not None:
            course.is_stale = True
            self._background.submit(f"renew {name}", lambda: self._renew(course))

    def wait_settled(self, timeout_s: float | None) -> bool:
        """Waits until no campaign and no trial is under way; False when `timeout_s` passed first.

        The requests up to now are looked at first: they may have shapes that are hot.
        """
        looked = threading.Event()

        def look() -> None:
            try:
                self._look()
            finally:
                looked.set()
                self._notify()

        self._background.submit(f"look {next(self._looks)}", look)
        with self._changed:
            return self._changed.wait_for(
                lambda: self._is_closed or (looked.is_set() and self._is_settled()), timeout_s
            )

    def status(self) -> BuilderStatus:
        """What the builder is at."""
        return self.link.status() if self.link is not None else BuilderStatus("disabled")

    def findings(self, name: str) -> Findings:
        """What is known about the ways of running a model."""
        course = self._courses.get(name)
        return course.findings if course is not None else Findings()

    def why_eager(self, model: LiveModel, block: str) -> str:
        """Why a block runs on the tier it runs on."""
        return self._fused.why_not(model.facts, block)

    def artifacts_in_use(self) -> set[tuple[str, ...]]:
        """Keys of the artifacts that plans with a role run on, or that are put together for one."""
        courses = list(self._courses.values())
        run = {
            key
            for course in courses
            for known in course.model.known()
            for overlay in known.overlays
            for key in overlay.artifacts
        }
        return run.union(*(course.campaign.wanted for course in courses if course.campaign))

    def close(self) -> None:
        """Ends the builder. The background thread has ended before."""
        self._is_closed = True
        for course in self._courses.values():
            self._end(course)
        self._notify()
        if self.link is not None:
            self.link.close()
        self.supply.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    # -- on the background thread

    def _wake(self, course: _Course) -> None:
        self._background.submit(f"campaign {course.model.name}", lambda: self._advance(course))

    def _wake_after(self, course: _Course, delay_s: float) -> None:
        key = f"campaign {course.model.name}"
        self._background.submit_after(delay_s, key, lambda: self._advance(course))

    def _wake_switch(self, course: _Course) -> None:
        self._background.submit(f"attend {course.model.name}", lambda: self._attend(course))

    def _advance(self, course: _Course) -> None:
        model, campaign = course.model, course.campaign
        course.is_waiting = False  # first: a delta that saw it set is older than what is read below
        if self._courses.get(model.name) is not course:
            return
        if campaign is None or (campaign.is_over and campaign.revision != model.revision):
            self._obey(course)
            now_s = self._now_s()
            if now_s < course.calm_s:
                course.is_waiting = True
                self._wake_after(course, course.calm_s - now_s)
                return
            course.waits_since_s = now_s
            campaign = Campaign(model, self._means, course.findings, resumes=not course.is_begun)
            course.campaign, course.is_begun = campaign, True
            course.shapes = hot_shapes(model.slot)
        keep_thread_count(model.share.each)  # what it runs here, it runs as requests do
        delay_s = campaign.step(lambda: self._wake(course))
        if delay_s is None:  # it waits for somebody else; otherwise it would wait for the disk
            self._background.submit("store artifacts", self.supply.store)
        if campaign.is_over and campaign.revision != model.revision:
            delay_s = 0.0
        elif campaign.is_over and _are_others(hot_shapes(model.slot), course.shapes):
            self._renew(course)  # they became hot under way
        if delay_s is not None and delay_s > 0.0:
            self._wake_after(course, delay_s)
        elif delay_s is not None:
            self._wake(course)
        self._notify()

    def _attend(self, course: _Course) -> None:
        """Lets the switch decide what it can, and tells what it decided."""
        model = course.model
        if self._courses.get(model.name) is not course:
            return
        captured: list[Mapping[str, Any]] = []
        keep_thread_count(model.share.each)  # a trial compares plans as requests run them
        if model.switch.phase in ("trial", "confirmation"):
            captured = model.inputs_to_try()
        is_beside = bool(captured) and self._others_serve(model)
        begun_s = self._now_s()
        for outcome in model.switch.step(captured, 0.0 if is_beside else ALONE_S):
            self._tell(course, outcome)
        if model.switch.phase in ("trial", "confirmation"):
            spent_s = self._now_s() - begun_s
            pause_s = spent_s * (1 / BESIDE_SHARE - 1) if is_beside else 0.0
            key = f"attend {model.name}"
            delay_s = max(TRIAL_S, pause_s)
            self._background.submit_after(delay_s, key, lambda: self._attend(course))
        self._notify()

    def _others_serve(self, model: LiveModel) -> bool:
        """Whether a model other than this one has requests, or had one since this was asked last."""
        serve = False
        for other in list(self._courses.values()):
            mark = other.model.slot.mark()
            if other.model is not model:
                serve |= mark is not other.mark or other.model.slot.is_busy()
            other.mark = mark
        return serve

    def _tell(self, course: _Course, outcome: Outcome) -> None:
        model = course.model
        if outcome.decision in _EVENTS:
            fields = {"graph": model.name, "revision": model.revision, **outcome.fields()}
            if outcome.decision == "published":
                plan = model.arrangement.plan
                fields = {**model.publication(plan, outcome.other), **outcome.fields()}
            name = _EVENTS[outcome.decision]
            if outcome.decision == "refused" and outcome.cause == "fault":
                name, fields["stage"] = "plan.refused", "trial"
            self.settings.events(name, fields)
        if outcome.decision == "rolled_back":
            course.findings.take_back(outcome)
            label = outcome.key[0] if isinstance(outcome.key, tuple) else ""
            found = course.findings.get(label)
            family = found.family if found is not None else label
            self.supply.forget(model.name, label, family or label)
        if course.campaign is not None:
            course.campaign.take(outcome)

    def _tick(self) -> None:
        try:
            self._look()
        finally:
            self._background.submit_after(TICK_S, "tick", self._tick)

    def _look(self) -> None:
        """Looks at what nobody tells: traffic, pins, plans under watch, memory."""
        for course in list(self._courses.values()):
            model = course.model
            self._attend(course)
            pin = self.pins.get(model.name)
            until_s = pin.until_s if pin is not None else None
            is_over = course.campaign is not None and course.campaign.is_over
            is_free = until_s is None and course.pinned_until_s is not None
            is_other = is_over and self.link and _are_others(hot_shapes(model.slot), course.shapes)
            if is_free or is_other or (is_over and _has_calmed(course)):
                self._renew(course)
            course.pinned_until_s = until_s
        for course in list(self._courses.values()):
            if course.campaign is None or course.campaign.is_over:
                course.model.forget_candidates()
            course.model.slot.reap()
        used = self.artifacts_in_use()
        while self.supply.trim(used) and not self._has_requests():
            pass
        self.supply.heap.give_back(is_quiet=not self._has_requests())
        self._notify()

    def _has_requests(self) -> bool:
        """Whether a request runs now."""
        return any(course.model.slot.is_busy() for course in list(self._courses.values()))

    def _renew(self, course: _Course) -> None:
        pin = self.pins.get(course.model.name)
        course.pinned_until_s = pin.until_s if pin is not None else None
        if course.campaign is not None:
            course.campaign.close()
            course.campaign = None
        if course.model.switch.phase == "trial":  # nobody is left to hear its verdict
            course.model.switch.cancel("the campaign starts anew")
        self._obey(course)
        course.is_stale = False
        self._wake(course)

    def _obey(self, course: _Course) -> None:
        """Takes off what a pin of tiers does not allow, also what a delta brought back."""
        pin = self.pins.get(course.model.name)
        if pin is not None and pin.tiers is not None:
            course.model.keep_to(pin.allows)

    def _end(self, course: _Course) -> None:
        if course.campaign is not None:
            course.campaign.close()
        course.model.switch.cancel("the model was unloaded")
        self._notify()

    def _is_settled(self) -> bool:
        return all(
            not self.settings.improve
            or (
                course.campaign is not None
                and not course.is_stale
                and course.campaign.is_over
                and course.campaign.revision == course.model.revision
                and course.model.switch.phase not in ("trial", "confirmation")
            )
            for course in list(self._courses.values())
        )

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()


def _has_calmed(course: _Course) -> bool:
    """Whether a block that the last campaign kept out of larger regions has been left alone since."""
    campaign = course.campaign
    return campaign is not None and not campaign.restless <= course.model.churn.restless()


def _are_others(now: HotShapes, before: HotShapes) -> bool:
    """Whether shapes became hot that were not: their order and exact share are no reason."""
    return any(bucket not in before.buckets for bucket in now.buckets)
