"""Deltas as documents: decoding what people and programs write, encoding what the journal keeps.

    delta: 1
    edits:
      - add_node: {id: gate, op: aten.sigmoid.default, args: [$pooler]}
      - rewire: {from: $pooler, to: $gate, users: [classifier]}

Values are `$node` or `$node:1`, constants `{const: NAME}`; a literal string that begins with `$` is
written `$$...`. Numbers that documents cannot carry are the strings `inf`, `-inf` and `nan`. Files
are named relative to the document; whoever decodes says how a name is opened.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from graphopt import macros
from graphopt.constants import TORCH_DTYPES
from graphopt.delta import (
    AddInput,
    AddNode,
    Delta,
    DropConstant,
    DropInput,
    Edit,
    Primitive,
    PutConstant,
    RemoveNode,
    Rewire,
    SetAttr,
    SetOutputs,
)  # fmt: skip
from graphopt.documents import Document, Reader
from graphopt.errors import DocumentError
from graphopt.graph import Arg, Const, Constant, Ref, Symbol
from graphopt.limits import EDITS_MAX, INLINE_ELEMENTS_MAX
from graphopt.safe_file import Source
from graphopt.safetensors_file import read_tensors
from graphopt.spelling import format_ref, parse_ref
from graphopt.types import TensorType, parse_type, short_dtype

FORMAT = 1


class Resources(Protocol):
    """What a document may refer to besides itself."""

    def files(self, path: str) -> Mapping[str, Source]:
        """The file at `path` under its own name, or the entries of the folder there."""

    def constant(self, digest: str) -> Constant | None:
        """The constant of that content hash, if it is at hand."""


class NoResources:
    """For documents that refer to nothing but graphs."""

    def files(self, path: str) -> Mapping[str, Source]:
        """Refuses: there is no folder to look into."""
        raise DocumentError(
            f"the file {path!r} cannot be opened here",
            where=path,
            remedy="send the file with the delta",
        )

    def constant(self, digest: str) -> Constant | None:
        """None: no constant is known."""
        return None


def decode_delta(document: Document, resources: Resources | None = None) -> Delta:
    """The delta a document says.

    Raises DocumentError with every fault, and what opening its files raises.
    """
    reader = Reader(document)
    decoder = _Decoder(resources or NoResources())
    reader.field("delta").integer(low=FORMAT, high=FORMAT)
    graph = _optional(reader, "graph", lambda r: r.string(chars_max=256))
    revision = _optional(reader, "if_revision", lambda r: r.integer(low=0))
    id_ = _optional(reader, "id", lambda r: r.string(chars_max=256))
    allow = _optional(reader, "allow_interface_change", lambda r: r.boolean()) or False
    edits: list[Edit] = []
    for item in reader.field("edits").items(count_max=EDITS_MAX):
        kind, body = item.one_of(DECODERS)
        if kind in DECODERS:
            edit = DECODERS[kind](decoder, body)
            if edit is not None:
                edits.append(edit)
    reader.finish()
    return Delta(edits, graph, revision, id_, allow, document.source)


def encode_delta(delta: Delta) -> dict[str, Any]:
    """A primitive delta as a JSON-able document; constants are named by content hash.

    `decode_delta` reads it back.
    """
    document: dict[str, Any] = {"delta": FORMAT}
    for name in ("graph", "if_revision", "id"):
        if getattr(delta, name) is not None:
            document[name] = getattr(delta, name)
    if delta.allow_interface_change:
        document["allow_interface_change"] = True
    document["edits"] = [_encode_edit(edit) for edit in delta.edits]  # type: ignore[arg-type]
    return document


def encode_value(value: Arg) -> Any:
    """An argument as documents write it."""
    if isinstance(value, Ref):
        return format_ref(value)
    if isinstance(value, Const):
        return {"const": value.name}
    if isinstance(value, tuple):
        return [encode_value(item) for item in value]
    if isinstance(value, str):
        return "$" + value if value.startswith("$") else value
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return value


def _encode_edit(edit: Primitive) -> dict[str, Any]:
    match edit:
        case AddNode(id, op, args, kwargs):
            body: dict[str, Any] = {"id": id, "op": op}
            if args:
                body["args"] = [encode_value(arg) for arg in args]
            if kwargs:
                body["kwargs"] = {name: encode_value(value) for name, value in kwargs}
            return {"add_node": body}
        case RemoveNode(id):
            return {"remove_node": {"id": id}}
        case Rewire(source, target, users):
            ends: dict[str, Any] = {"from": format_ref(source), "to": format_ref(target)}
            return {"rewire": ends if users is None else ends | {"users": list(users)}}
        case SetAttr(node, name, value):
            return {"set_attr": {"node": node, "name": name, "value": encode_value(value)}}
        case PutConstant(name, constant, is_param, aliases):
            body = {"name": name, "hash": constant.digest}
            if is_param is not None:
                body["param"] = is_param
            return {"put_constant": body | ({"aliases": list(aliases)} if aliases else {})}
        case DropConstant(name):
            return {"drop_constant": {"name": name}}
        case AddInput(name, type_, position, symbols):
            body = {"name": name, "type": str(type_)}
            if position is not None:
                body["position"] = position
            if symbols:
                body["symbols"] = {s.name: [s.min, s.max] for s in symbols}
            return {"add_input": body}
        case DropInput(name):
            return {"drop_input": {"name": name}}
        case SetOutputs(outputs):
            return {"set_outputs": {"outputs": {name: format_ref(ref) for name, ref in outputs}}}


class _Decoder:
    """Decodes the parts edits share."""

    def __init__(self, resources: Resources) -> None:
        self.resources = resources

    def value(self, reader: Reader) -> Arg:
        """An argument."""
        match reader.kind:
            case "list":
                return tuple(self.value(item) for item in reader.items())
            case "mapping":
                return Const(reader.field("const").string())
            case "string":
                text = reader.string()
                if text.startswith("$$"):
                    return text[1:]
                return self.ref(reader) if text.startswith("$") else text
        return reader.raw()

    def ref(self, reader: Reader) -> Ref:
        """A value, `$node` or `$node:1`."""
        try:
            return parse_ref(reader.string())
        except DocumentError as error:
            reader.fault(error.message, error.remedy or "write $node or $node:1")
            return Ref("?")

    def files(self, reader: Reader) -> Mapping[str, Source]:
        """The files at a path of the document."""
        try:
            return self.resources.files(reader.string(chars_max=4096))
        except DocumentError as error:
            reader.fault(error.message, error.remedy)
            return {}


def _add_node(d: _Decoder, r: Reader) -> AddNode:
    id_, op = r.field("id").string(), r.field("op").string()
    args = r.maybe("args")
    kwargs = r.maybe("kwargs")
    return AddNode(
        id_, op, tuple(d.value(item) for item in args.items()) if args else (),
        tuple((name, d.value(item)) for name, item in kwargs.entries()) if kwargs else (),
    )  # fmt: skip


def _rewire(d: _Decoder, r: Reader) -> Rewire:
    users = r.maybe("users")
    chosen = tuple(user.string() for user in users.items()) if users else None
    return Rewire(d.ref(r.field("from")), d.ref(r.field("to")), chosen)


def _put_constant(d: _Decoder, r: Reader) -> PutConstant | None:
    name = r.field("name").string()
    is_param = _optional(r, "param", lambda x: x.boolean())
    aliases = tuple(_optional(r, "aliases", lambda x: [i.string() for i in x.items()]) or ())
    digest, path, data = r.maybe("hash"), r.maybe("path"), r.maybe("data")
    if [digest, path, data].count(None) != 2:
        r.fault("a constant comes from one of hash, path and data", "give exactly one of them")
        return None
    if digest is not None:
        found = d.resources.constant(digest.string())
        if found is None:
            digest.fault("no constant of this content is at hand", "send the tensor as a file")
            return None
        return PutConstant(name, found, is_param, aliases)
    if path is not None:
        tensor = _tensor_file(d, path, _optional(r, "tensor", lambda x: x.string()) or name)
    else:
        assert data is not None
        dtype = _optional(r, "dtype", lambda x: x.string()) or "f32"
        tensor = _inline(data, dtype)
    return PutConstant(name, tensor, is_param, aliases) if tensor is not None else None


def _tensor_file(d: _Decoder, path: Reader, key: str) -> torch.Tensor | None:
    for file, source in d.files(path).items():
        tensors = read_tensors(source, [key], label=file, mapped=False)
        return tensors[key]
    return None


def _inline(data: Reader, dtype: str) -> torch.Tensor | None:
    try:
        tensor = torch.tensor(data.raw(), dtype=TORCH_DTYPES[short_dtype(dtype)])
    except (ValueError, TypeError, RuntimeError) as error:
        data.fault(f"not a tensor: {error}", "write nested lists of numbers of equal length")
        return None
    if tensor.numel() > INLINE_ELEMENTS_MAX:
        data.fault(
            f"{tensor.numel()} elements, at most {INLINE_ELEMENTS_MAX} inline",
            "use a safetensors file",
        )
        return None
    return tensor


def _add_input(d: _Decoder, r: Reader) -> AddInput:
    name, text = r.field("name").string(), r.field("type")
    try:
        type_ = parse_type(text.string())
    except ValueError as error:
        text.fault(str(error))
        type_ = TensorType("f32", ())
    if not isinstance(type_, TensorType):
        text.fault("an input is a tensor", "write for example f32[batch, 768]")
        type_ = TensorType("f32", ())
    ranges = r.maybe("symbols")
    symbols = _symbols(ranges) if ranges else ()
    position = _optional(r, "position", lambda x: x.integer(low=0))
    return AddInput(name, type_, position, symbols)


def _set_outputs(d: _Decoder, r: Reader) -> SetOutputs:
    return SetOutputs(tuple((name, d.ref(value)) for name, value in r.field("outputs").entries()))


def _attach(d: _Decoder, r: Reader) -> macros.AttachAdapter:
    scale = _optional(r, "scale", lambda x: x.number())
    path = r.field("path")
    label = path.string() if path.kind == "string" else ""
    return macros.AttachAdapter(
        r.field("name").string(), d.files(path), 1.0 if scale is None else scale, label
    )


def _load_weights(d: _Decoder, r: Reader) -> macros.LoadWeights:
    strict = _optional(r, "strict", lambda x: x.boolean())
    path = r.field("path")
    return macros.LoadWeights(d.files(path), True if strict is None else strict)


def _insert_after(d: _Decoder, r: Reader) -> macros.InsertAfter:
    args = r.maybe("args")
    kwargs = r.maybe("kwargs")
    return macros.InsertAfter(
        d.ref(r.field("value")), r.field("id").string(), r.field("op").string(),
        tuple(d.value(item) for item in args.items()) if args else (),
        tuple((name, d.value(item)) for name, item in kwargs.entries()) if kwargs else (),
    )  # fmt: skip


def _replace_region(d: _Decoder, r: Reader) -> macros.ReplaceRegion:
    return macros.ReplaceRegion(
        tuple(item.string() for item in r.field("remove").items()),
        tuple(_add_node(d, item) for item in r.field("add").items()),
        tuple(_rewire(d, item) for item in r.field("rewire").items()),
    )


def _shape_profile(d: _Decoder, r: Reader) -> macros.SetShapeProfile:
    return macros.SetShapeProfile(_symbols(r.field("symbols")))


def _symbols(r: Reader) -> tuple[Symbol, ...]:
    """Ranges as `{seq: [1, 128]}`; `null` for no upper bound."""
    found = []
    for name, bounds in r.entries():
        ends = bounds.items()
        if len(ends) != 2:
            bounds.fault("a range has two ends", "write [1, 128], or [1, null] for no upper bound")
            continue
        low, high = ends
        found.append(
            Symbol(name, low.integer(low=0), None if high.kind == "null" else high.integer(low=0))
        )
    return tuple(found)


DECODERS: dict[str, Callable[[_Decoder, Reader], Edit | None]] = {
    "add_node": _add_node,
    "remove_node": lambda d, r: RemoveNode(r.field("id").string()),
    "rewire": _rewire,
    "set_attr": lambda d, r: SetAttr(
        r.field("node").string(), r.field("name").string(), d.value(r.field("value"))
    ),
    "put_constant": _put_constant,
    "drop_constant": lambda d, r: DropConstant(r.field("name").string()),
    "add_input": _add_input,
    "drop_input": lambda d, r: DropInput(r.field("name").string()),
    "set_outputs": _set_outputs,
    "attach_adapter": _attach,
    "detach_adapter": lambda d, r: macros.DetachAdapter(r.field("name").string()),
    "load_weights": _load_weights,
    "swap_head": lambda d, r: macros.SwapHead(r.field("node").string(), d.files(r.field("path"))),
    "bypass": lambda d, r: macros.Bypass(r.field("node").string()),
    "insert_after": _insert_after,
    "replace_region": _replace_region,
    "set_shape_profile": _shape_profile,
}


def _optional(reader: Reader, name: str, read: Callable[[Reader], Any]) -> Any:
    found = reader.maybe(name)
    return read(found) if found is not None and found.kind != "null" else None
