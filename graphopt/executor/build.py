"""Plans from facts: every block gets a step, and blocks that did not change keep the step they had."""

from collections.abc import Callable
from functools import lru_cache
from hashlib import blake2b

from graphopt.analysis.blocks import CONTEXT
from graphopt.analysis.facts import Facts, Update
from graphopt.analysis.regions import Region
from graphopt.executor.codegen import Function, compile_source, eager_source
from graphopt.executor.plan import Plan, Step, step_digest, value_key
from graphopt.graph import Graph

FUNCTIONS_KEPT = 4096  # compiled blocks by structure key; a BERT-base has 7

MakeStep = Callable[[Facts, str], Step]


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


def bind_step(facts: Facts, block: str, tier: str, function: Function, constants: tuple[object, ...]) -> Step:
    """The step of `block` with `function`; reads, writes and frees come from the facts."""
    region = facts.regions[block]
    return Step(
        block, tier, region.key, weight_key(facts.graph, region), function, tuple(map(value_key, region.reads)), constants,
        region.symbols, tuple(map(value_key, region.exits)), _frees(facts, block, region), region.order,
    )  # fmt: skip


def weight_key(graph: Graph, region: Region) -> str:
    """The hash of the contents of a region's constants, in canonical order."""
    return _weight_key(tuple(graph.constants[name].digest for name in region.consts))


def build_plan(facts: Facts, revision: int, make: MakeStep) -> Plan:
    """A plan from scratch."""
    blocks = [CONTEXT] if CONTEXT in facts.regions else []
    blocks += [block.exit for block in facts.blocks]
    steps = tuple(make(facts, block) for block in blocks)
    return Plan(facts.graph, revision, steps, sum(map(step_digest, steps)))


def replan(plan: Plan, update: Update, revision: int, make: MakeStep) -> tuple[Plan, int]:
    """The plan after a change, and how many of its blocks were planned anew.

    Only steps of changed blocks are made; the others are the same objects. Work: the stretch from the first to the last changed block,
    plus one copy of the row of steps.
    """
    facts = update.facts
    remade = update.regions_changed | update.weights_changed | update.released
    stale = remade | update.regions_gone
    old = plan.steps
    idx = [i for i, step in enumerate(old) if step.block in stale] if stale else []
    has_context = CONTEXT in facts.regions
    head: tuple[Step, ...] = ()
    if has_context:
        keep = old and old[0].block == CONTEXT and CONTEXT not in stale
        head = (old[0],) if keep else (make(facts, CONTEXT),)
    body = old[1:] if old and old[0].block == CONTEXT else old
    shift = len(old) - len(body)
    idx = [i - shift for i in idx if i >= shift]
    first, last = (idx[0], idx[-1] + 1) if idx else (len(body), len(body))
    fresh = [exit_ for exit_ in remade if exit_ in facts.blocks.blocks]
    if fresh:
        key = facts.graph.order_key
        first, last = _widen(facts, body, first, last, [key(facts.blocks.blocks[b].nodes[0]) for b in fresh])
    by_block = {step.block: step for step in body[first:last]}
    before = body[first - 1].block if first else ""
    after = body[last].block if last < len(body) else None
    middle: list[Step] = []
    block = facts.blocks.next.get(before)
    while block is not None and block != after:
        kept = by_block.get(block)
        middle.append(kept if kept is not None and block not in remade else make(facts, block))
        block = facts.blocks.next.get(block)
    steps = (*head, *body[:first], *middle, *body[last:])
    made = sum(1 for step in (*head, *middle) if step.block in remade)
    return Plan(facts.graph, revision, steps, sum(map(step_digest, steps))), made


def _widen(
    facts: Facts, body: tuple[Step, ...], first: int, last: int, positions: list[tuple[int, str]]
) -> tuple[int, int]:
    """The stretch grown to where blocks at `positions` (order keys) belong."""

    def place(position: tuple[int, str]) -> int:
        low, high = 0, len(body)
        while low < high:
            mid = (low + high) // 2
            known = facts.blocks.blocks.get(body[mid].block)
            if known is None:  # gone; everything gone lies inside the stretch already
                return first
            low, high = (mid + 1, high) if facts.graph.order_key(known.nodes[0]) < position else (low, mid)
        return low

    if first == last == len(body) and body:
        first = len(body)
    places = [place(position) for position in (min(positions), max(positions))]
    return min(first, *places), max(last, *places)


def _frees(facts: Facts, block: str, region: Region) -> tuple[str, ...]:
    handed_out = {ref for _, ref in facts.graph.outputs}
    frees = []
    for ref in region.reads:
        last = facts.last_readers.get(ref)
        if ref not in handed_out and (last == block or (last is None and ref.id in facts.blocks.member)):
            frees.append(value_key(ref))
    return tuple(frees)


@lru_cache(maxsize=65_536)
def _weight_key(digests: tuple[str, ...]) -> str:
    return blake2b(" ".join(digests).encode(), digest_size=20).hexdigest()
