"""An answer: from the tensors a model returned to the body and headers a client understands.

Small binary tensors are joined with the JSON into one buffer; large ones are handed to the
transport as views. JSON numbers are written by orjson straight from tensor memory, in pieces (law
4).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
import torch

from graphopt.errors import RequestError
from graphoptd.data.compression import deflate
from graphoptd.data.datatypes import BY_TORCH_DTYPE
from graphoptd.data.decode import InferRequest
from graphoptd.data.shm import SharedMemory
from graphoptd.data.wishes import OutputWish

JSON_TYPE = (b"content-type", b"application/json")  # no charset: kserve compares the whole value
BINARY_TYPE = (b"content-type", b"application/octet-stream")

_PIECE_ELEMENTS = 16 << 10  # numbers written in one call: about 0.3 ms
_HEADS_MAX = 16  # kept for a form of request: plans change now and then, output shapes rarely
_JOIN_BYTES = 64 << 10  # below this one copy is cheaper than one more write

Part = bytes | memoryview


@dataclass(slots=True)
class Answer:
    """What goes back over HTTP: status, headers without Content-Length, and the body in parts."""

    status: int
    headers: list[tuple[bytes, bytes]]
    parts: Sequence[Part]

    def size_bytes(self) -> int:
        """Length of the body."""
        return sum([len(part) for part in self.parts])


def json_answer(content: Any, status: int = 200, *more: tuple[bytes, bytes]) -> Answer:
    """An answer that is one JSON value."""
    return Answer(status, [JSON_TYPE, *more], (orjson.dumps(content),))


def encode(
    model: str,
    request: InferRequest,
    outputs: Mapping[str, torch.Tensor],
    revision: int,
    plan_id: str,
    memory: SharedMemory | None,
) -> Answer:
    """The answer to an inference request.

    Raises:
        RequestError: an output cannot be given as asked (NaN in JSON, a 16-bit float in JSON, one
            that is gone since the request was checked, or a region too small for it).
    """
    tensors = [_output(outputs, wish.name) for wish in request.outputs]
    heads = request.heads
    key = (revision, plan_id, *[(tensor.shape, tensor.dtype) for tensor in tensors])
    head = heads.get(key) if heads is not None else None
    if head is not None:
        return _binary_answer(head, [_content(tensor) for tensor in tensors])
    described: list[dict[str, Any]] = []
    binaries: list[Part] = []
    for wish, tensor in zip(request.outputs, tensors, strict=True):
        datatype = BY_TORCH_DTYPE[tensor.dtype]
        entry: dict[str, Any] = {
            "name": wish.name,
            "datatype": datatype.name,
            "shape": list(tensor.shape),
        }
        if wish.region is not None and memory is not None:
            content = _content(tensor)
            memory.write(wish.region, content)
            entry["parameters"] = {
                "shared_memory_region": wish.region.name,
                "shared_memory_offset": wish.region.offset,
                "shared_memory_byte_size": len(content),
            }
        elif wish.binary:
            content = _content(tensor)
            entry["parameters"] = {"binary_data_size": len(content)}
            binaries.append(content)
        else:
            entry["data"] = orjson.Fragment(_number_text(tensor, wish.name))
        described.append(entry)
    document: dict[str, Any] = {"model_name": model, "model_version": str(revision)}
    if request.id is not None:
        document["id"] = request.id
    document["parameters"] = {"plan_id": plan_id}
    document["outputs"] = described
    head = orjson.dumps(document)
    if not binaries:
        return Answer(200, [JSON_TYPE], (head,))
    if heads is not None:
        if len(heads) >= _HEADS_MAX:
            heads.clear()
        heads[key] = head
    return _binary_answer(head, binaries)


def compress(answer: Answer, coding: bytes) -> Answer:
    """The same answer with its body encoded."""
    headers = [*answer.headers, (b"content-encoding", coding), (b"vary", b"accept-encoding")]
    return Answer(answer.status, headers, (deflate(answer.parts, coding),))


def is_heavy(
    wishes: Sequence[OutputWish], outputs: Mapping[str, torch.Tensor], coding: bytes | None
) -> bool:
    """True when encoding would hold the event loop for more than about a millisecond."""
    for wish in wishes:
        tensor = outputs.get(wish.name)
        if tensor is None:
            continue
        if (not wish.binary and tensor.numel() > _PIECE_ELEMENTS) or (
            (coding is not None or wish.region is not None) and tensor.nbytes > _JOIN_BYTES
        ):
            return True
    return False


def _binary_answer(head: bytes, binaries: Sequence[Part]) -> Answer:
    headers = [BINARY_TYPE, (b"inference-header-content-length", b"%d" % len(head))]
    if sum([len(part) for part in binaries]) <= _JOIN_BYTES:
        return Answer(200, headers, (b"".join((head, *binaries)),))
    return Answer(200, headers, (head, *binaries))


def _output(outputs: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    tensor = outputs.get(name)
    if tensor is None:
        raise RequestError(
            f"the model no longer returns {name!r}",
            where="outputs",
            remedy="read the model's metadata again",
        )
    if not tensor.is_cpu or not tensor.is_contiguous() or tensor.requires_grad:
        tensor = tensor.detach().cpu().contiguous()
    return tensor


def _content(tensor: torch.Tensor) -> Part:
    """The bytes of a contiguous tensor, row-major; a view when large."""
    if tensor.dtype is torch.bfloat16:  # numpy has no such type
        tensor = tensor.reshape(-1).view(torch.uint8)
    array = tensor.numpy()
    return array.tobytes() if array.nbytes <= _JOIN_BYTES else memoryview(array.data).cast("B")


def _number_text(tensor: torch.Tensor, name: str) -> bytes:
    """The elements as one flat JSON array."""
    if not BY_TORCH_DTYPE[tensor.dtype].array_code:
        raise RequestError(
            f"output {name!r} has no JSON form",
            where="outputs",
            remedy="ask for it with `binary_data: true`",
        )
    array = tensor.reshape(-1).numpy()
    if tensor.is_floating_point() and not np.isfinite(array).all():
        index = int(np.isfinite(array).argmin())
        raise RequestError(
            f"output {name!r} holds {array[index]} at element {index}, which JSON cannot express",
            where="outputs",
            remedy="ask for it with `binary_data: true`",
        )
    pieces = [b"["]
    for start in range(0, len(array), _PIECE_ELEMENTS):
        if start:
            pieces.append(b",")
        text = orjson.dumps(
            array[start : start + _PIECE_ELEMENTS], option=orjson.OPT_SERIALIZE_NUMPY
        )
        pieces.append(text[1:-1])
    pieces.append(b"]")
    return b"".join(pieces)
