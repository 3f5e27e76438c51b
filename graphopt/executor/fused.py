"""The `fused` tier: torch's prepacked oneDNN kernels, with what surrounds them folded in.

`FusedBuilder` makes such a step of a block (or of a run of blocks) in milliseconds, or declines
with a reason. A oneDNN call costs more Python than an ordinary one, so each linear chooses:
always the packed kernel, never, or, where its rows are a dynamic dim, by the rows of the request.
What a block computes is the same function; roundings differ, and where a value is NaN an epilogue
may yield a number (oneDNN's relu of NaN is 0). Results of convolutions are channels-last in
memory.

Deliberately absent: dtypes other than float32, and any measurement while serving: whether a step
is kept is decided outside.
"""

from dataclasses import dataclass

from graphopt.analysis.facts import Facts
from graphopt.analysis.regions import Region
from graphopt.executor.build import FUNCTIONS_KEPT, bind_run
from graphopt.executor.codegen import Function, compile_source
from graphopt.executor.fused_emit import emit
from graphopt.executor.fused_pack import PackCache, Packing
from graphopt.executor.fused_patterns import find_fusions
from graphopt.executor.plan import Step
from graphopt.executor.runs import run_region

# Ops whose result depends on how their operand lies in memory; a channels-last operand would
# change it.
_STRIDE_READERS = frozenset({"as_strided", "as_strided_copy", "as_strided_scatter"})
ANY_ROWS = 1 << 62  # added to or taken from the rows of a request, it decides every choice


@dataclass(frozen=True, slots=True)
class _Recipe:
    """What is known for a region key. `function` is None where the tier declines, and `reason` says why."""

    function: Function | None
    packings: tuple[Packing, ...]
    reason: str
    is_channels_last: bool


class FusedBuilder:
    """Makes fused steps: compiles a structure once, packs a weight once. Any thread may call it."""

    def __init__(self) -> None:
        self._recipes: dict[str, _Recipe] = {}
        self.packs = PackCache()

    def prepare(self, facts: Facts, block: str) -> Step | None:
        """The fused step of `block`, ready to run but not proven; None where `why` says the reason."""
        return self.prepare_run(facts, (block,))

    def prepare_run(self, facts: Facts, run: tuple[str, ...]) -> Step | None:
        """As `prepare`, for adjacent blocks as one step (see `graphopt.executor.runs`)."""
        region = run_region(facts, run)
        recipe = self._recipe(facts, region, len(run))
        if recipe.function is None or _reads_strides(facts, region, recipe):
            return None
        constants = [facts.graph.constants[name] for name in region.consts]
        packs = tuple(self.packs.get(packing, constants) for packing in recipe.packings)
        tensors = tuple(constant.tensor for constant in constants)
        return bind_run(facts, run, region, "fused", recipe.function, (*tensors, *packs))

    def why(self, facts: Facts, block: str) -> str:
        """Why `prepare` declines `block`; empty when it does not."""
        return self.why_run(facts, (block,))

    def why_run(self, facts: Facts, run: tuple[str, ...]) -> str:
        """Why `prepare_run` declines `run`; empty when it does not."""
        region = run_region(facts, run)
        recipe = self._recipe(facts, region, len(run))
        return recipe.reason or _reads_strides(facts, region, recipe)

    def _recipe(self, facts: Facts, region: Region, n_blocks: int) -> _Recipe:
        recipe = self._recipes.get(region.key)
        if recipe is None:
            recipe = _make_recipe(facts, region, n_blocks)
            if len(self._recipes) >= FUNCTIONS_KEPT:
                self._recipes.pop(next(iter(self._recipes)), None)
            self._recipes[region.key] = recipe
        return recipe


def _make_recipe(facts: Facts, region: Region, n_blocks: int) -> _Recipe:
    fusions = find_fusions(region, facts)
    emitted = emit(region, facts, fusions)
    if not emitted.gains and n_blocks == 1:
        reason = "too small for oneDNN's call" if fusions else "nothing in it that oneDNN fuses"
        return _Recipe(None, (), reason, False)
    text, names = emitted.text, emitted.names
    label = f"fused {region.key[:12]}"
    function = compile_source(text, {**names, "ROWS": 0}, label)
    if emitted.has_choice:  # both sides of every choice, for whoever proves the step
        sides = (-ANY_ROWS, ANY_ROWS)
        vars(function)["variants"] = tuple(
            compile_source(text, {**names, "ROWS": rows}, label) for rows in sides
        )
    return _Recipe(function, emitted.packings, "", emitted.is_channels_last)


def _reads_strides(facts: Facts, region: Region, recipe: _Recipe) -> str:
    """Why a channels-last result may not be handed out; empty when it may."""
    if not recipe.is_channels_last:
        return ""
    nodes = facts.graph.nodes
    for ref in region.exits:
        for user in facts.graph.users.get(ref.id, ()):
            if user in nodes and nodes[user].op.split(".")[1] in _STRIDE_READERS:
                return f"{user} depends on how its operand lies in memory"
    return ""
