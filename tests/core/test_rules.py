"""Type rules say what torch says: static shapes against a run, symbolic ones against static ones,
fits against sizes never probed.
"""

import itertools
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch._subclasses.fake_tensor import FakeTensorMode

from graphopt.analysis.fake_run import fake_tensor, fault_of
from graphopt.analysis.infer import infer_node
from graphopt.analysis.probe import torch_literal
from graphopt.analysis.rules import RULES
from graphopt.dims import Dim, evaluate, floordiv, symbol
from graphopt.errors import TypeMismatchError
from graphopt.graph import Node, Ref
from graphopt.nodes import make_node
from graphopt.ops import get_overload, get_spec
from graphopt.types import CONTIGUOUS, STRIDED, Layout, SymIntType, TensorType, ValueType
from strategies import randoms

torch.set_num_threads(1)

SYMBOLS = ("a", "b")
AS_RESHAPE = ("aten.view.default", "aten._unsafe_view.default")
Args = tuple[Any, ...]


class Case:
    """Draws the arguments of one call; types land in `types` and stand in the arguments as
    references.
    """

    def __init__(self, random: Random, *, symbolic: bool) -> None:
        self.random = random
        self.symbolic = symbolic
        self.types: dict[str, ValueType] = {}

    def size(self) -> Dim:
        if self.symbolic and self.random.randint(0, 1):
            base = symbol(self.random.choice(SYMBOLS))
            return self.random.choice([base, base, base * 2, base + 1, floordiv(base, 2) + 1])
        return self.random.choice([1, 2, 3, 4, 6])

    def shape(self, low: int = 0, high: int = 4) -> tuple[Dim, ...]:
        return tuple(self.size() for _ in range(self.random.randint(low, high)))

    def tensor(
        self,
        shape: tuple[Dim, ...] | None = None,
        dtype: str | None = None,
        layout: Layout | None = None,
    ) -> Ref:
        shape = self.shape() if shape is None else shape
        dtype = dtype or self.random.choice(["f32", "f32", "f32", "f64", "i64", "bool", "bf16"])
        ref = Ref(f"t{len(self.types)}")
        self.types[ref.id] = TensorType(
            dtype, shape, self.layout(len(shape)) if layout is None else layout
        )
        return ref

    def layout(self, rank: int) -> Layout:
        kind = self.random.randint(0, 5)
        if rank < 2 or kind < 4:
            return CONTIGUOUS
        if kind == 4:
            return STRIDED
        order = list(range(rank))
        self.random.shuffle(order)
        return CONTIGUOUS if order == sorted(order) else tuple(order)

    def number(self, dim: Dim) -> Any:
        """A size as an argument: a literal, or a reference to a symbolic integer."""
        if isinstance(dim, int):
            return dim
        ref = Ref(f"t{len(self.types)}")
        self.types[ref.id] = SymIntType(dim)
        return ref

    def type(self, ref: Ref) -> TensorType:
        found = self.types[ref.id]
        assert isinstance(found, TensorType)
        return found

    def like(self, ref: Ref) -> tuple[Dim, ...]:
        """A shape that mostly broadcasts with that of `ref`."""
        shape = [self.random.choice([dim, dim, dim, 1]) for dim in self.type(ref).shape]
        return tuple(
            shape[self.random.randint(0, len(shape)) :] if self.random.randint(0, 2) == 0 else shape
        )

    def axis(self, rank: int) -> int:
        return (
            self.random.randint(-rank - 1, rank)
            if self.random.randint(0, 9) == 0
            else self.random.randrange(-rank or -1, rank or 1)
        )


