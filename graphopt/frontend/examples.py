"""Example inputs and dynamic shapes as one call of the module, in the form torch.export wants.

The rule of `dynamic_shapes`: None makes every dim static; a name, such as "batch", makes dim 0 of
every input tensor that dynamic dim; anything else is torch.export's own structure, in which a dim
may also be given by its name. Torch assumes while it traces that a dynamic dim is neither 0 nor 1,
so examples of size 1 are repeated to 2.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.export import Dim
from torch.utils import _pytree as pytree

from graphopt.errors import ImportRefusedError

Shapes = Any  # None | str | torch.export's dynamic_shapes structure
TRACED_SIZE_MIN = 2  # torch specialises sizes 0 and 1


@dataclass(frozen=True, slots=True)
class Call:
    """How a module is called for tracing, and its dynamic shapes by parameter name.

    `shapes` is None when everything is static; `names` gives each positional example the name of its
    parameter.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shapes: dict[str, Any] | None
    names: tuple[str, ...]

    def leaf_shapes(self) -> list[Any]:
        """What was asked for each flat input, in torch's order; empty when everything is static."""
        leaves: list[Any] = []
        told = self.shapes or {}
        # Variadic arguments are one entry of the shapes; spread them over their values.
        spread = [
            shapes
            for name, asked in told.items()
            for shapes in ([asked] if name in (*self.names, *self.kwargs) else _spread(asked))
        ]
        for value, shapes in zip((*self.args, *self.kwargs.values()), spread, strict=False):
            _collect_shapes(value, shapes, leaves)
        return leaves

    def dims(self) -> list[Any]:
        """The named dims asked for."""
        found = [dim for shapes in self.leaf_shapes() for _, dim in axes_of(shapes)]
        return [dim for dim in found if isinstance(dim, Dim)]

    def with_dims(self, dims: Mapping[str, Any]) -> "Call":
        """The same call with other dims in the place of those of the same name."""
        return replace(self, shapes=_replaced(self.shapes, dims))


def axes_of(shapes: Any) -> list[tuple[int, Any]]:
    """What was asked for one tensor, as (axis, dim) pairs."""
    if isinstance(shapes, Mapping):
        return [(axis, dim) for axis, dim in shapes.items() if isinstance(axis, int)]
    return list(enumerate(shapes)) if isinstance(shapes, list | tuple) else []


