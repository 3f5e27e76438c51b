"""The lowered graph: what a region's nodes become before a runtime sees them.

`lower` runs the passes in order over one region of a graph. Their deltas apply to a graph that
shares everything else with the user's, are never journaled and make no revision (law 2); what the
region takes and hands out stays as it is, so a step built from the lowered region takes the place
of one built from the user's nodes, and the user's ids stay the ones that deltas name.

Deliberately absent: rewrites across regions. What a pass may know about the rest of the graph is
the types of what it reads.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from graphopt.analysis.facts import Facts, update
from graphopt.analysis.regions import Region, build_region
from graphopt.delta import Delta, RemoveNode, apply_fully
from graphopt.errors import GraphoptError
from graphopt.graph import Graph
from graphopt.rewrite.affine import fold_affine
from graphopt.rewrite.attention import recognise_attention
from graphopt.rewrite.cleaning import clean
from graphopt.rewrite.folding import fold_constants
from graphopt.rewrite.merging import merge_linears
from graphopt.rewrite.norms import fold_batch_norms
from graphopt.rewrite.rewrite import Declined, Pass
from graphopt.rewrite.rows import push_rows
from graphopt.rewrite.sharing import share_equal

PASSES: Mapping[str, Pass] = {
    "clean": clean,
    "constants": fold_constants,
    "affine": fold_affine,
    "norms": fold_batch_norms,
    "attention": recognise_attention,
    "share": share_equal,
    "rows": push_rows,
    "merge": merge_linears,
}
VERSION = 1  # of what the passes do together: an artifact of another one is built again
ROUNDS_MAX = 4  # one pass may make room for another; each settles by itself


@dataclass(frozen=True, slots=True)
class PassStep:
    """What one pass did to a region: how many edits, or why it left places alone."""

    name: str
    edits: int
    declined: tuple[Declined, ...] = ()
    fault: str = ""  # the pass made a delta that is refused: it is left out


@dataclass(frozen=True, slots=True)
class Lowered:
    """A region after the passes, in a graph of its own.

    `sources` maps each node of the region that is not the user's as it was to the user's nodes
    whose values it computes.
    """

    facts: Facts
    region: Region
    sources: Mapping[str, tuple[str, ...]]
    steps: tuple[PassStep, ...]

    @property
    def graph(self) -> Graph:
        """The lowered graph."""
        return self.facts.graph


def lower(facts: Facts, region: Region, passes: Mapping[str, Pass] | None = None) -> Lowered:
    """Runs the passes (all of `PASSES` by default) over `region` until none has anything to do."""
    lowered = Lowered(facts, region, {}, ())
    chosen = PASSES if passes is None else passes
    for _ in range(ROUNDS_MAX):
        before = lowered.graph
        for name, run in chosen.items():
            lowered = _after(lowered, name, run, region)
        if lowered.graph is before:
            break
    return _without_dead(lowered, region)


def _after(lowered: Lowered, name: str, run: Pass, original: Region) -> Lowered:
    facts = lowered.facts
    rewrite = run(facts, lowered.region)
    step = PassStep(name, len(rewrite.delta.edits), rewrite.declined)
    if not rewrite:
        return replace(lowered, steps=(*lowered.steps, step))
    try:
        applied = apply_fully(facts.graph, rewrite.delta)
        facts = update(facts, applied.graph, applied.change).facts
    except GraphoptError as error:
        step = replace(step, edits=0, fault=str(error))
        return replace(lowered, steps=(*lowered.steps, step))
    region = _region_of(facts, original)
    known = lowered.sources
    sources = {
        id: tuple(dict.fromkeys(root for part in parts for root in known.get(part, (part,))))
        for id, parts in rewrite.sources.items()
    }
    merged = {id: from_ for id, from_ in {**known, **sources}.items() if id in facts.graph.nodes}
    return Lowered(facts, region, merged, (*lowered.steps, step))


def _without_dead(lowered: Lowered, original: Region) -> Lowered:
    """Drops what no exit of the region needs any more, and nothing outside it reads."""
    graph = lowered.graph
    wanted = set(lowered.region.order)
    stale = [id for id in (*original.order, *lowered.sources) if id not in wanted]
    gone: dict[str, None] = {}
    for id in sorted(dict.fromkeys(stale), key=graph.order_key, reverse=True):
        if id in graph.nodes and all(user in gone for user in graph.users.get(id, ())):
            gone[id] = None
    if not gone:
        return lowered
    applied = apply_fully(graph, Delta([RemoveNode(id) for id in gone]))
    facts = update(lowered.facts, applied.graph, applied.change).facts
    sources = {id: from_ for id, from_ in lowered.sources.items() if id not in gone}
    return replace(lowered, facts=facts, sources=sources)


def _region_of(facts: Facts, original: Region) -> Region:
    """The region that computes the same exits from the same reads.

    Reads, symbols and the constants of the original keep their places, whether or not they are
    used still; constants that a pass made come last.
    """
    outside = {ref.id for ref in original.reads}
    found = build_region(
        facts.graph, facts.type_of, original.exits,
        lambda id: id not in outside and id in facts.graph.nodes,
    )  # fmt: skip
    made = tuple(name for name in found.consts if name not in original.consts)
    assert set(found.reads) <= set(original.reads), "a pass reads what the region does not"
    assert set(found.symbols) <= set(original.symbols), "a pass makes a size of its own"
    return replace(
        found,
        reads=original.reads,
        consts=(*original.consts, *made),
        symbols=original.symbols,
        made=(*original.made, *made),
    )
