"""The tier `onnxruntime`: a region run by ONNX Runtime's CPU provider, straight from our graph.

`build` writes the region as ONNX with its weights left outside, lets the runtime optimise it, and
keeps the optimised model: weights that came through unchanged are named only, and `load` gives the
session their memory. What the optimiser made of weights (folded batch-norms, convolution weights
in blocks) is kept beside the model and mapped. `load` optimises nothing.

Each session of more than one thread has its own pool, whose threads wait awake for `SPIN_US` only:
from one op to the next, not for the next request, so that no other runtime misses their cores. The
process-wide pool (`pool=shared` in the options' extra) spins for ever and cannot be told otherwise;
`spin=0` has a session's pool not spin at all, `spin=1` for ever.

Deliberately absent: other providers, float64, quantised kernels, and a converter of its own for ops
that no rule writes: torch's ONNX exporter takes whole models, through another package.
"""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from graphopt.analysis.facts import Facts
from graphopt.analysis.regions import Region
from graphopt.executor.backend import BackendMissingError, BuildError, Loaded, Options
from graphopt.executor.backends.artifact import Sheet, read_sheet, sheet_of, write_sheet
from graphopt.executor.backends.calls import Calls
from graphopt.executor.backends.onnx_target import OUTSIDE, OnnxTarget
from graphopt.executor.backends.target import EXACT_INTEGERS, Converter, DeclinedError
from graphopt.executor.backends.translate import translate, why_not
from graphopt.rewrite import PASSES, VERSION

MODEL, DERIVED = "model.onnx", "derived.bin"
_ALL = "all.bin"  # what the runtime writes; gone when `build` returns
# An op of a small net takes 2 to 20 us; waking a sleeping thread takes as long. An MLP of 8 layers on two
# threads took 47 us without spinning, 27 with 20 to 50 us of it, 28 with spinning for ever (by hand).
SPIN_US = 50
INLINE_BYTES_MAX = 4096  # of an initializer of integers: axes, pads, shapes
_TYPES = {"f32": 1, "i32": 6, "i64": 7, "bool": 9}  # onnx.TensorProto.DataType
_NUMPY = {1: np.float32, 6: np.int32, 7: np.int64, 9: np.bool_}
_PREPACKED = frozenset({"Gemm", "FusedGemm", "MatMul", "FusedMatMul", "Conv", "FusedConv"})
_ERROR_LEVEL = 3  # of the runtime's log: it warns that an optimised model fits this machine only


