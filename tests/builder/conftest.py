"""A link to a real builder, and the graph it works on: three linears with a GELU between."""

import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from graphopt.delta import Delta, PutConstant, apply_fully
from graphopt.engine.builder_files import ScratchConstants
from graphopt.engine.builder_link import BuilderLink, BuilderSettings, BuildJob
from graphopt.executor.backend import Options
from graphopt.graph import Constant, Graph, Ref, Symbol
from graphopt.types import TensorType
from helpers.graphs import BATCH, Builder

torch.set_num_threads(1)
HERE = Path(__file__).parent
ANSWER_S = 60.0  # of a broken test; a good one waits for the builder to load torch at most
NAMES = (
    "NumpyLinear", "Gated", "GatedProof", "Missing", "Segfault", "SegfaultOnLoad", "SegfaultOnTrial", "Hang",
    "Raises", "RaisesOnLoad", "Exits", "Wrong", "Greedy", "Telling",
)  # fmt: skip
BACKENDS = tuple(f"backends_under_test:{name}" for name in NAMES)
BACKENDS += ("graphopt.executor.backends.openvino:OpenVinoBackend",)  # where it is not installed
SETTINGS = BuilderSettings(backends=BACKENDS, path=(str(HERE),))
SIZE = 6


def chain(size: int = SIZE) -> Graph:
    """Linears a, b, c of `size`, a GELU behind a and b."""
    b = Builder(3)
    x = b.node("a.gelu", "gelu.default", b.linear("a", Ref("x"), size, size))
    x = b.node("b.gelu", "gelu.default", b.linear("b", x, size, size))
    y = b.linear("c", x, size, size)
    inputs = [("x", TensorType("f32", (BATCH, size)))]
    symbols = [Symbol("batch", 1, 64)]
    return Graph.build("chain", b.nodes, inputs, [("y", y)], b.constants, None, symbols)


class Events:
    """What the link said, and a way to wait for it."""

    def __init__(self) -> None:
        self.all: list[tuple[str, Mapping[str, Any]]] = []
        self._changed = threading.Condition()

    def __call__(self, name: str, fields: Mapping[str, Any]) -> None:
        with self._changed:
            self.all.append((name, fields))
            self._changed.notify_all()

    def wait(self, name: str, count: int = 1) -> Mapping[str, Any]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.of(name)) >= count, ANSWER_S), name
            return self.of(name)[count - 1]

    def of(self, name: str) -> list[Mapping[str, Any]]:
        return [fields for event, fields in self.all if event == name]


class Constants(ScratchConstants):
    """Constants in scratch files; remembers what was asked for, and can lose a file once."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.asked: list[set[str]] = []
        self.loses_next = False

    def files(self, model: str, constants: Mapping[str, Constant]) -> list[Path]:
        self.asked.append(set(constants))
        found = super().files(model, constants)
        if self.loses_next:
            self.loses_next = False
            return [path.with_name("compacted-away") for path in found]
        return found


class Bench:
    """A link that follows `chain`, and short ways to ask it for builds of a linear."""

    def __init__(self, folder: Path, settings: BuilderSettings = SETTINGS) -> None:
        self.folder = folder
        self.events = Events()
        self.constants = Constants(folder / "scratch")
        self.link = BuilderLink(
            folder / "builder", self.constants, time.monotonic, settings, self.events
        )
        self.graph, self.revision = chain(), 1
        self.link.revise("chain", 1, self.graph)

    def job(self, backend: str = "numpy", block: str = "a", **changes: Any) -> BuildJob:
        folder = self.folder / f"artifact-{secrets.token_hex(8)}"
        return replace(
            BuildJob("chain", self.revision, (block,), backend, Options(), folder), **changes
        )

    def gated(
        self, block: str = "b", backend: str = "gated", **changes: Any
    ) -> "tuple[BuildJob, Gate]":
        job = self.job(backend, block, **changes)
        path = self.folder / f"gate-{secrets.token_hex(8)}"
        os.mkfifo(path)
        return replace(job, options=Options(extra=(("gate", str(path)),))), Gate(path)

    def put(self, name: str, seed: int) -> str:
        """The next revision, with another value of a constant, whose digest is returned."""
        value = torch.randn(
            self.graph.constants[name].tensor.shape, generator=torch.Generator().manual_seed(seed)
        )
        applied = apply_fully(self.graph, Delta([PutConstant(name, value)]))
        self.graph, self.revision = applied.graph, self.revision + 1
        self.link.revise("chain", self.revision, self.graph, applied.expansion)
        return self.graph.constants[name].digest

    def do(self, job: BuildJob) -> Any:
        return self.link.build(job).result(ANSWER_S)


class Gate:
    """The other end of a gated build."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1

    def reached(self) -> None:
        """Returns once the build has begun; it waits from then on."""
        self._fd = os.open(self._path, os.O_WRONLY)

    def open(self) -> None:
        os.close(self._fd)


MakeBench = Callable[..., Bench]


@pytest.fixture
def make_bench(tmp_path: Path) -> Iterator[MakeBench]:
    benches: list[Bench] = []

    def make(settings: BuilderSettings = SETTINGS) -> Bench:
        benches.append(Bench(tmp_path, settings))
        return benches[-1]

    yield make
    for bench in benches:
        bench.link.close()


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """One for tests that leave the builder alive."""
    made = Bench(tmp_path_factory.mktemp("bench"), replace(SETTINGS, queue_max=12))
    yield made
    made.link.close()
