"""Runs: adjacent blocks that are worth one step: a fused kernel would span the cut between them.

Cuts lie wherever one data value crosses, so a convolution, its batch-norm and its activation are
three blocks when they lie on the model's spine. Whether two neighbours join depends on the ops at
their cut alone, so runs are found locally and are the same whether a graph was edited into its
shape or built in it.

Deliberately absent: whether a run is quicker; that is decided by the builder of its step and by
measurement.
"""

from contextlib import suppress
from operator import is_

from graphopt.analysis.blocks import CONTEXT, END, START
from graphopt.analysis.facts import Facts
from graphopt.analysis.regions import Region, join_regions
from graphopt.executor.build import bind_run
from graphopt.executor.codegen import compile_source, eager_source
from graphopt.executor.plan import Step
from graphopt.graph import Ref

_CONVOLUTIONS = frozenset({"aten.conv2d.default", "aten.convolution.default"})
_LINEARS = frozenset({"aten.linear.default", "aten.addmm.default"})
_BATCH_NORMS = frozenset({"aten.batch_norm.default"})
_ACTIVATIONS = frozenset(
    f"aten.{name}.default"
    for name in (
        "relu", "gelu", "silu", "tanh", "sigmoid", "hardtanh", "hardswish", "hardsigmoid",
        "leaky_relu", "relu6", "clamp",
    )
)  # fmt: skip
# The op of a cut value -> the ops of its only reader that join the two blocks. No chain through
# this table is longer than pad, convolution, batch-norm, activation, so no run is longer than
# four blocks.
_JOINS = {
    **dict.fromkeys(_CONVOLUTIONS, _BATCH_NORMS | _ACTIVATIONS),
    **dict.fromkeys(_LINEARS, _ACTIVATIONS),
    **dict.fromkeys(_BATCH_NORMS, _ACTIVATIONS),
    "aten.add.Tensor": _ACTIVATIONS,
    "aten.pad.default": _CONVOLUTIONS,
    "aten.constant_pad_nd.default": _CONVOLUTIONS,
}
KNOWN_MAX = 1_024  # runs, 10 KB each for a layer of a transformer
_Outputs = tuple[tuple[str, Ref], ...]
_KNOWN: dict[tuple[str, ...], tuple[tuple[Region, ...], _Outputs, Region]] = {}


def run_of(facts: Facts, block: str) -> tuple[str, ...]:
    """The run that holds `block`, in order; most are of one block. O(1)."""
    if block == CONTEXT:
        return (block,)
    table = facts.blocks
    first = block
    while (entry := table.blocks[first].entry) != START and joins(facts, entry):
        first = entry
    run = [first]
    while run[-1] != END and joins(facts, run[-1]):
        run.append(table.next[run[-1]])
    return tuple(run)


def joins(facts: Facts, cut: str) -> bool:
    """Whether the block that ends at `cut` and the next one belong together."""
    after = facts.blocks.next.get(cut)
    if after is None:
        return False
    users = list(facts.graph.users.get(cut, ()))
    if len(users) != 1 or users[0] not in facts.graph.nodes:
        return False
    return facts.graph.nodes[users[0]].op in _JOINS.get(facts.graph.nodes[cut].op, ())


def run_region(facts: Facts, run: tuple[str, ...]) -> Region:
    """What a run computes; for a single block the region that the facts hold already.

    A run of everything may begin with CONTEXT: it then computes the context values by itself and
    hands out none but the model's outputs among them.
    """
    if len(run) == 1:
        return facts.regions[run[0]]
    regions, outputs = facts.regions, facts.graph.outputs
    parts = tuple([regions[block] for block in run])
    # After a delta the regions of blocks that it left alone are the same objects
    known = _KNOWN.get(run)
    if known is not None and known[1] == outputs and all(map(is_, known[0], parts)):
        return known[2]
    handed_out = {ref for _, ref in outputs}
    exits: dict[Ref, None] = {}
    for block, part in zip(run, parts, strict=True):
        for ref in part.exits:
            is_inner = ref.id == block or block == CONTEXT
            if block == run[-1] or not is_inner or ref in handed_out:
                exits[ref] = None
    region = join_regions(parts, tuple(exits))
    _KNOWN[run] = (parts, outputs, region)
    while len(_KNOWN) > KNOWN_MAX:
        with suppress(KeyError, RuntimeError):  # another thread was at it too
            del _KNOWN[next(iter(_KNOWN))]
    return region


def eager_run(facts: Facts, run: tuple[str, ...]) -> Step:
    """The step that runs `run` on ordinary kernels: what its candidates are compared with."""
    region = run_region(facts, run)
    source = eager_source(region, facts)
    function = compile_source(source.text(), source.names, f"eager {region.key[:12]}")
    constants = tuple(facts.graph.constants[name].tensor for name in region.consts)
    return bind_run(facts, run, region, "eager", function, constants)