class OnnxRuntimeBackend:
    """See `graphopt.executor.backend.Backend`."""

    name: ClassVar[str] = "onnxruntime"
    dtypes: ClassVar[frozenset[str]] = frozenset({"f32", "i64", "i32", "bool"})
    integers: ClassVar[frozenset[str]] = EXACT_INTEGERS
    absent: ClassVar[frozenset[str]] = frozenset()
    flat_linear: ClassVar[bool] = True
    knows_causal: ClassVar[bool] = False
    converter: ClassVar[Converter | None] = None

    # Merged linears cost 0 to 8% on six networks (benchmarks/README.md, Rewrites)
    rewrites: ClassVar[tuple[str, ...]] = tuple(name for name in PASSES if name != "merge")

    def version(self) -> str:
        """See `Backend`."""
        return f"{self._library.__version__}, rewrites {VERSION}"

    def unsupported(self, facts: Facts, region: Region) -> dict[str, str]:
        """See `Backend`."""
        return why_not(facts, region, self)

    def choices(self, facts: Facts, region: Region, options: Options) -> Sequence[Options]:
        """See `Backend`: one form of each op is best here."""
        return [options]

    def build(self, facts: Facts, region: Region, options: Options, folder: Path) -> None:
        """See `Backend`."""
        version = self.version()
        constants = [facts.graph.constants[name].tensor for name in region.consts]
        try:
            target = OnnxTarget()
            written = translate(facts, region, target, self, options.sizes)
            sheet = sheet_of(facts, region, written, self.name, version, options.sizes)
            model = target.model(written.exits, sheet.computed_types())
            settings = self._settings(options, optimise=True)
            self._give(settings, {f"w{i}": _array(constants[i]) for i in sorted(target.weights)})
            settings.optimized_model_filepath = str(folder / MODEL)
            key = "session.optimized_model_external_initializers_"
            settings.add_session_config_entry(f"{key}file_name", _ALL)
            settings.add_session_config_entry(f"{key}min_size_in_bytes", "64")
            self._library.InferenceSession(model, settings, ["CPUExecutionProvider"])
        except DeclinedError as declined:
            raise BuildError(str(declined), where=self.name) from declined
        except ImportError as error:
            raise BackendMissingError(str(error), remedy="pip install onnx") from error
        except Exception as error:  # the runtime's own classes derive from Exception alone
            raise BuildError(f"{type(error).__name__}: {error}", where=self.name) from error
        _leave_weights_out(folder, constants[: len(constants) - len(region.made)])
        write_sheet(folder, sheet, [MODEL, DERIVED])

    def load(self, folder: Path, constants: Sequence[torch.Tensor], options: Options) -> Loaded:
        """See `Backend`."""
        sheet = read_sheet(folder, self.name, self.version())
        model = import_module("onnx").load(str(folder / MODEL), load_external_data=False)
        has_derived = (folder / DERIVED).stat().st_size > 0
        derived = np.memmap(folder / DERIVED, np.uint8, "c") if has_derived else None
        arrays: dict[str, Any] = {}
        for tensor in model.graph.initializer:
            if not tensor.external_data:
                continue
            entries = {entry.key: entry.value for entry in tensor.external_data}
            if entries["location"] == OUTSIDE:
                arrays[tensor.name] = _array(constants[int(tensor.name[1:])])
            elif derived is not None:
                start, length = int(entries["offset"]), int(entries["length"])
                piece: Any = derived[start : start + length].view(_NUMPY[tensor.data_type])
                arrays[tensor.name] = piece.reshape(tuple(tensor.dims))
        settings = self._settings(options, optimise=False)
        values = self._give(settings, arrays)
        try:
            text = model.SerializeToString()
            session = self._library.InferenceSession(text, settings, ["CPUExecutionProvider"])
        except Exception as error:  # the runtime's own classes derive from Exception alone
            raise BuildError(
                f"the model does not load: {error}", where=str(folder), remedy="build it again"
            ) from error
        slots = _slots(self._library, session, sheet, (values, arrays, derived))
        return Loaded(Calls(sheet, slots, sheet.guards), _packed_bytes(model))

    @cached_property
    def _library(self) -> Any:
        try:
            return import_module("onnxruntime")
        except (ImportError, OSError) as error:
            raise BackendMissingError(
                f"ONNX Runtime does not load: {error}", remedy="pip install onnxruntime onnx"
            ) from error

    def _settings(self, options: Options, *, optimise: bool) -> Any:
        extra = dict(options.extra)
        settings = self._library.SessionOptions()
        level = self._library.GraphOptimizationLevel
        settings.graph_optimization_level = (
            level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
        )
        settings.log_severity_level = _ERROR_LEVEL
        settings.inter_op_num_threads = 1
        if extra.get("pool") == "shared" and options.threads > 1:
            self._share_pool(options.threads)
            settings.use_per_session_threads = False
            return settings
        settings.intra_op_num_threads = options.threads
        spin = extra.get("spin")
        entry = "session.intra_op."
        settings.add_session_config_entry(f"{entry}allow_spinning", "0" if spin == "0" else "1")
        if spin is None:
            settings.add_session_config_entry(f"{entry}spin_duration_us", str(SPIN_US))
        return settings

    def _share_pool(self, threads: int) -> None:
        try:
            self._library.set_global_thread_pool_sizes(threads, 1)
        except Exception as error:
            if "already been created" not in str(error):  # one a process: the first size stays
                raise

    def _give(self, settings: Any, arrays: dict[str, Any]) -> list[Any]:
        """Gives a session initializers where they lie; the values must live as long as it does."""
        make = self._library.OrtValue.ortvalue_from_numpy
        values = [make(array) for array in arrays.values()]
        settings.add_external_initializers(list(arrays), values)
        return values


def _array(tensor: torch.Tensor) -> "np.ndarray[Any, Any]":
    array: np.ndarray[Any, Any] = tensor.detach().contiguous().numpy()
    return array


