"""Exact rewrites of a region before a runtime is given it: passes from a graph to a delta.

`rewrite.py` says what a pass is, `lowering.py` runs them, each other module is one of them.
"""

from graphopt.rewrite.lowering import PASSES, VERSION, Lowered, PassStep, lower
from graphopt.rewrite.rewrite import Declined, Pass, Rewrite

__all__ = ["PASSES", "VERSION", "Declined", "Lowered", "Pass", "PassStep", "Rewrite", "lower"]
