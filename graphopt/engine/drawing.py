"""The graph of a model with its regions, as a drawing in Graphviz's DOT language.

Each step of the plan is a cluster that says what runs it and what it takes; edges are data, and those
from one step to another carry the type that crosses. Constants are left out: an edge each would hide
the rest. Deliberately absent: layout, which is Graphviz's.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from graphopt.analysis.facts import Facts, analyse
from graphopt.engine.explain import Explanation, StepLine, explain
from graphopt.executor.plan import Plan
from graphopt.graph import Ref
from graphopt.tables import count_word, short_seconds_word

if TYPE_CHECKING:
    from graphopt.engine.host import Host
    from graphopt.engine.live import LiveModel

COLOURS = {"eager": "grey92", "fused": "lightyellow"}  # of tiers; a runtime's is another one
RUNTIME_COLOUR = "lightblue"


def draw(host: "Host", model: "LiveModel") -> str:
    """The published plan as one DOT document."""
    arrangement = model.arrangement
    explanation, facts = explain(host, model, arrangement), model.facts
    if facts.graph is not arrangement.plan.graph:  # a delta landed beside us
        facts = analyse(arrangement.plan.graph)
    return "\n".join([*_lines(facts, arrangement.plan, explanation), ""])


def _lines(facts: Facts, plan: Plan, explanation: Explanation) -> Iterator[str]:
    graph, inside = facts.graph, dict[str, int]()
    nodes = list(graph.iter_nodes())
    names = _Names(node.id for node in nodes)
    title = f"{explanation.model} revision {explanation.revision}, plan {explanation.plan_id}"
    yield f"digraph {_quoted(explanation.model)} {{"
    yield f'  label={_quoted(title)}; labelloc="t";'
    yield '  node [shape="box", style="filled", fillcolor="white"];'
    for name, type_ in graph.inputs:
        yield f'  {names.input(name)} [label={_quoted(name, str(type_))}, shape="ellipse"];'
    for number, (step, about) in enumerate(zip(plan.steps, explanation.steps, strict=True)):
        inside.update(dict.fromkeys(step.nodes, number))
        colour = COLOURS.get(step.tier, RUNTIME_COLOUR)
        yield f"  subgraph cluster_{number} {{"
        yield f'    label={_quoted(*_about(about))}; style="filled"; fillcolor="{colour}";'
        for id in step.nodes:
            yield f"    {names.node(id)} [label={_quoted(id, graph.nodes[id].op)}];"
        yield "  }"
    for node in nodes:
        if node.id not in inside:  # sizes, which come from types, and what nobody reads
            yield f'  {names.node(node.id)} [label={_quoted(node.id, node.op)}, style="dashed"];'
        for ref in dict.fromkeys(node.refs):
            crosses = inside.get(ref.id) != inside.get(node.id)
            yield f"  {names.node(ref.id)} -> {names.node(node.id)}{_typed(facts, ref, crosses)};"
    for name, ref in graph.outputs:
        yield f'  {names.output(name)} [label={_quoted(name)}, shape="ellipse"];'
        yield f"  {names.node(ref.id)} -> {names.output(name)}{_typed(facts, ref, True)};"
    yield "}"


class _Names:
    """Names of the drawing: short ones for nodes, whose ids may be anything."""

    def __init__(self, ids: Iterable[str]) -> None:
        self._numbers = {id: number for number, id in enumerate(ids)}

    def node(self, id: str) -> str:
        """Of a node, or of an input that a node reads."""
        number = self._numbers.get(id)
        return f"n{number}" if number is not None else self.input(id)

    def input(self, name: str) -> str:
        """Of an input."""
        return _quoted(f"in {name}")

    def output(self, name: str) -> str:
        """Of an output."""
        return _quoted(f"out {name}")


def _about(step: StepLine) -> list[str]:
    about = [f"{step.tier} {step.options}".strip(), count_word(step.nodes, "node")]
    if step.touched is not None:
        about.append(f"touched by revision {step.touched}")
    if step.measured_s is not None:
        about.append(f"{short_seconds_word(step.measured_s)} measured")
    if step.predicted_s is not None:
        about.append(f"{short_seconds_word(step.predicted_s)} predicted")
    return about


def _typed(facts: Facts, ref: Ref, crosses: bool) -> str:
    return f" [label={_quoted(str(facts.type_of(ref)))}]" if crosses else ""


def _quoted(*lines: str) -> str:
    """A DOT string of lines."""
    escaped = [line.replace("\\", "\\\\").replace('"', '\\"') for line in lines]
    return '"' + "\\n".join(escaped) + '"'
