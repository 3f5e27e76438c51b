"""What is known about the ways of running one model: tried, refused, chosen, and why.

A finding outlives the revision it was made on: while most blocks of a plan have the structure they
had, what was concluded about it stands (`stands_for`). Blocks and not regions: a delta to one layer
changes the one region of a whole graph, and says nothing new about whole graphs. `explain` prints
findings as they are.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from graphopt.analysis.facts import Facts
from graphopt.engine.assembly import Keyed
from graphopt.engine.kinds import kind_of
from graphopt.executor.switch import Outcome

SAME_SHARE = 0.75  # of the structures: as long as they are the same, a conclusion stands
FINDINGS_KEPT = 32

State = Literal["building", "on trial", "chosen", "replaced", "no gain", "failed", "held"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One way of running a model, and what came of it.

    Attributes:
        label: of the proposal: backend, layout, variant.
        state: `chosen` was published and not taken back; `replaced` was, until a better one came;
            `held` waits for a pin to end.
        reason: for people, with figures.
        revision: on which it was concluded.
        structures: keys of the regions it is made of.
        kinds: of these regions: see `kinds`.
        blocks: structure keys of the blocks in these.
        shapes: labels of the shape variants it has.
        ratio: time per request over that of the plan it was tried against, in its last trial; None
            before the first.
        latency_s: median of a request on it in that trial; None likewise.
        build_s: wall time of all builds it took, None when all artifacts were at hand.
        resident_bytes: memory of its artifacts beyond mapped files.
        against: label of the way that ran when it was tried; empty for the live path alone. Once a
            delta has taken that away, to be no gain says nothing.
        predicted_s: seconds of a request as the planner foresaw them; None where it could not.
        family: label of the same way of running without regard to blocks that are left out because
            deltas keep editing them; what won in one of a family counts for all.
    """

    label: str
    state: State
    reason: str = ""
    revision: int = 0
    structures: frozenset[str] = frozenset()
    kinds: frozenset[str] = frozenset()
    blocks: frozenset[str] = frozenset()
    shapes: frozenset[str] = frozenset()
    ratio: float | None = None
    latency_s: float | None = None
    build_s: float | None = None
    resident_bytes: int | None = None
    against: str = ""
    family: str = ""
    predicted_s: float | None = None

    @property
    def key(self) -> tuple[str, frozenset[str]]:
        """What a verdict about it, and a back-off, is about."""
        return (self.label, self.structures)

    def stands_for(self, blocks: Iterable[str], shapes: Iterable[str]) -> bool:
        """Whether the conclusion holds for a plan of blocks of these structures and shape variants."""
        wanted = set(blocks)
        same = len(wanted & self.blocks)
        is_same_shapes = set(shapes) <= self.shapes
        return is_same_shapes and bool(wanted) and same >= SAME_SHARE * len(wanted)


class Findings:
    """The findings about one model, in the order they were made."""

    def __init__(self) -> None:
        self._by_label: dict[str, Finding] = {}

    def note(self, finding: Finding) -> None:
        """Takes the place of an older finding of that label."""
        self._by_label.pop(finding.label, None)
        self._by_label[finding.label] = finding
        while len(self._by_label) > FINDINGS_KEPT:
            self._by_label.pop(next(iter(self._by_label)))

    def choose(self, finding: Finding) -> None:
        """Notes the one that runs now; any other that was chosen is replaced."""
        for other in self:
            if other.state == "chosen" and other.label != finding.label:
                self.note(replace(other, state="replaced"))
        self.note(finding)

    def get(self, label: str) -> Finding | None:
        """The finding about a label."""
        return self._by_label.get(label)

    def take_back(self, outcome: Outcome) -> None:
        """A plan that ran was found worse: its finding says why."""
        label = outcome.key[0] if isinstance(outcome.key, tuple) else ""
        found = self._by_label.get(label)
        if found is not None:
            self.note(replace(found, state="no gain", reason=f"taken back: {outcome.reason}"))

    @property
    def chosen(self) -> Finding | None:
        """The way that runs, if it was chosen by trial."""
        return next((f for f in self._by_label.values() if f.state == "chosen"), None)

    def __iter__(self) -> Iterator[Finding]:
        return iter(list(self._by_label.values()))


def with_keys(finding: Finding, facts: Facts, keyed: Keyed) -> Finding:
    """The finding with the structures and shape variants that its plan is made of."""
    return replace(
        finding,
        structures=frozenset(key[0] for _, key in keyed),
        kinds=frozenset(kind_of(facts, piece.blocks) for piece, _ in keyed),
        blocks=frozenset(facts.regions[block].key for piece, _ in keyed for block in piece.blocks),
        shapes=frozenset(piece.options.label for piece, _ in keyed),
    )


def with_figures(finding: Finding, before: Finding | None) -> Finding:
    """The finding with what was measured the last time, where nothing had to be measured now."""
    if before is None:
        return finding
    reason = before.reason if before.state == finding.state else ""
    return replace(
        finding, reason=finding.reason or reason, ratio=before.ratio, latency_s=before.latency_s,
        build_s=before.build_s if finding.build_s is None else finding.build_s,
    )  # fmt: skip


def judged(finding: Finding, outcome: Outcome, *, runs: bool) -> Finding:
    """The finding with what the switch decided.

    `runs`: regions of this way of running are published, and go on whatever becomes of the new ones.
    """
    trial = outcome.trial
    states: dict[str, State] = {
        "published": "chosen",
        "refused": "chosen" if runs else "no gain",
    }
    state = states.get(outcome.decision, "building")  # not judged to the end: open again
    return replace(
        finding,
        state=state,
        reason=outcome.reason,
        ratio=trial.ratio if trial is not None else finding.ratio,
        latency_s=trial.buckets[0].candidate_s if trial and trial.buckets else finding.latency_s,
    )
