"""A plan: the published way to run one revision, an immutable value.

A plan is a row of steps, one a block (and one for the context region, first). A step binds a
compiled function to the tensors it works with; a plan for the next revision shares every step that
did not change.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch

from graphopt.executor.binding import binder_of
from graphopt.graph import Graph, Ref


@dataclass(frozen=True, slots=True)
class Step:
    """One region on one backend: a block, or a run of blocks.

    `function(*reads, *constants, *symbols)` returns one value for one entry in `writes`, a tuple
    for several. `reads` and `writes` are keys of the request's environment; `frees` are the reads
    that nothing later needs.
    """

    block: str
    tier: str
    key: str  # structure key of the region
    weights: str  # hash of the constants' contents
    digest: int  # the share of this step in the plan's id
    function: Any
    reads: tuple[str, ...]
    constants: tuple[Any, ...]
    symbols: tuple[str, ...]
    writes: tuple[str, ...]
    frees: tuple[str, ...]
    nodes: tuple[str, ...]
    blocks: tuple[str, ...]  # the blocks this step computes, in order; `block` is the last
    options: str = ""  # how the tier runs it, for people; part of the plan's id


class Plan:
    """The steps for one revision of one graph.

    `id` names revision and steps: equal ids compute the same function the same way. `bind` checks the
    inputs of a request (see `binding`).
    """

    __slots__ = (
        "__weakref__",
        "bind",
        "digest",
        "graph",
        "id",
        "outputs",
        "revision",
        "steps",
    )

    def __init__(self, graph: Graph, revision: int, steps: tuple[Step, ...], digest: int) -> None:
        self.graph = graph
        self.revision = revision
        self.steps = steps
        self.digest = digest
        self.id = f"r{revision}-{digest % (1 << 48):012x}"
        self.bind = binder_of(graph.inputs, graph.symbols)
        self.outputs = tuple((name, value_key(ref)) for name, ref in graph.outputs)

    def __repr__(self) -> str:
        return f"<Plan {self.id}: {len(self.steps)} steps>"

    def tiers(self) -> dict[str, int]:
        """How many steps run on each tier."""
        counts: dict[str, int] = {}
        for step in self.steps:
            counts[step.tier] = counts.get(step.tier, 0) + 1
        return counts


def value_key(ref: Ref) -> str:
    """The environment key of a value."""
    return f"{ref.id}:{ref.idx}" if ref.idx else ref.id


def step_digest(block: str, tier: str, key: str, weights: str, options: str = "") -> int:
    """The share of a step in its plan's id."""
    text = f"{block} {tier} {key} {weights} {options}"
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def run_plan(plan: Plan, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The outputs of `plan` by name.

    Raises RequestError when the inputs are not what the graph declares.
    """
    env, symbols = plan.bind(inputs)
    run_steps(plan.steps, env, symbols)
    return {name: env[key] for name, key in plan.outputs}


def run_steps(steps: tuple[Step, ...], env: dict[str, Any], symbols: Mapping[str, int]) -> None:
    """Runs `steps` over `env`, which maps value keys to tensors, in place."""
    for step in steps:
        args = [env[key] for key in step.reads]
        for key in step.frees:
            del env[key]
        if step.symbols:
            out = step.function(*args, *step.constants, *[symbols[name] for name in step.symbols])
        else:
            out = step.function(*args, *step.constants)
        writes = step.writes
        if len(writes) == 1:
            env[writes[0]] = out
        else:
            env.update(zip(writes, out, strict=True))
