"""Runtimes for chains of relu, which are easy to run faster and slower than torch does: one call for
all of them, or as much waiting as one likes.
"""

import ctypes
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from graphopt.analysis.facts import Facts
from graphopt.analysis.regions import Region
from graphopt.executor.backend import BuildError, Loaded, Options


class Once:
    """Relu is idempotent: a chain of any length is one relu."""

    name: ClassVar[str] = "once"

    def version(self) -> str:
        return "1"

    def unsupported(self, facts: Facts, region: Region) -> dict[str, str]:
        ops = {id: facts.graph.nodes[id].op for id in region.order}
        return {id: f"{op} is no relu" for id, op in ops.items() if op != "aten.relu.default"}

    def choices(self, facts: Facts, region: Region, options: Options) -> Sequence[Options]:
        return (options,)

    def build(self, facts: Facts, region: Region, options: Options, folder: Path) -> None:
        (folder / "chain").write_text(str(len(region.order)))

    def load(self, folder: Path, constants: Sequence[torch.Tensor], options: Options) -> Loaded:
        if not (folder / "chain").is_file():
            raise BuildError("no chain", where=str(folder))
        return Loaded(self.function(folder), 0)

    def function(self, folder: Path) -> Callable[..., Any]:
        return lambda x, *symbols: torch.relu(x)


class Scaling(Once):
    """A chain of relu and one factor, as one call."""

    name = "scaling"

    def unsupported(self, facts: Facts, region: Region) -> dict[str, str]:
        return {}

    def build(self, facts: Facts, region: Region, options: Options, folder: Path) -> None:
        nodes = [facts.graph.nodes[id] for id in region.order]
        factors = [node.args[1] for node in nodes if node.op == "aten.mul.Tensor"]
        (folder / "chain").write_text(str(factors[0] if factors else 1.0))

    def function(self, folder: Path) -> Callable[..., Any]:
        factor = float((folder / "chain").read_text())
        return lambda x, *symbols: torch.relu(x) * factor


class Slow(Once):
    """Right, and a hundred times slower than anything else."""

    name = "slow"

    def function(self, folder: Path) -> Callable[..., Any]:
        def run(x: torch.Tensor, *symbols: int) -> torch.Tensor:
            end_s = time.perf_counter() + 0.02
            while time.perf_counter() < end_s:
                pass
            return torch.relu(x)

        return run


class Wrong(Once):
    name = "wrong"

    def function(self, folder: Path) -> Callable[..., Any]:
        return lambda x, *symbols: torch.relu(x) + 1e-3


class Segfault(Once):
    name = "segfault"

    def build(self, facts: Facts, region: Region, options: Options, folder: Path) -> None:
        ctypes.string_at(0)


class Homesick(Once):
    """Works where it was built, and nowhere else."""

    name = "homesick"

    def function(self, folder: Path) -> Callable[..., Any]:
        at_home = (
            Path(getattr(sys.modules["__main__"], "__file__", None) or "").parent.name == "builder"
        )

        def run(x: torch.Tensor, *symbols: int) -> torch.Tensor:
            if not at_home:
                raise RuntimeError("no such device")
            return torch.relu(x)

        return run


class Tiring(Once):
    """Fast in the builder and in its trial; slow once the file `tired` lies among the artifacts."""

    name = "tiring"

    def function(self, folder: Path) -> Callable[..., Any]:
        def run(x: torch.Tensor, *symbols: int) -> torch.Tensor:
            if (folder.parent / "tired").exists():
                end_s = time.perf_counter() + 0.02
                while time.perf_counter() < end_s:
                    pass
            return torch.relu(x)

        return run


class Fragile(Once):
    """Raises once the file `broken` lies among the artifacts."""

    name = "fragile"

    def function(self, folder: Path) -> Callable[..., Any]:
        def run(x: torch.Tensor, *symbols: int) -> torch.Tensor:
            if (folder.parent / "broken").exists():
                raise RuntimeError("the kernel met an unreachable state")
            return torch.relu(x)

        return run


class Heavy(Once):
    """Holds memory of its own: 400 KB for each artifact."""

    name = "heavy"

    def load(self, folder: Path, constants: Sequence[torch.Tensor], options: Options) -> Loaded:
        found = super().load(folder, constants, options)
        return Loaded(found.function, 400_000)
