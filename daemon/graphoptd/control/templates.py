"""Delta documents to start from: for each kind of edit a valid, commented one with ids of the model.

What a template proposes has been tried on the model where that needs no file of the user's, so
`graphoptctl new-delta bypass minilm | graphoptctl apply --dry-run -` passes.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from graphopt.delta import Delta
from graphopt.delta_document import DECODERS, encode_value
from graphopt.engine.live import LiveModel
from graphopt.errors import DeltaError, GraphoptError, nearest
from graphopt.graph import Const, Ref
from graphopt.macros import Bypass
from graphopt.types import TensorType

_TRIED_MAX = 24  # nodes tried before a template gives up: each costs a dry run
_SHOWN_ELEMENTS_MAX = 8  # of a constant whose data a template can spell out
_PLAIN = re.compile(r"[$A-Za-z_][A-Za-z0-9_./$@-]*")
_WORDS = frozenset(("true", "false", "null", "True", "False", "Null", "TRUE", "FALSE", "NULL"))

Edits = list[tuple[str, Mapping[str, Any]]]


def new_delta_text(kind: str, model: LiveModel) -> str:
    """The document of an edit kind for `model`.

    Raises:
        DeltaError: no such kind, or the model has nothing it could be shown on.
    """
    template = TEMPLATES.get(kind.replace("-", "_"))
    if template is None:
        remedy = nearest(kind, TEMPLATES) or f"kinds are {', '.join(TEMPLATES)}"
        raise DeltaError(f"no edit kind {kind!r}", where="kind", remedy=remedy)
    says, make = template
    made = make(model)
    edits, is_interface = made if isinstance(made, tuple) else (made, False)
    lines = [f"# {line}" for line in says.splitlines()]
    lines += [
        "delta: 1",
        f"graph: {flow(model.name)}",
        "# Refused when the model has moved on meanwhile; leave it out to apply anyway.",
        f"if_revision: {model.revision}",
        "# Applying the same id again answers as the first time and changes nothing.",
        "# id: choose-one",
    ]
    if is_interface:
        lines += [
            "# Inputs or outputs change, and clients will notice: this says that it is meant.",
            "allow_interface_change: true",
        ]
    lines.append("edits:")
    lines += [f"  - {edit}: {flow(body)}" for edit, body in edits]
    return "\n".join(lines) + "\n"


def flow(value: Any) -> str:
    """A value in YAML's flow style."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{flow(k)}: {flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(flow, value)) + "]"
    if isinstance(value, str):
        plain = _PLAIN.fullmatch(value) and value not in _WORDS
        return value if plain else json.dumps(value)
    return json.dumps(value)


def _add_node(model: LiveModel) -> Edits:
    value = _float_value(model)
    return [
        (
            "add_node",
            {"id": _free(model, "gate"), "op": "aten.sigmoid.default", "args": [str(value)]},
        )
    ]


def _remove_node(model: LiveModel) -> Edits:
    source, target, users = _bridge(model)
    rewire = {"from": str(source), "to": str(target), "users": users}
    return [("rewire", rewire), ("remove_node", {"id": source.id})]


def _rewire(model: LiveModel) -> Edits:
    source, target, users = _bridge(model)
    return [("rewire", {"from": str(source), "to": str(target), "users": users})]


def _set_attr(model: LiveModel) -> Edits:
    for kind in (float, int):  # an epsilon says more than a dimension
        for node in model.graph.iter_nodes():
            for name, value in node.bound().items():
                if type(value) is kind:
                    return [("set_attr", {"node": node.id, "name": name, "value": value})]
    raise _nothing(model, "no node has a number among its arguments")


def _put_constant(model: LiveModel) -> Edits:
    named = sorted(model.graph.constants.items(), key=lambda pair: pair[1].tensor.numel())
    if not named:
        raise _nothing(model, "it has no constants")
    name, constant = named[0]
    body: dict[str, Any] = {"name": name}
    if constant.tensor.numel() <= _SHOWN_ELEMENTS_MAX and not constant.tensor.is_complex():
        data = constant.tensor.tolist()
        return [("put_constant", body | {"data": data, "dtype": constant.type.dtype})]
    return [("put_constant", body | {"path": "weights.safetensors", "tensor": name})]


def _drop_constant(model: LiveModel) -> Edits:
    name = _free(model, "scratch")
    return [
        ("put_constant", {"name": name, "data": [0.0]}),
        ("drop_constant", {"name": name}),
    ]


def _add_input(model: LiveModel) -> tuple[Edits, bool]:
    first = next((type_ for _, type_ in model.graph.inputs if type_.shape), None)
    type_ = TensorType("f32", (first.shape[0], 4) if first is not None else (4,))
    return [("add_input", {"name": _free(model, "extra"), "type": str(type_)})], True


def _drop_input(model: LiveModel) -> tuple[Edits, bool]:
    used = [name for name, _ in model.graph.inputs if model.graph.users.get(name)]
    unused = [name for name, _ in model.graph.inputs if name not in used]
    if unused:
        return [("drop_input", {"name": unused[0]})], True
    added, _ = _add_input(model)
    return [*added, ("drop_input", {"name": added[0][1]["name"]})], True


def _set_outputs(model: LiveModel) -> Edits:
    return [("set_outputs", {"outputs": {name: str(ref) for name, ref in model.graph.outputs}})]


def _attach_adapter(model: LiveModel) -> Edits:
    return [("attach_adapter", {"name": "legal", "path": "adapters/legal", "scale": 1.0})]


