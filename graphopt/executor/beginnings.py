"""The values that there are where a step of a plan begins, on captured inputs.

What is to be warmed or timed by itself starts from them. They are computed once, and those that cross
from layer to layer are kept for later revisions: behind an edit the old values still have the types
that the new ones would have, so what runs from them takes as long. It is no answer to anybody, and no
proof: `graphopt.builder.boundaries` has the values of the very revision.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from graphopt.analysis.blocks import CONTEXT
from graphopt.analysis.facts import Facts
from graphopt.constants import TORCH_DTYPES
from graphopt.dims import evaluate
from graphopt.executor.plan import Plan, Step, run_steps
from graphopt.graph import Ref
from graphopt.types import TensorType

BYTES_MAX = 16 << 20  # of one model: a BERT-base at 1x128 has 0.4 MB at each layer

Inputs = Mapping[str, torch.Tensor]
Env = dict[str, Any]


class Crossings:
    """Tensors that crossed into a model's blocks on captured inputs; those not asked for longest go first."""

    def __init__(self, bytes_max: int = BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self._bytes = 0
        self._inputs: dict[int, Inputs] = {}  # by id, which stays theirs while they are held
        self._kept: OrderedDict[tuple[int, str], Mapping[str, torch.Tensor]] = OrderedDict()

    def keep_to(self, inputs: Sequence[Inputs]) -> None:
        """Forgets what crossed on other inputs."""
        self._inputs = {id(each): each for each in inputs}
        for key in [key for key in self._kept if key[0] not in self._inputs]:
            self._drop(key)

    def put(self, captured: Inputs, block: str, env: Env) -> None:
        """The tensors of `env` are those that there are where `block` begins."""
        key = id(captured), block
        if key[0] not in self._inputs:
            return
        if key in self._kept:
            self._drop(key)
        given = set(map(id, captured.values()))
        # Copies: a runtime must not go without the memory of a result that is kept for long
        self._kept[key] = {
            name: value.clone()
            for name, value in env.items()
            if isinstance(value, torch.Tensor) and id(value) not in given
        }
        self._bytes += _size(self._kept[key])
        while self._bytes > self._bytes_max:
            self._drop(next(iter(self._kept)))

    def find(self, captured: Inputs, block: str) -> Mapping[str, torch.Tensor]:
        """What crossed into `block`; nothing where that is not known."""
        key = id(captured), block
        if key not in self._kept:
            return {}
        self._kept.move_to_end(key)
        return self._kept[key]

    def _drop(self, key: tuple[int, str]) -> None:
        self._bytes -= _size(self._kept.pop(key))


class Beginnings:
    """Of the steps of `plan` on `inputs`."""

    def __init__(
        self,
        plan: Plan,
        inputs: Sequence[Inputs],
        facts: Facts | None = None,
        crossings: Crossings | None = None,
    ) -> None:
        """With `crossings` of the plan's model, and `facts` of its graph, what they hold is made use of."""
        self.plan = plan
        self.inputs = inputs
        self._facts = facts
        self._crossings = crossings
        if crossings is not None:
            crossings.keep_to(inputs)
        self._symbols: dict[int, Mapping[str, int]] = {}
        self._kept: dict[int, dict[int, Env]] = {}  # by id of the input, and by position

    def at(self, captured: Inputs, position: int) -> tuple[Env, Mapping[str, int]]:
        """A fresh environment with them, and the sizes of symbols.

        Raises what `bind` and the steps before raise.
        """
        with torch._C._InferenceMode(True):
            kept = self._kept.get(id(captured))
            if kept is None:
                env, self._symbols[id(captured)] = self.plan.bind(captured)
                kept = self._kept[id(captured)] = {0: env}
            if position not in kept:
                known = self._known(captured, position)
                kept[position] = known if known is not None else self._compute(captured, position)
        return dict(kept[position]), self._symbols[id(captured)]

    def run(self, captured: Inputs, position: int, steps: tuple[Step, ...]) -> None:
        """Runs `steps` from where the step at `position` begins, as a request would; raises what they do."""
        with torch._C._InferenceMode(True):
            env, symbols = self.at(captured, position)
            run_steps(steps, env, symbols)

    def _compute(self, captured: Inputs, position: int) -> Env:
        """From the nearest position before."""
        kept, symbols = self._kept[id(captured)], self._symbols[id(captured)]
        near = max(each for each in kept if each < position)
        env = dict(kept[near])
        for step in self.plan.steps[near:position]:
            if self._crossings is not None and len(step.blocks) > 1:
                self._crossings.put(captured, step.blocks[0], env)
            run_steps((step,), env, symbols)
        if self._crossings is not None and position < len(self.plan.steps):
            self._crossings.put(captured, self.plan.steps[position].blocks[0], env)
        return env

    def _known(self, captured: Inputs, position: int) -> Env | None:
        """By what crossed in a plan from before, where that has the types of today.

        Everything but such tensors is computed: what the context hands to all blocks.
        """
        steps, kept = self.plan.steps, self._kept[id(captured)]
        if self._crossings is None or self._facts is None or position >= len(steps):
            return None
        crossed = self._crossings.find(captured, steps[position].blocks[0])
        if not crossed:
            return None
        head = 1 if steps[0].block == CONTEXT else 0
        if head >= position:
            return None
        if head not in kept:
            kept[head] = self._compute(captured, head)
        env = kept[head]
        needed = _needed(self.plan, position)
        missing = needed - env.keys()
        if not all(self._has_type(name, crossed.get(name), captured) for name in missing):
            return None
        return {name: env[name] if name in env else crossed[name] for name in needed}

    def _has_type(self, name: str, value: torch.Tensor | None, captured: Inputs) -> bool:
        assert self._facts is not None
        type_ = self._facts.type_of(_ref(name, self._facts))
        if value is None or not isinstance(type_, TensorType):
            return False
        symbols = self._symbols[id(captured)]
        shape = tuple(evaluate(dim, symbols) for dim in type_.shape)
        return (value.dtype, tuple(value.shape)) == (TORCH_DTYPES[type_.dtype], shape)


def _needed(plan: Plan, position: int) -> set[str]:
    """What the steps from `position` on read and do not make, and what is answered of it."""
    made: set[str] = set()
    needed: set[str] = set()
    for step in plan.steps[position:]:
        needed.update(name for name in step.reads if name not in made)
        made.update(step.writes)
    return needed | {key for _, key in plan.outputs if key not in made}


def _ref(name: str, facts: Facts) -> Ref:
    """The value of an environment's key."""
    id, _, idx = name.rpartition(":")
    is_later = id in facts.graph.nodes and idx.isdigit()
    return Ref(id, int(idx)) if is_later else Ref(name)


def _size(values: Mapping[str, torch.Tensor]) -> int:
    return sum(value.nbytes for value in values.values())