def arguments(op: str, case: Case) -> Args:
    """Arguments that mostly fit `op`."""
    r, name = case.random, op.split(".")[1]
    params = [param.name for param in get_spec(op).params]
    x = case.tensor()
    rank = case.type(x).rank
    match name:
        case "add" | "sub" | "rsub" | "mul" | "div" | "eq" | "ne" | "lt" | "le" | "gt" | "ge":
            if op.endswith("Scalar"):
                return (x, r.choice([2, 0.5, True]))
            other = case.tensor(case.like(x), r.choice([case.type(x).dtype, None]))
            return (x, r.choice([other, other, other, 2.0, 3]))
        case "pow" | "elu" | "leaky_relu":
            return (x, r.choice([2, 0.5]))
        case "clamp":
            return (x, r.choice([None, 0.0, 1]), 2.0)
        case "softmax":
            return (x, case.axis(rank), *r.choice([(), ("f64",)]))
        case "_softmax":
            return (x, case.axis(rank), r.choice([False, False, True]))
        case "where":
            condition = case.tensor(case.like(x), "bool")
            return (condition, x, case.tensor(case.like(x), r.choice([case.type(x).dtype, None])))
        case "linear" | "addmm" | "mm" | "matmul" | "bmm":
            return _products(name, case)
        case "embedding":
            return (
                case.tensor(case.shape(2, 2), "f32"),
                case.tensor(None, r.choice(["i64", "i32", "f32"])),
            )
        case "layer_norm":
            x = case.tensor(case.shape(1, 4), "f32")
            tail = case.type(x).shape[-r.randint(1, case.type(x).rank) :]
            weights = [case.tensor(tail, "f32", CONTIGUOUS) for _ in range(r.randint(0, 2))]
            return (x, tuple(case.number(dim) for dim in tail), *weights)
        case "batch_norm":
            return _batch_norm(case)
        case "scaled_dot_product_attention":
            return _attention(case)
        case "conv2d" | "convolution":
            return _convolution(name, case)
        case "max_pool2d" | "avg_pool2d":
            x = case.tensor(case.shape(3, 4), "f32")
            kernel, stride = r.choice([(2,), (3,), (2, 3), (1, 1)]), r.choice([(), (1,), (2, 2)])
            return (
                x,
                kernel,
                stride,
                r.choice([(0,), (1,), (0, 1)]),
                *r.choice([(), ((1,),), ((1,), True)] if name == "max_pool2d" else [(), (True,)]),
            )
        case "cat":
            first = case.tensor(case.shape(1, 3))
            axis = case.axis(case.type(first).rank)
            shape = list(case.type(first).shape)
            shape[axis % len(shape)] = case.size()
            return (
                (first, case.tensor(tuple(shape), r.choice([case.type(first).dtype, None]))),
                axis,
            )
        case _:
            return _shaping(op, name, params, case, x)


def _products(name: str, case: Case) -> Args:
    r, inner, n_out = case.random, case.size(), case.size()
    dtype = r.choice(["f32", "f64"])
    other = r.choice([inner, inner, inner, inner, case.size()])
    match name:
        case "linear":
            bias = [case.tensor((n_out,), dtype)] if r.randint(0, 1) else []
            return (
                case.tensor((*case.shape(0, 3), inner), dtype),
                case.tensor((n_out, other), r.choice([dtype, dtype, "f32"])),
                *bias,
            )
        case "mm":
            return (case.tensor((case.size(), inner), dtype), case.tensor((other, n_out), dtype))
        case "addmm":
            rows = case.size()
            bias = case.tensor(r.choice([(n_out,), (rows, n_out), (1,), ()]), dtype)
            return (bias, case.tensor((rows, inner), dtype), case.tensor((other, n_out), dtype))
        case "bmm":
            batch = case.size()
            return (
                case.tensor((batch, case.size(), inner), dtype),
                case.tensor((batch, other, n_out), dtype),
            )
        case _:
            lead = case.shape(0, 2)
            left = (*lead, case.size(), inner) if r.randint(0, 5) else (inner,)
            right = (
                (*r.choice([lead, (), lead[-1:], case.shape(0, 2)]), other, n_out)
                if r.randint(0, 5)
                else (other,)
            )
            return (case.tensor(left, dtype), case.tensor(right, dtype))


def _batch_norm(case: Case) -> Args:
    x = case.tensor(case.shape(2, 4), "f32")
    channels = (case.type(x).shape[1],)
    stats = [case.tensor(channels, "f32", CONTIGUOUS) for _ in range(4)]
    return (x, *stats, False, 0.1, 1e-5, True)


