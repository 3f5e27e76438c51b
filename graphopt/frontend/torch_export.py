"""A torch module, or an exported program, as a graph.

`from_torch` traces the module with torch.export as it is served and reads the result: parameters
and buffers become constants under their state_dict names, ops become nodes named after their module.
What cannot be imported is refused with the op and the module's path; nothing is guessed.

What imports cannot carry: mutated buffers (caches, counters), sizes that depend on tensor contents,
control flow on tensors, randomness, and outputs that are not tensors.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument

from graphopt.constants import SHORT_DTYPES
from graphopt.errors import DeltaError, ImportRefusedError
from graphopt.frontend.capture import export_module, functional
from graphopt.frontend.convert import Out, Reader, Step, live_steps, make_nodes, used_constants
from graphopt.frontend.examples import Call, Shapes, prepare_call
from graphopt.frontend.names import module_place, unique_name
from graphopt.frontend.shapes import dim_names, input_values, symbols, to_dim
from graphopt.frontend.weights import read_weights
from graphopt.graph import Const, Graph, Ref
from graphopt.signature import leaf_name, output_name
from graphopt.types import TensorType

_MUTATIONS = {
    OutputKind.BUFFER_MUTATION: "writes into the buffer",
    OutputKind.PARAMETER_MUTATION: "writes into the parameter",
    OutputKind.USER_INPUT_MUTATION: "writes into its input",
}


def from_torch(
    module: torch.nn.Module,
    example_inputs: Any,
    dynamic_shapes: Shapes = None,
    name: str = "model",
    *,
    share_memory: bool = False,
) -> Graph:
    """The graph of `module` as it serves: eval mode, no gradients. The module is left as it was.

    Args:
        module: any module that torch.export can trace.
        example_inputs: a tensor, a tuple of positional arguments or a mapping of keyword arguments.
            Only shapes and dtypes matter; dynamic dims of size 1 are repeated to 2 for tracing.
        dynamic_shapes: None makes every dim static; a name such as "batch" makes dim 0 of every
            input that dynamic dim; else torch.export's own structure, in which a dim may be given by
            name (`{"input_ids": {0: "batch", 1: "seq"}}`). Bounds left open are narrowed to what the
            model accepts.
        name: the graph's name.
        share_memory: let constants be the module's own tensors instead of copies. Only for a module
            that nobody writes to afterwards: a graph is immutable.

    Raises:
        ImportRefusedError: `where` names the op and the module path, or the argument at fault.
    """
    module = getattr(module, "_orig_mod", module)  # torch.compile's wrapper
    call = prepare_call(module.forward, example_inputs, dynamic_shapes)
    program, call = export_module(module, call)
    return _graph(program, name, call, share_memory=share_memory)


def from_program(
    program: ExportedProgram, name: str = "model", *, share_memory: bool = False
) -> Graph:
    """The graph of a program that torch.export made before (a loaded `.pt2`); else as `from_torch`.

    Programs do not keep the names of dynamic dims: dim 0 is `batch`, dim 1 of an integer matrix
    `seq`, any other is called after its input.
    """
    return _graph(functional(program), name, None, share_memory=share_memory)


def _graph(program: ExportedProgram, name: str, call: Call | None, *, share_memory: bool) -> Graph:
    _refuse_mutations(program)
    names = dim_names(program, call)
    weights = read_weights(program, _homes(program))
    inputs = _input_names(program, call)
    values = _placeholders(program, weights.names, inputs)
    reader = Reader(names)
    results = reader.read(program.graph, values)
    outputs = [
        (output, _own_value(value, reader))
        for output, value in zip(_output_names(program), results, strict=True)
        if output is not None
    ]
    steps = live_steps(reader.steps, (value for _, value in outputs))
    nodes, ids = make_nodes(steps, inputs.values())
    used = {weights.aliases.get(const, const) for const in used_constants(steps)}
    final = [(key, Ref(ids[v.step], v.idx) if isinstance(v, Out) else v) for key, v in outputs]
    try:
        return Graph.build(
            name,
            nodes,
            _inputs(program, inputs, names),
            final,
            weights.constants(used, share_memory=share_memory),
            {alias: target for alias, target in weights.aliases.items() if target in used},
            symbols(program, names, call),
        )
    except DeltaError as error:
        raise ImportRefusedError(error.message, where=error.where, remedy=error.remedy) from error


def _refuse_mutations(program: ExportedProgram) -> None:
    nodes = {node.name: node for node in program.graph.nodes}
    for spec in program.graph_signature.output_specs:
        if spec.kind == OutputKind.USER_OUTPUT:
            continue
        node = nodes.get(spec.arg.name)
        path = _path(node) if node is not None else ""
        what = _MUTATIONS.get(spec.kind, f"returns a {spec.kind.name.lower()}")
        raise ImportRefusedError(
            f"the model {what} {spec.target or ''}".rstrip(),
            where=f"{node.target if node is not None else spec.kind.name} in {path or 'the root module'}",
            remedy="a graph keeps no state between requests: switch the cache or counter off",
        )


def _homes(program: ExportedProgram) -> dict[str, str]:
    """The path of the module that reads each placeholder first."""
    homes: dict[str, str] = {}
    for node in program.graph.nodes:
        if node.op == "call_function":
            for source in node.all_input_nodes:
                if source.op == "placeholder":
                    homes.setdefault(source.name, _path(node))
    return homes


def _path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return module_place([(key, value[0]) for key, value in stack.items()])[0]


def _placeholders(
    program: ExportedProgram, weights: dict[str, str], inputs: dict[str, str]
) -> dict[fx.Node, Any]:
    literals = {
        spec.arg.name: spec.arg.value
        for spec in program.graph_signature.input_specs
        if spec.kind == InputKind.USER_INPUT and isinstance(spec.arg, ConstantArgument)
    }
    values: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        if node.op != "placeholder":
            continue
        if node.name in weights:
            values[node] = Const(weights[node.name])
        elif node.name in inputs:
            values[node] = Ref(inputs[node.name])
        else:
            values[node] = literals.get(node.name)
    return values


def _input_names(program: ExportedProgram, call: Call | None) -> dict[str, str]:
    """Graph input by placeholder, tensors only, in the order of the module's parameters."""
    found: dict[str, str] = {}
    paths = _leaf_paths(program.call_spec.in_spec)
    for (placeholder, value), (side, *path) in zip(input_values(program), paths, strict=True):
        if value is None or isinstance(value, bool | int | float | str):
            continue
        if not isinstance(value, torch.Tensor):
            raise ImportRefusedError(
                f"input {placeholder} is a {type(value).__name__} and not a tensor",
                where=placeholder,
                remedy="pass it as a tensor, or fix its value in the module",
            )
        is_positional = side == "0"
        if len(path) == 1 and not (is_positional and call is not None):
            wanted = placeholder if is_positional else path[0]
        elif is_positional:
            root = call.names[int(path[0])] if call is not None else placeholder.split("_")[0]
            wanted = leaf_name(root, path[1:])
        else:
            wanted = leaf_name(path[0], path[1:])
        found[placeholder] = unique_name(wanted, set(found.values()))
    return found


