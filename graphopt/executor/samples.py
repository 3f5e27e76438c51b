"""What to run a block on before there is traffic: made-up model inputs, and the values at its edge.

Made-up inputs are plausible, not real: floats are normal, integers stay below the size of every
table they index, an integer or boolean that indexes nothing is taken for a mask with the first
place of each row open. They exercise shapes and kernels; they say nothing about accuracy on data.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from graphopt.analysis.facts import Facts
from graphopt.constants import TORCH_DTYPES
from graphopt.dims import evaluate
from graphopt.executor.plan import Plan, Step, run_steps
from graphopt.graph import Const, Graph, Node, Ref
from graphopt.types import TensorType

# Sizes of dynamic dims, in the order a graph names them: small, distinct, so that a mixed-up dim
# shows; powers of two hide padding.
SYMBOL_SIZES = (2, 11, 5, 7)
TABLE_ROWS_MAX = 64  # ids stay below, so that small offsets added to them are in range still
WALK_MAX = 256  # nodes looked at for what an integer input indexes

_INDEXING = {"embedding": ("weight", 0), "index_select": ("self", None), "gather": ("self", None)}


@dataclass(frozen=True, slots=True)
class Sample:
    """One request as a step sees it: the values of `Step.reads`, and the dynamic dims."""

    reads: tuple[Any, ...]
    symbols: Mapping[str, int]


def sample_inputs(
    facts: Facts, sizes: Mapping[str, int] | None = None, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Inputs for the graph of `facts`, the same for the same seed.

    Args:
        facts: of the graph.
        sizes: of dynamic dims by name; others get a small one within their range.
        seed: of the generator; torch's own is left alone.
    """
    graph = facts.graph
    generator = torch.Generator().manual_seed(seed)
    chosen = {
        symbol.name: _size(symbol.min, symbol.max, SYMBOL_SIZES[i % len(SYMBOL_SIZES)])
        for i, symbol in enumerate(graph.symbols)
    } | dict(sizes or {})
    return {name: _made_up(facts, name, type_, chosen, generator) for name, type_ in graph.inputs}


def capture_boundaries(
    plan: Plan, steps: Iterable[Step], inputs: Mapping[str, torch.Tensor], blocks: set[str]
) -> dict[str, Sample]:
    """The samples of `blocks` in a request with `inputs`, by the name of the step's last block.

    `steps` are eager steps for the whole of `plan`'s graph in order; all of them run.
    RequestError when `inputs` do not fit the plan.
    """
    env, symbols = plan.bind(inputs)
    found: dict[str, Sample] = {}
    with torch.no_grad():
        for step in steps:
            if step.block in blocks:
                found[step.block] = Sample(tuple(env[key] for key in step.reads), symbols)
            run_steps((step,), env, symbols)
    return found


def _size(least: int, most: int | None, wanted: int) -> int:
    return max(least, wanted if most is None else min(wanted, most))


def _made_up(
    facts: Facts,
    name: str,
    type_: TensorType,
    sizes: Mapping[str, int],
    generator: torch.Generator,
) -> torch.Tensor:
    shape = [evaluate(dim, sizes) for dim in type_.shape]
    dtype = TORCH_DTYPES[type_.dtype]
    if type_.is_float:
        real = torch.float64 if type_.dtype in ("f64", "c128") else torch.float32
        return torch.randn(shape, generator=generator, dtype=real).to(dtype)
    rows = _rows_indexed(facts, name, sizes)
    if rows is not None and type_.dtype != "bool":
        most = max(1, min(rows, TABLE_ROWS_MAX))
        return torch.randint(0, most, shape, generator=generator).to(dtype)
    mask = torch.randint(0, 4, shape, generator=generator) > 0
    if shape and shape[-1]:
        mask[..., 0] = True
    return mask.to(dtype)


def _rows_indexed(facts: Facts, name: str, sizes: Mapping[str, int]) -> int | None:
    """The size of the smallest table that values made from input `name` index; None for no table."""
    graph = facts.graph
    least: int | None = None
    seen, waiting = {name}, [name]
    while waiting and len(seen) < WALK_MAX:
        id = waiting.pop()
        for user in graph.users.get(id, ()):
            node = graph.nodes.get(user)
            if node is None:
                continue
            rows = _table_rows(facts, node, id, sizes)
            if rows is not None:
                least = rows if least is None else min(least, rows)
            elif user not in seen and _stays_integer(facts, user):
                seen.add(user)
                waiting.append(user)
    return least


def _table_rows(facts: Facts, node: Node, id: str, sizes: Mapping[str, int]) -> int | None:
    name = node.op.split(".")[1]
    if name == "index":
        table, axes = node.args[0], node.args[1]
        if isinstance(axes, tuple) and Ref(id) in axes:
            return _dim(facts, table, axes.index(Ref(id)), sizes)
        return None
    if name not in _INDEXING:
        return None
    bound = node.bound()
    table_name, axis = _INDEXING[name]
    table = bound[table_name]
    if table == Ref(id) or not any(value == Ref(id) for value in bound.values()):
        return None
    return _dim(facts, table, bound["dim"] if axis is None else axis, sizes)


def _dim(facts: Facts, value: Any, axis: int, sizes: Mapping[str, int]) -> int | None:
    type_ = _type(facts.graph, facts, value)
    return evaluate(type_.shape[axis], sizes) if type_ is not None else None


def _type(graph: Graph, facts: Facts, value: Any) -> TensorType | None:
    if isinstance(value, Const):
        return graph.get_constant(value.name).type
    type_ = facts.type_of(value) if isinstance(value, Ref) else None
    return type_ if isinstance(type_, TensorType) else None


def _stays_integer(facts: Facts, id: str) -> bool:
    types = facts.types[id]
    return all(
        isinstance(t, TensorType) and t.dtype in ("i64", "i32", "i16", "i8", "u8") for t in types
    )
