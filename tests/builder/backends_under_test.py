"""Backends for tests of the builder: one that works, and one for each way to go wrong.

They run linears only: weights go into .npy files, which `load` maps.
"""

import ctypes
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from graphopt.analysis.facts import Facts
from graphopt.analysis.regions import Region
from graphopt.executor.backend import BackendMissingError, BuildError, Loaded, Options
from graphopt.executor.backends.openvino import OpenVinoBackend
from graphopt.executor.backends.openvino_frontend import OpenVinoFrontend
from graphopt.executor.backends.target import Converter, OpCall


class NumpyLinear:
    """A linear as a numpy matmul over mapped files."""

    name: ClassVar[str] = "numpy"

    def version(self) -> str:
        return np.__version__

    def unsupported(self, facts: Facts, region: Region) -> dict[str, str]:
        ops = {id: facts.graph.nodes[id].op for id in region.order}
        return {id: f"{op} is no linear" for id, op in ops.items() if op != "aten.linear.default"}

    def choices(self, facts: Facts, region: Region, options: Options) -> Sequence[Options]:
        return (options,)

    def build(self, facts: Facts, region: Region, options: Options, folder: Path) -> None:
        for i, name in enumerate(region.consts):
            np.save(folder / f"{i}.npy", facts.graph.constants[name].tensor.numpy())

    def load(self, folder: Path, constants: Sequence[torch.Tensor], options: Options) -> Loaded:
        weight, bias = (np.load(folder / f"{i}.npy", mmap_mode="r") for i in range(2))

        def run(x: torch.Tensor, *symbols: int) -> torch.Tensor:
            return torch.from_numpy(x.numpy() @ weight.T + bias)

        return Loaded(run, 0)


class Gated(NumpyLinear):
    """Says that it has begun by opening the FIFO of its options, and goes on when that ends."""

    name = "gated"

    def build(self, facts: Facts, region: Region, options: Options, folder: Path) -> None:
        Path(dict(options.extra)["gate"]).read_bytes()
        super().build(facts, region, options, folder)


class GatedProof(NumpyLinear):
    """Runs once, and waits as `Gated` does when it is asked again."""

    name = "gated-proof"

    def load(self, folder: Path, constants: Sequence[torch.Tensor], options: Options) -> Loaded:
        run, calls = super().load(folder, constants, options).function, []

        def gated(*args: Any) -> Any:
            calls.append(1)
            if len(calls) == 2:
                Path(dict(options.extra)["gate"]).read_bytes()
            return run(*args)

        return Loaded(gated, 0)


class Missing(NumpyLinear):
    name = "missing"

    def version(self) -> str:
        raise BackendMissingError("the library is not there", remedy="install it")


class Segfault(NumpyLinear):
    name = "segfault"

    def build(self, facts: Facts, region: Region, options: Options, folder: Path) -> None:
        (folder / "half.npy").write_bytes(b"half")
        os.write(2, b"the compiler met an unreachable state\n")
        ctypes.string_at(0)


class SegfaultOnLoad(NumpyLinear):
    name = "segfault-on-load"

    def load(self, folder: Path, constants: Sequence[torch.Tensor], options: Options) -> Loaded:
        os.kill(os.getpid(), signal.SIGABRT)
        raise AssertionError


class Unsound(OpenVinoFrontend):
    """OpenVINO's frontend as it were if it could not take one op in."""

    def _model(self, call: OpCall) -> Any:
        if call.op == "aten.log1p.default":
            ctypes.string_at(0)
        return super()._model(call)


class SegfaultOnTrial(OpenVinoBackend):
    name: ClassVar[str] = "segfault-on-trial"
    converter: ClassVar[Converter | None] = Unsound()


class Hang(NumpyLinear):
    name = "hang"

    def build(self, facts: Facts, region: Region, options: Options, folder: Path) -> None:
        signal.pause()


class Raises(NumpyLinear):
    name = "raises"

    def build(self, facts: Facts, region: Region, options: Options, folder: Path) -> None:
        (folder / "half.npy").write_bytes(b"half")
        raise BuildError("the layout is not possible", where="conv")


class RaisesOnLoad(NumpyLinear):
    name = "raises-on-load"

    def load(self, folder: Path, constants: Sequence[torch.Tensor], options: Options) -> Loaded:
        raise ValueError("not my file")


class Exits(NumpyLinear):
    name = "exits"

    def build(self, facts: Facts, region: Region, options: Options, folder: Path) -> None:
        raise SystemExit(3)


class Wrong(NumpyLinear):
    name = "wrong"

    def load(self, folder: Path, constants: Sequence[torch.Tensor], options: Options) -> Loaded:
        right = super().load(folder, constants, options).function

        def run(*args: Any) -> torch.Tensor:
            out: torch.Tensor = right(*args)
            return out + 1e-3

        return Loaded(run, 0)


class Greedy(NumpyLinear):
    """Keeps what it built in memory, as a runtime with a leak would."""

    name = "greedy"
    kept: ClassVar[list[bytearray]] = []

    def build(self, facts: Facts, region: Region, options: Options, folder: Path) -> None:
        self.kept.append(bytearray(os.urandom(1 << 20) * 300))
        super().build(facts, region, options, folder)


class Telling(NumpyLinear):
    """Writes what it finds in its process into the artifact: which constants are mapped."""

    name = "telling"

    def build(self, facts: Facts, region: Region, options: Options, folder: Path) -> None:
        super().build(facts, region, options, folder)
        pointers = [facts.graph.constants[name].tensor.data_ptr() for name in region.consts]
        rows = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
        files = []
        for pointer in pointers:
            for row in rows:
                low, high = (int(end, 16) for end in row[0].split("-"))
                if low <= pointer < high:
                    files.append(row[5] if len(row) > 5 else "anonymous")
        status = Path("/proc/self/status").read_text()
        scheduler = str(os.sched_getscheduler(0))
        loaded = str("torch._dynamo" in __import__("sys").modules)
        (folder / "told").write_text("\n".join([scheduler, loaded, *files]))
        (folder / "status").write_text(status)
