"""Malformed text: every refusal names line, column and what to do."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_graphs import small_model

from graphopt.dims import symbol
from graphopt.errors import DocumentError, GraphTextError
from graphopt.graph import Constant, Graph
from graphopt.spelling import parse_arguments
from graphopt.text import parse_graph, parse_ref, parse_value, print_graph
from graphopt.types import TensorType
from helpers.golden import check_golden

HEAD = "graph g format 1\ninput x: f32[2]\n"
FAULTS = [
    "",
    "input x: f32[2]",
    "graph g",
    "graph g format 2",
    f"{HEAD}graph h format 1",
    f"{HEAD}inptu y: f32[2]",
    f"{HEAD}y aten.relu.default($x)",
    f"{HEAD}y = relu($x)",
    f"{HEAD}y = aten.rleu.default($x)",
    f"{HEAD}y = aten.relu_.default($x)",
    f"{HEAD}y = aten.relu.default($x",
    f"{HEAD}y = aten.relu.default($x))",
    f"{HEAD}y = aten.relu.default($x])",
    f"{HEAD}y = aten.relu.default($x) $x",
    f"{HEAD}y = aten.relu.default($x,)",
    f"{HEAD}y = aten.relu.default(,$x)",
    f"{HEAD}y = aten.relu.default($x $x)",
    f"{HEAD}y = aten.relu.default(x)",
    f"{HEAD}y = aten.relu.default($)",
    f"{HEAD}y = aten.relu.default(@#w)",
    f'{HEAD}y = aten.relu.default("$x)',
    f'{HEAD}y = aten.relu.default("\\q")',
    f'{HEAD}y = aten.relu.default("\\UFFFFFFFF")',
    f'{HEAD}y = aten.relu.default("a":1)',
    f"{HEAD}y = aten.relu.default('x')",
    f"{HEAD}y = aten.relu.default(1.5.2)",
    f"{HEAD}y = aten.relu.default(1_000)",
    f"{HEAD}y = aten.relu.default(0x10)",
    f"{HEAD}y = aten.relu.default({'9' * 5000})",
    f"{HEAD}y = aten.relu.default({'[' * 5000})",
    f"{HEAD}y = aten.add.Tensor($x, alpha=)",
    f"{HEAD}y = aten.add.Tensor($x, alpha=1, $x)",
    f"{HEAD}y = aten.add.Tensor($x, alpha=1, alpha=2)",
    f"{HEAD}y = aten.add.Tensor($x, [alpha=1])",
    f"{HEAD}y = aten.add.Tensor($x, $xx)",
    f"{HEAD}hidden = aten.relu.default($x)\ny = aten.cat.default([$hidden, $h, $hid])",
    f"{HEAD}y = aten.add.Tensor($x, @w)",
    f"{HEAD}input x: f32[2]",
    f"{HEAD}x = aten.relu.default($x)",
    f"{HEAD}a = aten.relu.default($b)\nb = aten.relu.default($a)",
    f'{HEAD}"a b" = aten.relu.default($x)',
    f"{HEAD}input y: f33[2]",
    f"{HEAD}input y: f32[2",
    f"{HEAD}input y: f32[2 //]",
    f"{HEAD}input y: f32[1 // 0]",
    f"{HEAD}input y: f32[{'(' * 150}2{')' * 150}]",
    f"{HEAD}input y: f32[{'(a + b)*' * 40}2]",
    f"{HEAD}input y: f32[{'2, ' * 400}2]",
    f"{HEAD}input y: int[2]",
    f"{HEAD}symbol s in 1",
    f"{HEAD}symbol s in 1..\nsymbol s in 2..",
    f"{HEAD}const w: f32[2] weight sha256:00",
    f"{HEAD}const w: f32[2] param md5:00",
    f"{HEAD}const w: f32[2] param sha256:00\nalias w = w",
    f"{HEAD}const w: f32[2] param sha256:00\nalias v = ww",
    f"{HEAD}output y = x",
    f"{HEAD}output y = $z",
    f"{HEAD}output y = $x\noutput y = $x",
]  # fmt: skip


def refusal(text: str, constants: object = None) -> GraphTextError:
    with pytest.raises(GraphTextError) as caught:
        parse_graph(text, constants)
    return caught.value


def test_every_refusal_is_as_golden():
    lines = []
    for text in FAULTS:
        last = text.rsplit("\n", 1)[-1]
        shown = last if len(last) < 100 else f"{last[:60]}... ({len(last)} characters)"
        lines.append(f"{shown}\n    {refusal(text)}\n")
    check_golden("errors.txt", "".join(lines))


def test_the_column_points_at_the_fault():
    fault = refusal(f"{HEAD}y = aten.add.Tensor($x, $hidden)")
    assert (fault.line, fault.column) == (3, 25)
    assert fault.where == "line 3, column 25"


def test_a_wrong_reference_names_the_nearest_ids():
    assert "did you mean pooler" in str(
        refusal(f"{HEAD}pooler = aten.relu.default($x)\noutput y = $poler")
    )


def test_a_constant_without_data_is_refused_by_name():
    fault = refusal(f"{HEAD}const w: f32[2] param sha256:00", {})
    assert "w: 00" in fault.message
    assert fault.line == 3


def test_a_constant_of_another_type_than_its_data_is_refused():
    data = {"00": Constant("00", TensorType("f32", (3,)), True, None)}
    assert "f32[3]" in refusal(f"{HEAD}const w: f32[2] param sha256:00", data).message


def test_arguments_that_do_not_fit_the_schema_are_refused_by_canonical_reading():
    for call in (
        "aten.relu.default()",
        "aten.relu.default($x, 1)",
        "aten.sum.dim_IntList($x, 1.5)",
    ):
        with pytest.raises(GraphTextError) as caught:
            parse_graph(f"{HEAD}y = {call}", canonical=True)
        assert caught.value.line == 3


def test_a_type_that_could_not_be_read_back_is_not_printed():
    graph = Graph.build("g", [], [("x", TensorType("f32", (symbol("a b"),)))], [], {})
    with pytest.raises(DocumentError, match="input x: the type"):
        print_graph(graph)


def test_a_value_that_is_not_one_is_refused():
    for text in ("", "1, 2", "a=1", "1) ", "[1", "x"):
        with pytest.raises(DocumentError, match="column"):
            parse_value(text)
    for text in ("x", "@x", "$", "$x y", ""):
        with pytest.raises(DocumentError):
            parse_ref(text)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_damage_to_a_text_raises_anything_but_a_text_error(data):
    text = print_graph(small_model()[1])
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 20)))
    damage = data.draw(st.text(st.sampled_from('$@"\\[](),=:#.0 1ea\n{}'), max_size=6))
    damaged = text[:start] + damage + text[end:]
    fault = None
    try:
        parse_graph(damaged, canonical=True)
    except GraphTextError as raised:
        fault = raised
    if fault is not None:  # some damage leaves a graph: a changed number, say
        assert 1 <= fault.line <= damaged.count("\n") + 1
        assert 1 <= fault.column <= len(damaged.split("\n")[fault.line - 1]) + 1


def test_deep_lists_end_at_the_bound():
    inside = "[" * 64 + "]" * 64
    args, _, _ = parse_arguments(f"{inside})", 0, {})
    assert len(args) == 1