def _attention(case: Case) -> Args:
    r, batch, heads, length, size = (
        case.random,
        case.size(),
        case.size(),
        case.size(),
        case.random.choice([2, 4, 8]),
    )
    keys = r.choice([length, case.size()])

    def layout() -> Layout:
        return r.choice([CONTIGUOUS, (0, 2, 1, 3)])

    query = case.tensor((batch, heads, length, size), "f32", layout())
    key, value = (
        case.tensor((batch, heads, keys, r.choice([size, size, size, 4])), "f32", layout())
        for _ in range(2)
    )
    mask = case.tensor(
        r.choice([(length, keys), (batch, 1, length, keys), (batch, 1, 1, keys)]),
        r.choice(["f32", "bool"]),
        CONTIGUOUS,
    )
    return (query, key, value, r.choice([None, mask]))


def _convolution(name: str, case: Case) -> Args:
    r, groups = case.random, case.random.choice([1, 1, 2])
    n_in = r.choice([2, 4]) * groups
    x = case.tensor((case.size(), n_in, *(r.choice([case.size(), 7, 8]) for _ in range(2))), "f32")
    weight = case.tensor(
        (
            2 * groups,
            r.choice([n_in // groups, n_in // groups, 3]),
            r.choice([1, 3]),
            r.choice([1, 2, 3]),
        ),
        "f32",
    )
    bias = r.choice([None, case.tensor((2 * groups,), "f32", CONTIGUOUS)])
    stride, padding, dilation = (
        r.choice([(1, 1), (2, 2), (2,)]),
        r.choice([(0, 0), (1, 1), (1,)]),
        r.choice([(1, 1), (2, 2)]),
    )
    if name == "conv2d":
        return (x, weight, bias, stride, padding, dilation, groups)
    return (x, weight, bias, stride, padding, dilation, False, (0, 0), groups)


def _shaping(op: str, name: str, params: list[str], case: Case, x: Ref) -> Args:
    r, type_ = case.random, case.type(x)
    rank = type_.rank
    match name:
        case "sym_size":
            return (x, case.axis(rank))
        case "view" | "reshape" | "_unsafe_view":
            dims: list[Any] = [case.number(dim) for dim in type_.shape]
            if len(dims) > 1 and r.randint(0, 1):
                at = r.randrange(len(dims) - 1)
                dims[at : at + 2] = [case.number(type_.shape[at] * type_.shape[at + 1])]
            if dims and r.randint(0, 1):
                dims[r.randrange(len(dims))] = -1
            return (x, tuple(dims) if r.randint(0, 4) else (*dims, r.choice([1, 2])))
        case "permute":
            order = list(range(rank))
            r.shuffle(order)
            return (x, tuple(order) if r.randint(0, 5) else tuple(order[1:]))
        case "transpose":
            return (x, case.axis(rank), case.axis(rank))
        case "unsqueeze":
            return (x, r.randint(-rank - 2, rank + 1))
        case "expand":
            sizes: list[Any] = [
                r.choice([case.number(dim), -1]) if dim != 1 else r.choice([1, 3, -1])
                for dim in type_.shape
            ]
            return (x, tuple([2] * r.randint(0, 1) + sizes))
        case "select":
            return (x, case.axis(rank), r.choice([0, 0, -1] if case.symbolic else [0, -1, 1, 5]))
        case "slice":
            return (
                x,
                case.axis(rank),
                r.choice([None, 0, 0, 1, -1]),
                r.choice([None, (1 << 63) - 1, 2, -1, 1]),
                r.choice([1, 1, 2]),
            )
        case "mean" | "sum" | "amax" | "amin":
            axes = tuple(sorted({case.axis(rank) for _ in range(r.randint(0, 2))}))
            return (x, axes, r.choice([False, True]))
        case "clone" | "contiguous":
            return (x,)
        case "_to_copy" | "to":
            return (x, *((r.choice(["f32", "f16", "i64"]),) if name == "to" else ()))
    assert len([p for p in get_spec(op).params if not p.has_default]) == 1, op
    return (x,)


def torch_says(node: Node, types: dict[str, ValueType], sizes: dict[str, int]) -> tuple[Any, ...]:
    """The outputs of a call on fake CPU tensors."""
    with FakeTensorMode():
        return call(node, types, sizes)


def torch_runs(node: Node, types: dict[str, ValueType]) -> tuple[Any, ...]:
    """The outputs of a real call on ones; whatever torch raises when it refuses. Fake tensors take
    dtypes that no kernel does.
    """
    return call(node, types, {}, torch.ones_like)


def call(
    node: Node,
    types: dict[str, ValueType],
    sizes: dict[str, int],
    fill: Any = lambda tensor: tensor,
) -> tuple[Any, ...]:
    def final(param: Any, arg: Any) -> Any:
        if isinstance(arg, Ref):
            type_ = types[arg.id]
            return (
                fill(fake_tensor(type_, sizes))
                if isinstance(type_, TensorType)
                else evaluate(type_.value, sizes)
            )
        if isinstance(arg, tuple):
            return [final(param, item) for item in arg]
        return torch_literal(param, arg)

    with torch.no_grad():
        args = [final(param, arg) for param, arg in zip(node.spec.params, node.args, strict=False)]
        kwargs = {name: final(None, arg) for name, arg in node.kwargs}
        out = (torch.reshape if node.op in AS_RESHAPE else get_overload(node.op))(*args, **kwargs)
    return tuple(out) if isinstance(out, tuple | list) else (out,)


def check_call(op: str, random: Random, *, symbolic: bool) -> str:
    """Compares one call; says whether it was taken or refused."""
    case = Case(random, symbolic=symbolic)
    node = make_node("n", op, arguments(op, case))
    points = [{"a": 4, "b": 6}, {"a": 5, "b": 9}] if symbolic else [{}]
    try:
        types = infer_node(node, lambda ref: case.types[ref.id])
    except TypeMismatchError:
        if not symbolic:
            with pytest.raises(Exception):  # noqa: B017, PT011 - whatever torch likes
                torch_runs(node, case.types)
        return "refused"
    for point in points:
        found = torch_says(node, case.types, point)
        assert len(found) == len(types)
        for type_, value in zip(types, found, strict=True):
            fault = fault_of(type_, value, point)
            assert not fault, (op, node.args, node.kwargs, case.types, point, fault)
    return "taken"


@pytest.mark.parametrize("op", sorted(RULES))
def test_a_rule_says_what_torch_says(op: str) -> None:
    outcomes = {
        check_call(op, Random(f"{op} {seed}"), symbolic=seed % 2 == 1) for seed in range(30)
    }
    assert "taken" in outcomes


@settings(max_examples=50, deadline=None, database=None, derandomize=True)
@given(random=randoms)
def test_any_rule_at_any_static_and_symbolic_shape(random: Random) -> None:
    check_call(random.choice(sorted(RULES)), random, symbolic=random.choice((False, True)))


NORM_DTYPES = ("f32", "f64", "bf16", "i64")


@pytest.mark.parametrize("dtypes", list(itertools.product(NORM_DTYPES, repeat=3)), ids="-".join)
@pytest.mark.parametrize("op", ["layer_norm", "native_layer_norm", "batch_norm"])
def test_a_norm_is_taken_where_the_cpu_has_a_kernel_for_it(
    op: str, dtypes: tuple[str, ...]
) -> None:
    x, weight, stats = dtypes
    types = {
        "x": TensorType(x, (2, 4)), "w": TensorType(weight, (4,)), "b": TensorType(weight, (4,)),
        "m": TensorType(stats, (4,)), "v": TensorType(stats, (4,)),
    }  # fmt: skip
    refs = {name: Ref(name) for name in types}
    args: Args = {
        "layer_norm": (refs["x"], (4,), refs["w"], refs["b"]),
        "native_layer_norm": (refs["x"], (4,), refs["w"], refs["b"], 1e-5),
        "batch_norm": (*refs.values(), False, 0.1, 1e-5, False),
    }[op]
    node = make_node("n", f"aten.{op}.default", args)
    try:
        torch_runs(node, dict(types))
    except RuntimeError:
        with pytest.raises(TypeMismatchError):
            infer_node(node, lambda ref: types[ref.id])
    else:
        infer_node(node, lambda ref: types[ref.id])
