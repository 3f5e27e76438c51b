"""Methods that look: nothing here changes anything.

All of them read immutable values (a graph, facts, a plan), so they run beside changes and requests
without a lock; what they say is one revision's truth, named in the reply.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import translate
from re import compile as compile_pattern
from typing import Any

from graphopt.analysis.blocks import CONTEXT
from graphopt.analysis.facts import Facts
from graphopt.delta import difference
from graphopt.delta_document import encode_delta
from graphopt.documents import rule
from graphopt.engine.drawing import draw as draw_model
from graphopt.engine.explain import explain as explain_model
from graphopt.engine.live import LiveModel
from graphopt.graph import Graph
from graphopt.limits import NAME_CHARS_MAX
from graphopt.text import print_graph, print_node
from graphoptd.control.context import ControlContext
from graphoptd.control.differences import (
    difference_counts,
    difference_lines,
    plan_of_difference,
)
from graphoptd.control.task import Answer, Task
from graphoptd.control.templates import new_delta_text

_NAME = rule(chars_max=NAME_CHARS_MAX)


@dataclass(frozen=True, slots=True)
class NoParams:
    """A call without parameters."""


@dataclass(frozen=True, slots=True)
class ModelParams:
    """A call about a model; without a name, about the only one."""

    model: str | None = field(default=None, metadata=_NAME)


@dataclass(frozen=True, slots=True)
class NodesParams:
    """`glob` as file names have it: `encoder.layer.3.*`."""

    model: str | None = field(default=None, metadata=_NAME)
    glob: str | None = field(default=None, metadata=_NAME)


@dataclass(frozen=True, slots=True)
class ShowParams:
    """Without `node`, the whole graph."""

    model: str | None = field(default=None, metadata=_NAME)
    node: str | None = field(default=None, metadata=_NAME)


@dataclass(frozen=True, slots=True)
class DiffParams:
    """Two revisions; what leads from the first to the second."""

    from_revision: int = field(metadata=rule(low=0))
    to_revision: int = field(metadata=rule(low=0))
    model: str | None = field(default=None, metadata=_NAME)


@dataclass(frozen=True, slots=True)
class NewDeltaParams:
    """`kind` is an edit kind, such as `bypass`."""

    kind: str = field(metadata=rule(chars_max=64))
    model: str | None = field(default=None, metadata=_NAME)


def snapshot(context: ControlContext) -> dict[str, Any]:
    """The service in a few figures."""
    host = context.host
    return {
        "version": context.version,
        "pid": os.getpid(),
        "uptime_s": round(time.time() - context.started_s, 3),
        "state": str(context.settings().state.path) if host.folder is not None else None,
        "executor_threads": host.settings.threads,
        "intra_op_threads": host.settings.intra_op,
        "builder": asdict(host.better.status()),
        "models": [
            model_row(model) | {"pin": pin_row(context, model.name)}
            for _, model in sorted(host.models().items())
        ],
        "statistics": dict(context.statistics()),
    }


def model_row(model: LiveModel) -> dict[str, Any]:
    """A model in one line."""
    facts, plan = model.facts, model.slot.plan
    graph = facts.graph
    by_content = {constant.digest: constant for constant in graph.constants.values()}
    return {
        "name": model.name,
        "revision": plan.revision,
        "plan_id": plan.id,
        "nodes": len(graph),
        "blocks": len(facts.regions),
        "tiers": plan.tiers(),
        "threads": model.share.workers,
        "intra_op_threads": model.share.each,
        "constant_bytes": sum(c.tensor.nbytes for c in by_content.values() if c.tensor is not None),
        "adapters": adapters_of(graph),
        "inputs": {name: str(type_) for name, type_ in graph.inputs},
        "outputs": {name: str(facts.type_of(ref)) for name, ref in graph.outputs},
    }


def pin_row(context: ControlContext, model: str) -> dict[str, Any] | None:
    """The pin in force, as JSON values."""
    held = context.host.better.pins.held(model)
    return asdict(held) if held is not None else None


def adapters_of(graph: Graph) -> list[str]:
    """The names of the adapters attached, as their constants tell."""
    names = (*graph.constants, *graph.aliases)
    return sorted({name.split("/")[1] for name in names if name.startswith("adapters/")})


async def status(task: Task, params: NoParams) -> Answer:
    """The service, its models, its figures."""
    found = await task.lanes.look.run(lambda: snapshot(task.context))
    return Answer(found | {"peer": {"uid": task.peer.uid, "level": task.level.word}})


async def models(task: Task, params: NoParams) -> Answer:
    """Every model in one row."""
    found = await task.lanes.look.run(lambda: snapshot(task.context)["models"])
    return Answer({"models": found}, rows="models")


async def nodes(task: Task, params: NodesParams) -> Answer:
    """Nodes with op, type, block and tier, in topological order."""
    model = task.find(params.model)
    match = compile_pattern(translate(params.glob or "*")).match

    def look() -> list[dict[str, Any]]:
        facts = model.facts
        tiers = {block: step.tier for step in model.slot.plan.steps for block in step.blocks}
        return [
            _node_row(facts, node.id, tiers) for node in facts.graph.iter_nodes() if match(node.id)
        ]

    return Answer({"model": model.name, "nodes": await task.lanes.look.run(look)}, rows="nodes")


async def show(task: Task, params: ShowParams) -> Answer:
    """The text form with types: of the graph, or of one node and what is around it."""
    model = task.find(params.model)
    facts = model.facts
    if params.node is None:
        text = await task.lanes.look.run(lambda: print_graph(facts.graph, facts.types))
        return Answer({"model": model.name, "lines": text.splitlines()}, rows="lines")
    node = facts.graph.get_node(params.node)
    tiers = {block: step.tier for step in model.slot.plan.steps for block in step.blocks}
    constants = {name: facts.graph.get_constant(name) for name in dict.fromkeys(node.consts)}
    found = _node_row(facts, node.id, tiers) | {
        "line": print_node(node, facts.types.get(node.id)),
        "operands": {str(ref): str(facts.type_of(ref)) for ref in dict.fromkeys(node.refs)},
        "constants": {
            name: {"type": str(c.type), "hash": c.digest} for name, c in constants.items()
        },
        "users": sorted(facts.graph.users.get(node.id, ())),
    }
    return Answer({"model": model.name, "node": found})


async def history(task: Task, params: ModelParams) -> Answer:
    """The last revisions, oldest first."""
    model = task.find(params.model)
    lines = [asdict(line) for line in model.past.lines()]
    return Answer({"model": model.name, "history": lines}, rows="history")


async def explain(task: Task, params: ModelParams) -> Answer:
    """The published plan step by step, what else was considered, the pin, the builder."""
    model = task.find(params.model)
    found = await task.lanes.look.run(lambda: asdict(explain_model(task.context.host, model)))
    listed = {"steps": list(found["steps"]), "candidates": list(found["candidates"])}
    return Answer(found | listed, rows="steps")


async def draw(task: Task, params: ModelParams) -> Answer:
    """The graph with the regions of its plan, in Graphviz's DOT language, line by line."""
    model = task.find(params.model)
    text = await task.lanes.look.run(lambda: draw_model(task.context.host, model))
    return Answer({"model": model.name, "lines": text.splitlines()}, rows="lines")


