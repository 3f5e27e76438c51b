"""Plans from facts: every block gets a step, and blocks that did not change keep the step they had."""

from bisect import bisect_left
from collections.abc import Callable, Set
from functools import lru_cache
from hashlib import blake2b
from itertools import pairwise

from graphopt.analysis.blocks import CONTEXT, END, START
from graphopt.analysis.facts import Facts, Update
from graphopt.analysis.regions import Region
from graphopt.executor.codegen import Function, compile_source, eager_source
from graphopt.executor.plan import Plan, Step, step_digest, value_key
from graphopt.graph import Graph

FUNCTIONS_KEPT = 4096  # compiled blocks by structure key; a BERT-base has 7

_BEHIND = (1 << 1024, "")  # sorts after every block that has a single exit
MakeStep = Callable[[Facts, str], Step]  # of the block, or of a run of blocks that begins with it


class EagerBuilder:
    """Makes eager steps, compiling each structure once."""

    def __init__(self) -> None:
        self._functions: dict[str, Function] = {}

    def __call__(self, facts: Facts, block: str) -> Step:
        """The step that runs `block` on ordinary kernels."""
        region = facts.regions[block]
        function = self._functions.get(region.key)
        if function is None:
            source = eager_source(region, facts)
            function = compile_source(source.text(), source.names, f"eager {region.key[:12]}")
            if len(self._functions) >= FUNCTIONS_KEPT:
                self._functions.pop(next(iter(self._functions)))
            self._functions[region.key] = function
        constants = tuple(facts.graph.constants[name].tensor for name in region.consts)
        return bind_step(facts, block, "eager", function, constants)


def bind_step(
    facts: Facts, block: str, tier: str, function: Function, constants: tuple[object, ...]
) -> Step:
    """The step of `block` with `function`; reads, writes and frees come from the facts."""
    return bind_run(facts, (block,), facts.regions[block], tier, function, constants)


def bind_run(
    facts: Facts,
    blocks: tuple[str, ...],
    region: Region,
    tier: str,
    function: Function,
    constants: tuple[object, ...],
    options: str = "",
) -> Step:
    """The step of a run of blocks, whose region is `region` (see `graphopt.executor.runs`)."""
    weights = weight_key(facts.graph, region)
    return Step(
        blocks[-1],
        tier,
        region.key,
        weights,
        step_digest(blocks[-1], tier, region.key, weights, options),
        function,
        tuple(map(value_key, region.reads)),
        constants,
        region.symbols,
        tuple(map(value_key, region.exits)),
        _frees(facts, blocks, region),
        region.order,
        blocks,
        options,
    )


def weight_key(graph: Graph, region: Region) -> str:
    """The hash of the contents of a region's constants, in canonical order."""
    return _weight_key(tuple(graph.constants[name].digest for name in region.consts))


def build_plan(facts: Facts, revision: int, make: MakeStep) -> Plan:
    """A plan from scratch."""
    steps = [make(facts, CONTEXT)] if CONTEXT in facts.regions else []
    block = facts.blocks.next.get(START)
    while block is not None:
        steps.append(make(facts, block))
        block = facts.blocks.next.get(steps[-1].block)
    return Plan(facts.graph, revision, tuple(steps), sum(step.digest for step in steps))


