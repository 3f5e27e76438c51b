"""What runs and why: the plan of a model as a record that prints as a table."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from graphopt.analysis.blocks import CONTEXT

if TYPE_CHECKING:
    from graphopt.engine.host import Host
    from graphopt.engine.live import LiveModel


@dataclass(frozen=True, slots=True)
class BlockLine:
    """One block of the plan: `nodes` it computes, the tier it runs on, and the reason."""

    block: str
    nodes: int
    tier: str
    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """The plan of one revision.

    Predicted and measured costs are absent until a cost model supplies them.
    """

    model: str
    revision: int
    plan_id: str
    graph_hash: str
    blocks: tuple[BlockLine, ...]

    def __str__(self) -> str:
        head = f"{self.model} revision {self.revision}, plan {self.plan_id}, graph {self.graph_hash[:12]}"
        width = max((len(line.block) for line in self.blocks), default=5)
        rows = [f"{'block':<{width}}  nodes  tier   key           why"]
        rows += [
            f"{b.block:<{width}}  {b.nodes:>5}  {b.tier:<5}  {b.key[:12]}  {b.reason}"
            for b in self.blocks
        ]
        return "\n".join([head, *rows])


def explain(host: "Host", model: "LiveModel") -> Explanation:
    """The explanation of the published plan."""
    plan, facts = model.slot.plan, model.facts
    lines = []
    for step in plan.steps:
        name = "context" if step.block == CONTEXT else step.block
        if step.tier == "eager":
            reason = (
                host.explain_block(model, step.block)
                if step.block in facts.regions
                else "being replaced"
            )
        else:
            reason = "verified against eager for this region and these weights"
        lines.append(BlockLine(name, len(step.nodes), step.tier, step.key, reason))
    return Explanation(model.name, plan.revision, plan.id, plan.graph.hash, tuple(lines))
