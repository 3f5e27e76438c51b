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

from graphopt.constants import SHORT_DTYPES, TORCH_DTYPES
from graphopt.dims import evaluate, symbols_of
from graphopt.errors import RequestError, nearest
from graphopt.graph import Graph, Ref, Symbol
from graphopt.types import TensorType


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


@dataclass(frozen=True, slots=True)
class InputSpec:
    """What a request must bring for one input; dims are ints or symbol expressions."""

    name: str
    type: TensorType
    dtype: torch.dtype


class Plan:
    """The steps for one revision of one graph.

    `id` names revision and steps: equal ids compute the same function the same way.
    """

    __slots__ = (
        "__weakref__",
        "digest",
        "graph",
        "id",
        "inputs",
        "outputs",
        "revision",
        "steps",
        "symbols",
    )

    def __init__(self, graph: Graph, revision: int, steps: tuple[Step, ...], digest: int) -> None:
        self.graph = graph
        self.revision = revision
        self.steps = steps
        self.digest = digest
        self.id = f"r{revision}-{digest % (1 << 48):012x}"
        self.inputs = tuple(
            InputSpec(name, type_, TORCH_DTYPES[type_.dtype]) for name, type_ in graph.inputs
        )
        self.outputs = tuple((name, value_key(ref)) for name, ref in graph.outputs)
        self.symbols = graph.symbols

    def __repr__(self) -> str:
        return f"<Plan {self.id}: {len(self.steps)} steps>"

    def tiers(self) -> dict[str, int]:
        """How many steps run on each tier."""
        counts: dict[str, int] = {}
        for step in self.steps:
            counts[step.tier] = counts.get(step.tier, 0) + 1
        return counts


def bucket_symbols(plan: Plan) -> tuple[str, ...]:
    """The dynamic dims in the order in which `bind_inputs` meets them: the order of a shape bucket."""
    found: dict[str, None] = {}
    for spec in plan.inputs:
        for dim in spec.type.shape:
            if dim.__class__ is not int and symbols_of(dim) == {str(dim)}:
                found[str(dim)] = None
    return tuple(found)


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
    env, symbols = bind_inputs(plan, inputs)
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


def bind_inputs(
    plan: Plan, inputs: Mapping[str, torch.Tensor]
) -> tuple[dict[str, Any], dict[str, int]]:
    """The environment and the symbol values of a request; RequestError names input, dim and remedy."""
    env: dict[str, Any] = {}
    symbols: dict[str, int] = {}
    for spec in plan.inputs:
        tensor = inputs.get(spec.name)
        if tensor is None:
            wanted = ", ".join(other.name for other in plan.inputs)
            raise RequestError(
                f"input {spec.name!r} is missing",
                where=spec.name,
                remedy=f"the model takes {wanted}",
            )
        shape = tensor.shape
        if tensor.dtype is not spec.dtype or len(shape) != len(spec.type.shape):
            raise _mismatch(spec, tensor)
        for dim, size in zip(spec.type.shape, shape, strict=True):
            if dim.__class__ is int:
                if dim != size:
                    raise _mismatch(spec, tensor)
            else:
                _bind_dim(spec, tensor, dim, size, symbols)
        env[spec.name] = tensor
    if len(inputs) != len(plan.inputs):
        extra = next(name for name in inputs if all(name != spec.name for spec in plan.inputs))
        remedy = nearest(extra, [spec.name for spec in plan.inputs])
        raise RequestError(
            f"the model has no input {extra!r}", where=extra, remedy=remedy or "leave it out"
        )
    for symbol in plan.symbols:
        _check_range(symbol, symbols)
    return env, symbols


def _bind_dim(
    spec: InputSpec, tensor: torch.Tensor, dim: Any, size: int, symbols: dict[str, int]
) -> None:
    name = str(dim)
    known = symbols.get(name)
    if known is None and symbols_of(dim) == {name}:
        symbols[name] = size
    elif (known if known is not None else evaluate(dim, symbols)) != size:
        wanted = known if known is not None else evaluate(dim, symbols)
        raise RequestError(
            f"dim {name} is {size} in {spec.name}, {wanted} elsewhere",
            where=spec.name,
            remedy="make the inputs agree",
        )


def _check_range(symbol: Symbol, symbols: Mapping[str, int]) -> None:
    size = symbols.get(symbol.name, symbol.min)
    if size < symbol.min or (symbol.max is not None and size > symbol.max):
        upper = symbol.max if symbol.max is not None else "any size"
        raise RequestError(
            f"{symbol.name} is {size}, the model takes {symbol.min} to {upper}",
            where=symbol.name,
            remedy="cut or pad the input",
        )


def _mismatch(spec: InputSpec, tensor: torch.Tensor) -> RequestError:
    got = f"{SHORT_DTYPES.get(tensor.dtype, tensor.dtype)}[{', '.join(map(str, tensor.shape))}]"
    return RequestError(
        f"input {spec.name} is {got}, the model takes {spec.type}",
        where=spec.name,
        remedy="convert or reshape it",
    )
