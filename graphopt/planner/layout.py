"""Layouts: ways to part a graph into runs of adjacent blocks, each to be one region of a runtime.

A *layer* is what a network repeats. It begins at its anchor, the repeated block that makes up most
of the graph (in a transformer that is the attention), and lasts to the next one. An edit inside a
layer changes that layer's run alone, because the others keep their anchors; a layer whose anchor was
edited is known by the rest of it, or by the layer before it. Where what follows the last layer reads a
few of its rows alone, the two are one run: a region is rewritten by itself, so only together do they
leave out the others.

Deliberately absent: parts of blocks. A cut that more than one value crosses costs more than it
gains at the sizes where layers pay.
"""

from collections import Counter
from collections.abc import Set
from itertools import pairwise

from graphopt.analysis.blocks import CONTEXT, START
from graphopt.analysis.facts import Facts
from graphopt.executor.runs import joins, run_of, run_region
from graphopt.rewrite.rows import narrowed

LAYERS_MIN = 3  # fewer repetitions are no pattern
NODES_MIN = 2  # a call into a runtime costs more than one op
CUT_NODES_MIN = 8  # what a cut leaves over is worth a region of its own only from this size on
REST_NODES_MIN = 4  # of a layer beside its anchor, to know it by them; fewer are met anywhere
EDITED_MAX = 2  # an edited anchor has grown or shrunk by one in so many of its nodes, at most
AROUND_MIN = 0.5  # of the nodes: with fewer left of it, a layout around edits is none

Run = tuple[str, ...]


def chain(facts: Facts) -> Run:
    """All blocks in order."""
    found = []
    block = facts.blocks.next.get(START)
    while block is not None:
        found.append(block)
        block = facts.blocks.next.get(block)
    return tuple(found)


def whole(facts: Facts) -> list[Run]:
    """One run of everything, the context region included where there is one."""
    blocks = chain(facts)
    return [(CONTEXT, *blocks) if CONTEXT in facts.regions else blocks]


def layers(facts: Facts) -> list[Run]:
    """A run for each layer, one for what comes before the first and one for what follows the last,
    if it does not belong to that.

    Empty when nothing repeats `LAYERS_MIN` times.
    """
    blocks = chain(facts)
    keys = [facts.regions[block].key for block in blocks]
    starts = _starts(facts, blocks)
    if not starts:
        return []
    bounds = {whole_run(facts, blocks, i) for i in (*starts, _end_of_last(keys, starts))}
    runs = [blocks[a:b] for a, b in pairwise(sorted({0, *bounds, len(blocks)}))]
    last = (*runs[-2], *runs[-1])
    return [*runs[:-2], last] if _narrows(facts, runs[-2], last) else runs


def _narrows(facts: Facts, layer: Run, joined: Run) -> bool:
    """Whether in `joined` fewer rows of `layer` are computed than by itself."""
    region = run_region(facts, joined)
    inside = set(layer)
    return any(facts.home_of(id) in inside for id in narrowed(facts, region))


def whole_run(facts: Facts, blocks: Run, bound: int) -> int:
    """`bound`, or the next position that parts no blocks which the live path runs as one step."""
    while 0 < bound < len(blocks) and joins(facts, blocks[bound - 1]):
        bound += 1
    return bound


def pieces_of(facts: Facts, run: Run, out: Set[str]) -> list[Run]:
    """What is left of `run` without the blocks of `out` and those that run as one step with them."""
    out = {part for block in out if block in facts.regions for part in run_of(facts, block)}
    if not out:
        return [run] if node_count(facts, run) >= NODES_MIN else []
    if CONTEXT in out and run[0] == CONTEXT:  # its values are read from outside then
        run = run[1:]
    pieces: list[list[str]] = [[]]
    for block in run:
        if block in out:
            pieces.append([])
        else:
            pieces[-1].append(block)
    if len(pieces) > 1 and run[0] == CONTEXT:  # only a run of everything computes it by itself
        pieces[0].remove(CONTEXT)
    least = NODES_MIN if len(pieces) == 1 else CUT_NODES_MIN
    return [piece for each in pieces if each and node_count(facts, piece := tuple(each)) >= least]


def around(facts: Facts, runs: list[Run], restless: Set[str]) -> list[Run]:
    """`runs` without the blocks that deltas keep editing: a delta then drops none of the regions.

    The runs as they are where no restless block is in them, or where too little would be left.
    """
    pieces = [piece for run in runs for piece in pieces_of(facts, run, restless)]
    if not restless:
        return pieces
    left, most = (sum(node_count(facts, run) for run in each) for each in (pieces, runs))
    return pieces if left >= AROUND_MIN * most else runs


def node_count(facts: Facts, run: Run) -> int:
    """How many nodes the blocks of a run compute."""
    return len(run_region(facts, run).order)


def layer_count(facts: Facts) -> int:
    """How many layers `layers` finds."""
    return len(_starts(facts, chain(facts)))


def _starts(facts: Facts, blocks: Run) -> list[int]:
    """Where layers begin: at the anchors, of which the first of equals in the order of the graph is
    taken, and at blocks of about their size that stand where an anchor would.
    """
    keys = [facts.regions[block].key for block in blocks]
    sizes = [len(facts.regions[block].order) for block in blocks]
    counts, nodes = Counter(keys), dict(zip(keys, sizes, strict=True))
    repeated = [key for key, count in counts.items() if count >= LAYERS_MIN]
    anchor = max(repeated, key=lambda key: counts[key] * nodes[key], default=None)
    if anchor is None:
        return []
    found = [i for i, key in enumerate(keys) if key == anchor]

    def is_like_anchor(key: str) -> bool:
        return abs(nodes[key] - nodes[anchor]) * EDITED_MAX <= nodes[anchor]

    rest = min((tuple(keys[a + 1 : b]) for a, b in pairwise(found)), key=len)
    half = len(rest) // 2  # where every second anchor was edited there are two layers in it
    if half and rest[:half] == rest[half + 1 :] and is_like_anchor(rest[half]):
        rest = rest[:half]
    length = len(rest)
    if sum(nodes[key] for key in rest) < REST_NODES_MIN:
        return found
    starts: list[int] = []
    alike = {key for key in nodes if key == anchor or is_like_anchor(key)}
    for i, key in enumerate(keys):
        if key not in alike:
            continue
        is_before_rest = tuple(keys[i + 1 : i + 1 + length]) == rest
        is_behind_layer = bool(starts) and i == starts[-1] + length + 1
        is_behind_rest = is_behind_layer and tuple(keys[i - length : i]) == rest
        if key == anchor or is_before_rest or is_behind_rest:
            starts.append(i)
    return starts


def _end_of_last(keys: list[str], starts: list[int]) -> int:
    """Where the last layer ends: as long as it is like the layer before, block by block."""
    last, before = starts[-1], starts[-2]
    length = 0
    while last + length < len(keys) and before + length < last:
        if keys[last + length] != keys[before + length]:
            break
        length += 1
    return last + length
