"""An inference request: from its bytes to tensors that fit the model, or a named refusal.

Binary tensors are views of the body, never copied here; the body is laid out so that they start
aligned (`Body`). Everything is checked before any work is queued, so that one bad request cannot
spoil a batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NoReturn

import numpy as np
import torch

from graphopt.errors import RequestError, nearest
from graphoptd.data import jsontext
from graphoptd.data.budget import Lease
from graphoptd.data.datatypes import DATATYPES, Datatype
from graphoptd.data.served import Signature, TensorSpec
from graphoptd.data.shm import RegionRef, SharedMemory, region_ref

RANK_MAX = 32  # torch's iterators stop at 64; models have at most 6
_DIM_MAX = (
    1 << 40
)  # elements; far above any body, and products of RANK_MAX of them stay cheap integers
_ALIGN_BYTES = 16  # what malloc gives a bytearray, and the widest element we have is 8


@dataclass(frozen=True, slots=True)
class Interface:
    """A signature, indexed for checking. Made once a revision."""

    signature: Signature
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    batchable: bool
    fingerprint: str  # of names and types; a str because its hash is computed once
    forms: dict[bytes, "Form"]

    @classmethod
    def of(cls, signature: Signature) -> "Interface":
        """The index of `signature`; batchable when every input and output has a batch dim."""
        both = (*signature.inputs, *signature.outputs)
        return cls(
            signature,
            {spec.name: spec for spec in signature.inputs},
            {spec.name: spec for spec in signature.outputs},
            bool(signature.inputs) and all(spec.batch_dim for spec in both),
            " ".join(f"{spec.name}:{spec.datatype}" for spec in both),
            {},
        )


@dataclass(frozen=True, slots=True)
class OutputWish:
    """How one output is to be returned."""

    name: str
    binary: bool
    region: RegionRef | None = None


@dataclass(slots=True)  # not frozen: one is made for each request, and freezing triples the cost
class InferRequest:
    """A checked request.

    Attributes:
        id: echoed in the answer.
        inputs: every input of the model, by name.
        rows: size of the batch dim; 1 for a model without one.
        batch_key: requests with equal keys may share a batch; None when the model has no batch dim.
        size_bytes: of all inputs.
        outputs: what to return, in order.
        timeout_us: the client's deadline, 0 when it named none.
        heads: where `encode` keeps the JSON of answers to requests of the same form, when it may.
    """

    id: str | None
    inputs: dict[str, torch.Tensor]
    rows: int
    batch_key: tuple[Any, ...] | None
    size_bytes: int
    outputs: tuple[OutputWish, ...]
    timeout_us: int
    heads: dict[Any, bytes] | None = None


class Form:
    """What the JSON of a binary request says: all but the bytes.

    Most clients send the same JSON with every request, so what was read and checked once is kept
    with the interface it was checked against, under the JSON's bytes.
    """

    __slots__ = ("n_bytes", "places", "request")

    def __init__(self, request: InferRequest, places: Sequence["_Place"], n_bytes: int) -> None:
        self.places = tuple(places)
        self.n_bytes = n_bytes
        self.request = replace(request, inputs={}, heads={})

    def fill(self, body: "Body") -> InferRequest:
        """The request, with the tensors in `body`."""
        like, buffer, base = self.request, body.binary, body.binary_offset
        inputs = {
            name: _view(buffer, base + offset, datatype, shape, where)
            for name, offset, datatype, shape, where in self.places
        }
        return InferRequest(
            None,
            inputs,
            like.rows,
            like.batch_key,
            like.size_bytes,
            like.outputs,
            like.timeout_us,
            like.heads,
        )


_Place = tuple[
    str, int, Datatype, tuple[int, ...], str
]  # name, offset, type, shape, path in the JSON
_FORMS_MAX = 64  # kept for a revision: a few clients with a few batch sizes each
_FORM_BYTES_MAX = 1 << 10  # of JSON: three or four tensors


class Body:
    """A whole request body: its JSON, and the binary part in a buffer of its own, aligned for tensors."""

    __slots__ = ("binary", "binary_offset", "json", "raw")

    def __init__(self, content: bytes, header_length: bytes | None) -> None:
        """Split at `header_length`, the value of Inference-Header-Content-Length.

        Raises:
            RequestError: the header is not a number or lies beyond the body.
        """
        self.raw = False
        if header_length is None:
            self.json, self.binary, self.binary_offset = content, bytearray(), 0
            return
        if (
            not header_length.isdigit()
            or len(header_length) > 10
            or int(header_length) > len(content)
        ):
            raise RequestError(
                f"{header_length[:32].decode('latin-1')!r} is no length within {len(content)} bytes",
                where="Inference-Header-Content-Length",
                remedy="send the length of the JSON part, before compression",
            )
        n_json = int(header_length)
        self.raw = n_json == 0
        self.json = content[:n_json]
        # The pad makes the binary part start aligned after JSON of any length; one copy, which also
        # makes it writable for torch and independent of the HTTP layer's buffer.
        pad = -n_json % _ALIGN_BYTES
        self.binary = bytearray().join((bytes(pad), content))
        self.binary_offset = pad + n_json


def decode(
    body: Body,
    interface: Interface,
    envelope_bytes_max: int,
    memory: SharedMemory | None,
    lease: Lease,
) -> InferRequest:
    """The request in `body`, checked against `interface`; bytes read from shared memory are added to `lease`.

    Raises:
        RequestError: anything does not fit; `where` is the path inside the document.
        LimitError: the JSON is too large.
        RegionNotFoundError: it names a shared memory region that is not registered.
        BusyError: the byte budget is exhausted.
    """
    if body.raw:
        return _decode_raw(body, interface)
    n_bytes = len(body.binary) - body.binary_offset
    form = interface.forms.get(body.json)
    if form is not None and form.n_bytes == n_bytes:
        return form.fill(body)
    document, n_arrays = jsontext.parse(body.json, envelope_bytes_max)
    if not isinstance(document, dict):
        _refuse("the body", "a JSON object", "")
    parameters = _object(document.get("parameters", {}), "parameters")
    request_id = document.get("id")
    if request_id is not None:
        request_id = _text(request_id, "id")
    wishes = _outputs(document.get("outputs"), parameters, interface, memory)
    inputs, n_read, places = _inputs(document.get("inputs"), body, interface, memory, lease)
    if n_read != n_arrays:
        # Such an array was never parsed; refusing it keeps the promise of strict JSON.
        raise RequestError(
            "`data` outside of an input", where="body", remedy="send `data` in `inputs` only"
        )
    request = _checked(request_id, inputs, wishes, _timeout(parameters), interface)
    is_plain = request_id is None and all(wish.binary and wish.region is None for wish in wishes)
    if is_plain and len(places) == len(inputs) and len(body.json) <= _FORM_BYTES_MAX:
        if len(interface.forms) >= _FORMS_MAX:
            interface.forms.clear()
        interface.forms[body.json] = Form(request, places, n_bytes)
    return request


# -- inputs


def _inputs(
    entries: Any, body: Body, interface: Interface, memory: SharedMemory | None, lease: Lease
) -> tuple[dict[str, torch.Tensor], int, list[_Place]]:
    """The tensors, how many of them came from a `NumberText`, and where the binary ones lie."""
    expected = interface.inputs
    if not isinstance(entries, list) or not entries:
        _refuse("`inputs`", "a list with at least one tensor", "inputs")
    tensors: dict[str, torch.Tensor] = {}
    offset = body.binary_offset
    n_read = 0
    places: list[_Place] = []
    for position, entry in enumerate(entries):
        where = f"inputs[{position}]"
        name = _text(_object(entry, where).get("name"), f"{where}.name")
        spec = expected.get(name)
        if spec is None:
            raise RequestError(
                f"no input {name!r}; the model takes {', '.join(expected)}",
                where=f"{where}.name",
                remedy=nearest(name, expected) or "use the names in the model's metadata",
            )
        if name in tensors:
            raise RequestError(
                f"input {name!r} twice", where=f"{where}.name", remedy="send each input once"
            )
        datatype = _datatype(entry.get("datatype"), spec, where)
        shape = _shape(entry.get("shape"), spec, where)
        parameters = _object(entry.get("parameters", {}), f"{where}.parameters")
        size = parameters.get("binary_data_size")
        ref = region_ref(parameters, f"{where}.parameters", memory) if parameters else None
        if (size is not None) + (ref is not None) + ("data" in entry) > 1:
            raise RequestError(
                "the tensor in several forms", where=where, remedy="send it in one form"
            )
        if size is not None:
            tensors[name] = _binary(body.binary, offset, size, datatype, shape, where)
            places.append((name, offset - body.binary_offset, datatype, shape, where))
            offset += size
        elif ref is not None and memory is not None:
            _check_size(
                ref.size_bytes, datatype, shape, f"{where}.parameters.shared_memory_byte_size"
            )
            lease.grow(ref.size_bytes)
            tensors[name] = _view(memory.read(ref), 0, datatype, shape, where)
        else:
            n_read += isinstance(entry.get("data"), jsontext.NumberText)
            tensors[name] = _numbers(entry.get("data"), datatype, shape, f"{where}.data")
    if offset < len(body.binary):
        raise RequestError(
            f"{len(body.binary) - offset} bytes of binary data belong to no input",
            where="body",
            remedy="make the `binary_data_size` of all inputs add up to the binary part",
        )
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise RequestError(
            f"missing {', '.join(missing)}", where="inputs", remedy="send every input of the model"
        )
    return tensors, n_read, places


def _datatype(value: Any, spec: TensorSpec, where: str) -> Datatype:
    if value != spec.datatype:
        raise RequestError(
            f"datatype {value!r}, but input {spec.name!r} is {spec.datatype}",
            where=f"{where}.datatype",
            remedy=f"convert the tensor to {spec.datatype}",
        )
    return DATATYPES[spec.datatype]


def _shape(value: Any, spec: TensorSpec, where: str) -> tuple[int, ...]:
    where = f"{where}.shape"
    if not isinstance(value, list):
        _refuse("it", "a list of sizes", where)
    if len(value) > RANK_MAX or any(type(n) is not int or not 0 <= n <= _DIM_MAX for n in value):
        _refuse("it", f"at most {RANK_MAX} sizes from 0", where)
    shape = tuple(value)
    if len(shape) != len(spec.shape) or any(
        want not in (-1, got) for got, want in zip(shape, spec.shape, strict=True)
    ):
        raise RequestError(
            f"shape {list(shape)}, but input {spec.name!r} takes {list(spec.shape)} (-1 is any size)",
            where=where,
            remedy="reshape the tensor",
        )
    if spec.batch_dim and shape[0] == 0:
        raise RequestError("an empty batch", where=where, remedy="send at least one row")
    return shape


def _binary(
    buffer: bytearray,
    offset: int,
    size: Any,
    datatype: Datatype,
    shape: tuple[int, ...],
    where: str,
) -> torch.Tensor:
    where = f"{where}.parameters.binary_data_size"
    if type(size) is not int or size < 0:
        _refuse("it", "a number of bytes", where)
    if offset + size > len(buffer):
        raise RequestError(
            f"{size} bytes, but only {max(len(buffer) - offset, 0)} are left in the body",
            where=where,
            remedy="append the tensor's bytes, and send Inference-Header-Content-Length",
        )
    _check_size(size, datatype, shape, where)
    return _view(buffer, offset, datatype, shape, where)


def _check_size(size: int, datatype: Datatype, shape: tuple[int, ...], where: str) -> None:
    if size != prod(shape) * datatype.size_bytes:
        raise RequestError(
            f"{size} bytes, but shape {list(shape)} of {datatype.name} takes "
            f"{prod(shape) * datatype.size_bytes}",
            where=where,
            remedy="send the tensor whole, row-major and without gaps",
        )


def _view(
    buffer: bytearray, offset: int, datatype: Datatype, shape: tuple[int, ...], where: str
) -> torch.Tensor:
    n_elements = prod(shape)
    if n_elements == 0:
        return torch.empty(shape, dtype=datatype.torch_dtype)
    if offset % datatype.size_bytes:
        # An odd-sized tensor stands before this one. Kernels may assume that elements are aligned.
        buffer = buffer[offset : offset + n_elements * datatype.size_bytes]
        offset = 0
    if datatype.kind == "bool":
        octets = torch.frombuffer(buffer, dtype=torch.uint8, count=n_elements, offset=offset)
        if octets.max() > 1:
            raise RequestError("a byte above 1", where=where, remedy="send BOOL as bytes 0 and 1")
    flat = torch.frombuffer(buffer, dtype=datatype.torch_dtype, count=n_elements, offset=offset)
    return flat if len(shape) == 1 else flat.view(shape)


def _numbers(data: Any, datatype: Datatype, shape: tuple[int, ...], where: str) -> torch.Tensor:
    if not datatype.array_code:
        raise RequestError(
            f"{datatype.name} has no JSON form",
            where=where,
            remedy="send the tensor as binary data",
        )
    if isinstance(data, list):
        data = jsontext.number_text(data, where)
    if not isinstance(data, jsontext.NumberText):
        _refuse("it", f"an array of {'booleans' if datatype.kind == 'bool' else 'numbers'}", where)
    values = jsontext.read_numbers(data, datatype, shape, where)
    if not values:
        return torch.empty(shape, dtype=datatype.torch_dtype)
    tensor = torch.frombuffer(values, dtype=datatype.torch_dtype).view(shape)
    # The parser refuses what is beyond FP64, so only narrowing can overflow.
    if datatype.name == "FP32" and not np.isfinite(tensor.numpy()).all():
        raise RequestError(
            f"a number beyond {datatype.name}", where=where, remedy="send finite values"
        )
    return tensor


# -- outputs and parameters


def _outputs(
    entries: Any, parameters: dict[str, Any], interface: Interface, memory: SharedMemory | None
) -> tuple[OutputWish, ...]:
    by_default = _flag(parameters.get("binary_data_output", False), "parameters.binary_data_output")
    known = interface.outputs
    if entries is None or entries == []:
        wishes = [OutputWish(name, by_default) for name in known]
    else:
        if not isinstance(entries, list):
            _refuse("`outputs`", "a list", "outputs")
        wishes = []
        for position, entry in enumerate(entries):
            where = f"outputs[{position}]"
            name = _text(_object(entry, where).get("name"), f"{where}.name")
            if name not in known:
                raise RequestError(
                    f"no output {name!r}; the model returns {', '.join(known)}",
                    where=f"{where}.name",
                    remedy=nearest(name, known) or "use the names in the model's metadata",
                )
            if any(wish.name == name for wish in wishes):
                raise RequestError(
                    f"output {name!r} twice", where=f"{where}.name", remedy="ask for it once"
                )
            asked = _object(entry.get("parameters", {}), f"{where}.parameters")
            if asked.get("classification"):
                raise RequestError(
                    "classification is not offered",
                    where=f"{where}.parameters",
                    remedy="ask for the tensor",
                )
            binary = _flag(asked.get("binary_data", by_default), f"{where}.parameters.binary_data")
            ref = region_ref(asked, f"{where}.parameters", memory) if asked else None
            wishes.append(OutputWish(name, binary, ref))
    for wish in wishes:
        datatype = DATATYPES[known[wish.name].datatype]
        if not wish.binary and wish.region is None and not datatype.array_code:
            raise RequestError(
                f"output {wish.name!r} is {datatype.name}, which has no JSON form",
                where="outputs",
                remedy="ask for it with `binary_data: true`",
            )
    return tuple(wishes)


def _timeout(parameters: dict[str, Any]) -> int:
    value = parameters.get("timeout", 0)
    if type(value) is not int or value < 0:
        _refuse("it", "a number of microseconds", "parameters.timeout")
    return int(value)


# -- the whole


def _checked(
    request_id: str | None,
    inputs: dict[str, torch.Tensor],
    outputs: tuple[OutputWish, ...],
    timeout_us: int,
    interface: Interface,
) -> InferRequest:
    rows, key = 1, None
    size_bytes = sum([tensor.nbytes for tensor in inputs.values()])
    if interface.batchable:
        shapes = [(name, inputs[name].shape) for name in interface.inputs]
        rows = shapes[0][1][0]
        if any(shape[0] != rows for _, shape in shapes):
            raise RequestError(
                "the inputs differ in their first dim, the batch: "
                + ", ".join(f"{name} {list(shape)}" for name, shape in shapes),
                where="inputs",
                remedy="send the same number of rows in each",
            )
        key = (interface.fingerprint, *[shape[1:] for _, shape in shapes])
    return InferRequest(request_id, inputs, rows, key, size_bytes, outputs, timeout_us)


def _decode_raw(body: Body, interface: Interface) -> InferRequest:
    """A body that is one tensor and nothing else; its shape comes from the model."""
    if len(interface.inputs) != 1:
        raise RequestError(
            f"a body without JSON, but the model takes {len(interface.inputs)} inputs",
            where="Inference-Header-Content-Length",
            remedy="name the inputs in JSON",
        )
    (spec,) = interface.inputs.values()
    datatype = DATATYPES[spec.datatype]
    n_bytes = len(body.binary) - body.binary_offset
    row_bytes = prod(n for n in spec.shape if n != -1) * datatype.size_bytes
    n_free = spec.shape.count(-1)
    fits = (
        n_bytes == row_bytes
        if n_free == 0
        else n_free == 1 and row_bytes and n_bytes % row_bytes == 0
    )
    if not fits or not n_bytes:
        raise RequestError(
            f"{n_bytes} bytes do not fill shape {list(spec.shape)} of {spec.datatype}",
            where="body",
            remedy="send whole rows, or describe the tensor in JSON (needed when several dims are variable)",
        )
    shape = tuple(n_bytes // row_bytes if n == -1 else n for n in spec.shape)
    tensor = _view(body.binary, body.binary_offset, datatype, shape, "body")
    wishes = tuple(OutputWish(name, True) for name in interface.outputs)
    return _checked(None, {spec.name: tensor}, wishes, 0, interface)


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        _refuse("it", "an object", where)
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        _refuse("it", "a string", where)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            _refuse("it", "text without lone surrogates", where)
    return value


def _flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        _refuse("it", "true or false", where)
    return value


def _refuse(what: str, should_be: str, where: str) -> NoReturn:
    raise RequestError(
        f"{what} is not {should_be}", where=where or "body", remedy=f"send {should_be}"
    )
