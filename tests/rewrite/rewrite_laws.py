"""What every pass owes: the same values, the same interface, nothing left to do the second time."""

from collections.abc import Mapping

import torch

from graphopt.analysis.check import check_facts
from graphopt.analysis.facts import Facts, analyse
from graphopt.analysis.regions import Region, build_region
from graphopt.dims import evaluate
from graphopt.graph import Graph
from graphopt.rewrite import Lowered, lower
from graphopt.rewrite.rewrite import Pass
from graphopt.types import TensorType
from helpers.graphs import reference

INTEGERS_BELOW = 4  # ids and indices that every table of the tests has


def whole(facts: Facts) -> Region:
    """The region of everything the outputs need; model inputs are its reads."""
    graph = facts.graph
    exits = tuple(dict.fromkeys(ref for _, ref in graph.outputs if ref.id in graph.nodes))
    return build_region(graph, facts.type_of, exits, lambda id: id in graph.nodes)


def lowered_by(graph: Graph, **passes: Pass) -> Lowered:
    """`graph` as one region after these passes alone."""
    facts = analyse(graph)
    return lower(facts, whole(facts), passes)


def edits_of(lowered: Lowered) -> int:
    """How many edits the passes made; none of them may have been refused."""
    assert [step.fault for step in lowered.steps if step.fault] == []
    return sum(step.edits for step in lowered.steps)


def feeds_of(graph: Graph, sizes: Mapping[str, int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs for `graph` at these sizes of its symbols."""
    random = torch.Generator().manual_seed(seed)
    feeds = {}
    for name, type_ in graph.inputs:
        assert isinstance(type_, TensorType)
        shape = [evaluate(dim, sizes) for dim in type_.shape]
        if type_.is_float:
            feeds[name] = torch.randn(shape, generator=random)
        else:
            feeds[name] = torch.randint(0, INTEGERS_BELOW, shape, generator=random)
        if type_.dtype == "bool":
            feeds[name] = feeds[name] > 0
    return feeds


def assert_law(
    graph: Graph, sizes: Mapping[str, int], *, atol: float = 2e-5, **passes: Pass
) -> Lowered:
    """`graph` lowered by the passes, once it is shown that they keep the law."""
    lowered = lowered_by(graph, **passes)
    edits_of(lowered)
    before = whole(analyse(graph))
    after = lowered.region
    assert (after.reads, after.exits, after.symbols) == (before.reads, before.exits, before.symbols)
    assert after.consts[: len(before.consts)] == before.consts
    types = analyse(graph)
    for ref in before.exits:  # layouts may differ: a step hands out contiguous tensors
        was, is_now = types.type_of(ref), lowered.facts.type_of(ref)
        assert isinstance(was, TensorType)
        assert isinstance(is_now, TensorType)
        assert (is_now.dtype, is_now.shape) == (was.dtype, was.shape), ref
    check_facts(lowered.facts)
    feeds = feeds_of(graph, sizes)
    expected, given = reference(graph, feeds), reference(lowered.graph, feeds)
    for name, value in expected.items():
        assert value.dtype == given[name].dtype, name
        torch.testing.assert_close(given[name], value, rtol=1e-4, atol=atol, equal_nan=True)
    again = lower(lowered.facts, lowered.region, passes)
    assert edits_of(again) == 0, "the passes find more to do in what they made"
    for id, sources in lowered.sources.items():
        assert id in lowered.graph.nodes
        assert set(sources) <= set(graph.nodes), "sources are the user's nodes"
    return lowered
