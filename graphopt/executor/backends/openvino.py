"""The tier `openvino`: a region compiled by OpenVINO's CPU plugin, straight from our graph.

`build` writes the region node by node over the weights where they lie, compiles it and exports the
result; `load` imports that from a private mapping of the file. Everything computes in float32:
bfloat16 (which the plugin prefers where the processor has it) and quantisation are switched off.

The plugin counts in 32 bits inside. Integers are therefore ids, positions and masks: a call whose
integer reads do not fit is refused, and so is a region whose integer constants do not. An index
that is out of range where it was computed inside the region reads zeros and is not reported.
Activations of NaN may yield a number, as in the tier `fused`.

An op that no rule of ours writes goes to OpenVINO's own frontend (`openvino_frontend`), that node alone.

Deliberately absent: other devices, and float64, which the plugin would round to float32.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from graphopt.analysis.facts import Facts
from graphopt.analysis.regions import Region
from graphopt.executor.backend import BackendMissingError, BuildError, Loaded, Options
from graphopt.executor.backends.artifact import Sheet, read_sheet, sheet_of, write_sheet
from graphopt.executor.backends.calls import Calls
from graphopt.executor.backends.openvino_frontend import OpenVinoFrontend
from graphopt.executor.backends.openvino_target import EXACT, OpenVinoTarget
from graphopt.executor.backends.target import EXACT_INTEGERS, Converter, DeclinedError
from graphopt.executor.backends.translate import Guard, translate, why_not
from graphopt.rewrite import PASSES, VERSION

BLOB = "model.blob"
ATTENTION = "attention"  # an extra option: `node` writes attention as one node
_INT32 = (-(2**31), 2**31 - 1)
_NUMPY = {"f32": np.float32, "i64": np.int64, "i32": np.int32, "bool": np.bool_}


class OpenVinoBackend:
    """See `graphopt.executor.backend.Backend`."""

    name: ClassVar[str] = "openvino"
    dtypes: ClassVar[frozenset[str]] = frozenset({"f32", "i64", "i32", "bool"})
    integers: ClassVar[frozenset[str]] = EXACT_INTEGERS

    absent: ClassVar[frozenset[str]] = frozenset()
    flat_linear: ClassVar[bool] = False
    knows_causal: ClassVar[bool] = True
    converter: ClassVar[Converter | None] = OpenVinoFrontend()

    # Merged linears cost 0 to 8% on six networks (benchmarks/README.md, Rewrites)
    rewrites: ClassVar[tuple[str, ...]] = tuple(name for name in PASSES if name != "merge")

    def version(self) -> str:
        """See `Backend`."""
        return f"{self._library.get_version()}, rewrites {VERSION}"

    def unsupported(self, facts: Facts, region: Region) -> dict[str, str]:
        """See `Backend`."""
        return why_not(facts, region, self)

    def without_rule(self, facts: Facts, region: Region) -> dict[str, str]:
        """See `Backend`."""
        return why_not(facts, region, self, converts=False)

    def choices(self, facts: Facts, region: Region, options: Options) -> Sequence[Options]:
        """See `Backend`: attention has two forms. Products and a softmax were the faster one on five
        of six models by 1 to 5%, the runtime's own node on the sixth.
        """
        nodes = facts.graph.nodes
        attends = any("scaled_dot_product_attention" in nodes[id].op for id in region.order)
        if not attends or any(name == ATTENTION for name, _ in options.extra):
            return [options]
        extra = tuple(sorted((*options.extra, (ATTENTION, "node"))))
        return [options, replace(options, extra=extra)]

    def build(self, facts: Facts, region: Region, options: Options, folder: Path) -> None:
        """See `Backend`."""
        in_parts = dict(options.extra).get(ATTENTION) != "node"
        version = self.version()
        try:
            target = OpenVinoTarget(attention_in_parts=in_parts)
            written = translate(facts, region, target, self, options.sizes)
            _check_integers(facts, region)
            model = target.model(written.exits)
            compiled = self._core.compile_model(model, "CPU", _settings(options))
            with (folder / BLOB).open("wb") as file:
                file.write(compiled.export_model().getbuffer())
        except DeclinedError as declined:
            raise BuildError(str(declined), where=self.name) from declined
        except (RuntimeError, TypeError, ValueError) as error:
            raise BuildError(f"{type(error).__name__}: {error}", where=self.name) from error
        sheet = sheet_of(facts, region, written, self.name, version, options.sizes)
        write_sheet(folder, sheet, [BLOB])

    def load(self, folder: Path, constants: Sequence[torch.Tensor], options: Options) -> Loaded:
        """See `Backend`."""
        sheet = read_sheet(folder, self.name, self.version())
        blob = np.memmap(folder / BLOB, np.uint8, "c")  # private and writable: the library asks so
        try:
            tensor = self._library.Tensor(blob, shared_memory=True)
            compiled = self._core.import_model(tensor, "CPU", _settings(options))
        except RuntimeError as error:
            raise BuildError(
                f"the blob does not load: {error}", where=str(folder), remedy="build it again"
            ) from error
        slots = _slots(self._library, compiled, sheet, tensor)
        function = Calls(sheet, slots, [*sheet.guards, *_narrow_reads(sheet)])
        return Loaded(function, blob.nbytes, sheet.converted)

    @cached_property
    def _library(self) -> Any:
        try:
            return import_module("openvino")
        except (ImportError, OSError) as error:
            raise BackendMissingError(
                f"OpenVINO does not load: {error}", remedy="pip install openvino"
            ) from error

    @cached_property
    def _core(self) -> Any:
        return self._library.Core()


def _settings(options: Options) -> dict[str, Any]:
    """The plugin's configuration: float32 throughout, threads that are ours to place."""
    return {
        **EXACT,
        "NUM_STREAMS": str(options.streams),
        "INFERENCE_NUM_THREADS": str(options.threads * options.streams),
        "ENABLE_CPU_PINNING": "NO",
        "PERFORMANCE_HINT_NUM_REQUESTS": str(options.streams),
    }


