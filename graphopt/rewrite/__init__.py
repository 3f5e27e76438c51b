"""Exact rewrites of a region before a runtime is given it: passes from a graph to a delta.

`rewrite.py` says what a pass is, `lowering.py` runs them, each other module is one of them.
"""

from graphopt.rewrite.lowering import PASSES, Lowered, lower
from graphopt.rewrite.rewrite import Declined, Rewrite

__all__ = ["PASSES", "Declined", "Lowered", "Rewrite", "lower"]
