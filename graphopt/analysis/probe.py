"""Types of ops without a rule: run the op on torch's meta device at probe sizes and fit the output
shapes.

Each symbol takes a few sizes. An output dim is first fitted as an affine expression by finite
differences, then looked for among products and quotients of operand dims; whatever is found must
hold at every probe. An op without a meta kernel runs on real, small tensors.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import combinations
from typing import Any

import torch

from graphopt.constants import SHORT_DTYPES, TORCH_DTYPES, layout_of
from graphopt.dims import Dim, Expr, evaluate, floordiv, product, symbol, symbols_of
from graphopt.errors import TypeMismatchError
from graphopt.ops import Param, get_overload, get_spec
from graphopt.types import STRIDED, Layout, SymIntType, TensorType, ValueType

# Distinct, twice a prime or nearly: a fit that holds at them is no coincidence of small factors.
BASE_SIZES = (6, 10, 14, 22, 26, 34, 38, 46)
STEP = 4  # even, so that windows of stride 2 or 4 fit exactly
CHECKS = (
    (1, 1),
    (2, 5),
    (3, STEP),
    (1, 7),
)  # factor and offset of further sizes of all symbols: odd ones too
RESIDUES = 32  # sizes in a row that tell floor divisions by up to 32 apart
CALL_ELEMENTS_MAX = 1 << 20  # of a real call during inference: a millisecond or two
_KERNELS_KNOWN = frozenset({"f32", "f64", "f16", "bf16"})
_UNSUPPORTED = re.compile(
    r"not implemented for|(not|only) supported|unsupported|mixed dtype|expected scalar type",
    re.IGNORECASE,
)

Shapes = list[tuple[int, ...]]


def infer(op: str, bound: Mapping[str, Any]) -> tuple[ValueType, ...]:
    """The output types of `op`; `bound` maps each parameter to a literal, TensorType or Dim.
    TypeMismatchError if it refuses.
    """
    names = sorted(set().union(*(_symbols(value) for value in bound.values())))
    points = _points(names)
    results = [_run(op, bound, point) for point in points]
    _check_kernel(op, bound, points[0], results[0])
    if len({len(outputs) for outputs in results}) != 1:
        raise TypeMismatchError(
            "the number of outputs depends on a dynamic dim", remedy="make that dim static"
        )
    if names and not all(
        _is_affine(outputs, points, names) for outputs in zip(*results, strict=True)
    ):
        more = _residue_points(names)
        points, results = [*points, *more], [*results, *(_run(op, bound, point) for point in more)]
    unknown = any(_has_unknown_layout(value) for value in bound.values())
    return tuple(
        _type_through(outputs, points, names, bound, unknown=unknown)
        for outputs in zip(*results, strict=True)
    )


def _type_through(
    outputs: tuple[Any, ...],
    points: list[dict[str, int]],
    names: list[str],
    bound: Mapping[str, Any],
    *,
    unknown: bool,
) -> ValueType:
    """The type of one output from what it was at every point."""
    first = outputs[0]
    if isinstance(first, int):
        return SymIntType(_fit(list(outputs), points, names, bound))
    shapes = [tuple(o.shape) for o in outputs]
    if len({len(shape) for shape in shapes}) != 1:
        raise TypeMismatchError(
            "the rank of an output depends on a dynamic dim", remedy="make that dim static"
        )
    dims = tuple(
        _fit([shape[d] for shape in shapes], points, names, bound) for d in range(len(shapes[0]))
    )
    layouts = {layout_of(o) for o in outputs}
    layout: Layout = layouts.pop() if len(layouts) == 1 and not unknown else STRIDED
    return TensorType(SHORT_DTYPES[first.dtype], dims, layout)


def _is_affine(outputs: tuple[Any, ...], points: list[dict[str, int]], names: list[str]) -> bool:
    """Whether every size of an output is affine in the symbols, so that no further point is needed
    to tell.
    """
    sizes = [(o,) if isinstance(o, int) else tuple(o.shape) for o in outputs]
    return all(
        _holds(_affine(list(values), points, names), points, list(values))
        for values in zip(*sizes, strict=False)
    )


def torch_argument(
    param: Param, value: Any, tensor: Callable[[TensorType], Any], size: Callable[[Dim], int]
) -> Any:
    """`value` as torch takes it: types become tensors through `tensor`, dims ints through `size`,
    names torch's objects.
    """
    if isinstance(value, tuple):
        return [torch_argument(param, item, tensor, size) for item in value]
    if isinstance(value, TensorType):
        return tensor(value)
    if isinstance(value, Expr):
        return size(value)
    return torch_literal(param, value)


def torch_literal(param: Param, value: Any) -> Any:
    """A literal as torch takes it: dtype, memory format and layout names become torch's objects."""
    if isinstance(value, str):
        if param.kind == "ScalarType":
            return TORCH_DTYPES[value]
        if param.kind in ("MemoryFormat", "Layout"):
            return getattr(torch, value)
    return value


