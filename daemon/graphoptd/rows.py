"""Whether requests to a model may be run as one batch: a proof over its graph, not a guess from shapes.

Shapes alone do not tell: `x @ x.T @ x` and a softmax over the batch have the right shape and mix the
rows of different clients. A model is batched when dim 0 of every input and output is the same plain
symbol (`batch`) and every node keeps rows apart. A value *bears rows* when its shape mentions the
symbol; it must then be `[batch * k, ...]`, the symbol nowhere else, so that in row-major order the
elements of one row lie together. Each node that takes or makes such a value must be of a kind known
to keep them so: elementwise, along other dims, or a view. An op that is not known here means no
batching, never a wrong answer.

The check is local to a node and its operands' types, so verdicts are kept by region key: after a
delta only the blocks it changed are looked at.

Deliberately absent: models whose batch is not dim 0, and numerical probing, which proves nothing.
"""

from collections import OrderedDict
from typing import Any

import torch

from graphopt.analysis.facts import Facts
from graphopt.analysis.regions import Region
from graphopt.dims import symbol, symbols_of
from graphopt.graph import Const, Node, Ref
from graphopt.ops import get_overload
from graphopt.types import SymIntType, TensorType, ValueType
from graphoptd.row_rules import RULES, Bound, bears, is_rows, pointwise

VERDICTS_KEPT_MAX = 8_192  # region keys remembered: the blocks of a few large models


class RowProof:
    """Decides for revision after revision of any model; not thread-safe."""

    def __init__(self) -> None:
        self._verdicts: OrderedDict[tuple[str, tuple[bool, ...]], bool] = OrderedDict()

    def batch_symbol(self, facts: Facts) -> str | None:
        """The symbol of the rows when requests may be concatenated along it, else None."""
        graph = facts.graph
        types = [type_ for _, type_ in graph.inputs] + [facts.type_of(r) for _, r in graph.outputs]
        name = _plain_symbol(types)
        if name is None or not all(is_rows(type_, name, 1) for type_ in types):
            return None
        if any(_is_row_number(facts, ref, name) for _, ref in graph.outputs):
            return None
        if not all(self._keeps_rows(facts, region, name) for region in facts.regions.values()):
            return None
        return name

    def _keeps_rows(self, facts: Facts, region: Region, name: str) -> bool:
        # The key describes symbols by place; where the batch symbol is among them belongs to it.
        numbers = [_is_row_number(facts, ref, name) for ref in region.reads]
        key = (region.key, (*(s == name for s in region.symbols), *numbers))
        known = self._verdicts.get(key)
        if known is None:
            known = all(_node_keeps_rows(facts, facts.graph.nodes[id], name) for id in region.order)
            self._verdicts[key] = known
            if len(self._verdicts) > VERDICTS_KEPT_MAX:
                self._verdicts.popitem(last=False)
        return known


def _plain_symbol(types: list[ValueType]) -> str | None:
    first = types[0] if types else None
    if not isinstance(first, TensorType) or not first.shape:
        return None
    names = symbols_of(first.shape[0])
    return next(iter(names)) if len(names) == 1 else None


def _node_keeps_rows(facts: Facts, node: Node, name: str) -> bool:
    made = facts.types[node.id]
    if all(isinstance(type_, SymIntType) for type_ in made):
        return True  # decided by shapes; where one is used as a number, its reader is refused
    taken = [facts.type_of(ref) for ref in node.refs]
    if not any(bears(type_, name) for type_ in (*taken, *made)):
        # A number made of the batch size in a value without rows: the mean over the batch, say.
        return not any(isinstance(t, SymIntType) and name in symbols_of(t.value) for t in taken)
    if not all(is_rows(type_, name) for type_ in (*taken, *made) if bears(type_, name)):
        return False
    if not all(bears(type_, name) for type_ in made):
        return False  # rows went in, and something common to all came out
    op = node.op.split(".")[1]
    if any(_is_row_number(facts, ref, name) for ref in node.refs) and op not in _NUMBERS_IN:
        return False
    bound = {key: _type_of(facts, value) for key, value in node.bound().items()}
    if op in _INDEXING:
        return _index(facts, node, bound, name)
    rule = RULES.get(op) if node.op.startswith("aten.") else None
    if rule is None:
        rule = pointwise if torch.Tag.pointwise in get_overload(node.op).tags else None
    return rule is not None and rule(bound, made[0], name)


def _type_of(facts: Facts, value: Any) -> Any:
    """The argument with types in place of the values it refers to."""
    if isinstance(value, Ref):
        return facts.type_of(value)
    if isinstance(value, Const):
        return facts.graph.get_constant(value.name).type
    if isinstance(value, tuple):
        return tuple(_type_of(facts, each) for each in value)
    return value


# -- row numbers: `x[arange(batch)[:, None], columns]`, as transformers makes its masks


def _is_row_number(facts: Facts, ref: Ref, name: str) -> bool:
    """Whether the value is `arange(batch)` along dim 0: each row holds its own number."""
    while True:
        node = facts.graph.nodes.get(ref.id)
        if node is None or not is_rows(facts.type_of(ref), name, 1):
            return False
        op = node.op.split(".")[1]
        if op == "arange":
            bound = node.bound()
            end = _type_of(facts, bound["end"])
            starts = bound.get("start", 0) == 0 and bound.get("step", 1) == 1
            return starts and isinstance(end, SymIntType) and end.value == symbol(name)
        if op not in _VIEWS:
            return False
        ref = node.refs[0]


def _index(facts: Facts, node: Node, bound: Bound, name: str) -> bool:
    """Row `b` of the result comes from row `b` of the source."""
    indices, source = node.bound()["indices"], bound["self"]
    types = bound["indices"]
    if not indices or not all(isinstance(type_, TensorType) for type_ in types):
        return False
    rank = max(type_.rank for type_ in types)
    return (
        is_rows(source, name, 1)
        and isinstance(indices[0], Ref)
        and _is_row_number(facts, indices[0], name)
        and all(not bears(type_, name) or type_.rank == rank for type_ in types)
    )


_VIEWS = ("unsqueeze", "view", "reshape", "expand", "_to_copy", "clone", "alias")
_INDEXING = ("index", "_unsafe_index")
_NUMBERS_IN = (*_VIEWS, *_INDEXING)
