"""The delta oracle: single-edge deltas between NAS-Bench-201 cells on a live graph, against the
same network built anew.

Every delta changes the op of one edge of one cell. After each the live graph must have the rebuilt
graph's hash, facts and plan, and compute the same bits. Wrong answers allowed: none.
GRAPHOPT_NAS_DELTAS sets the number of a soak.
"""

import os
from random import Random

import pytest

from graphopt.analysis.check import check_facts, compare_facts
from graphopt.analysis.facts import analyse, update
from graphopt.delta import AddNode, Delta, Edit, RemoveNode, apply_fully, invert
from graphopt.executor.build import EagerBuilder, build_plan, replan
from graphopt.executor.plan import run_plan
from graphopt.graph import Graph
from helpers.graphs import (
    CELL_EDGES,
    CELL_OPS,
    Builder,
    cell_edge,
    cell_network,
    feeds_of,
    reference,
    same_outputs,
)

SOAK_DELTAS = int(os.environ.get("GRAPHOPT_NAS_DELTAS", "20000"))
N_CELLS = 2

Cells = list[list[str]]


def edge_delta(graph: Graph, id: str, op: str) -> Delta:
    """The delta that puts `op` on the edge `id`, as a person would write it: the old nodes out, the
    new ones in.
    """
    source = graph.nodes[f"{id}/relu"] if f"{id}/relu" in graph.nodes else graph.nodes[id]
    scratch = Builder()
    cell_edge(scratch, id, op, source.refs[0], 4)
    removed: list[Edit] = [RemoveNode(name) for name in (id, f"{id}/relu") if name in graph.nodes]
    return Delta(
        [*removed, *(AddNode(node.id, node.op, node.args, node.kwargs) for node in scratch.nodes)]
    )


def run_deltas(count: int, seed: int) -> dict[str, int]:
    """Applies `count` random single-edge deltas and counts what was right and wrong."""
    random = Random(seed)
    cells: Cells = [[random.choice(CELL_OPS) for _ in CELL_EDGES] for _ in range(N_CELLS)]
    graph, make = cell_network(cells), EagerBuilder()
    facts = analyse(graph)
    plan = build_plan(facts, 1, make)
    tally = {"right": 0, "wrong": 0, "steps kept": 0, "steps": 0}
    for number in range(count):
        cell, edge = random.randrange(N_CELLS), random.randrange(len(CELL_EDGES))
        op = random.choice([op for op in CELL_OPS if op != cells[cell][edge]])
        delta = edge_delta(graph, "cell.{}/{}-{}".format(cell, *CELL_EDGES[edge]), op)
        applied = apply_fully(graph, delta)
        step = update(facts, applied.graph, applied.change)
        next_plan, _ = replan(plan, step, plan.revision + 1, make)
        cells[cell][edge] = op
        rebuilt = cell_network(cells)
        scratch = analyse(rebuilt)
        built = build_plan(scratch, next_plan.revision, make)
        feeds = feeds_of(rebuilt, {"batch": 1 + number % 3}, number)
        is_right = (
            applied.graph.hash == rebuilt.hash and next_plan.id == built.id
            and same_outputs(run_plan(next_plan, feeds), run_plan(built, feeds))
        )  # fmt: skip
        if number % 50 == 0:
            compare_facts(step.facts, scratch)
            check_facts(step.facts)
            assert apply_fully(applied.graph, invert(delta, graph)).graph.hash == graph.hash
            assert same_outputs(run_plan(next_plan, feeds), reference(rebuilt, feeds))
        tally["right" if is_right else "wrong"] += 1
        tally["steps"] += len(next_plan.steps)
        tally["steps kept"] += len({id(s) for s in plan.steps} & {id(s) for s in next_plan.steps})
        graph, facts, plan = applied.graph, step.facts, next_plan
    return tally


def test_a_thousand_single_edge_deltas_equal_a_rebuilt_network() -> None:
    tally = run_deltas(1000, seed=1)
    assert (tally["right"], tally["wrong"]) == (1000, 0)
    assert tally["steps kept"] >= tally["steps"] * 0.6, "only the cell that changed is planned anew"


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_many_thousand_single_edge_deltas_equal_a_rebuilt_network() -> None:
    assert run_deltas(SOAK_DELTAS, seed=2)["wrong"] == 0