def _points(names: list[str]) -> list[dict[str, int]]:
    base = {
        name: BASE_SIZES[i % len(BASE_SIZES)] + 50 * (i // len(BASE_SIZES))
        for i, name in enumerate(names)
    }
    if not names:
        return [base]
    steps = [base | {name: base[name] + STEP} for name in names]
    checks = [
        {name: size * factor + offset for name, size in base.items()} for factor, offset in CHECKS
    ]
    return [base, *steps, *checks]


def _residue_points(names: list[str]) -> list[dict[str, int]]:
    """Points that take each symbol through `RESIDUES` sizes in a row, the others at their base."""
    base = _points(names)[0]
    return [base | {name: base[name] + step} for name in names for step in range(RESIDUES)]


def _run(op: str, bound: Mapping[str, Any], point: Mapping[str, int]) -> list[Any]:
    last: Exception | None = None
    for device in ("meta", "cpu"):
        try:
            return _call(op, bound, point, device)
        except NotImplementedError as error:
            last = error
            continue
        except (
            Exception
        ) as error:  # meta kernels written in Python assert, index and divide as they like
            raise TypeMismatchError(str(error).split("\n")[0] or type(error).__name__) from None
    raise TypeMismatchError(f"no kernel for it here: {last}")


def _call(op: str, bound: Mapping[str, Any], point: Mapping[str, int], device: str) -> list[Any]:
    args, kwargs = [], {}
    for param in get_spec(op).params:
        value = torch_argument(
            param,
            bound[param.name],
            lambda type_: _probe_tensor(type_, point, device),
            lambda dim: evaluate(dim, point),
        )
        if param.is_keyword:
            kwargs[param.name] = value
        else:
            args.append(value)
    if "device" in kwargs:
        kwargs["device"] = device
    with torch.no_grad():
        out = get_overload(op)(*args, **kwargs)
    return list(out) if isinstance(out, tuple | list) else [out]


def _check_kernel(
    op: str, bound: Mapping[str, Any], point: Mapping[str, int], outputs: list[Any]
) -> None:
    """Meta kernels take dtypes that no kernel implements (gelu of int64, native_layer_norm of f32 with
    weights of f64): where operands are not floats of one dtype, one real call, if a small one.
    """
    items = [
        item
        for value in bound.values()
        for item in (value if isinstance(value, tuple) else (value,))
    ]
    operands = [item for item in items if isinstance(item, TensorType)]
    flags = [
        bound[p.name]
        for p in get_spec(op).params
        if p.kind in ("Tensor", "number") and isinstance(bound[p.name], bool)
    ]
    dtypes = {type_.dtype for type_ in operands}
    if not flags and dtypes <= _KERNELS_KNOWN and len(dtypes) <= 1:
        return
    sizes = [evaluate(product(type_.shape), point) for type_ in operands]
    if (
        sum(sizes) + sum(out.numel() for out in outputs if isinstance(out, torch.Tensor))
        > CALL_ELEMENTS_MAX
    ):
        return
    try:
        _call(op, bound, point, "cpu")
    except (
        Exception
    ) as error:  # what depends on contents (a division by zero) says nothing about the type
        if _UNSUPPORTED.search(str(error)):
            raise TypeMismatchError(str(error).split("\n")[0]) from None


def _probe_tensor(type_: TensorType, point: Mapping[str, int], device: str) -> torch.Tensor:
    shape = [evaluate(dim, point) for dim in type_.shape]
    dtype = TORCH_DTYPES[type_.dtype]
    make = torch.empty if device == "meta" else torch.ones
    if isinstance(type_.layout, str):
        return make(shape, dtype=dtype, device=device)
    inner = make([shape[d] for d in type_.layout], dtype=dtype, device=device)
    inverse = [type_.layout.index(d) for d in range(len(shape))]
    return inner.permute(inverse)


def _fit(
    values: list[int], points: list[dict[str, int]], names: list[str], bound: Mapping[str, Any]
) -> Dim:
    if not names or len(set(values)) == 1:
        return values[0]
    affine = _affine(values, points, names)
    for candidate in (affine, *_candidates(bound, points, values)):
        if _holds(candidate, points, values):
            return candidate
    raise TypeMismatchError(
        f"its output size is no simple expression of {', '.join(names)}",
        remedy="make those dims static, or split the op",
    )


def _affine(values: list[int], points: list[dict[str, int]], names: list[str]) -> Dim:
    """The affine expression through the base and the steps; it need not hold at the other points."""
    affine: Dim = values[0]
    for name, value in zip(names, values[1 : 1 + len(names)], strict=True):
        affine = affine + (symbol(name) - points[0][name]) * ((value - values[0]) // STEP)
    return affine


def _holds(candidate: Dim, points: list[dict[str, int]], values: list[int]) -> bool:
    return all(
        evaluate(candidate, point) == value for point, value in zip(points, values, strict=True)
    )


def _candidates(
    bound: Mapping[str, Any], points: list[dict[str, int]], values: list[int]
) -> Iterable[Dim]:
    found: dict[Dim, None] = {}
    numels: list[Dim] = []
    for value in bound.values():
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, TensorType):
                found |= dict.fromkeys(dim for dim in item.shape if isinstance(dim, Expr))
                numels.append(product(item.shape))
            elif isinstance(item, Expr):
                found[item] = None
    dims = list(found)
    yield from (dim + (values[0] - evaluate(dim, points[0])) for dim in dims)
    yield from (a * b for a, b in combinations(dims, 2))
    yield from numels
    plain = [symbol(name) for name in points[0]]
    for dim in [*plain, *dims, *numels]:
        sizes = [evaluate(dim, point) for point in points]
        for divisor in range(
            2, RESIDUES + 1
        ):  # (size + shift) // divisor == value leaves shift an interval at every point
            low = max(value * divisor - size for size, value in zip(sizes, values, strict=True))
            high = min(
                value * divisor - size + divisor - 1
                for size, value in zip(sizes, values, strict=True)
            )
            if low == high:
                yield floordiv(dim + low, divisor)


def _symbols(value: Any) -> set[str]:
    if isinstance(value, TensorType):
        return set().union(*(symbols_of(dim) for dim in value.shape)) if value.shape else set()
    if isinstance(value, Expr):
        return symbols_of(value)
    if isinstance(value, tuple):
        return set().union(*(_symbols(item) for item in value)) if value else set()
    return set()


def _has_unknown_layout(value: Any) -> bool:
    if isinstance(value, tuple):
        return any(_has_unknown_layout(item) for item in value)
    return isinstance(value, TensorType) and value.layout == STRIDED
