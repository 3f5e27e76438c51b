"""Types of ops without a rule: run the op on torch's meta device at probe sizes and fit the output shapes.

Each symbol takes a few sizes. An output dim is first fitted as an affine expression by finite differences, then looked for among products
and quotients of operand dims; whatever is found must hold at every probe. An op without a meta kernel runs on real, small tensors.
"""

from collections.abc import Callable, Iterable, Mapping
from itertools import combinations
from typing import Any

import torch

from graphopt.constants import SHORT_DTYPES, TORCH_DTYPES, layout_of
from graphopt.dims import Dim, Expr, evaluate, floordiv, product, symbol, symbols_of
from graphopt.errors import TypeMismatchError
from graphopt.ops import Param, get_overload, get_spec
from graphopt.types import STRIDED, Layout, SymIntType, TensorType, ValueType

# Distinct, odd, coprime: a fit that holds at them is no coincidence of small factors.
BASE_SIZES = (6, 10, 14, 22, 26, 34, 38, 46)
STEP = 4  # even, so that windows of stride 2 or 4 fit exactly
CHECK_FACTORS = (2, 3)

Shapes = list[tuple[int, ...]]


def infer(op: str, bound: Mapping[str, Any]) -> tuple[ValueType, ...]:
    """The output types of `op`; `bound` maps each parameter to a literal, TensorType or Dim. TypeMismatchError if it refuses."""
    names = sorted(set().union(*(_symbols(value) for value in bound.values())))
    points = _points(names)
    results = [_run(op, bound, point) for point in points]
    if len({len(outputs) for outputs in results}) != 1:
        raise TypeMismatchError("the number of outputs depends on a dynamic dim", remedy="make that dim static")
    types: list[ValueType] = []
    unknown = any(_has_unknown_layout(value) for value in bound.values())
    for outputs in zip(*results, strict=True):
        first = outputs[0]
        if isinstance(first, int):
            types.append(SymIntType(_fit([o for o in outputs], points, names, bound)))
            continue
        shapes = [tuple(o.shape) for o in outputs]
        if len({len(shape) for shape in shapes}) != 1:
            raise TypeMismatchError("the rank of an output depends on a dynamic dim", remedy="make that dim static")
        dims = tuple(_fit([shape[d] for shape in shapes], points, names, bound) for d in range(len(shapes[0])))
        layouts = {layout_of(o) for o in outputs}
        layout: Layout = layouts.pop() if len(layouts) == 1 and not unknown else STRIDED
        types.append(TensorType(SHORT_DTYPES[first.dtype], dims, layout))
    return tuple(types)


def torch_argument(param: Param, value: Any, tensor: Callable[[TensorType], Any], size: Callable[[Dim], int]) -> Any:
    """`value` as torch takes it: types become tensors through `tensor`, dims ints through `size`, names torch's objects."""
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
    base = {name: BASE_SIZES[i % len(BASE_SIZES)] + 50 * (i // len(BASE_SIZES)) for i, name in enumerate(names)}
    if not names:
        return [base]
    steps = [base | {name: base[name] + STEP} for name in names]
    checks = [{name: size * factor + STEP for name, size in base.items()} for factor in CHECK_FACTORS]
    return [base, *steps, *checks]


def _run(op: str, bound: Mapping[str, Any], point: Mapping[str, int]) -> list[Any]:
    spec, overload = get_spec(op), get_overload(op)
    last: Exception | None = None
    for device in ("meta", "cpu"):
        def tensor(type_: TensorType, device: str = device) -> torch.Tensor:
            return _probe_tensor(type_, point, device)

        args, kwargs = [], {}
        for param in spec.params:
            value = torch_argument(param, bound[param.name], tensor, lambda dim: evaluate(dim, point))
            if param.is_keyword:
                kwargs[param.name] = value
            else:
                args.append(value)
        if "device" in kwargs:
            kwargs["device"] = device
        try:
            with torch.no_grad():
                out = overload(*args, **kwargs)
        except NotImplementedError as error:
            last = error
            continue
        except Exception as error:  # meta kernels written in Python assert, index and divide as they like
            raise TypeMismatchError(str(error).split("\n")[0] or type(error).__name__) from None
        return list(out) if isinstance(out, tuple | list) else [out]
    raise TypeMismatchError(f"no kernel for it here: {last}")


def _probe_tensor(type_: TensorType, point: Mapping[str, int], device: str) -> torch.Tensor:
    shape = [evaluate(dim, point) for dim in type_.shape]
    dtype = TORCH_DTYPES[type_.dtype]
    make = torch.empty if device == "meta" else torch.zeros
    if isinstance(type_.layout, str):
        return make(shape, dtype=dtype, device=device)
    inner = make([shape[d] for d in type_.layout], dtype=dtype, device=device)
    inverse = [type_.layout.index(d) for d in range(len(shape))]
    return inner.permute(inverse)


def _fit(values: list[int], points: list[dict[str, int]], names: list[str], bound: Mapping[str, Any]) -> Dim:
    if not names or len(set(values)) == 1:
        return values[0]
    base, steps = values[0], values[1 : 1 + len(names)]
    affine: Dim = base
    for name, value in zip(names, steps, strict=True):
        slope, rest = divmod(value - base, STEP)
        if rest:
            break
        affine = affine + (symbol(name) - points[0][name]) * slope
    for candidate in (affine, *_candidates(bound)):
        if all(evaluate(candidate, point) == value for point, value in zip(points, values, strict=True)):
            return candidate
    raise TypeMismatchError(
        f"its output size is no simple expression of {', '.join(names)}", remedy="make those dims static, or split the op"
    )


def _candidates(bound: Mapping[str, Any]) -> Iterable[Dim]:
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
    yield from (a * b for a, b in combinations(dims, 2))
    yield from numels
    for dim in [*dims, *numels]:
        for divisor in (2, 3, 4, 8, 16, 32):
            for shift in range(-divisor, divisor + 1):
                yield floordiv(dim + shift, divisor)


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


