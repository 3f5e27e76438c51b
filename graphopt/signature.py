"""How a graph is called: the module's calling convention, spelled in names.

A graph has flat, named inputs and outputs. The import names them so that the module's own structure
can be read back from the names alone: it survives bundles, deltas and reloads without a further
record.

- `output` alone is a plain tensor; `output_0`, `output_1` is a tuple; anything else is a record with
  these fields (`logits`);
- `hidden_states.0`, `hidden_states.1` is a tuple inside the field `hidden_states`; `cache.key` is a
  field inside `cache`;
- inputs likewise: `x.0` is the first element of what the argument `x` takes.

Lists come back as tuples, dataclasses and dicts as `Fields`. Deliberately absent: arguments that
were Python constants at import.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from graphopt.errors import RequestError, nearest
from graphopt.graph import Graph

SINGLE_OUTPUT = "output"
_ROOT_TUPLE = re.compile(r"output_(\d+)")


class Fields(dict[str, Any]):
    """A record of outputs: `y.logits`, `y["logits"]` and `y[0]` are the same."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(f"no output {name!r}; there are {', '.join(self)}") from error

    def __getitem__(self, key: Any) -> Any:
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)


@dataclass(frozen=True)
class Signature:
    """The names of a graph's inputs and outputs, in order, and the convention they spell."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @cached_property
    def is_plain(self) -> bool:
        """Whether each argument takes one tensor."""
        return not any("." in name for name in self.inputs)

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The flat inputs by name for `engine(*args, **kwargs)`; RequestError when they do not fit."""
        parameters = list(dict.fromkeys(name.split(".")[0] for name in self.inputs))
        if len(args) > len(parameters):
            raise RequestError(
                f"takes {len(parameters)} inputs, not {len(args)}",
                where="call",
                remedy=f"its inputs are {', '.join(parameters)}",
            )
        given = dict(zip(parameters, args, strict=False))
        for name, value in kwargs.items():
            if name in given:
                raise RequestError(f"{name} is given twice", where=name, remedy="leave one out")
            given[name] = value
        flat: dict[str, Any] = {}
        for name, value in given.items():
            _flatten(name, value, flat)
        self._check(flat)
        return flat

    def rebuild(self, outputs: Mapping[str, Any]) -> Any:
        """What the module would have returned, from its flat outputs."""
        if self.outputs == (SINGLE_OUTPUT,):
            return outputs[SINGLE_OUTPUT]
        tree: dict[str, Any] = {}
        for name in self.outputs:
            *parents, last = name.split(".")
            branch = tree
            for parent in parents:
                branch = branch.setdefault(parent, {})
            branch[last] = outputs[name]
        if all(_ROOT_TUPLE.fullmatch(name) for name in tree):
            return _tuple({int(name.split("_")[1]): value for name, value in tree.items()})
        return Fields({name: _folded(value) for name, value in tree.items()})

    def _check(self, flat: Mapping[str, Any]) -> None:
        extra = [name for name in flat if name not in self.inputs]
        if extra:
            remedy = nearest(extra[0], self.inputs) or f"its inputs are {', '.join(self.inputs)}"
            raise RequestError(f"no input {extra[0]!r}", where=extra[0], remedy=remedy)
        missing = [name for name in self.inputs if name not in flat]
        if missing:
            raise RequestError(
                f"input {missing[0]!r} is missing",
                where=missing[0],
                remedy=f"its inputs are {', '.join(self.inputs)}",
            )


def signature_of(graph: Graph) -> Signature:
    """The calling convention that the names of `graph` spell."""
    return Signature(
        tuple(name for name, _ in graph.inputs), tuple(name for name, _ in graph.outputs)
    )


def leaf_name(root: str, path: Sequence[str]) -> str:
    """The flat name of the leaf at `path` inside the argument or field `root`."""
    return ".".join((root, *path))


def output_name(path: Sequence[str], *, is_tuple: bool) -> str:
    """The flat name of the output at `path`, where the empty path is the output itself.

    `is_tuple` says whether the root is a tuple or list.
    """
    if not path:
        return SINGLE_OUTPUT
    root = f"{SINGLE_OUTPUT}_{path[0]}" if is_tuple else path[0]
    return leaf_name(root, path[1:])


def _flatten(name: str, value: Any, flat: dict[str, Any]) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _flatten(f"{name}.{key}", item, flat)
    elif isinstance(value, list | tuple):
        for position, item in enumerate(value):
            _flatten(f"{name}.{position}", item, flat)
    elif value is not None:
        flat[name] = value


def _folded(value: Any) -> Any:
    if type(value) is not dict:
        return value
    if all(name.isdecimal() for name in value):
        return _tuple({int(name): item for name, item in value.items()})
    return Fields({name: _folded(item) for name, item in value.items()})


def _tuple(items: Mapping[int, Any]) -> tuple[Any, ...]:
    # A position without a tensor was None in the module's own answer.
    return tuple(_folded(items.get(position)) for position in range(max(items) + 1))
