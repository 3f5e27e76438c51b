"""Reads the text form of a graph back; `graphopt.text` shows it and writes it.

Line by line, one regular expression a kind of line and one token loop for arguments, so the time is
linear in the text. Lines may come in any order behind the header. Where the nodes stand in
topological order, their order is kept. Every error names line and column. Deliberately absent: type
inference.
"""

import re
from collections.abc import Callable, Mapping

import immutables

from graphopt.errors import DeltaError, GraphTextError, nearest
from graphopt.graph import Arg, Constant, Graph, Node, Ref, Symbol
from graphopt.nodes import make_node
from graphopt.order import GAP
from graphopt.spelling import (
    NAME,
    REF,
    SpellingError,
    format_name,
    format_ref,
    parse_arguments,
    parse_name,
    parse_ref,
)
from graphopt.types import TensorType, ValueType, parse_type

FORMAT = 1  # of the text; a reader refuses higher ones

Constants = Mapping[str, Constant] | Callable[[str], Constant | None]
"""Data by digest."""

TYPE_CHARS_MAX = 1024  # 64 dims of ten digits; far above what people write
# Products of sums expand when they are read: 160 characters take 0.3 s at worst, 256 take 4 s.
NESTED_TYPE_CHARS_MAX = 160

_END = r"\s*(?:\s#.*)?\Z"
_TYPED = rf"({NAME}):\s+(\w+\[[^\]]*\](?:\{{[^}}]*\}})?)"
_HEADER = re.compile(rf"graph ({NAME}) format ([0-9]{{1,9}}){_END}")
_SYMBOL = re.compile(rf"symbol ({NAME}) in (-?[0-9]{{1,19}})\.\.(-?[0-9]{{1,19}})?{_END}")
_INPUT = re.compile(rf"input {_TYPED}{_END}")
_CONST = re.compile(rf"const {_TYPED}\s+(param|buffer)\s+sha256:([^\s#]+){_END}")
_ALIAS = re.compile(rf"alias ({NAME}) = ({NAME}){_END}")
_OUTPUT = re.compile(rf"output ({NAME}) = ({REF}){_END}")
_NODE = re.compile(rf"({NAME}) = ([\w.]+)\(")
_REST = re.compile(r"\s*(?:#.*)?\Z")
_FORMS = {
    "graph": (_HEADER, "graph minilm format 1"),
    "symbol": (_SYMBOL, "symbol batch in 1..64"),
    "input": (_INPUT, "input input_ids: i64[batch, 128]"),
    "const": (_CONST, "const encoder.weight: f32[384, 384] param sha256:DIGEST"),
    "alias": (_ALIAS, "alias lm_head.weight = embeddings.weight"),
    "output": (_OUTPUT, "output logits = $classifier"),
}
_NODE_EXAMPLE = "gate = aten.relu.default($pooler)"


def parse_graph(text: str, constants: Constants | None = None, *, canonical: bool = False) -> Graph:
    """The graph that `print_graph` wrote, or that a person did. Linear in the text.

    Args:
        text: the text form.
        constants: data by digest, as a mapping or a function (None or KeyError: not there).
            Without it constants hold no tensor: enough to read, compare and print, not to run.
        canonical: check arguments against the op's schema and bring them into canonical form, as
            `graphopt.nodes.make_node` does, instead of taking them as they are written. For text
            that a person or a stranger wrote.

    Raises:
        GraphTextError: names line, column and what to do; among its causes is everything that a
            delta would be refused for (unknown ops, missing operands, cycles) and data that
            `constants` lacks.
    """
    return _Parser(text, constants, canonical).graph()


def parse_graph_type(text: str) -> ValueType:
    """As `graphopt.types.parse_type`, bounded; ValueError for what is not a type or too long to be one."""
    if len(text) > (NESTED_TYPE_CHARS_MAX if "(" in text else TYPE_CHARS_MAX):
        raise ValueError("the type is too long")
    try:
        return parse_type(text)
    except (ArithmeticError, RecursionError, MemoryError) as fault:
        raise ValueError(f"not a type: {text[:80]}") from fault


