"""What a runtime has to offer to run regions: the contract between the engine and its tiers that are
built.

A backend has two halves that run in different processes. In the builder, `build` turns a region into
an *artifact*, a folder of files. In the serving process, `load` turns that folder into a function,
and must not compile anything (law 5). Backends register under the entry point group
`graphopt.backends`; the ones that come with graphopt are found the same way.

Deliberately absent: which backend is best for a region; that is measured.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from graphopt.analysis.facts import Facts
from graphopt.analysis.regions import Region
from graphopt.errors import GraphoptError
from graphopt.rewrite import PASSES, Pass

ENTRY_POINTS = "graphopt.backends"


class BackendMissingError(GraphoptError):
    """The runtime's library is not installed or does not load; the tier is not offered."""

    code = "backend.missing"


class BuildError(GraphoptError):
    """A region could not be built on a backend; the message is the runtime's own reason."""

    code = "backend.build_failed"


@dataclass(frozen=True, slots=True)
class Options:
    """How a candidate is to run: part of its identity.

    Attributes:
        threads: of the runtime, for one call.
        streams: calls expected at the same time: the executor threads that share the function.
        sizes: values of `Region.symbols`, in order, when the artifact is for that shape bucket
            only; None for one that takes every shape. A region without symbols has `()`.
        extra: settings of the backend's own, by name, sorted.
    """

    threads: int = 1
    streams: int = 1
    sizes: tuple[int, ...] | None = None
    extra: tuple[tuple[str, str], ...] = ()

    @property
    def label(self) -> str:
        """Short and unique: `2 threads, 1x128`."""
        parts = [f"{self.threads} threads"] if self.threads != 1 else ["1 thread"]
        if self.streams != 1:
            parts.append(f"{self.streams} streams")
        if self.sizes:
            parts.append("x".join(map(str, self.sizes)))
        parts += [f"{name}={value}" for name, value in self.extra]
        return ", ".join(parts)

    def document(self) -> dict[str, Any]:
        """As JSON values; `options_of` reads it back."""
        return {
            "threads": self.threads, "streams": self.streams, "sizes": self.sizes, "extra": self.extra,
        }  # fmt: skip


def options_of(document: Mapping[str, Any]) -> Options:
    """The options that `Options.document` wrote."""
    sizes = document["sizes"]
    return Options(
        document["threads"],
        document["streams"],
        None if sizes is None else tuple(sizes),
        tuple((name, value) for name, value in document["extra"]),
    )


@dataclass(frozen=True, slots=True)
class Loaded:
    """An artifact that is ready to run in this process.

    `function(*reads, *symbols)` takes the region's reads (tensors of any strides) and the values of
    its symbols, and returns a fresh contiguous tensor for one exit, a tuple for several. Any number
    of threads may call it at once. Reads are never written to. `resident_bytes` is the memory it
    holds beyond mapped files: packed weights, buffers. `converted` are the ops that the runtime's own
    converter wrote because no rule does, one for each node.
    """

    function: Callable[..., Any]
    resident_bytes: int
    converted: tuple[str, ...] = ()


class Backend(Protocol):
    """One runtime. Importing its module must not import the runtime's library.

    A class attribute `last_resort = True` says that it is worth its build time only where no other
    runtime takes a graph. A class attribute `rewrites` names the passes of `graphopt.rewrite` that
    pay on it: `build` is then given the lowered region, whose constants may end with some that a
    pass made (`Region.made`); the artifact has to hold these, `load` is not given them. A method
    `without_rule(facts, region)`, like `unsupported`, names more nodes: those that it can run only as
    its own converter writes them. Regions without them are then tried as well.
    """

    name: ClassVar[str]

    def version(self) -> str:
        """The runtime's version; raises BackendMissingError naming what to install."""

    def unsupported(self, facts: Facts, region: Region) -> dict[str, str]:
        """The nodes of the region that it cannot run, each with the reason; empty when it can run all.

        Decided from ops, arguments and types alone, in microseconds a node; a call that has to be
        shown to the runtime's own converter takes some 50 to 500 ms, once a process. Asked by the
        builder only: the serving process converts nothing (law 5).
        """

    def choices(self, facts: Facts, region: Region, options: Options) -> Sequence[Options]:
        """Variants of `options` worth measuring for this region, the most promising first."""

    def build(self, facts: Facts, region: Region, options: Options, folder: Path) -> None:
        """Writes the artifact into `folder`, which exists and is empty.

        Raises BuildError; files that were written before it are the caller's to remove.
        """

    def load(self, folder: Path, constants: Sequence[torch.Tensor], options: Options) -> Loaded:
        """Makes an artifact runnable without compiling; `constants` are those of `Region.consts`
        that are the user's.

        The folder is renamed afterwards and may be removed: what is mapped or open stays good, its
        path does not. Raises BuildError when the files are not what `build` of this version wrote.
        """


def passes_of(backend: Backend) -> dict[str, Pass]:
    """The rewrites that a backend wants, in the order in which they run."""
    wanted = getattr(backend, "rewrites", ())
    return {name: run for name, run in PASSES.items() if name in wanted}


@cache
def backends() -> dict[str, Backend]:
    """Every registered backend by name, whether or not its library is there."""
    found: dict[str, Backend] = {}
    for entry in sorted(entry_points(group=ENTRY_POINTS), key=lambda entry: entry.name):
        found[entry.name] = entry.load()()
    return found