def _leave_weights_out(folder: Path, constants: Sequence[torch.Tensor]) -> None:
    """Strips what the optimiser left as it was; the rest goes into one file of its own."""
    onnx = import_module("onnx")
    model = onnx.load(str(folder / MODEL), load_external_data=False)
    whole = folder / _ALL
    written = np.memmap(whole, np.uint8, "r") if whole.exists() else np.empty(0, np.uint8)
    with (folder / DERIVED).open("wb") as derived:
        for tensor in model.graph.initializer:
            if not tensor.external_data:
                continue
            entries = {entry.key: entry.value for entry in tensor.external_data}
            start, length = int(entries["offset"]), int(entries["length"])
            data = written[start : start + length]
            if length <= INLINE_BYTES_MAX and tensor.data_type != _TYPES["f32"]:
                del tensor.external_data[:]  # shape inference reads integers from the model alone
                tensor.data_location = onnx.TensorProto.DEFAULT
                tensor.raw_data = data.tobytes()
                continue
            if _is_constant(tensor.name, data, constants):
                entries |= {"location": OUTSIDE, "offset": "0"}
            else:
                derived.write(b"\0" * (-derived.tell() % 64))
                entries |= {"location": DERIVED, "offset": str(derived.tell())}
                derived.write(data.data)
            del tensor.external_data[:]
            for key, value in entries.items():
                tensor.external_data.add(key=key, value=value)
    (folder / MODEL).write_bytes(model.SerializeToString())
    del written
    whole.unlink(missing_ok=True)


def _is_constant(
    name: str, data: "np.ndarray[Any, Any]", constants: Sequence[torch.Tensor]
) -> bool:
    """Whether the bytes are those of the constant that `name` names."""
    if name[:1] != "w" or not name[1:].isdigit() or int(name[1:]) >= len(constants):
        return False
    array = _array(constants[int(name[1:])]).reshape(-1).view(np.uint8)
    return bool(np.array_equal(array, data))


def _packed_bytes(model: Any) -> int:
    """The bytes of the copies that kernels make of their weights when a session is made."""
    packed = {
        name for node in model.graph.node if node.op_type in _PREPACKED for name in node.input
    }
    return sum(
        prod(tensor.dims) * np.dtype(_NUMPY[tensor.data_type]).itemsize
        for tensor in model.graph.initializer
        if tensor.name in packed
    )


def _slots(library: Any, session: Any, sheet: Sheet, kept: object) -> "Callable[[], _Binding]":
    reads = [(f"x{i}", type_.dtype) for i, type_ in enumerate(sheet.read_types())]
    reads += [(f"s{position}", "i64") for position in sheet.scalars]
    exits = [(f"y{i}", type_.dtype) for i, type_ in enumerate(sheet.computed_types())]

    def make() -> _Binding:
        assert kept is not None  # held here: the session reads from that memory
        return _Binding(library, session, reads, exits)

    return make


class _Binding:
    """One binding of a session; see `graphopt.executor.backends.calls.Slot`."""

    __slots__ = ("_binding", "_device", "_exits", "_reads", "run")

    def __init__(
        self, library: Any, session: Any, reads: list[tuple[str, str]], exits: list[tuple[str, str]]
    ) -> None:
        state = library.capi.onnxruntime_pybind11_state  # without the copies of the public class
        self._binding = state.SessionIOBinding(session._sess)
        self._device = state.OrtDevice(state.OrtDevice.cpu(), state.OrtDevice.default_memory(), 0)
        self._reads = [(name, _TYPES[dtype]) for name, dtype in reads]
        self._exits = [(name, _TYPES[dtype]) for name, dtype in exits]
        self.run = partial(session._sess.run_with_iobinding, self._binding, None)

    def bind_read(self, index: int, address: int, shape: tuple[int, ...]) -> None:
        name, dtype = self._reads[index]
        self._binding.bind_input(name, self._device, dtype, shape, address)

    def bind_exit(self, index: int, address: int, shape: tuple[int, ...]) -> None:
        name, dtype = self._exits[index]
        self._binding.bind_output(name, self._device, dtype, shape, address)