def _check_integers(facts: Facts, region: Region) -> None:
    for name in region.consts:
        tensor = facts.graph.constants[name].tensor
        if tensor.dtype != torch.int64 or not tensor.numel():
            continue
        least, most = (int(value) for value in torch.aminmax(tensor))
        if least < _INT32[0] or most > _INT32[1]:
            raise DeclinedError(f"constant {name} holds integers of more than 32 bits")


def _narrow_reads(sheet: Sheet) -> list[Guard]:
    types = enumerate(sheet.read_types())
    return [Guard(read, *_INT32) for read, type_ in types if type_.dtype == "i64"]


def _slots(library: Any, compiled: Any, sheet: Sheet, blob: Any) -> Callable[[], "_Request"]:
    reads = [type_.dtype for type_ in sheet.read_types()] + ["i64"] * len(sheet.scalars)
    exits = [type_.dtype for type_ in sheet.computed_types()]

    def make() -> _Request:
        assert blob is not None  # held here: what was imported reads from the mapping
        return _Request(library, compiled, reads, exits)

    return make


class _Request:
    """One infer request; see `graphopt.executor.backends.calls.Slot`."""

    __slots__ = ("_exits", "_library", "_reads", "_request", "run")

    def __init__(self, library: Any, compiled: Any, reads: list[str], exits: list[str]) -> None:
        request = import_module(
            "openvino._pyopenvino"
        ).InferRequest  # without the public one's copies

        self._library = library
        self._request = compiled.create_infer_request()
        self._reads = [np.dtype(_NUMPY[dtype]) for dtype in reads]
        self._exits = [np.dtype(_NUMPY[dtype]) for dtype in exits]
        self.run = partial(request.infer, self._request, {}, True, False)

    def bind_read(self, index: int, address: int, shape: tuple[int, ...]) -> None:
        self._request.set_input_tensor(index, self._wrap(address, shape, self._reads[index]))

    def bind_exit(self, index: int, address: int, shape: tuple[int, ...]) -> None:
        self._request.set_output_tensor(index, self._wrap(address, shape, self._exits[index]))

    def _wrap(self, address: int, shape: tuple[int, ...], dtype: "np.dtype[Any]") -> Any:
        n_bytes = dtype.itemsize
        for size in shape:
            n_bytes *= size
        memory: Any = (ctypes.c_char * n_bytes).from_address(address)
        return self._library.Tensor(np.ndarray(shape, dtype, memory), shared_memory=True)