class _Parser:
    """One reading of one text."""

    def __init__(self, text: str, constants: Constants | None, canonical: bool) -> None:
        self.canonical = canonical
        self.rows = text.split("\n")
        self.row = 0
        self.find = constants.__getitem__ if isinstance(constants, Mapping) else constants
        self.name: str | None = None
        self.symbols: dict[str, Symbol] = {}
        self.inputs: dict[str, TensorType] = {}
        self.constants: dict[str, Constant] = {}
        self.aliases: dict[str, str] = {}
        self.nodes: dict[str, Node] = {}
        self.outputs: dict[str, Ref] = {}
        self.row_of: dict[tuple[str, str], int] = {}  # (kind, name) -> row, for errors
        self.atoms: dict[str, Arg] = {}
        self.types: dict[str, TensorType] = {}
        self.takers: dict[str, Callable[[re.Match[str]], None]] = {
            "graph": self._take_header,
            "symbol": self._take_symbol,
            "input": self._take_input,
            "const": self._take_const,
            "alias": self._take_alias,
            "output": self._take_output,
        }

    def graph(self) -> Graph:
        for row, line in enumerate(self.rows):
            self.row = row
            if not line or line.isspace() or line.startswith("#"):
                continue
            try:
                self._take_line(line)
            except SpellingError as fault:
                raise self._fault(fault.message, fault.position, fault.remedy) from None
        if self.name is None:
            raise self._fault("the text is empty", remedy=f"begin with {_FORMS['graph'][1]!r}")
        is_ordered = self._check_uses()
        graph = self._build(self.name)
        return _labelled(graph, list(self.nodes)) if is_ordered else graph

    def _take_line(self, line: str) -> None:
        match = _NODE.match(line)
        if match and self.name is not None:
            self._take_node(line, match)
            return
        word = line.partition(" ")[0]
        pattern, example = _FORMS.get(word, (None, ""))
        if self.name is None and word != "graph":
            raise self._fault("the header is missing", remedy=f"begin with {_FORMS['graph'][1]!r}")
        if pattern is None or line[len(word) :].startswith(" = "):
            remedy = f"write for example {_NODE_EXAMPLE}" if "(" in line else nearest(word, _FORMS)
            raise self._fault("neither a node nor a declaration", remedy=remedy)
        match = pattern.match(line)
        if match is None:
            raise self._fault(
                f"the {word} line is malformed",
                min(len(word) + 1, len(line)),
                f"write for example {example}",
            )
        self.takers[word](match)

    def _take_node(self, line: str, match: re.Match[str]) -> None:
        id = parse_name(match[1])
        args, kwargs, end = parse_arguments(line, match.end(), self.atoms)
        if not _REST.match(line, end):
            raise self._fault("nothing but a comment may follow", end)
        self._claim("value", id)
        try:
            if self.canonical:
                self.nodes[id] = make_node(id, match[2], args, dict(kwargs))
            else:
                self.nodes[id] = Node(id, match[2], args, kwargs)
        except DeltaError as fault:
            raise self._fault(fault.message, match.start(2), fault.remedy) from None

    def _take_header(self, match: re.Match[str]) -> None:
        if self.name is not None:
            raise self._fault("a second header", remedy="one text holds one graph")
        if int(match[2]) != FORMAT:
            remedy = "read it with a newer graphopt" if int(match[2]) > FORMAT else ""
            message = f"format {match[2]} is not known here; this is format {FORMAT}"
            raise self._fault(message, match.start(2), remedy)
        self.name = parse_name(match[1])

    def _take_symbol(self, match: re.Match[str]) -> None:
        name = parse_name(match[1])
        self._claim("symbol", name)
        self.symbols[name] = Symbol(name, int(match[2]), int(match[3]) if match[3] else None)

    def _take_input(self, match: re.Match[str]) -> None:
        name = parse_name(match[1])
        self._claim("value", name)
        self.inputs[name] = self._type(match)

    def _take_const(self, match: re.Match[str]) -> None:
        name, type_, is_param, digest = (
            parse_name(match[1]),
            self._type(match),
            match[3] == "param",
            match[4],
        )
        self._claim("constant", name)
        if self.find is None:
            self.constants[name] = Constant(digest, type_, is_param, None)
            return
        try:
            found = self.find(digest)
        except KeyError:
            found = None
        if found is None:
            raise self._fault(f"no data for the constant {name}: {digest}", match.start(4))
        if found.type != type_:
            message = f"the constant {name} is written as {type_}, its data are {found.type}"
            raise self._fault(message, match.start(2))
        self.constants[name] = Constant(digest, type_, is_param, found.tensor)

    def _take_alias(self, match: re.Match[str]) -> None:
        alias = parse_name(match[1])
        self._claim("constant", alias)
        self.aliases[alias] = parse_name(match[2])

    def _take_output(self, match: re.Match[str]) -> None:
        name = parse_name(match[1])
        self._claim("output", name)
        self.outputs[name] = parse_ref(match[2])

    def _type(self, match: re.Match[str]) -> TensorType:
        text = match[2]
        type_ = self.types.get(text)
        if type_ is None:
            try:
                parsed = parse_graph_type(text)
            except ValueError as fault:
                raise self._fault(str(fault), match.start(2)) from None
            if not isinstance(parsed, TensorType):
                raise self._fault("an input or constant is a tensor", match.start(2))
            type_ = self.types[text] = parsed
        return type_

    def _claim(self, kind: str, name: str) -> None:
        row = self.row_of.setdefault((kind, name), self.row)
        if row != self.row:
            raise self._fault(f"the {kind} {name} exists already, on line {row + 1}")

    def _check_uses(self) -> bool:
        """Whether the nodes stand in topological order; raises at the first name that does not exist."""
        is_ordered, seen = True, set(self.inputs)
        for node in self.nodes.values():
            for ref in node.refs:
                if ref.id not in seen:
                    self._check_value(ref, "value", node.id)
                    is_ordered = False
            for name in node.consts:
                if name not in self.constants and name not in self.aliases:
                    known = [*self.constants, *self.aliases]
                    raise self._unknown("value", node.id, "@" + format_name(name), name, known)
            seen.add(node.id)
        for name, ref in self.outputs.items():
            if ref.id not in seen:
                self._check_value(ref, "output", name)
        for alias, name in self.aliases.items():
            if name not in self.constants:
                raise self._unknown("constant", alias, format_name(name), name, [*self.constants])
        return is_ordered

    def _check_value(self, ref: Ref, kind: str, user: str) -> None:
        if ref.id not in self.nodes and ref.id not in self.inputs:
            known = [*self.nodes, *self.inputs]
            raise self._unknown(kind, user, format_ref(ref), ref.id, known)

    def _build(self, name: str) -> Graph:
        try:
            return Graph.build(
                name, self.nodes.values(), self.inputs.items(), self.outputs.items(),
                self.constants, self.aliases, self.symbols.values(),
            )  # fmt: skip
        except DeltaError as fault:
            kinds = ("value", "constant", "output")
            rows = (
                self.row_of[kind, fault.where]
                for kind in kinds
                if (kind, fault.where) in self.row_of
            )
            self.row = next(rows, self.row)
            raise self._fault(fault.message, remedy=fault.remedy) from None

    def _unknown(
        self, kind: str, user: str, spelling: str, name: str, known: list[str]
    ) -> GraphTextError:
        self.row = self.row_of[kind, user]
        whole = re.search(rf"{re.escape(spelling)}(?![^\s,()\[\]=])", self.rows[self.row])
        column = whole.start() if whole else 0
        return self._fault(
            f"{user} uses {spelling}, which does not exist", column, nearest(name, known)
        )

    def _fault(self, message: str, position: int = 0, remedy: str = "") -> GraphTextError:
        return GraphTextError(message, line=self.row + 1, column=position + 1, remedy=remedy)


def _labelled(graph: Graph, order: list[str]) -> Graph:
    """`graph` with labels that keep `order`: printing it again gives the lines as they stood."""
    labels = immutables.Map((id, (position + 1) * GAP) for position, id in enumerate(order))
    return Graph(
        graph.name, graph.nodes, graph.inputs, graph.outputs, graph.constants, graph.aliases,
        graph.symbols, graph.users, graph.const_users, labels, graph.digest,
    )  # fmt: skip
