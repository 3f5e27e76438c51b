"""The tier `inductor`: a region compiled to machine code by torch's own AOTInductor.

Needs no library beyond torch, but a C++ compiler, and tens of seconds for a region: on a CPU it is
offered only where no other runtime takes a region (`last_resort`). `build` exports the generated
eager function and packages the shared library without weights; `load` hands it the graph's own
constants, which it uses where they lie (the compiler writes those of a few elements into its code; an
artifact is for one set of weights anyway). Loading imports nothing of the compiler.

A call holds the GIL while it runs (measured, torch 2.13), which law 4 forbids above a millisecond:
one more reason to come last.

Deliberately absent: freezing, which would fold weights into each artifact, and autotuning.
"""

import shutil
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch

from graphopt.analysis.facts import Facts
from graphopt.analysis.regions import Region
from graphopt.constants import TORCH_DTYPES
from graphopt.dims import evaluate
from graphopt.executor.backend import BackendMissingError, BuildError, Loaded, Options
from graphopt.executor.backends.artifact import read_sheet, sheet_of, write_sheet
from graphopt.executor.backends.translate import Written
from graphopt.executor.codegen import compile_source, eager_source
from graphopt.executor.samples import SYMBOL_SIZES
from graphopt.graph import Ref
from graphopt.types import TensorType

PACKAGE = "region.pt2"
COMPILERS = ("g++", "clang++", "c++")
_MODEL = "model"  # what the packager calls the only one in a package
_CPU = -1  # index of the device


class InductorBackend:
    """See `graphopt.executor.backend.Backend`."""

    name: ClassVar[str] = "inductor"
    last_resort: ClassVar[bool] = True

    def version(self) -> str:
        """See `Backend`."""
        if not any(map(shutil.which, COMPILERS)):
            raise BackendMissingError(
                "no C++ compiler", remedy=f"install one of {', '.join(COMPILERS)}"
            )
        return str(torch.__version__)

    def unsupported(self, facts: Facts, region: Region) -> dict[str, str]:
        """See `Backend`: whatever runs eager can be compiled; a symbol must be the size of a read."""
        known = _axes(facts, region)
        if all(name in known for name in region.symbols):
            return {}
        return {region.order[0]: "a dynamic dim is no dim of what the region reads"}

    def choices(self, facts: Facts, region: Region, options: Options) -> Sequence[Options]:
        """See `Backend`."""
        return [options]

    def build(self, facts: Facts, region: Region, options: Options, folder: Path) -> None:
        """See `Backend`."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns of its own code
                _compile(_exported(facts, region, options), options, folder / PACKAGE)
        except Exception as error:  # the compiler's errors have no common class
            text = str(error).strip() or "no reason given"
            raise BuildError(f"{type(error).__name__}: {text}", where=self.name) from error
        written = Written((), (), (), (), ())
        sheet = sheet_of(facts, region, written, self.name, self.version(), options.sizes)
        write_sheet(folder, sheet, [PACKAGE])

    def load(self, folder: Path, constants: Sequence[torch.Tensor], options: Options) -> Loaded:
        """See `Backend`."""
        sheet = read_sheet(folder, self.name, self.version())
        try:
            loader = torch._C._aoti.AOTIModelPackageLoader(
                str(folder / PACKAGE), _MODEL, False, options.streams, _CPU
            )
            given = {f"w{i}": tensor.contiguous() for i, tensor in enumerate(constants)}
            wanted = {name: given[name] for name in loader.get_constant_fqns()}
            loader.load_constants(wanted, False, True, True)
        except (RuntimeError, KeyError) as error:
            raise BuildError(
                f"the package does not load: {error}", where=str(folder), remedy="build it again"
            ) from error
        own = sum(
            tensor.nbytes
            for tensor, kept in zip(constants, given.values(), strict=True)
            if kept is not tensor
        )
        return Loaded(_function(loader, len(sheet.reads), len(sheet.exits), given), own)


class _Computation(torch.nn.Module):
    """The region as a module: constants are its buffers, symbols the sizes of its inputs."""

    def __init__(
        self, function: Callable[..., Any], constants: Sequence[torch.Tensor], sizes: Sequence[Any]
    ) -> None:
        super().__init__()
        self.function = function
        self.count = len(constants)
        self.sizes = tuple(sizes)  # an int, or the position of a read and its axis
        for i, tensor in enumerate(constants):
            self.register_buffer(f"w{i}", tensor)

    def forward(self, *reads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The exits."""
        constants = [getattr(self, f"w{i}") for i in range(self.count)]
        sizes = [
            size if isinstance(size, int) else reads[size[0]].shape[size[1]] for size in self.sizes
        ]
        out = self.function(*reads, *constants, *sizes)
        return out if isinstance(out, tuple) else (out,)


