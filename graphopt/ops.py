"""What an op takes and returns, from torch's own registry, and whether it may stand in a graph.

An op is named as torch names its overload, `aten.linear.default`; arithmetic on symbolic integers
has the few `sym.*` ops below. An op may be used when it is functional: it does not mutate, has no
`out=`, is not random, and touches neither files nor devices. Output shapes that depend on tensor
contents (`nonzero`) are refused too: nothing downstream could be typed.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from graphopt import dims
from graphopt.dims import Dim
from graphopt.errors import UnknownOpError, nearest
from graphopt.types import short_dtype

SYM_OPS: dict[str, Callable[..., Dim]] = {
    "sym.add": lambda a, b: a + b,
    "sym.sub": lambda a, b: a - b,
    "sym.mul": lambda a, b: a * b,
    "sym.neg": lambda a: a * -1,
    "sym.floordiv": dims.floordiv,
    "sym.mod": dims.mod,
    "sym.max": dims.maximum,
    "sym.min": dims.minimum,
}
# Functional by their schema, and yet not to be let in: they open a path, or hand out memory nobody
# wrote.
_FORBIDDEN = frozenset(
    {
        "from_file",
        "set_data",
        "_fw_primal",
        "record_stream",
        "empty",
        "empty_like",
        "new_empty",
        "empty_strided",
    }
)
# Ops torch tags random whose randomness an argument turns off, and the value that does.
RANDOM_SWITCHES: dict[str, Any] = {"dropout_p": 0.0, "train": False}
_SIZE = re.compile(r"SymInt(?:\[\d*\])?\??(?:\[\])?\?? (\w+)")
_MEMORY_FORMATS = ("contiguous_format", "channels_last", "channels_last_3d", "preserve_format")


@dataclass(frozen=True, slots=True)
class Param:
    """One parameter of an op. `kind` is the schema's element type: Tensor, int, float, number,
    bool, str, ScalarType, ...
    """

    name: str
    kind: str
    is_list: bool
    is_optional: bool
    is_keyword: bool
    has_default: bool
    default: Any
    is_size: bool = False  # an int that may be dynamic: SymInt in the schema


@dataclass(frozen=True, slots=True)
class OpSpec:
    """The signature of an op. `returns` counts its tensors; None for a list whose length the
    arguments decide.
    """

    name: str
    params: tuple[Param, ...]
    returns: int | None

    def why_random(self, bound: Mapping[str, Any]) -> str:
        """Why the op is random with these arguments; empty when it is not."""
        for param in self.params:
            off = RANDOM_SWITCHES.get(param.name)
            if off is not None and bound[param.name] != off:
                return f"{self.name} is random unless {param.name} is {off}"
        return ""

    def param_idx(self, name: str) -> int | None:
        """The position of the parameter called `name`."""
        return next((i for i, param in enumerate(self.params) if param.name == name), None)


@lru_cache(maxsize=4096)
def get_spec(name: str) -> OpSpec:
    """The signature of the op `name`; UnknownOpError when torch has no such op or a graph may not
    hold it.
    """
    if name in SYM_OPS:
        arity = 1 if name == "sym.neg" else 2
        params = tuple(
            Param(p, "int", False, False, False, False, None, True) for p in ("a", "b")[:arity]
        )
        return OpSpec(name, params, 1)
    overload = get_overload(name)
    schema = overload._schema
    reason = _why_forbidden(overload)
    if reason:
        raise UnknownOpError(
            f"op {name} may not be used in a graph: {reason}",
            where=name,
            remedy="use its functional form",
        )
    sizes = set(_SIZE.findall(str(schema)))  # the only place that tells SymInt from int
    params = tuple(
        replace(param, is_size=param.name in sizes) for param in map(_param, schema.arguments)
    )
    is_list = any(str(value.type).startswith("List") for value in schema.returns)
    return OpSpec(name, params, None if is_list else len(schema.returns))


def get_overload(name: str) -> Any:
    """Torch's callable for `name`; UnknownOpError with the nearest names when there is none."""
    parts = name.split(".")
    if len(parts) == 3:
        namespace = getattr(torch.ops, parts[0], None)
        packet = getattr(namespace, parts[1], None) if namespace is not None else None
        if isinstance(packet, torch._ops.OpOverloadPacket) and parts[2] in _overloads(packet):
            return getattr(packet, parts[2])
    raise UnknownOpError(f"no op {name!r}", where=name, remedy=_nearest_op(name))


def canonical_literal(param: Param, value: Any) -> Any:
    """`value` as `param` stores it (ints become floats where the schema wants floats, dtypes get
    short names).

    References pass through unchanged. ValueError says why a value does not fit.
    """
    if value is None:
        if param.is_optional or (param.has_default and param.default is None):
            return None
        raise ValueError(f"{param.name} may not be none")
    if param.is_list:
        items = value if isinstance(value, list | tuple) else (value,)
        return tuple(_scalar(param, item) if item is not None else None for item in items)
    return _scalar(param, value)


