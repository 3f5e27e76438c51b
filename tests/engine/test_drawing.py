"""The drawing of a plan: every node and edge of the graph, in the cluster of the step that computes it."""

import re

import pytest

import graphopt
from graphopt import Bypass, Delta, Engine
from graphopt.graph import Graph, Ref, Symbol
from graphopt.types import TensorType
from helpers.graphs import SEQ, Builder, transformer

SETTINGS = graphopt.EngineSettings(improve=False)
CLUSTER = re.compile(r"  subgraph cluster_\d+ \{\n(.*?)\n  \}", re.DOTALL)
NODE = re.compile(r'^ +(n\d+) \[label="((?:[^"\\]|\\.)*)"', re.MULTILINE)


def test_every_node_is_in_the_cluster_of_its_step_and_every_edge_is_there() -> None:
    with Engine(transformer(2), SETTINGS) as engine:
        text, plan, graph = engine.draw(), engine.model.slot.plan, engine.graph
    clusters = CLUSTER.findall(text)
    drawn = [[found.split("\\n")[0] for _, found in NODE.findall(cluster)] for cluster in clusters]
    assert [tuple(ids) for ids in drawn] == [step.nodes for step in plan.steps]
    names = {found.split("\\n")[0]: name for name, found in NODE.findall(text)}
    assert names.keys() == set(graph.nodes)
    for node in graph.nodes.values():
        for ref in node.refs:
            source = names.get(ref.id, f'"in {ref.id}"')
            assert f"  {source} -> {names[node.id]}" in text
    assert f'{names["classifier"]} -> "out logits" [label="f32[batch, 3]"];' in text
    heads, dot = names["layer.0/query/heads"], names["layer.0/attention"]
    assert f"  {heads} -> {dot};" in text  # no type where nothing crosses


def test_a_step_says_what_touched_it() -> None:
    with Engine(transformer(2), SETTINGS) as engine:
        assert "touched by" not in engine.draw()
        engine.apply(Delta([Bypass("layer.0/gelu")]))
        touched = [
            each for each in CLUSTER.findall(engine.draw()) if "touched by revision 2" in each
        ]
        assert len(touched) == 1
        assert "layer.0/up" in touched[0]
        (line,) = [step for step in engine.explain().steps if step.touched is not None]
        assert (line.block, line.touched) == ("layer.0/add", 2)


def odd() -> Graph:
    """Names that are no names in DOT."""
    b = Builder()
    out = b.node("a;b->c\\d", "relu.default", Ref("x->y"))
    rows, symbols = TensorType("f32", (SEQ, 4)), [Symbol("seq", 1, 64)]
    return Graph.build("odd-1.2", b.nodes, [("x->y", rows)], [("out", out)], {}, symbols=symbols)


STRING = r'"(?:[^"\\]|\\.)*"'
NAME = rf"(?:n\d+|{STRING})"
VALUE = rf"\w+={STRING}"
STATEMENTS = re.compile(
    rf"digraph {STRING} {{|subgraph cluster_\d+ {{|}}"  # what opens and what closes
    rf"|{VALUE}(?:; {VALUE})*;|node \[{VALUE}(?:, {VALUE})*\];"
    rf"|{NAME} \[{VALUE}(?:, {VALUE})*\];|{NAME} -> {NAME}(?: \[{VALUE}\])?;"
)


@pytest.mark.parametrize("graph", [transformer(2), odd()], ids=["transformer", "odd names"])
def test_it_is_made_of_statements_of_the_language(graph: Graph) -> None:
    """https://graphviz.org/doc/info/lang.html: what of it is used here, whatever the names are."""
    with Engine(graph, SETTINGS) as engine:
        text = engine.draw()
    depth = 0
    for line in text.splitlines():
        statement = line.strip()
        assert STATEMENTS.fullmatch(statement), line
        depth += statement.endswith("{") - (statement == "}")
        assert line.startswith("  " * (depth - statement.endswith("{")))
    assert depth == 0
    drawn = text.count(', shape="ellipse"]')
    assert drawn == len(graph.inputs) + len(graph.outputs)


def test_names_are_quoted() -> None:
    with Engine(odd(), SETTINGS) as engine:
        text = engine.draw()
    assert text.startswith('digraph "odd-1.2" {\n')
    assert 'label="a;b->c\\\\d\\naten.relu.default"' in text
    assert '  "in x->y" -> n0 [label="f32[seq, 4]"];' in text
