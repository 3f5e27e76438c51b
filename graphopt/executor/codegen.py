"""Straight-line Python for one region.

The source names nothing of the graph: operands are `x0, x1 …`, constants `w0 …`, symbols `s0 …`,
results `v0 …`, in the canonical order of the region, so every region of one structure key shares
one compiled function. A result is let go right after its last use.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from graphopt.analysis.facts import Facts
from graphopt.analysis.probe import torch_literal
from graphopt.analysis.regions import Region
from graphopt.dims import Dim, Expr, substitute, symbol
from graphopt.executor.kernels import kernel_of
from graphopt.graph import Arg, Const, Node, Ref
from graphopt.ops import Param
from graphopt.types import SymIntType

Function = Callable[..., Any]


@dataclass(slots=True)
class Source:
    """Source text under construction, and the objects it names."""

    region: Region
    facts: Facts
    lines: list[str] = field(default_factory=list)
    names: dict[str, Any] = field(default_factory=dict)  # globals of the generated function
    values: dict[str, str] = field(default_factory=dict)  # node id -> local name

    def bind(self, value: Any, stem: str = "k") -> str:
        """A global name for an object that has no literal."""
        for name, known in self.names.items():
            if known is value:
                return name
        name = f"{stem}{len(self.names)}"
        self.names[name] = value
        return name

    def operand(self, ref: Ref) -> str:
        """The expression for a value."""
        type_ = self.facts.type_of(ref)
        if isinstance(type_, SymIntType):
            return self.dim(type_.value)
        if ref.id in self.values:
            local = self.values[ref.id]
            return f"{local}[{ref.idx}]" if self.has_many(ref.id) else local
        return f"x{self.region.reads.index(ref)}"

    def has_many(self, id: str) -> bool:
        """Whether the op of node `id` returns a tuple or list."""
        returns = self.facts.graph.nodes[id].spec.returns
        return returns is None or returns > 1

    def dim(self, dim: Dim) -> str:
        """The expression for a dimension, over the symbols the function takes."""
        if not isinstance(dim, Expr):
            return str(dim)
        names = {name: symbol(f"s{i}") for i, name in enumerate(self.region.symbols)}
        return str(substitute(dim, names))

    def arg(self, param: Param, value: Arg) -> str:
        """The expression for an argument."""
        if isinstance(value, Ref):
            return self.operand(value)
        if isinstance(value, Const):
            name = self.facts.graph.aliases.get(value.name, value.name)
            return f"w{self.region.consts.index(name)}"
        if isinstance(value, tuple):
            items = ", ".join(self.arg(param, item) for item in value)
            return f"[{items}]"
        literal = torch_literal(param, value)
        if isinstance(literal, float) and (
            literal != literal or literal in (float("inf"), float("-inf"))
        ):
            return self.bind(literal)
        if literal is None or isinstance(literal, bool | int | float):  # a text could name a local
            return repr(literal)
        return self.bind(literal)

    def call(self, node: Node) -> str:
        """The expression that runs `node` on its ordinary kernel."""
        positional = [param for param in node.spec.params if not param.is_keyword]
        parts = [
            self.arg(param, value) for param, value in zip(positional, node.args, strict=False)
        ]
        by_name = {param.name: param for param in node.spec.params}
        parts += [f"{name}={self.arg(by_name[name], value)}" for name, value in node.kwargs]
        return f"{self.bind(kernel_of(node.op), node.op.split('.')[1] + '_')}({', '.join(parts)})"

    def text(self, extra: int = 0) -> str:
        """The whole function; `extra` more constants `p0 …` follow the region's own."""
        region = self.region
        header = [f"x{i}" for i in range(len(region.reads))]
        header += [f"w{i}" for i in range(len(region.consts))] + [f"p{i}" for i in range(extra)]
        header += [f"s{i}" for i in range(len(region.symbols))]
        exits = ", ".join(self.operand(ref) for ref in region.exits)
        body = "\n    ".join([*release(self.lines, exits), f"return {exits}"])
        return f"def block({', '.join(header)}):\n    {body}\n"


def eager_source(region: Region, facts: Facts) -> Source:
    """The region on ordinary kernels, node by node."""
    source = Source(region, facts)
    for id in region.order:
        expression = source.call(facts.graph.nodes[id])
        local = f"v{len(source.values)}"
        source.values[id] = local
        source.lines.append(f"{local} = {expression}")
    return source


def compile_source(text: str, names: dict[str, Any], label: str) -> Function:
    """The function `block` of the generated text.

    Ours and bounded: one block, no names from outside.
    """
    scope = dict(names)
    exec(compile(text, f"<{label}>", "exec"), scope)
    function: Function = scope["block"]
    return function


def release(lines: list[str], exits: str) -> list[str]:
    """`lines` with a `del` after the last use of each local that is not handed out."""
    out: list[str] = []
    needed = set(_words(exits))
    for line in reversed(lines):
        local, _, expression = line.partition(" = ")
        used = [
            w
            for w in dict.fromkeys(_words(expression))
            if w[0] in "vx" and w[1:].isdigit() and w not in needed
        ]
        if used:
            out.append(f"del {', '.join(used)}")
            needed.update(used)
        if local not in needed:
            out.append(f"del {local}")  # an output nobody reads
        out.append(line)
    return out[::-1]


def _words(text: str) -> list[str]:
    words, word = [], ""
    for char in text + " ":
        if char.isalnum() or char == "_":
            word += char
            continue
        if word and not word[0].isdigit():
            words.append(word)
        word = ""
    return words