def _scalar(param: Param, value: Any) -> Any:
    if not isinstance(value, bool | int | float | str):
        if isinstance(value, list | tuple):
            raise ValueError(f"{param.name} takes one {param.kind}, not a list")
        return value  # a reference, checked when types are inferred
    kind = param.kind
    if kind == "ScalarType" and isinstance(value, str):
        return short_dtype(value)
    if kind == "MemoryFormat" and value in _MEMORY_FORMATS:
        return value
    if kind == "Layout" and value == "strided":
        return value
    if kind == "Device" and value == "cpu":
        raise ValueError("devices are chosen by the engine; leave the argument out")
    if kind in ("float", "number", "Tensor") and value in ("inf", "-inf", "nan"):
        return float(value)  # documents carry no Infinity literal
    if kind == "float" and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind in ("number", "Tensor") and isinstance(value, bool | int | float):
        return value
    if kind == "int" and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind == "bool" and isinstance(value, bool):
        return value
    if kind == "str" and isinstance(value, str):
        return value
    raise ValueError(f"{param.name} takes {param.kind}, not {value!r}")


def same_literal(left: Any, right: Any) -> bool:
    """Whether two literals are the same value of the same type (`1` is not `1.0`, nan is nan, `0.0`
    is not `-0.0`).
    """
    if type(left) is not type(right):
        return False
    if isinstance(left, tuple):
        return len(left) == len(right) and all(map(same_literal, left, right))
    if isinstance(left, float):
        return repr(left) == repr(right)  # nan is nan, 0.0 is not -0.0
    return bool(left == right)


def _why_forbidden(overload: Any) -> str:
    schema, tags = overload._schema, overload.tags
    base = schema.name.split("::")[1]
    if schema.is_mutable or any(argument.is_out for argument in schema.arguments):
        return "it writes into one of its arguments"
    if torch.Tag.nondeterministic_seeded in tags and not any(
        a.name in RANDOM_SWITCHES for a in schema.arguments
    ):
        return "it is random"
    if torch.Tag.dynamic_output_shape in tags or torch.Tag.data_dependent_output in tags:
        return "its output shape depends on tensor contents"
    if base in _FORBIDDEN or any(
        str(a.real_type) in ("Stream", "Storage") for a in schema.arguments
    ):
        return "it touches memory, files or devices outside the graph"
    if not schema.returns:
        return "it returns nothing"
    return ""


def _param(argument: Any) -> Param:
    kind = str(argument.real_type)
    is_optional = kind.startswith("Optional[")
    kind = kind.removeprefix("Optional[").removesuffix("]") if is_optional else kind
    is_list = kind.startswith("List[")
    kind = kind.removeprefix("List[").removesuffix("]") if is_list else kind
    if kind.startswith("Optional["):  # a list of optional tensors
        kind = kind.removeprefix("Optional[").removesuffix("]")
    default = argument.default_value if argument.has_default_value() else None
    if is_list and isinstance(default, int | float):
        default = (default,)
    param = Param(
        argument.name,
        kind,
        is_list,
        is_optional,
        argument.kwarg_only,
        argument.has_default_value(),
        None,
    )
    if default is not None and kind in ("ScalarType", "MemoryFormat", "Layout"):
        default = _ENUM_DEFAULTS[kind](default)
    default = (
        canonical_literal(param, tuple(default) if isinstance(default, list) else default)
        if default is not None
        else None
    )
    return Param(
        param.name, kind, is_list, is_optional, argument.kwarg_only, param.has_default, default
    )


_SCALAR_TYPES = ("u8", "i8", "i16", "i32", "i64", "f16", "f32", "f64", "c32", "c64", "c128", "bool")
_ENUM_DEFAULTS: dict[str, Callable[[int], str]] = {
    "ScalarType": lambda code: _SCALAR_TYPES[code],  # the order of c10::ScalarType
    "MemoryFormat": lambda code: (
        "contiguous_format",
        "preserve_format",
        "channels_last",
        "channels_last_3d",
    )[code],
    "Layout": lambda _: "strided",
}


def _overloads(packet: Any) -> list[str]:
    names: list[str] = packet.overloads()
    return names


def _nearest_op(name: str) -> str:
    parts = name.split(".")
    if len(parts) != 3:
        return "write namespace.op.overload, for example aten.relu.default"
    packet = getattr(torch.ops.aten, parts[1], None) if parts[0] == "aten" else None
    if isinstance(packet, torch._ops.OpOverloadPacket):
        return f"its overloads are {', '.join(_overloads(packet))}"
    names = {
        schema.name.removeprefix("aten::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("aten::")
    }
    return nearest(parts[1], (n for n in names if not n.startswith("_")))
