"""Which of the plans that the builder proposes are worth pursuing, in what order, and what is known
about each from before.

What is at hand but for a layer or two comes before what is to be built whole, and the last winner
before others. A plan that was concluded on with nearly the same regions is not looked at again.

Deliberately absent: what is worth proposing (the planner), and what becomes of a plan (`pursuit`).
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from graphopt.analysis.facts import Facts
from graphopt.engine.assembly import Keyed, artifact_key, pieces_of
from graphopt.engine.completion import completed
from graphopt.engine.findings import Finding, Findings, with_keys
from graphopt.engine.live import LiveModel
from graphopt.engine.precedent import NEAR, share_of
from graphopt.engine.supply import Supply

Proposal = Mapping[str, Any]


class Prospects:
    """The proposals of one campaign, beside what is known."""

    def __init__(
        self, model: LiveModel, revision: int, facts: Facts, findings: Findings, supply: Supply
    ) -> None:
        self._model = model
        self._revision = revision
        self._facts = facts
        self._findings = findings
        self._supply = supply
        self._keys: dict[Hashable, Keyed] = {}  # of the proposed plans, by label and runs

    def in_order(self, plans: Sequence[Proposal]) -> list[Proposal]:
        """What is at hand but for little comes first, and of that what was chosen last."""
        return sorted(plans, key=lambda plan: (not self.is_at_hand(plan), not self.is_chosen(plan)))

    def is_chosen(self, plan: Proposal) -> bool:
        """Whether a plan was chosen, or another one of its family."""
        chosen = self._findings.chosen
        return chosen is not None and plan["family"] in (chosen.label, chosen.family)

    def precedent(self, plan: Proposal) -> Finding | None:
        """What is known about a plan: of its family the one that runs, else the one of its label."""
        if self.is_chosen(plan):
            return self._findings.chosen
        return self._findings.get(plan["label"]) or self._findings.get(plan["family"])

    def fresh(self, plan: Proposal) -> Finding:
        """A finding about a plan of which nothing is known yet, but what it is made of."""
        finding = Finding(
            plan["label"], "building", revision=self._revision, family=plan["family"],
            predicted_s=plan.get("predicted_s"),
        )  # fmt: skip
        return with_keys(finding, self._facts, self.keyed(plan))

    def completed(self, plan: Proposal) -> Proposal | None:
        """The way that runs with what a delta took away from it, where `plan` is that and more."""
        chosen = self._findings.chosen
        if chosen is None or not self.is_chosen(plan):
            return None
        return completed(plan, chosen, self._model.arrangement_of(self._facts))

    def is_at_hand(self, plan: Proposal) -> bool:
        """Whether hardly anything of a plan has to be built."""
        keyed = self.keyed(plan)
        return share_of(self._facts, keyed, self._supply.is_at_hand) >= 1.0 - NEAR

    def is_open(self, plan: Proposal) -> bool:
        """Whether a plan is worth another look.

        Not when it was concluded on nearly the same regions, and a whole graph only on the runtime
        that won by layers.
        """
        chosen = self._findings.chosen
        found = self._findings.get(plan["label"]) or self._findings.get(plan["family"])
        is_bare = not self._model.arrangement_of(self._facts).overlays
        if is_bare and found is not None and (found.state == "replaced" or found.against):
            return True  # a delta took away what it had lost against
        by_layers = chosen is not None and " layers" in chosen.label
        if chosen is not None and by_layers and plan["layout"] == "whole":
            is_rival = chosen.label.startswith(plan["backend"])
            if not is_rival:
                return False
        if found is None or found.state in ("building", "on trial", "held", "chosen"):
            return True
        if found.state == "replaced" and self.is_chosen(plan):
            return True  # by the same way with other blocks left out around edits
        fresh = self.fresh(plan)
        return not found.stands_for(fresh.blocks, fresh.shapes)

    def keyed(self, plan: Proposal) -> Keyed:
        """The pieces of a proposed plan with their keys; made once a campaign."""
        name = plan["label"], tuple(tuple(region["blocks"]) for region in plan["regions"])
        found = self._keys.get(name)
        if found is None:
            versions = self._supply.versions()
            found = self._keys[name] = [
                (piece, artifact_key(self._facts, piece, versions[piece.backend]))
                for piece in pieces_of(plan)
            ]
        return found
