"""A link to a real builder, and the graph it works on: three linears with a GELU between."""

import os
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
from graphopt.graph import Graph, Ref, Symbol
from graphopt.types import TensorType
from helpers.graphs import BATCH, Builder

torch.set_num_threads(1)
HERE = Path(__file__).parent
ANSWER_S = 60.0  # of a broken test; a good one waits for the builder to load torch at most
NAMES = (
    "NumpyLinear", "Gated", "Missing", "Segfault", "SegfaultOnLoad", "Hang", "Raises",
    "RaisesOnLoad", "Exits", "Wrong", "Greedy", "Telling",
)  # fmt: skip
BACKENDS = tuple(f"backends_under_test:{name}" for name in NAMES)
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


def put(graph: Graph, name: str, seed: int = 1) -> tuple[Graph, Delta]:
    """The graph with another value of the constant `name`, and the primitives that lead there."""
    shape = graph.constants[name].tensor.shape
    value = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    applied = apply_fully(graph, Delta([PutConstant(name, value)]))
    return applied.graph, applied.expansion


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


class Bench:
    """A link that follows `chain` as revision 1, and short ways to ask it for builds of a linear."""

    def __init__(self, folder: Path, settings: BuilderSettings = SETTINGS) -> None:
        self.folder = folder
        self.events = Events()
        scratch = ScratchConstants(folder / "scratch")
        self.link = BuilderLink(folder / "builder", scratch, time.monotonic, settings, self.events)
        self.graph = chain()
        self.link.revise("chain", 1, self.graph)
        self._count = 0

    def job(self, backend: str = "numpy", block: str = "a", **changes: Any) -> BuildJob:
        self._count += 1
        folder = self.folder / f"artifact-{self._count}"
        return replace(BuildJob("chain", 1, (block,), backend, Options(), folder), **changes)

    def gated(self, block: str = "b", **changes: Any) -> "tuple[BuildJob, Gate]":
        job = self.job("gated", block, **changes)
        path = self.folder / f"gate-{self._count}"
        os.mkfifo(path)
        return replace(job, options=Options(extra=(("gate", str(path)),))), Gate(path)

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


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """One for tests that leave the builder as it was."""
    made = Bench(tmp_path_factory.mktemp("bench"))
    yield made
    made.link.close()