def _compile(exported: Any, options: Options, package: Path) -> None:
    settings = {"aot_inductor.package_constants_in_so": False, "cpp.threads": options.threads}
    inductor = import_module("torch._inductor")
    with import_module("torch._inductor.utils").fresh_cache():
        inductor.aoti_compile_and_package(
            exported, package_path=str(package), inductor_configs=settings
        )


def _exported(facts: Facts, region: Region, options: Options) -> Any:
    source = eager_source(region, facts)
    function = compile_source(source.text(), source.names, f"inductor {region.key[:12]}")
    constants = [facts.graph.constants[name].tensor.contiguous() for name in region.consts]
    axes = _axes(facts, region)
    sizes: list[Any] = list(options.sizes or [axes[name] for name in region.symbols])
    at = dict(zip(region.symbols, options.sizes, strict=True)) if options.sizes else _probe(facts)
    dynamic = None if options.sizes is not None else tuple(_dims(facts, r) for r in region.reads)
    reads = tuple(_zeros(_tensor_type(facts, ref), at) for ref in region.reads)
    export = import_module("torch.export")
    with torch.no_grad():
        module = _Computation(function, constants, sizes)
        shapes = (dynamic,) if dynamic is not None and any(dynamic) else None
        return export.export(module, reads, dynamic_shapes=shapes, strict=False)


def _axes(facts: Facts, region: Region) -> dict[str, tuple[int, int]]:
    """Where the size of each symbol can be read off: a read and its axis."""
    found: dict[str, tuple[int, int]] = {}
    for position, ref in enumerate(region.reads):
        for axis, dim in enumerate(_tensor_type(facts, ref).shape):
            if str(dim) in region.symbols:
                found.setdefault(str(dim), (position, axis))
    return found


def _dims(facts: Facts, ref: Ref) -> dict[int, Any]:
    """The dynamic axes of a read, as `torch.export` is told of them: found out by itself."""
    auto = import_module("torch.export").Dim.AUTO
    shape = _tensor_type(facts, ref).shape
    return {axis: auto for axis, dim in enumerate(shape) if not isinstance(dim, int)}


def _probe(facts: Facts) -> dict[str, int]:
    """Sizes to export at: above 1, which would be taken for a fixed one."""
    sizes = {}
    for i, symbol in enumerate(facts.graph.symbols):
        size = max(SYMBOL_SIZES[i % len(SYMBOL_SIZES)], symbol.min, 2)
        sizes[symbol.name] = size if symbol.max is None else min(size, symbol.max)
    return sizes


def _zeros(type_: TensorType, sizes: dict[str, int]) -> torch.Tensor:
    shape = [dim if isinstance(dim, int) else evaluate(dim, sizes) for dim in type_.shape]
    return torch.zeros(shape, dtype=TORCH_DTYPES[type_.dtype])


def _tensor_type(facts: Facts, ref: Ref) -> TensorType:
    type_ = facts.type_of(ref)
    assert isinstance(type_, TensorType), ref
    return type_


def _function(loader: Any, n_reads: int, n_exits: int, held: object) -> Callable[..., Any]:
    """What the engine calls; `held` are constants that the library uses where they lie."""
    run = loader.boxed_run

    def function(*args: Any, _held: object = held) -> Any:
        reads = [read.contiguous() for read in args[:n_reads]]
        places = {read.data_ptr() for read in args[:n_reads]}
        outs = [out.clone() if out.data_ptr() in places else out.contiguous() for out in run(reads)]
        return outs[0] if n_exits == 1 else tuple(outs)

    return function
