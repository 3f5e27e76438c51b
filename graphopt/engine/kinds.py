"""What decides how long a run of blocks takes: its ops, types and attributes, but for the floats of
plain arithmetic. A factor of 1.25 costs what one of 1.5 does, so that what was compared with one of them
need not be compared with the other; a power of 2.0 is another kernel than one of 2.5. Whether it computes
the right thing is another question, which the builder answers for each.

Deliberately absent: how its values are wired, which the boundary and the ops leave little of.
"""

from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b

from graphopt.analysis.facts import Facts
from graphopt.analysis.regions import Region
from graphopt.graph import Arg, Const, Ref
from graphopt.kept import Kept

# Ops that take as long with any float
ARITHMETIC = frozenset(
    f"aten.{name}"
    for name in (
        "add.Scalar", "add.Tensor", "sub.Scalar", "sub.Tensor", "rsub.Scalar", "mul.Scalar", "mul.Tensor",
        "div.Scalar", "div.Tensor",
    )
)  # fmt: skip
BLOCKS_KEPT = 4_096
_KINDS: Kept[str, str] = Kept(BLOCKS_KEPT)


def kind_of(facts: Facts, run: Sequence[str]) -> str:
    """The kind of adjacent blocks, the same for all that take equally long on one way of running them."""
    return _digest(_of_block(facts, facts.regions[block]) for block in run)


def _of_block(facts: Facts, region: Region) -> str:
    found = _KINDS.get(region.key)
    if found is None:
        numbers = {name: f"s{i}" for i, name in enumerate(region.symbols)}
        found = _KINDS[region.key] = _digest(_lines(facts, region, numbers))
    return found


def _lines(facts: Facts, region: Region, numbers: dict[str, str]) -> Iterator[str]:
    graph = facts.graph
    yield f"{len(numbers)} sizes, {len(region.exits)} exits"
    for ref in region.reads:
        yield " ".join(numbers.get(word, word) for word in _words(facts, ref))
    for name in region.consts:
        yield str(graph.constants[name].type)
    for id in region.order:
        node = graph.nodes[id]
        write = _masked if node.op in ARITHMETIC else _written
        named = [f"{name}={write(value)}" for name, value in node.kwargs]
        yield " ".join([node.op, *map(write, node.args), *named])


def _words(facts: Facts, ref: Ref) -> list[str]:
    type_ = facts.type_of(ref)
    return [getattr(type_, "dtype", "int"), *map(str, getattr(type_, "shape", ()))]


def _written(arg: Arg) -> str:
    if isinstance(arg, tuple):
        return f"({' '.join(map(_written, arg))})"
    return type(arg).__name__ if isinstance(arg, Ref | Const) else repr(arg)


def _masked(arg: Arg) -> str:
    return "float" if isinstance(arg, float) else _written(arg)


def _digest(lines: Iterable[str]) -> str:
    return blake2b("\n".join(lines).encode(), digest_size=20).hexdigest()
