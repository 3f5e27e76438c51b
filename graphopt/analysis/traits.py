"""Which values are data: what a value depends on, as bit flags.

A *data value* is one that a float input reaches, or that a learned parameter and the contents of an
input both reach. Everything else is context: symbolic integers, masks, position and rotary tables,
and what is computed from parameters alone (a relative position bias serves every layer and must not
keep them from being cut apart).
"""

from typing import Protocol

from graphopt.graph import Graph, Node
from graphopt.types import TensorType

CONTENT = 1  # depends on what is in an input, not only on its shape
PARAM = 2  # a learned parameter reaches it
FLOAT_INPUT = 4  # a floating-point input reaches it
INTEGER = 8  # it is a symbolic integer


class Traits(Protocol):
    """Flags by node id: a persistent map, or the mutable one of an update."""

    def __getitem__(self, id: str, /) -> int: ...


def node_traits(graph: Graph, node: Node, traits: "Traits") -> int:
    """The flags of `node` from those of its operands, which `traits` maps by id."""
    if is_shape_query(node):
        return INTEGER
    flags = 0
    for ref in node.refs:
        flags |= (
            input_traits(graph, ref.id) if ref.id not in graph.nodes else traits[ref.id] & ~INTEGER
        )
    for name in node.consts:
        flags |= PARAM if graph.get_constant(name).is_param else 0
    return flags


def input_traits(graph: Graph, name: str) -> int:
    """The flags of a model input."""
    type_ = graph.input_type(name)
    return CONTENT | (FLOAT_INPUT if isinstance(type_, TensorType) and type_.is_float else 0)


def is_data(flags: int) -> bool:
    """Whether a value with these flags is a data value."""
    return bool(flags & FLOAT_INPUT) or flags & (CONTENT | PARAM) == CONTENT | PARAM


def is_shape_query(node: Node) -> bool:
    """Whether the node yields a symbolic integer, whose value shapes alone decide."""
    return node.op.startswith("sym.") or node.op.split(".")[1] in (
        "sym_size",
        "sym_numel",
        "sym_stride",
    )
