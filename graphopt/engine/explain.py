"""What runs and why: the plan of a model, step by step, what else was considered, with figures, and
who holds it.

A record that prints as tables; `graphopt.explained` has the words. Read without a lock, beside
requests and deltas.
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from graphopt.analysis.blocks import CONTEXT
from graphopt.costs.plan_cost import StepCost
from graphopt.engine.builder_jobs import BuilderStatus
from graphopt.engine.costs import sizes_of
from graphopt.engine.findings import Finding, State
from graphopt.engine.pins import LIVE_TIERS, HeldPin, Pin
from graphopt.executor.arrangement import Arrangement
from graphopt.executor.plan import Step
from graphopt.executor.switch import Phase
from graphopt.explained import text_of

if TYPE_CHECKING:
    from graphopt.engine.host import Host
    from graphopt.engine.live import LiveModel

PARTED = "parted"  # first word of the planner's label for regions where it found them cheapest


@dataclass(frozen=True, slots=True)
class StepLine:
    """One step of the plan.

    Attributes:
        block: the last of the blocks it computes.
        blocks: how many they are.
        nodes: how many nodes it computes.
        tier: that it runs on.
        options: how the tier runs it; empty where it has no choice.
        key: structure key of its region.
        reason: why it runs on that tier.
        predicted_s: seconds as the cost model says, None where it cannot; with the band in which nine
            of ten lie.
        measured_s: seconds as timed while no request ran; None where it was not.
        touched: the last revision of this process that changed what it computes, or its weights;
            None where none did.
    """

    block: str
    blocks: int
    nodes: int
    tier: str
    options: str
    key: str
    reason: str
    predicted_s: float | None = None
    predicted_low_s: float | None = None
    predicted_high_s: float | None = None
    measured_s: float | None = None
    touched: int | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way of running the model that was considered; what was not measured is None.

    Attributes:
        label: backend, layout, variant.
        state: what came of it, see `graphopt.engine.findings`.
        reason: for people, with figures.
        revision: on which that was concluded.
        predicted_s: seconds of a request as foreseen before it was built.
        ratio: time per request over that of the plan it was tried against.
        latency_s: median of a request on it in its trial.
        build_s: wall time of the builds it took; None where all artifacts were at hand.
        resident_bytes: memory of its artifacts beyond mapped files.
    """

    label: str
    state: State
    reason: str
    revision: int
    predicted_s: float | None
    ratio: float | None
    latency_s: float | None
    build_s: float | None
    resident_bytes: int | None


@dataclass(frozen=True, slots=True)
class Explanation:
    """The published plan of one model and what is known around it.

    Attributes:
        phase: what the switch is at: idle, trial, watch or confirmation.
        steps: of the plan, in order.
        candidates: considered for this model, in the order they were concluded; none before the
            better path got to them.
        pin: the one in force.
        builder: what the builder process is at.
    """

    model: str
    revision: int
    plan_id: str
    graph_hash: str
    phase: Phase
    steps: tuple[StepLine, ...]
    candidates: tuple[Candidate, ...]
    pin: HeldPin | None
    builder: BuilderStatus

    def __str__(self) -> str:
        return text_of(asdict(self))


def explain(
    host: "Host", model: "LiveModel", arrangement: Arrangement | None = None
) -> Explanation:
    """The explanation of the published plan, or of one that was published a moment ago."""
    arrangement, facts = arrangement or model.arrangement, model.facts
    plan, findings = arrangement.plan, host.better.findings(model.name)
    is_current = plan.graph is facts.graph  # a delta may land beside us
    costs = host.better.costs.steps(facts, arrangement, sizes_of(model)) if is_current else None
    nothing = [StepCost(None, None)] * len(plan.steps)
    pin, chosen = host.better.pins.held(model.name), findings.chosen
    return Explanation(
        model.name, plan.revision, plan.id, plan.graph.hash, model.switch.phase,
        tuple(
            _line(step, _reason(host, model, step, chosen, pin), cost, model.churn.touched(step.blocks))
            for step, cost in zip(plan.steps, costs or nothing, strict=True)
        ),
        tuple(map(_candidate, findings)), pin, host.better.status(),
    )  # fmt: skip


def _line(step: Step, reason: str, cost: StepCost, touched: int | None) -> StepLine:
    block = "context" if step.block == CONTEXT else step.block
    n_blocks, n_nodes = len(step.blocks), len(step.nodes)
    said = cost.predicted
    return StepLine(
        block, n_blocks, n_nodes, step.tier, step.options, step.key, reason,
        said.seconds if said else None, said.low_s if said else None,
        said.high_s if said else None, cost.measured_s, touched,
    )  # fmt: skip


def _reason(
    host: "Host", model: "LiveModel", step: Step, chosen: Finding | None, pin: Pin | None
) -> str:
    if (
        step.tier in LIVE_TIERS
        and chosen is not None
        and " around " in chosen.label
        and not model.churn.restless().isdisjoint(step.blocks)
    ):
        return "edited often of late: kept out of larger regions"
    if step.tier == "eager":
        if step.block not in model.facts.regions:
            return "being replaced"
        if pin is not None and not pin.allows("fused"):
            return "pinned"
        return host.explain_block(model, step.block)
    if step.tier == "fused":
        return "verified against eager for this region and these weights"
    way = chosen.label.split()[0] if chosen is not None else ""
    if chosen is not None and way == PARTED:
        return "part of the parted plan"
    if chosen is None or way != step.tier:
        return "proven on an earlier revision, and nothing in it has changed"
    return f"part of {chosen.label}"


def _candidate(finding: Finding) -> Candidate:
    return Candidate(
        finding.label, finding.state, finding.reason, finding.revision, finding.predicted_s,
        finding.ratio, finding.latency_s, finding.build_s, finding.resident_bytes,
    )  # fmt: skip
