"""What the engine is told and what it answers: plain records."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from graphopt.costs.plan_cost import PlanCost
from graphopt.engine.thread_budget import ThreadBudget, usable_cpus

EventSink = Callable[[str, Mapping[str, Any]], None]


def ignore_event(name: str, fields: Mapping[str, Any]) -> None:
    """The event sink of an engine nobody listens to."""


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What one model may have of the process.

    Attributes:
        budget: its requests at once at most, and threads inside each of them, of torch as of other
            runtimes.
        memory_bytes_max: that the artifacts of a plan may hold beyond mapped files: weights that
            runtimes packed for themselves. None: no bound.
    """

    budget: ThreadBudget
    memory_bytes_max: int | None = None


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How an engine runs.

    Attributes:
        threads: requests at once of a model that `models` does not name; others wait.
        intra_op: threads inside each of these.
        improve: whether better plans are looked for in the background.
        builder: whether a process of its own builds and proves them; without it models reach the
            `fused` tier, proven in this process.
        builder_floor_pct: percent of one core that the builder gets at least while it has work.
        artifacts_bytes_max: of finished artifacts kept on disk; None: 4 GiB, or a tenth of the disk.
        backends: the runtimes that may be used, by name; None: all that are installed.
        extra_backends: further ones as `module:Class`, to try one before it is packaged.
        extra_path: folders in which the builder finds those.
        verify: whether every update of the facts is checked against a computation from scratch.
            Costs seconds on a large graph.
        events: receives every event name with its fields; called from engine threads, must be
            quick.
        models: what single models may have instead of `threads` and `intra_op`, by live name.
            Running requests together have no more threads than the widest of all these budgets.
    """

    threads: int = 1
    intra_op: int = field(default_factory=usable_cpus)
    improve: bool = True
    builder: bool = True
    builder_floor_pct: float = 10.0
    artifacts_bytes_max: int | None = None
    backends: tuple[str, ...] | None = None
    extra_backends: tuple[str, ...] = ()
    extra_path: tuple[str, ...] = ()
    verify: bool = False
    events: EventSink = ignore_event
    models: Mapping[str, ModelLimits] = field(default_factory=dict)

    def limits(self, name: str) -> ModelLimits:
        """Those of the model that is live as `name`."""
        return self.models.get(name) or ModelLimits(ThreadBudget(self.threads, self.intra_op))

    def budgets(self) -> set[ThreadBudget]:
        """All that models may have."""
        default = ThreadBudget(self.threads, self.intra_op)
        return {default, *(limits.budget for limits in self.models.values())}


@dataclass(frozen=True, slots=True)
class Foreseen:
    """What a delta changes, in seconds a request at `sizes`; None where it cannot be predicted.

    Attributes:
        before: the plan as it runs.
        live: what would run as soon as the delta is applied.
        settled: what would run once the regions it drops are built again on their runtimes.
    """

    sizes: Mapping[str, int]
    before: PlanCost | None
    live: PlanCost | None
    settled: PlanCost | None


@dataclass(frozen=True, slots=True)
class Result:
    """The answer to one request: `outputs` by name, and the revision and plan that computed them."""

    outputs: dict[str, torch.Tensor]
    revision: int
    plan_id: str


@dataclass(frozen=True, slots=True)
class Applied:
    """The answer to one delta, live when it is given.

    Attributes:
        revision: the revision the delta made.
        affected_nodes: nodes added, changed or removed, and nodes whose type changed.
        inferred_nodes: nodes whose type was computed again.
        blocks_replanned: blocks that got a new step.
        blocks_reused: blocks whose step is the same object as before.
        live_s: seconds from the call to the store that published the new plan, journal commit
            included.
    """

    revision: int
    affected_nodes: int
    inferred_nodes: int
    blocks_replanned: int
    blocks_reused: int
    live_s: float

    def fields(self) -> dict[str, int | float]:
        """By name, for documents and events."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class DryRun:
    """What a delta would do.

    `nodes` and `blocks` are ids; `staged_bytes` counts constants that are not there yet; `cost` says
    what a request takes before and after, in the shape that is asked for most.
    """

    revision: int
    nodes: tuple[str, ...]
    inferred_nodes: int
    blocks: tuple[str, ...]
    blocks_reused: int
    staged_bytes: int
    changes_interface: bool
    cost: Foreseen | None = None


@dataclass(frozen=True, slots=True)
class RevisionInfo:
    """One line of a model's history.

    `wall_s` is seconds since the epoch, for people; order is by revision.
    """

    revision: int
    kind: str
    summary: str
    delta_id: str | None
    graph_hash: str
    wall_s: float