def replan(plan: Plan, update: Update, revision: int, make: MakeStep) -> tuple[Plan, int]:
    """The plan after a change, and how many of its blocks were planned anew.

    Only steps of changed blocks are made; the others are the same objects. Work: the stretch from
    the first to the last changed block, plus one copy of the row of steps.
    """
    facts, old = update.facts, plan.steps
    remade = update.regions_changed | update.weights_changed | update.released
    had_context = bool(old) and old[0].block == CONTEXT
    head, body = (old[:1], old[1:]) if had_context else ((), old)
    new_head = head
    if CONTEXT in remade or (CONTEXT in facts.regions) != had_context:
        new_head = (make(facts, CONTEXT),) if CONTEXT in facts.regions else ()
    stale = (remade | update.regions_gone) - {CONTEXT}
    fresh = {block for block in remade if block in facts.blocks.blocks}
    first, last = _stretch(plan.graph, body, stale)
    middle, last = _walk(facts, body, first, last, remade, make)
    if not fresh <= {block for step in middle for block in step.blocks}:
        last = len(body)  # blocks were added behind the last one
        middle, _ = _walk(facts, body, first, last, remade, make)
    row = list(body)
    row[first:last] = middle
    steps = (*new_head, *row)
    gone, come = (*head, *body[first:last]), (*new_head, *middle)
    digest = plan.digest - sum(step.digest for step in gone) + sum(step.digest for step in come)
    return Plan(facts.graph, revision, steps, digest), len(fresh) + (CONTEXT in remade)


def position_of(plan: Plan, block: str) -> int:
    """Where in a plan the step that begins with `block` is; behind the last where none does.

    O(log(steps)).
    """
    steps = plan.steps
    head = 1 if steps and steps[0].block == CONTEXT else 0
    if block == CONTEXT:
        return 0 if head else len(steps)
    is_known = block == END or block in plan.graph.nodes
    position = _search(plan.graph, steps, block, head) if is_known else len(steps)
    is_there = position < len(steps) and steps[position].blocks[0] == block
    return position if is_there else len(steps)


def _search(graph: Graph, steps: tuple[Step, ...], block: str, start: int = 0) -> int:
    """The first step from `start` on that ends with `block` or behind it; all are in order."""

    def key(step: Step) -> tuple[int, str]:
        return graph.order_key(step.block) if step.block != END else _BEHIND

    return bisect_left(
        steps, graph.order_key(block) if block != END else _BEHIND, lo=start, key=key
    )


def _stretch(graph: Graph, body: tuple[Step, ...], stale: Set[str]) -> tuple[int, int]:
    """The row positions from the first to behind the last step whose block is in `stale`.

    O(stale * log(steps)).
    """
    found = []
    for block in stale:
        position = _search(graph, body, block)
        if position < len(body) and block in body[position].blocks:
            found.append(position)
    return (min(found), max(found) + 1) if found else (len(body), len(body))


def _walk(
    facts: Facts, body: tuple[Step, ...], first: int, last: int, remade: Set[str], make: MakeStep
) -> tuple[list[Step], int]:
    """The steps of the new graph's blocks between the kept rows before `first` and from `last` on.

    Returns them and where the kept rows go on: behind `last` where a run that was made covers rows
    of it.
    """
    kept = {step.blocks[0]: step for step in body[first:last]}
    block = facts.blocks.next.get(body[first - 1].block if first else START)
    after = body[last].blocks[0] if last < len(body) else None
    steps: list[Step] = []
    while block is not None and block != after:
        known = kept.get(block)
        if known is None or not _stands(facts, known, remade):
            known = make(facts, block)
        steps.append(known)
        while after in known.blocks:
            last += 1
            after = body[last].blocks[0] if last < len(body) else None
        block = facts.blocks.next.get(known.block)
    return steps, last


def _stands(facts: Facts, step: Step, remade: Set[str]) -> bool:
    """Whether the blocks of `step` are unchanged and still follow each other."""
    links = pairwise(step.blocks)
    return remade.isdisjoint(step.blocks) and all(facts.blocks.next.get(a) == b for a, b in links)


def _frees(facts: Facts, blocks: tuple[str, ...], region: Region) -> tuple[str, ...]:
    handed_out = {ref for _, ref in facts.graph.outputs}
    frees = []
    for ref in region.reads:
        last = facts.last_readers.get(ref)
        if ref not in handed_out and (
            last in blocks or (last is None and ref.id in facts.blocks.member)
        ):
            frees.append(value_key(ref))
    return tuple(frees)


@lru_cache(maxsize=65_536)
def _weight_key(digests: tuple[str, ...]) -> str:
    return blake2b(" ".join(digests).encode(), digest_size=20).hexdigest()
