"""Everyday edits: each expands into primitive edits against the graph it meets, and is journaled as
those.
"""

from graphopt.macros.adapters import AttachAdapter, DetachAdapter
from graphopt.macros.structure import Bypass, InsertAfter, ReplaceRegion, SetShapeProfile
from graphopt.macros.weights import LoadWeights, SwapHead

__all__ = [
    "AttachAdapter",
    "Bypass",
    "DetachAdapter",
    "InsertAfter",
    "LoadWeights",
    "ReplaceRegion",
    "SetShapeProfile",
    "SwapHead",
]
