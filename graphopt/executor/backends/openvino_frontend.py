"""One op by OpenVINO's own PyTorch frontend, where no rule of ours writes it.

The op goes in as a TorchScript graph of one node, made by hand: nothing is traced or exported, so no
size is taken for a constant, and a conversion takes 2 to 10 ms where `torch.jit.trace` and
`openvino.convert_model` take 400 and `torch.export` 1,500. `convert_model` would also report every
call to the library's makers. What comes out is spliced into the model under construction; the
frontend sees types and never a weight.

It gets things wrong (softplus with a beta, pools in ceil mode), and a wrong node would cost the
whole region its proof. So each kind of call is tried once: compiled alone and compared with torch.

Only the builder asks (law 5). What a conversion raises is the reason why the op is declined; one that
brings the process down is known by its name (`trials`), and declined by the next builder. Deliberately
absent: which calls may be trusted at all (`conversion.check_exact`).
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib import import_module
from typing import Any

import torch

from graphopt.analysis.probe import BASE_SIZES, torch_literal
from graphopt.dims import evaluate, product
from graphopt.executor.backends.conversion import check_exact
from graphopt.executor.backends.openvino_target import EXACT, TYPES, output_of
from graphopt.executor.backends.target import DeclinedError, OpCall, Operand
from graphopt.executor.backends.trials import TRIALS, Trial
from graphopt.ops import Param, get_overload, get_spec

VERDICTS_MAX = 512  # kept: one short text each
# Of the operands of a trial, where windows get sizes that they fit in, and otherwise: a comparison takes
# 100 ns an element in fresh memory. What is larger is left to the region's proof.
GENEROUS_ELEMENTS_MAX, TRIED_ELEMENTS_MAX = 1 << 18, 1 << 24
TOLERANCE = 1e-4  # of the scale: a wrong conversion is off by more
_INSIDE = frozenset({"f32", "i64", "i32", "boolean", "u8"})  # what else a node yields is not exact
_EMPTY = {"int": "ofInts", "float": "ofFloats", "bool": "ofBools"}
REASON_CHARS_MAX = 160


class OpenVinoFrontend:
    """See `graphopt.executor.backends.conversion.Converter`; handles are those of `OpenVinoTarget`."""

    def __init__(self) -> None:
        self._verdicts: dict[str, str] = {}  # call -> why not; empty where it converts

    def check(self, call: OpCall) -> None:
        """See `Converter`."""
        key = repr(call)
        reason = self._verdicts.get(key)
        if reason is None:
            reason = self._verdict(call)
            if len(self._verdicts) >= VERDICTS_MAX:
                self._verdicts.clear()
            self._verdicts[key] = reason
        if reason:
            raise DeclinedError(reason)

    def convert(self, call: OpCall, handles: Sequence[Any]) -> list[Any]:
        """See `Converter`."""
        self.check(call)
        try:
            return self._spliced(call, handles)
        except Exception as error:  # the library's own classes derive from several
            raise DeclinedError(_told(error)) from error

    def _verdict(self, call: OpCall) -> str:
        try:
            check_exact(call)
            with TRIALS.trying(self._trial(call)):
                self._try(call)
        except DeclinedError as declined:
            return str(declined)
        except Exception as error:
            return _told(error)
        return ""

    def _trial(self, call: OpCall) -> Trial:
        digest = hashlib.blake2b(repr(call).encode(), digest_size=8).hexdigest()
        return Trial(f"{call.op} {digest}", "openvino", self._library.get_version())

    # -- converting

    def _spliced(self, call: OpCall, handles: Sequence[Any]) -> list[Any]:
        """The outputs of the op over `handles`."""
        model = self._model(call)
        by_name = {name: node for node in model.get_parameters() for name in node.output(0).names}
        for i, handle in enumerate(handles):
            if f"x{i}" in by_name:
                by_name[f"x{i}"].output(0).replace(output_of(handle))
        results = model.get_results()
        if len(results) != len(call.results):
            raise DeclinedError(f"the frontend yields {len(results)} results")
        outputs = [result.input_value(0) for result in results]
        for output, wanted in zip(outputs, call.results, strict=True):
            if wanted is not None and output.get_element_type().to_string() != TYPES[wanted.dtype]:
                raise DeclinedError(f"the frontend yields {output.get_element_type()}")
        return [
            None if wanted is None else output
            for output, wanted in zip(outputs, call.results, strict=True)
        ]

    def _model(self, call: OpCall) -> Any:
        """The op as a model of its own, with parameters named `x0`, `x1` and so on."""
        decoder: Any = import_module("openvino.frontend.pytorch.ts_decoder")
        graph = _graph(call)
        # Held to the end: the frontend asks it until the conversion is over
        source = decoder.TorchScriptPythonDecoder(
            None, graph_element=graph, alias_db=graph.alias_db()
        )
        described = self._frontend.load(source)
        for place in described.get_inputs():
            name = next(name for name in place.get_names() if name[:1] == "x")
            type_ = call.operands[int(name[1:])]
            shape = [dim if isinstance(dim, int) else -1 for dim in type_.shape]
            described.set_partial_shape(place, self._library.PartialShape(shape))
            described.set_element_type(place, getattr(self._library.Type, TYPES[type_.dtype]))
        model = self._frontend.convert(described)
        found = {
            output.get_element_type().to_string()
            for node in model.get_ops()
            for output in node.outputs()
        }
        if not found <= _INSIDE:
            raise DeclinedError(f"the frontend computes in {', '.join(sorted(found - _INSIDE))}")
        return model

    # -- trying

    def _try(self, call: OpCall) -> None:
        """DeclinedError where the op, compiled alone, is not what torch computes."""
        target: Any = import_module("openvino.opset15")
        sizes = _sizes(call)
        if _elements(call, sizes[-1]) > TRIED_ELEMENTS_MAX:
            return
        samples = [_operands(call, each) for each in sizes]
        handles, parameters = [], []
        for i, type_ in enumerate(call.operands):
            if i in call.constants:  # the plugin asks for constants where models have weights
                handles.append(target.constant(samples[0][i].numpy()))
                continue
            shape = [dim if isinstance(dim, int) else -1 for dim in type_.shape]
            kind = getattr(self._library.Type, TYPES[type_.dtype])
            parameters.append(target.parameter(self._library.PartialShape(shape), kind))
            handles.append(parameters[-1])
        outputs = [output for output in self._spliced(call, handles) if output is not None]
        model = self._library.Model([target.result(out) for out in outputs], parameters, "tried")
        request = self._core.compile_model(model, "CPU", EXACT).create_infer_request()
        for operands in samples:
            for i in call.constants:
                operands[i] = samples[0][i]
            given = [x.numpy() for i, x in enumerate(operands) if i not in call.constants]
            request.infer(given)
            results = [
                torch.from_numpy(request.get_output_tensor(i).data.copy())
                for i in range(len(outputs))
            ]
            _compare(call, results, _computed(call, operands))

    @cached_property
    def _library(self) -> Any:
        return import_module("openvino")

    @cached_property
    def _core(self) -> Any:
        return self._library.Core()

    @cached_property
    def _frontend(self) -> Any:
        manager: Any = import_module("openvino.frontend").FrontEndManager()
        return manager.load_by_framework("pytorch")


def _graph(call: OpCall) -> Any:
    """The call as a TorchScript graph of one op; DeclinedError where TorchScript has another in mind."""
    spec = get_spec(call.op)
    jit: Any = torch._C
    tensor = jit.TensorType.get()
    graph = jit.Graph()
    inputs = [graph.addInput(f"x{i}") for i in range(len(call.operands))]
    for value in inputs:
        value.setType(tensor)

    def as_list(items: list[Any], type_: Any) -> Any:
        node = graph.create("prim::ListConstruct", items, 1)
        node.output().setType(type_)
        graph.appendNode(node)
        return node.output()

    def written(param: Param, argument: Any) -> Any:
        if isinstance(argument, Operand):
            return inputs[argument.index]
        if not isinstance(argument, tuple):
            return graph.insertConstant(torch_literal(param, argument))
        if any(isinstance(item, Operand) for item in argument):
            return as_list([inputs[item.index] for item in argument], jit.ListType(tensor))
        if not argument:
            return as_list([], getattr(jit.ListType, _EMPTY[param.kind])())
        return graph.insertConstant([torch_literal(param, item) for item in argument])

    pairs = zip(spec.params, call.arguments, strict=True)
    arguments = [written(param, argument) for param, argument in pairs]
    namespace, name, _ = call.op.split(".")
    node = graph.create(f"{namespace}::{name}", arguments, len(call.results))
    graph.appendNode(node)
    if node.schema() != str(get_overload(call.op)._schema):
        raise DeclinedError("TorchScript takes it for another overload")
    for output in node.outputs():
        output.setType(tensor)
        graph.registerOutput(output)
    return graph


def _sizes(call: OpCall) -> list[dict[str, int]]:
    """Two sizes of each symbol, unlike those of the others, within its range; of the generous ones, which
    windows fit in, where the operands stay small.
    """
    if len(call.ranges) > len(BASE_SIZES):
        raise DeclinedError(f"it has {len(call.ranges)} dynamic sizes")
    bases = range(2, 2 * len(BASE_SIZES) + 2, 2), BASE_SIZES

    def within(factor: int, base: Sequence[int]) -> dict[str, int]:
        sizes = {}
        for (name, low, high), size in zip(call.ranges, base, strict=False):
            most = size * factor if high is None else min(size * factor, high)
            sizes[name] = max(most, low)
        return sizes

    small, generous = ([within(factor, base) for factor in (1, 2)] for base in bases)
    chosen = generous if _elements(call, generous[-1]) <= GENEROUS_ELEMENTS_MAX else small
    return chosen if call.ranges else chosen[:1]


def _elements(call: OpCall, sizes: Mapping[str, int]) -> int:
    return sum(evaluate(product(type_.shape), sizes) for type_ in call.operands)


def _operands(call: OpCall, sizes: Mapping[str, int]) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    values = [
        torch.randn([evaluate(dim, sizes) for dim in type_.shape], generator=random)
        for type_ in call.operands
    ]
    return [
        value > 0 if type_.dtype == "bool" else value
        for value, type_ in zip(values, call.operands, strict=True)
    ]


def _computed(call: OpCall, operands: Sequence[torch.Tensor]) -> list[Any]:
    """The results by torch."""

    def final(param: Param, argument: Any) -> Any:
        if isinstance(argument, Operand):
            return operands[argument.index]
        if isinstance(argument, tuple):
            return [final(param, item) for item in argument]
        return torch_literal(param, argument)

    positional, keywords = [], {}
    for param, argument in zip(get_spec(call.op).params, call.arguments, strict=True):
        if param.is_keyword:
            keywords[param.name] = final(param, argument)
        else:
            positional.append(final(param, argument))
    with torch.no_grad():
        results = get_overload(call.op)(*positional, **keywords)
    return list(results) if isinstance(results, tuple | list) else [results]


def _compare(call: OpCall, given: Sequence[torch.Tensor], computed: Sequence[Any]) -> None:
    wanted = [x for x, type_ in zip(computed, call.results, strict=True) if type_ is not None]
    for value, expected in zip(given, wanted, strict=True):
        if (value.dtype, value.shape) != (expected.dtype, expected.shape):
            raise DeclinedError("the frontend makes another shape of it")
        allowed = 0.0
        if expected.is_floating_point():
            allowed = TOLERANCE * float(expected.nan_to_num(0, 0, 0).abs().max())
        if not torch.allclose(value, expected, rtol=0, atol=allowed, equal_nan=True):
            raise DeclinedError("the frontend makes something else of it")


def _told(error: Exception) -> str:
    """The line of a message that says most: the library's begin with places in its sources."""
    lines = [line.strip("- ") for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith(("No conversion rule", "Conversion is"))]
    text = (telling or lines or [type(error).__name__])[0]
    return f"{type(error).__name__}: {text[:REASON_CHARS_MAX]}"
