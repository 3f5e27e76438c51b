"""Keeps torch's compiler front end out of the serving process.

Some of torch's meta kernels are Python (`torch._refs`) and are marked "not to be traced". The mark
is carried out at a kernel's first call by importing the whole of torch._dynamo: one to four seconds,
in which requests stall, only to type one node of a delta. This process traces nothing, ever (a law:
it loads, never compiles), so each such kernel is told here that it is its own untraced form, which
is the cache that `torch._compile` looks into first.

Relies on names private to torch 2.13, which is pinned; where they are missing nothing happens but
the import. `tests/service/test_parts.py` fails when a new torch needs this looked at again.
"""

from types import CellType, FunctionType

import torch._compile
import torch._refs
import torch._refs.fft
import torch._refs.linalg
import torch._refs.nn.functional
import torch._refs.special
from torch._decomp import decomposition_table

_MODULES = (
    torch._refs,
    torch._refs.fft,
    torch._refs.linalg,
    torch._refs.nn.functional,
    torch._refs.special,
)
_MARK = torch._compile._disable_dynamo.__code__.co_filename  # what the marking wrapper was made in
_CACHE = "__dynamo_disable"


def spare_dynamo() -> int:
    """Marks every kernel; how many there are. About 10 ms."""
    waiting = [value for module in _MODULES for value in vars(module).values()]
    waiting += decomposition_table.values()
    seen: set[int] = set()
    count = 0
    while waiting:
        function = waiting.pop()
        if not isinstance(function, FunctionType) or id(function) in seen:
            continue
        seen.add(id(function))
        inside = [cell.cell_contents for cell in function.__closure__ or () if _is_set(cell)]
        if function.__code__.co_filename == _MARK:
            for kernel in filter(_is_function, inside):
                setattr(kernel, _CACHE, kernel)
            count += 1
        waiting += inside
    return count


def _is_function(value: object) -> bool:
    return isinstance(value, FunctionType)


def _is_set(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - a cell that holds nothing yet raises
    except ValueError:
        return False
    return True