def _detach_adapter(model: LiveModel) -> Edits:
    for name in sorted(model.graph.constants):
        if name.startswith("adapters/"):
            return [("detach_adapter", {"name": name.split("/")[1]})]
    raise _nothing(model, "no adapter is attached")


def _load_weights(model: LiveModel) -> Edits:
    return [("load_weights", {"path": "model.safetensors", "strict": True})]


def _swap_head(model: LiveModel) -> Edits:
    heads = [node.id for node in model.graph.iter_nodes() if node.op == "aten.linear.default"]
    if not heads:
        raise _nothing(model, "it has no linear layer")
    return [("swap_head", {"node": heads[-1], "path": "head.safetensors"})]


def _bypass(model: LiveModel) -> Edits:
    return [("bypass", {"node": _bridge(model)[0].id})]


def _insert_after(model: LiveModel) -> Edits:
    value = _float_value(model)
    id_ = _free(model, f"{value.id}/sigmoid")
    return [("insert_after", {"value": str(value), "id": id_, "op": "aten.sigmoid.default"})]


def _replace_region(model: LiveModel) -> Edits:
    value = _float_value(model)
    node = model.graph.nodes[value.id]
    new: dict[str, Any] = {"id": _free(model, f"{node.id}/new"), "op": node.op}
    new["args"] = [_written(arg) for arg in node.args]
    if node.kwargs:
        new["kwargs"] = {name: _written(arg) for name, arg in node.kwargs}
    rewire = {"from": f"${node.id}", "to": f"${new['id']}"}
    return [("replace_region", {"remove": [node.id], "add": [new], "rewire": [rewire]})]


def _set_shape_profile(model: LiveModel) -> Edits:
    ranges = {symbol.name: [symbol.min, symbol.max] for symbol in model.graph.symbols}
    if not ranges:
        raise _nothing(model, "all its shapes are fixed")
    return [("set_shape_profile", {"symbols": ranges})]


def _bridge(model: LiveModel) -> tuple[Ref, Ref, list[str]]:
    """A node that can be left out: its value, the value instead, and who reads it."""
    graph, facts = model.graph, model.facts
    tried = 0
    for node in reversed(list(graph.iter_nodes())):
        users = sorted(graph.users.get(node.id, ()))
        types = facts.types.get(node.id, ())
        same = [ref for ref in node.refs if len(types) == 1 and facts.type_of(ref) == types[0]]
        if not users or not same:
            continue
        tried += 1
        if tried > _TRIED_MAX:
            break
        try:
            model.dry_run(Delta([Bypass(node.id)]))
        except GraphoptError:
            continue
        return Ref(node.id), same[0], users
    raise _nothing(model, "no node has an input of the type of its output")


def _float_value(model: LiveModel) -> Ref:
    """The last floating point tensor that another node reads, so that an edit shows."""
    for node in reversed(list(model.graph.iter_nodes())):
        types = model.facts.types.get(node.id, ())
        if len(types) == 1 and isinstance(types[0], TensorType) and types[0].is_float:
            return Ref(node.id)
    raise _nothing(model, "no node makes a floating point tensor")


def _free(model: LiveModel, name: str) -> str:
    graph = model.graph
    taken: Iterator[str] = (
        name if number == 0 else f"{name}{number}" for number in range(len(graph) + 2)
    )
    known = (graph.nodes, graph.constants, graph.aliases, dict(graph.inputs))
    return next(each for each in taken if not any(each in names for names in known))


def _written(arg: Any) -> Any:
    value = encode_value(arg)
    return {"const": arg.name} if isinstance(arg, Const) else value


def _nothing(model: LiveModel, why: str) -> DeltaError:
    return DeltaError(
        f"there is nothing to show this edit on: {why}",
        where=model.name,
        remedy="see graphoptctl nodes",
    )


TEMPLATES: Mapping[str, tuple[str, Callable[[LiveModel], Edits | tuple[Edits, bool]]]] = {
    "add_node": (
        "A new node. Nobody reads it yet: rewire its users, or use insert_after.",
        _add_node,
    ),
    "remove_node": ("A node goes; who read it reads something else first.", _remove_node),
    "rewire": ("Users of one value read another; without users, all of them do.", _rewire),
    "set_attr": ("One argument of a node gets another value.", _set_attr),
    "put_constant": (
        "A constant gets other data: inline, by path, or by content hash.",
        _put_constant,
    ),
    "drop_constant": ("A constant goes; only one that no node reads can.", _drop_constant),
    "add_input": ("A new model input.", _add_input),
    "drop_input": ("A model input goes; only one that no node reads can.", _drop_input),
    "set_outputs": ("The outputs, by name and in order.", _set_outputs),
    "attach_adapter": ("A PEFT LoRA folder; the path counts from this file.", _attach_adapter),
    "detach_adapter": ("An adapter goes; the model is what it was without it.", _detach_adapter),
    "load_weights": (
        "New values for constants of the same name: a safetensors file or a folder of them.\n"
        "strict: the file holds exactly the model's parameters.",
        _load_weights,
    ),
    "swap_head": ("A linear layer gets another weight and bias; its size may change.", _swap_head),
    "bypass": ("A node, or all nodes of a module, is left out.", _bypass),
    "insert_after": ("A new node between a value and those that read it.", _insert_after),
    "replace_region": ("Nodes go, others come, in one step.", _replace_region),
    "set_shape_profile": ("The sizes that dynamic dimensions may take.", _set_shape_profile),
}
assert TEMPLATES.keys() == DECODERS.keys(), "each edit kind has its template"
