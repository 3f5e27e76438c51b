"""Binding: whether the inputs of a request are what the graph declares, and the sizes they bring.

Every request passes here, so the common case is a function generated for the interface, without a
loop: 1 us for three inputs with two dynamic dims. Whatever it does not like goes through the checks
one by one, which say what is wrong. The order in which dims are met is that of a shape bucket.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from graphopt.constants import SHORT_DTYPES, TORCH_DTYPES
from graphopt.dims import Dim, evaluate, symbols_of
from graphopt.errors import RequestError, nearest
from graphopt.graph import Symbol
from graphopt.types import TensorType

INTERFACES_KEPT = 1024  # generated functions: every model's, and those of its last revisions

Inputs = Mapping[str, torch.Tensor]
Bound = tuple[dict[str, Any], dict[str, int]]
"""The environment a request starts with, by value key, and its symbols' sizes in bucket order."""
Bind = Callable[[Inputs], Bound]
"""Raises RequestError naming input, dim and remedy."""


@dataclass(frozen=True, slots=True)
class InputSpec:
    """What a request must bring for one input; dims are ints or symbol expressions."""

    name: str
    type: TensorType
    dtype: torch.dtype


@lru_cache(maxsize=INTERFACES_KEPT)
def binder_of(inputs: tuple[tuple[str, TensorType], ...], symbols: tuple[Symbol, ...]) -> Bind:
    """The binder of an interface."""
    specs = tuple(InputSpec(name, type_, TORCH_DTYPES[type_.dtype]) for name, type_ in inputs)

    def check(given: Inputs) -> Bound:
        return _check(specs, symbols, given)

    source = _source(specs, symbols)
    if source is None:
        return check
    names: dict[str, Any] = {"check": check}
    names |= {f"type_{i}": spec.dtype for i, spec in enumerate(specs)}
    exec(compile(source, "<binder>", "exec"), names)  # noqa: S102: our own source
    bind: Bind = names["bind"]
    return bind


def bucket_symbols(inputs: tuple[tuple[str, TensorType], ...]) -> tuple[str, ...]:
    """The dynamic dims in the order in which inputs bring them: the order of a shape bucket."""
    dims = (dim for _, type_ in inputs for dim in type_.shape if not isinstance(dim, int))
    return tuple(dict.fromkeys(str(dim) for dim in dims if _is_symbol(dim)))


def _is_symbol(dim: Dim) -> bool:
    return not isinstance(dim, int) and symbols_of(dim) == {str(dim)}


def _source(specs: tuple[InputSpec, ...], symbols: tuple[Symbol, ...]) -> str | None:
    """The text of `bind`; None where a dim is computed from others. Names are written as literals."""
    dims = [dim for spec in specs for dim in spec.type.shape]
    if not specs or not all(isinstance(dim, int) or _is_symbol(dim) for dim in dims):
        return None
    fetches, tests = [], [f"len(given) == {len(specs)}"]
    sizes: dict[str, str] = {}
    for i, spec in enumerate(specs):
        fetches.append(f"        x{i} = given[{spec.name!r}]")
        tests.append(f"x{i}.dtype is type_{i}")
        if not spec.type.shape:
            tests.append(f"not x{i}.shape")
            continue
        places = [f"x{i}_{axis}" for axis in range(spec.type.rank)]
        fetches.append(f"        {', '.join(places)}, = x{i}.shape")
        for place, dim in zip(places, spec.type.shape, strict=True):
            if isinstance(dim, int):
                tests.append(f"{place} == {dim}")
            elif (known := sizes.setdefault(str(dim), place)) != place:
                tests.append(f"{place} == {known}")
    for symbol in symbols:
        if symbol.name in sizes:
            upper = "" if symbol.max is None else f" <= {symbol.max}"
            tests.append(f"{symbol.min} <= {sizes[symbol.name]}{upper}")
    env = ", ".join(f"{spec.name!r}: x{i}" for i, spec in enumerate(specs))
    found = ", ".join(f"{name!r}: {place}" for name, place in sizes.items())
    lines = ["def bind(given):", "    try:", *fetches, "    except Exception:"]
    lines += ["        return check(given)", f"    if {' and '.join(tests)}:"]
    lines += [f"        return {{{env}}}, {{{found}}}", "    return check(given)"]
    return "\n".join(lines)


def _check(specs: tuple[InputSpec, ...], symbols: tuple[Symbol, ...], inputs: Inputs) -> Bound:
    """What `bind` answers, one check after the other."""
    env: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    computed: list[tuple[InputSpec, Dim, int]] = []  # dims that follow from others
    for spec in specs:
        tensor = inputs.get(spec.name)
        if tensor is None:
            wanted = ", ".join(other.name for other in specs)
            raise RequestError(
                f"input {spec.name!r} is missing",
                where=spec.name,
                remedy=f"the model takes {wanted}",
            )
        if not isinstance(tensor, torch.Tensor):
            raise RequestError(
                f"input {spec.name} is a {type(tensor).__name__}",
                where=spec.name,
                remedy=f"give a tensor, {spec.type}",
            )
        shape = tensor.shape
        if tensor.dtype is not spec.dtype or len(shape) != len(spec.type.shape):
            raise _mismatch(spec, tensor)
        for dim, size in zip(spec.type.shape, shape, strict=True):
            if isinstance(dim, int):
                if dim != size:
                    raise _mismatch(spec, tensor)
            elif not _is_symbol(dim):
                computed.append((spec, dim, size))
            else:
                before = sizes.setdefault(str(dim), size)
                if before != size:
                    raise _disagreement(spec, dim, size, before)
        env[spec.name] = tensor
    for spec, dim, size in computed:
        unknown = symbols_of(dim) - sizes.keys()
        computed_size = size if unknown else evaluate(dim, sizes)
        if computed_size != size:
            raise _disagreement(spec, dim, size, computed_size)
    if len(inputs) != len(specs):
        extra = next(name for name in inputs if all(name != spec.name for spec in specs))
        remedy = nearest(extra, [spec.name for spec in specs])
        raise RequestError(
            f"the model has no input {extra!r}", where=extra, remedy=remedy or "leave it out"
        )
    for symbol in symbols:
        _check_range(symbol, sizes)
    return env, sizes


def _disagreement(spec: InputSpec, dim: Dim, size: int, wanted: int) -> RequestError:
    return RequestError(
        f"dim {dim} is {size} in {spec.name}, {wanted} elsewhere",
        where=spec.name,
        remedy="make the inputs agree",
    )


def _check_range(symbol: Symbol, sizes: Mapping[str, int]) -> None:
    size = sizes.get(symbol.name, symbol.min)
    if size < symbol.min or (symbol.max is not None and size > symbol.max):
        upper = symbol.max if symbol.max is not None else "any size"
        raise RequestError(
            f"{symbol.name} is {size}, the model takes {symbol.min} to {upper}",
            where=symbol.name,
            remedy="cut or pad the input",
        )


def _mismatch(spec: InputSpec, tensor: torch.Tensor) -> RequestError:
    got = f"{SHORT_DTYPES.get(tensor.dtype, tensor.dtype)}[{', '.join(map(str, tensor.shape))}]"
    return RequestError(
        f"input {spec.name} is {got}, the model takes {spec.type}",
        where=spec.name,
        remedy="convert or reshape it",
    )
