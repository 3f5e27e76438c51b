r"""The text form of a graph: what people read, logs quote, golden tests compare and bundles store.

    graph minilm format 1

    symbol batch in 1..
    input input_ids: i64[batch, 128]

    const embeddings.weight: f32[30522, 384] param sha256:9f0c...
    alias lm_head.weight = embeddings.weight

    embeddings = aten.embedding.default(@embeddings.weight, $input_ids)  # f32[batch, 128, 384]
    pooler = aten.mean.dim($embeddings, [1])  # f32[batch, 384]

    output sentence = $pooler

One fact a line: `grep '^embeddings = '` finds a node, `grep '[$]embeddings\b'` its users, and
editing one node changes one line. Nodes stand in topological order, constants and aliases in natural
order of their names, inputs and outputs in their own. `parse_graph(print_graph(g)) == g`, and
printing the result gives the same text. Behind the last word of a line, `#` opens a comment; printed
types are comments, because they are derived. `graphopt.spelling` has the grammar of values.
Deliberately absent: tensor data (constants are named by digest), types of nodes, topological labels.
"""

import re
from collections.abc import Mapping, Sequence

from graphopt.errors import DocumentError
from graphopt.graph import Constant, Graph, Node, Symbol
from graphopt.spelling import format_name, format_ref, format_value, parse_ref, parse_value
from graphopt.text_parser import FORMAT, Constants, parse_graph, parse_graph_type
from graphopt.types import TensorType, ValueType

__all__ = [
    "FORMAT", "Constants", "Types", "format_ref", "format_value", "parse_graph", "parse_ref",
    "parse_value", "print_graph", "print_node",
]  # fmt: skip

Types = Mapping[str, Sequence[ValueType]]

_DIGITS = re.compile(r"([0-9]+)")


def print_graph(graph: Graph, types: Types | None = None) -> str:
    """The text form of `graph`, ending in a newline. O(n log n).

    Args:
        graph: the graph.
        types: types of each node's outputs by id, written as comments.

    Raises:
        DocumentError: an input type that no reader could read back (a symbol whose name is no identifier).
    """
    frame = [*map(_symbol_line, graph.symbols)]
    frame += [
        f"input {format_name(name)}: {_input_type(name, type_)}" for name, type_ in graph.inputs
    ]
    constants = [_const_line(*pair) for pair in sorted(graph.constants.items(), key=_by_name)]
    constants += [
        f"alias {format_name(alias)} = {format_name(name)}"
        for alias, name in sorted(graph.aliases.items(), key=_by_name)
    ]
    known = types or {}
    nodes = [print_node(node, known.get(node.id)) for node in graph.iter_nodes()]
    outputs = [f"output {format_name(name)} = {format_ref(ref)}" for name, ref in graph.outputs]
    head = [f"graph {format_name(graph.name)} format {FORMAT}"]
    sections = (head, frame, constants, nodes, outputs)
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


def print_node(node: Node, types: Sequence[ValueType] | None = None) -> str:
    """One line: `id = op(arguments)`, with `types` as a comment behind it."""
    parts = [format_value(arg) for arg in node.args]
    parts += [f"{name}={format_value(value)}" for name, value in node.kwargs]
    line = f"{format_name(node.id)} = {node.op}({', '.join(parts)})"
    return f"{line}  # {', '.join(map(str, types))}" if types else line


def _symbol_line(symbol: Symbol) -> str:
    high = "" if symbol.max is None else symbol.max
    return f"symbol {format_name(symbol.name)} in {symbol.min}..{high}"


def _const_line(name: str, constant: Constant) -> str:
    kind = "param" if constant.is_param else "buffer"
    return f"const {format_name(name)}: {constant.type} {kind} sha256:{constant.digest}"


def _input_type(name: str, type_: TensorType) -> str:
    text = str(type_)
    try:
        is_readable = parse_graph_type(text) == type_
    except ValueError:
        is_readable = False
    if not is_readable:
        raise DocumentError(
            f"the type {text} cannot be written",
            where=f"input {name}",
            remedy="name symbols with letters, digits and _, and keep dimensions short",
        )
    return text


def _by_name(pair: tuple[str, object]) -> tuple[list[str | int], str]:
    """Natural order: `layer.10` after `layer.9`."""
    parts: list[str | int] = [*_DIGITS.split(pair[0])]
    parts[1::2] = [int(digits) for digits in _DIGITS.findall(pair[0])]
    return parts, pair[0]
