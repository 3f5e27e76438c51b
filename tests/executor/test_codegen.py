"""Generated blocks: what the source text may hold."""

import torch

from graphopt.analysis.facts import analyse
from graphopt.executor.build import EagerBuilder, build_plan
from graphopt.executor.codegen import eager_source
from graphopt.executor.plan import run_plan
from graphopt.graph import Graph, Ref
from graphopt.nodes import make_node
from graphopt.types import TensorType

NODE = make_node("a", "aten.div.Tensor_mode", [Ref("x"), Ref("y")], {"rounding_mode": "floor"})
PAIR = TensorType("f32", (3,))
GRAPH = Graph.build("g", [NODE], [("x", PAIR), ("y", PAIR)], [("out", Ref("a"))], {})


def test_a_text_argument_never_stands_in_the_source() -> None:
    facts = analyse(GRAPH)
    (region,) = facts.regions.values()
    source = eager_source(region, facts)
    assert "floor" not in source.text()
    assert "floor" in source.names.values()


def test_a_text_argument_reaches_the_op() -> None:
    plan = build_plan(analyse(GRAPH), 1, EagerBuilder())
    feeds = {"x": torch.tensor([7.0, -7.0, 1.0]), "y": torch.tensor([2.0, 2.0, 2.0])}
    assert run_plan(plan, feeds)["out"].tolist() == [3.0, -4.0, 0.0]
