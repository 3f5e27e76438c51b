"""Small graphs by hand, and the comparison every test of the fused tier makes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from graphopt.analysis.facts import Facts, analyse
from graphopt.constants import constant_of
from graphopt.executor.build import EagerBuilder, build_plan
from graphopt.executor.fused import FusedBuilder
from graphopt.executor.plan import Plan, Step, run_plan
from graphopt.executor.runs import eager_run, run_of
from graphopt.executor.verify import (
    Verdict,
    capture_boundaries,
    sample_inputs,
    verify_step,
)
from graphopt.graph import Const, Graph, Ref, Symbol
from graphopt.nodes import make_node
from graphopt.types import parse_type

Row = tuple[Any, ...]  # id, op, *args, and keywords as a last dict


def graph_of(
    rows: Sequence[Row],
    inputs: Mapping[str, str],
    constants: Mapping[str, torch.Tensor],
    outputs: Sequence[str],
    symbols: Sequence[str] = (),
    buffers: frozenset[str] = frozenset(),
) -> Graph:
    """`rows` name values and constants by `$name` and `@name`; inputs by type text."""
    nodes = []
    for id, op, *args in rows:
        kwargs = args.pop() if args and isinstance(args[-1], dict) else {}
        values = {name: _value(value) for name, value in kwargs.items()}
        nodes.append(make_node(id, f"aten.{op}", [_value(arg) for arg in args], values))
    return Graph.build(
        "hand",
        nodes,
        [(name, parse_type(text)) for name, text in inputs.items()],
        [(name, Ref(name)) for name in outputs],
        {n: constant_of(t, is_param=n not in buffers) for n, t in constants.items()},
        symbols=[Symbol(name) for name in symbols],
    )


def _value(arg: Any) -> Any:
    if isinstance(arg, str) and arg[:1] == "$":
        return Ref(arg[1:])
    if isinstance(arg, str) and arg[:1] == "@":
        return Const(arg[1:])
    if isinstance(arg, tuple | list):
        return tuple(map(_value, arg))
    return arg


def runs_of(facts: Facts) -> list[tuple[str, ...]]:
    """The runs of a graph in order, the context region first."""
    runs = [("$context",)] if "$context" in facts.regions else []
    for block in facts.blocks:
        run = run_of(facts, block.exit)
        if run[0] == block.exit:
            runs.append(run)
    return runs


def fused_steps(facts: Facts, builder: FusedBuilder | None = None) -> list[Step]:
    """The steps the tier offers for a graph."""
    builder = builder or FusedBuilder()
    steps = [builder.prepare_run(facts, run) for run in runs_of(facts)]
    return [step for step in steps if step is not None]


def fused_plan(facts: Facts, builder: FusedBuilder | None = None) -> Plan:
    """The plan with every fused step there is."""
    first = {step.blocks[0]: step for step in fused_steps(facts, builder)}
    eager = EagerBuilder()
    return build_plan(facts, 1, lambda f, block: first.get(block) or eager(f, block))


def verdicts(facts: Facts, sizes: Mapping[str, int] | None = None) -> dict[str, Verdict]:
    """What `verify_step` says of every fused step."""
    runs = runs_of(facts)
    references = {run[-1]: eager_run(facts, run) for run in runs}
    plan = build_plan(facts, 1, EagerBuilder())
    inputs = sample_inputs(facts, sizes)
    samples = capture_boundaries(plan, references.values(), inputs, set(references))
    return {
        step.block: verify_step(
            facts, step.block, step, references[step.block], [samples[step.block]]
        )
        for step in fused_steps(facts)
    }


def assert_equal_to_eager(
    graph: Graph, inputs: Mapping[str, torch.Tensor], tier: str = "fused"
) -> Plan:
    """Whole plans agree on `inputs`, every step is proven, and at least one is of `tier`."""
    facts = analyse(graph)
    plan = fused_plan(facts)
    assert tier in plan.tiers(), plan.tiers()
    for block, verdict in verdicts(facts).items():
        assert verdict.ok, (block, verdict)
    expected = run_plan(build_plan(facts, 1, EagerBuilder()), inputs)
    kept = {name: tensor.clone() for name, tensor in inputs.items()}
    for name, value in run_plan(plan, inputs).items():
        scale = float(expected[name].abs().max()) if expected[name].numel() else 1.0
        torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-5 * max(scale, 1e-30))
    assert all(torch.equal(tensor, kept[name]) for name, tensor in inputs.items())
    return plan
