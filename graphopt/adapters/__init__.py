"""PEFT LoRA folders, read exactly as they are on disk and fitted to a live graph.

`read_adapter` reads the files and refuses by name what it would not reproduce; `LoraAdapter.resolve`
says which module gets which pair of matrices and which constants are replaced. Deliberately absent:
any change to a graph (the delta macros do that), other PEFT methods, and peft itself, which serves
as the oracle of the tests.
"""

from graphopt.adapters.peft import ADAPTER_FILES, LoraAdapter, adapter_files, read_adapter
from graphopt.adapters.resolve import ConstantLike, LinearSite, LoraPair, Resolved

__all__ = [
    "ADAPTER_FILES",
    "ConstantLike",
    "LinearSite",
    "LoraAdapter",
    "LoraPair",
    "Resolved",
    "adapter_files",
    "read_adapter",
]