def _inputs(
    program: ExportedProgram, inputs: dict[str, str], names: dict[Any, str]
) -> Iterator[tuple[str, TensorType]]:
    for placeholder, value in input_values(program):
        if placeholder not in inputs:
            continue
        try:
            shape = tuple(to_dim(size, names) for size in value.shape)
        except ValueError as error:
            raise ImportRefusedError(
                f"input {inputs[placeholder]}: {error}",
                where="dynamic_shapes",
                remedy="give that dim a name of its own, or make it static",
            ) from error
        if value.dtype not in SHORT_DTYPES:
            raise ImportRefusedError(
                f"dtype {value.dtype} cannot be held",
                where=inputs[placeholder],
                remedy="convert it",
            )
        yield inputs[placeholder], TensorType(SHORT_DTYPES[value.dtype], shape)


def _output_names(program: ExportedProgram) -> list[str | None]:
    """One name for each flat output; None for those that are None."""
    spec = program.call_spec.out_spec
    is_tuple = not spec.is_leaf() and spec.type in (tuple, list)
    found: list[str | None] = []
    taken: set[str] = set()
    user = [s for s in program.graph_signature.output_specs if s.kind == OutputKind.USER_OUTPUT]
    for output, path in zip(user, _leaf_paths(spec), strict=True):
        wanted = output_name(path, is_tuple=is_tuple)
        if isinstance(output.arg, ConstantArgument) and output.arg.value is None:
            found.append(None)
            continue
        if not isinstance(output.arg, TensorArgument):
            raise ImportRefusedError(
                f"output {wanted} is not a tensor",
                where=wanted,
                remedy="return tensors only: wrap the module and drop that output",
            )
        name = unique_name(wanted, taken)
        taken.add(name)
        found.append(name)
    return found


def _own_value(value: Any, reader: Reader) -> Out | Ref:
    """The value as a graph output: a constant that the module returns needs a node that gives it."""
    if not isinstance(value, Const):
        assert isinstance(value, Out | Ref)
        return value
    step = Step("aten.clone.default", (value,), {}, "", 0)
    reader.steps.append(step)
    return Out(step)


def _leaf_paths(spec: Any) -> list[list[str]]:
    """The path of keys to each leaf of a pytree spec, in order."""
    if spec is None or spec.is_leaf():
        return [[]]
    children: Sequence[Any] = spec.children()
    keys = _keys(spec, len(children))
    return [
        [key, *rest]
        for key, child in zip(keys, children, strict=True)
        for rest in _leaf_paths(child)
    ]


def _keys(spec: Any, count: int) -> list[str]:
    context = spec.context
    if isinstance(context, type) and hasattr(context, "_fields"):  # a named tuple
        return list(context._fields)
    listed = context
    if isinstance(context, list | tuple) and context and isinstance(context[0], list | tuple):
        listed = context[0]  # a dataclass: its fields with a value, then those without
    if isinstance(listed, list | tuple) and len(listed) == count:
        return [str(key) for key in listed]
    return [str(position) for position in range(count)]
