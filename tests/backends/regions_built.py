"""Builds a region of a graph on a backend and runs it beside the reference."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from graphopt.analysis.facts import Facts
from graphopt.analysis.regions import Region, build_region
from graphopt.executor.backend import Backend, Loaded, Options, passes_of
from graphopt.graph import Const, Graph, Ref
from graphopt.rewrite import lower
from helpers.graphs import reference

Case = tuple[Any, ...]  # op, *args, keywords as a last dict


def whole(facts: Facts) -> Region:
    """The region of every node that an output needs."""
    graph = facts.graph
    exits = dict.fromkeys(ref for _, ref in graph.outputs)
    return build_region(graph, facts.type_of, tuple(exits), lambda id: id in graph.nodes)


def built(backend: Backend, facts: Facts, region: Region, options: Options, folder: Path) -> Loaded:
    """The region built into `folder`, which is made, and loaded from it."""
    folder.mkdir()
    backend.build(facts, region, options, folder)
    return backend.load(folder, [facts.graph.constants[n].tensor for n in region.consts], options)


def lowered_and_built(
    backend: Backend, facts: Facts, region: Region, options: Options, folder: Path
) -> Loaded:
    """As the builder does it: rewritten first, and loaded with the user's constants alone."""
    lowered = lower(facts, region, passes_of(backend))
    assert [step.fault for step in lowered.steps if step.fault] == []
    folder.mkdir()
    backend.build(lowered.facts, lowered.region, options, folder)
    return backend.load(folder, [facts.graph.constants[n].tensor for n in region.consts], options)


def call(
    loaded: Loaded, region: Region, values: Mapping[str, torch.Tensor], sizes: Mapping[str, int]
) -> list[torch.Tensor]:
    """The exits for reads that are graph inputs."""
    symbols = [sizes[name] for name in region.symbols]
    out = loaded.function(*[values[ref.id] for ref in region.reads], *symbols)
    return [out] if len(region.exits) == 1 else list(out)


def differences(
    graph: Graph, region: Region, given: Sequence[torch.Tensor], feeds: Mapping[str, torch.Tensor]
) -> list[str]:
    """What differs from eager torch beyond rounding, by output."""
    expected = reference(graph, feeds)
    by_ref = {ref: expected[name] for name, ref in graph.outputs}
    found = []
    for ref, value in zip(region.exits, given, strict=True):
        wanted = by_ref[ref]
        if (value.dtype, value.shape) != (wanted.dtype, wanted.shape):
            found.append(f"{ref.id}: {value.dtype}{list(value.shape)}, not {wanted.shape}")
        elif not torch.allclose(value, wanted, rtol=2e-5, atol=2e-6, equal_nan=True):
            found.append(f"{ref.id}: {value.flatten()[:6]} and not {wanted.flatten()[:6]}")
    return found


def references(arg: Any) -> Any:
    """`$x` and `@w` in arguments as values and constants."""
    if isinstance(arg, str) and arg[:1] == "$":
        name, _, idx = arg[1:].partition(":")
        return Ref(name, int(idx or 0))
    if isinstance(arg, str) and arg[:1] == "@":
        return Const(arg[1:])
    return tuple(map(references, arg)) if isinstance(arg, tuple | list) else arg


def outputs_of(ids: Iterable[str]) -> list[tuple[str, Ref]]:
    """One output a node, under its id."""
    return [(id, Ref(id)) for id in ids]