def prepare_call(forward: Callable[..., Any], examples: Any, shapes: Shapes) -> Call:
    """Examples as a call of `forward`, each tensor a fresh contiguous copy.

    Dynamic dims of size 1 become 2. Copies keep a tensor given twice (`attention(x, x, x)`) from
    being traced as one input. `examples` is a tensor, a tuple or list of positional arguments, or a
    mapping of keyword arguments.

    Raises:
        ImportRefusedError: examples or shapes do not fit `forward`.
    """
    args, kwargs = _split(examples)
    signature = inspect.signature(forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ImportRefusedError(
            f"the example inputs do not fit the module: {error}",
            where="example_inputs",
            remedy=f"its forward takes {signature}",
        ) from error
    told = None if shapes is None else _by_parameter(bound.arguments, shapes)
    keywords = [p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]
    if told is not None and keywords and keywords[0] in bound.arguments:
        raise ImportRefusedError(
            f"torch cannot trace dynamic dims beside inputs that forward takes as **{keywords[0]}",
            where=", ".join(bound.arguments[keywords[0]]),
            remedy="name these inputs in the parameters of forward",
        )
    for name, value in bound.arguments.items():
        bound.arguments[name] = _copied(value, (told or {}).get(name))
    return Call(bound.args, bound.kwargs, told, _positional_names(signature, len(bound.args)))


def _split(examples: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(examples, Mapping):
        return (), dict(examples)
    if isinstance(examples, list | tuple):
        return tuple(examples), {}
    return (examples,), {}


def _positional_names(signature: inspect.Signature, count: int) -> tuple[str, ...]:
    names: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{i}" for i in range(count - len(names))]
        elif parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            names.append(parameter.name)
    return tuple(names[:count])


def _by_parameter(arguments: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """Torch's structure keyed by parameter, with names made into dims (one object a name)."""
    made: dict[str, Any] = {}
    if isinstance(shapes, str):
        batch = _dim(shapes, made)
        return {name: _first_dims(value, batch) for name, value in arguments.items()}
    if isinstance(shapes, Mapping):
        unknown = [name for name in shapes if name not in arguments]
        if unknown:
            raise ImportRefusedError(
                f"dynamic_shapes names {unknown[0]!r}, which is not an example input",
                where="dynamic_shapes",
                remedy=f"the example inputs are {', '.join(arguments)}",
            )
        told = dict(shapes)
    elif isinstance(shapes, list | tuple) and len(shapes) <= len(arguments):
        told = dict(zip(arguments, shapes, strict=False))
    else:
        raise ImportRefusedError(
            f"dynamic_shapes does not match the example inputs {', '.join(arguments)}",
            where="dynamic_shapes",
            remedy='give None, a name such as "batch", or one entry for each input',
        )
    return {name: _with_dims(told.get(name), made) for name in arguments}


def _with_dims(shapes: Any, made: dict[str, Any]) -> Any:
    if isinstance(shapes, str):
        return _dim(shapes, made)
    if isinstance(shapes, Mapping):
        return {key: _with_dims(value, made) for key, value in shapes.items()}
    if isinstance(shapes, list | tuple):
        return type(shapes)(_with_dims(value, made) for value in shapes)
    return shapes


def _dim(name: str, made: dict[str, Any]) -> Any:
    if not name.isidentifier():
        raise ImportRefusedError(
            f"{name!r} cannot name a dim",
            where="dynamic_shapes",
            remedy="use letters, digits and _",
        )
    if name not in made:
        made[name] = Dim(name, min=1)
    return made[name]


def _first_dims(value: Any, batch: Any) -> Any:
    return pytree.tree_map(
        lambda leaf: {0: batch} if isinstance(leaf, torch.Tensor) and leaf.ndim else None, value
    )


def _copied(value: Any, shapes: Any) -> Any:
    if isinstance(value, torch.Tensor):
        copy = value.detach()
        for axis in _dynamic_axes(shapes):
            if axis < copy.ndim and copy.shape[axis] == 1:
                copy = copy.repeat_interleave(TRACED_SIZE_MIN, dim=axis)
        return copy.contiguous().clone()
    if isinstance(value, Mapping) and type(value) is dict:
        inner = shapes if isinstance(shapes, Mapping) else {}
        return {key: _copied(item, inner.get(key)) for key, item in value.items()}
    if type(value) in (list, tuple):
        listed = shapes if isinstance(shapes, list | tuple) else [None] * len(value)
        return type(value)(_copied(v, s) for v, s in zip(value, listed, strict=False))
    return pytree.tree_map_only(torch.Tensor, lambda leaf: _copied(leaf, None), value)


def _dynamic_axes(shapes: Any) -> list[int]:
    return [
        a
        for a, dim in axes_of(shapes)
        if dim is not None and dim is not Dim.STATIC and not isinstance(dim, int)
    ]


def _spread(told: Any) -> list[Any]:
    return list(told.values()) if isinstance(told, Mapping) else list(told or ())


def _collect_shapes(value: Any, told: Any, leaves: list[Any]) -> None:
    if isinstance(value, Mapping) and type(value) is dict:
        inner = told if isinstance(told, Mapping) else {}
        for key, item in value.items():
            _collect_shapes(item, inner.get(key), leaves)
    elif type(value) in (list, tuple):
        listed = told if isinstance(told, list | tuple) else [None] * len(value)
        for item, shapes in zip(value, listed, strict=False):
            _collect_shapes(item, shapes, leaves)
    else:
        leaves += [told] * len(pytree.tree_leaves(value))


def _replaced(shapes: Any, dims: Mapping[str, Any]) -> Any:
    if isinstance(shapes, Mapping):
        return {key: _replaced(value, dims) for key, value in shapes.items()}
    if isinstance(shapes, list | tuple):
        return type(shapes)(_replaced(value, dims) for value in shapes)
    return dims.get(shapes.__name__, shapes) if isinstance(shapes, Dim) else shapes
