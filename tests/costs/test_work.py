"""How much work regions are: as torch counts operations, and laws of sums and sizes."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from graphopt.analysis.facts import Facts, analyse
from graphopt.analysis.regions import build_region
from graphopt.costs.op_work import CLASSES
from graphopt.costs.work import Work, work_of
from graphopt.executor.build import EagerBuilder, build_plan
from graphopt.executor.runs import run_region
from graphopt.graph import Graph, Ref
from graphopt.ops import get_overload
from graphopt.planner.layout import chain
from graphopt.types import TensorType
from helpers.graphs import Builder, transformer

FACTS = analyse(transformer(2))
SIZES = {"batch": 2, "seq": 5}


def whole(facts: Facts, sizes: dict[str, int]) -> Work:
    exits = tuple(ref for _, ref in facts.graph.outputs)
    region = build_region(facts.graph, facts.type_of, exits, facts.graph.nodes.__contains__)
    return work_of(facts, region, sizes)


def one_op(op: str, shapes: list[tuple[int, ...]], *rest: Any) -> tuple[Work, int]:
    """Our count of an op, and torch's own."""
    b = Builder()
    refs = [Ref(f"x{i}") for i in range(len(shapes))]
    out = b.node("y", op, *refs, *rest)
    inputs = [(f"x{i}", TensorType("f32", shape)) for i, shape in enumerate(shapes)]
    work = whole(analyse(Graph.build("g", b.nodes, inputs, [("y", out)], {})), {})
    counter = FlopCounterMode(display=False)
    with counter:
        get_overload(f"aten.{op}")(*(torch.ones(shape, device="meta") for shape in shapes), *rest)
    return work, counter.get_total_flops()


@pytest.mark.parametrize(
    ("op", "shapes", "rest"),
    [
        ("linear.default", [(3, 7, 5), (11, 5), (11,)], ()),
        ("mm.default", [(4, 6), (6, 9)], ()),
        ("addmm.default", [(9,), (4, 6), (6, 9)], ()),
        ("bmm.default", [(2, 4, 6), (2, 6, 9)], ()),
        ("conv2d.default", [(2, 6, 9, 8), (10, 6, 3, 3), (10,)], ((2, 1), (1, 1))),
        ("conv2d.default", [(1, 8, 9, 9), (8, 1, 3, 3)], (None, (1, 1), (1, 1), (1, 1), 8)),
        ("conv1d.default", [(2, 6, 9), (10, 3, 3)], (None, (1,), (0,), (1,), 2)),
        (
            "convolution.default",
            [(2, 6, 5, 5), (6, 4, 3, 3)],
            (None, (2, 2), (0, 0), (1, 1), True, (0, 0), 1),
        ),
    ],
)
def test_operations_are_counted_as_torch_counts_them(
    op: str, shapes: list[tuple[int, ...]], rest: tuple[Any, ...]
) -> None:
    work, expected = one_op(op, shapes, *rest)
    assert work.flops == expected > 0


def test_attention_is_counted_as_its_two_products() -> None:
    shapes = [(2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)]
    work, _ = one_op("scaled_dot_product_attention.default", shapes)
    assert work.flops == 2 * (2 * 3 * 5 * 7 * 8) * 2


def test_bytes_are_those_of_operands_and_results_with_weights_apart() -> None:
    b = Builder()
    out = b.linear("y", Ref("x"), 5, 11)
    graph = Graph.build("g", b.nodes, [("x", TensorType("f32", (3, 5)))], [("y", out)], b.constants)
    work = whole(analyse(graph), {})
    assert work.weight_bytes == 4 * (11 * 5 + 11)
    assert work.bytes == 4 * (3 * 5 + 3 * 11)


def test_a_lookup_costs_the_rows_it_takes_and_not_its_table() -> None:
    b = Builder()
    out = b.node("y", "embedding.default", b.weight("table", 1000, 8), Ref("ids"))
    graph = Graph.build("g", b.nodes, [("ids", TensorType("i64", (3,)))], [("y", out)], b.constants)
    (kernel,) = whole(analyse(graph), {}).kernels
    assert kernel.bytes < 3 * (8 + 4 * 8 + 4 * 8) + 1


def test_a_view_is_free_and_a_size_is_no_kernel() -> None:
    work = whole(FACTS, SIZES)
    assert len(work.kernels) < len(FACTS.graph.nodes)  # sym_size
    assert all(k.bytes == 0 or k.ops == 0 for k in work.kernels if k.op_class == "view")


def test_what_only_one_linear_reads_is_an_epilogue() -> None:
    b = Builder()
    out = b.node("act", "relu.default", b.linear("y", Ref("x"), 4, 4))
    inputs = [("x", TensorType("f32", (3, 4)))]
    fused = whole(analyse(Graph.build("g", b.nodes, inputs, [("a", out)], b.constants)), {})
    both = [("a", out), ("y", Ref("y"))]
    apart = whole(analyse(Graph.build("g", b.nodes, inputs, both, b.constants)), {})
    assert [k.op_class for k in fused.kernels] == ["linear", "epilogue"]
    assert [k.op_class for k in apart.kernels] == ["linear", "elementwise"]


def test_equal_region_keys_mean_equal_work() -> None:
    found: dict[str, Work] = {}
    for block in chain(FACTS):
        region = FACTS.regions[block]
        work = work_of(FACTS, region, SIZES)
        assert found.setdefault(region.key, work) == work
    assert len(found) < len(chain(FACTS))


def test_the_work_of_a_graph_is_the_sum_of_its_steps() -> None:
    steps = build_plan(FACTS, 0, EagerBuilder()).steps
    parts = [work_of(FACTS, run_region(FACTS, step.blocks), SIZES) for step in steps]
    together = whole(FACTS, SIZES)
    assert sum(part.flops for part in parts) == together.flops
    assert sum(len(part.kernels) for part in parts) == len(together.kernels)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(2, 30), st.sampled_from(["batch", "seq"]))
def test_work_grows_with_every_size(batch: int, seq: int, name: str) -> None:
    sizes = {"batch": batch, "seq": seq}
    less, more = whole(FACTS, sizes), whole(FACTS, sizes | {name: sizes[name] + 1})
    for a, b in zip(less.kernels, more.kernels, strict=True):
        assert a.op_class == b.op_class
        assert (a.ops, a.read_bytes, a.write_bytes) <= (b.ops, b.read_bytes, b.write_bytes)
    assert less.flops < more.flops


def test_a_size_that_is_not_given_is_named() -> None:
    with pytest.raises(KeyError, match="seq"):
        whole(FACTS, {"batch": 1})


def test_every_kernel_has_a_known_class() -> None:
    assert {kernel.op_class for kernel in whole(FACTS, SIZES).kernels} <= set(CLASSES)


def test_a_footprint_holds_weights_and_values_once() -> None:
    work = whole(FACTS, SIZES)
    assert work.weight_bytes < work.footprint_bytes <= work.weight_bytes + work.bytes
    assert work.within(123).footprint_bytes == 123
