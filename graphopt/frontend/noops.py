"""Which traced ops change nothing in a graph whose values are never written to.

Deliberately absent: arithmetic that changes nothing (`x * 1.0`): that is for the passes to prove.
"""

from typing import Any

import torch
from torch import fx

INDEX_END = 2**63 - 1  # what torch writes for "to the end"
_ALIASES = frozenset(
    {
        "aten.alias.default",
        "aten.detach.default",
        "aten.lift_fresh_copy.default",
        "aten.lift.default",
    }
)
_COPIES = frozenset({"aten.clone.default", "aten._to_copy.default"})
_VIEWS = frozenset(
    {
        "aten.view.default",
        "aten._unsafe_view.default",
        "aten.reshape.default",
        "aten.expand.default",
    }
)


def is_noop(node: fx.Node, op: str) -> bool:
    """Whether the op returns its first operand, in a graph whose values are never written to."""
    if op in _ALIASES:
        return True
    source = node.args[0] if node.args else None
    before = source.meta.get("val") if isinstance(source, fx.Node) else None
    after = node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    if op in _COPIES:
        # Strides are compared as written: asking for equality would add guards.
        same_layout = [str(s) for s in before.stride()] == [str(s) for s in after.stride()]
        if before.dtype == after.dtype and same_layout:
            return True
        # A view in a graph is a reshape, which copies where it must: a copy made only to be viewed
        # is made twice.
        return op == "aten.clone.default" and all(str(user.target) in _VIEWS for user in node.users)
    if op in _VIEWS:
        return [str(size) for size in before.shape] == [str(size) for size in after.shape]
    if op == "aten.slice.Tensor":
        given: list[Any] = list(node.args[2:])
        start, end, step = given + [None, None, 1][len(given) :]
        is_full = start in (None, 0) and end in (None, INDEX_END)
        return is_full and bool(step == 1)
    return False


def are_whole(indices: Any) -> bool:
    """Whether all of an op's indices are whole numbers: a mask's result has as many rows as it has trues."""
    values = [index.meta.get("val") for index in indices if isinstance(index, fx.Node)]
    return all(
        isinstance(value, torch.Tensor) and value.dtype in (torch.int32, torch.int64)
        for value in values
    )