async def diff(task: Task, params: DiffParams) -> Answer:
    """What differs between two revisions: counts, lines of the text form, a delta, the plan there."""
    model = task.find(params.model)
    old, new = model.past.graph_at(params.from_revision), model.past.graph_at(params.to_revision)
    lines = await task.lanes.look.run(lambda: list(difference_lines(old, new)))
    edits = await task.lanes.look.run(lambda: encode_delta(difference(old, new))["edits"])
    found = {
        "model": model.name,
        "from_revision": params.from_revision,
        "to_revision": params.to_revision,
        "counts": difference_counts(old, new),
        "plan": None,
        "edits": edits,
        "lines": lines,
    }
    plan = model.slot.plan
    if plan.revision in (params.from_revision, params.to_revision):
        found["plan"] = await task.lanes.look.run(lambda: plan_of_difference(plan, old, new))
    return Answer(found, rows="lines")


async def new_delta(task: Task, params: NewDeltaParams) -> Answer:
    """A delta document of a kind, with ids of the model, ready to be edited."""
    model = task.find(params.model)
    text = await task.lanes.look.run(lambda: new_delta_text(params.kind, model))
    return Answer({"model": model.name, "text": text})


def _node_row(facts: Facts, id: str, tiers: Mapping[str, str]) -> dict[str, Any]:
    block = facts.home_of(id)
    return {
        "id": id,
        "op": facts.graph.nodes[id].op,
        "types": [str(type_) for type_ in facts.types.get(id, ())],
        "block": "context" if block == CONTEXT else block,
        "tier": tiers.get(block) if block is not None else None,
    }
