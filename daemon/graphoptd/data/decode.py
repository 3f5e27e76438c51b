"""An inference request: from its bytes to tensors that fit the model, or a named refusal.

Binary tensors are views of the body, never copied here; the body is laid out so that they start
aligned (`Body`). Everything is checked before any work is queued, so that one bad request cannot
spoil a batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

from graphopt.errors import RequestError, nearest
from graphoptd.data import jsontext
from graphoptd.data.budget import Lease
from graphoptd.data.datatypes import DATATYPES, Datatype
from graphoptd.data.fields import read_object, read_text, refuse
from graphoptd.data.served import Signature, TensorSpec
from graphoptd.data.shm import SharedMemory, region_ref
from graphoptd.data.tensors import (
    Body,
    check_size,
    read_binary,
    read_datatype,
    read_numbers,
    read_shape,
    view_of,
)
from graphoptd.data.wishes import OutputWish, read_outputs, read_timeout

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

    def fill(self, body: Body) -> InferRequest:
        """The request, with the tensors in `body`."""
        like, buffer, base = self.request, body.binary, body.binary_offset
        inputs = {
            name: view_of(buffer, base + offset, datatype, shape, where)
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
        refuse("the body", "a JSON object", "")
    parameters = read_object(document.get("parameters", {}), "parameters")
    request_id = document.get("id")
    if request_id is not None:
        request_id = read_text(request_id, "id")
    wishes = read_outputs(document.get("outputs"), parameters, interface.outputs, memory)
    inputs, n_read, places = _inputs(document.get("inputs"), body, interface, memory, lease)
    if n_read != n_arrays:
        # Such an array was never parsed; refusing it keeps the promise of strict JSON.
        raise RequestError(
            "`data` outside of an input", where="body", remedy="send `data` in `inputs` only"
        )
    request = _checked(request_id, inputs, wishes, read_timeout(parameters), interface)
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
        refuse("`inputs`", "a list with at least one tensor", "inputs")
    tensors: dict[str, torch.Tensor] = {}
    offset = body.binary_offset
    n_read = 0
    places: list[_Place] = []
    for position, entry in enumerate(entries):
        where = f"inputs[{position}]"
        name = read_text(read_object(entry, where).get("name"), f"{where}.name")
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
        datatype = read_datatype(entry.get("datatype"), spec, where)
        shape = read_shape(entry.get("shape"), spec, where)
        parameters = read_object(entry.get("parameters", {}), f"{where}.parameters")
        size = parameters.get("binary_data_size")
        ref = region_ref(parameters, f"{where}.parameters", memory) if parameters else None
        if (size is not None) + (ref is not None) + ("data" in entry) > 1:
            raise RequestError(
                "the tensor in several forms", where=where, remedy="send it in one form"
            )
        if size is not None:
            tensors[name] = read_binary(body.binary, offset, size, datatype, shape, where)
            places.append((name, offset - body.binary_offset, datatype, shape, where))
            offset += size
        elif ref is not None and memory is not None:
            check_size(
                ref.size_bytes, datatype, shape, f"{where}.parameters.shared_memory_byte_size"
            )
            lease.grow(ref.size_bytes)
            tensors[name] = view_of(memory.read(ref), 0, datatype, shape, where)
        else:
            n_read += isinstance(entry.get("data"), jsontext.NumberText)
            tensors[name] = read_numbers(entry.get("data"), datatype, shape, f"{where}.data")
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
    tensor = view_of(body.binary, body.binary_offset, datatype, shape, "body")
    wishes = tuple(OutputWish(name, True) for name in interface.outputs)
    return _checked(None, {spec.name: tensor}, wishes, 0, interface)
