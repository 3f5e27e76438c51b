"""Slice pushdown: what is narrowed, what is not, and that the exits keep their values."""

from graphopt.delta import AddNode, Delta, SetOutputs, apply
from graphopt.graph import Graph, Ref
from graphopt.rewrite.rows import push_rows
from graphopt.types import TensorType
from helpers.graphs import transformer
from rewrite_laws import assert_law, lowered_by

SIZES = {"batch": 3, "seq": 5}
LAST = "layer.1"


def rows_of(graph: Graph) -> dict[str, object]:
    """The shapes of the linears and attentions of the last layer after the pass."""
    lowered = assert_law(graph, SIZES, rows=push_rows)
    found = {}
    for id in lowered.region.order:
        node = lowered.graph.nodes[id]
        if id.startswith(LAST) and ("linear" in node.op or "attention" in node.op):
            type_ = lowered.facts.type_of(Ref(id))
            assert isinstance(type_, TensorType)
            found[id.removeprefix(f"{LAST}/").removesuffix("~rows")] = type_.shape[-2]
    return {name: str(size) for name, size in found.items()}


def test_a_classifier_that_reads_one_token_computes_one_row_of_its_last_layer() -> None:
    assert rows_of(transformer(2)) == {
        "query": "1", "key": "seq", "value": "seq", "attention": "1",
        "out": "1", "up": "1", "down": "1",
    }  # fmt: skip
