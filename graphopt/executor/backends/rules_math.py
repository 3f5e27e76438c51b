"""What elementwise ops, comparisons and reductions mean: see `rule_table`.

Dtypes are promoted as torch does; a function of integers computes in float32. Deliberately absent:
remainders and floor divisions of floats, whose last bit depends on how the quotient is rounded.
"""

import math
from typing import Any

from graphopt.dims import Dim
from graphopt.executor.backends.rule_table import (
    RULES,
    Args,
    Rule,
    axes_of,
    axis_of,
    number,
    operand,
    rule,
)
from graphopt.executor.backends.tape import Tape, elements, promote
from graphopt.executor.backends.target import DeclinedError, InexactError, Value
from graphopt.types import TensorType

_UNARY = (
    "abs", "acos", "acosh", "asin", "asinh", "atan", "atanh", "cos", "cosh", "erf", "exp",
    "hardsigmoid", "hardswish", "log", "mish", "neg", "relu", "rsqrt", "selu", "sigmoid", "sign",
    "silu", "sin", "sinh", "sqrt", "tan", "tanh",
)  # fmt: skip
_COMPARE = ("eq", "ne", "lt", "le", "gt", "ge")
_INF = math.inf


def _unary(kind: str) -> Rule:
    return lambda t, a, out: t.unary(kind, t.cast(a["self"], out.dtype))


def _rounding(kind: str) -> Rule:
    def apply(t: Tape, a: Args, out: TensorType) -> Value:
        x: Value = a["self"]
        return t.unary(kind, x) if out.dtype == "f32" else x  # integers are whole

    return apply


def _test(kind: str) -> Rule:
    return lambda t, a, out: t.unary(kind, t.cast(a["self"], "f32"))


def _compare(kind: str) -> Rule:
    def apply(t: Tape, a: Args, out: TensorType) -> Value:
        dtype = promote(a["self"], _kind(a["other"]))
        return t.compare(kind, t.cast(a["self"], dtype), operand(t, a["other"], dtype))

    return apply


def _logic(kind: str) -> Rule:
    def apply(t: Tape, a: Args, out: TensorType) -> Value:
        return t.binary(kind, t.cast(a["self"], "bool"), operand(t, a["other"], "bool"))

    return apply


def _bitwise(kind: str) -> Rule:
    logic = _logic(kind)

    def apply(t: Tape, a: Args, out: TensorType) -> Value:
        if out.dtype != "bool":
            raise DeclinedError("bits of integers")
        return logic(t, a, out)

    return apply


RULES |= {f"aten.{name}.default": _unary(name) for name in _UNARY}
RULES |= {
    "aten.special_erf.default": _unary("erf"),
    "aten.special_expit.default": _unary("sigmoid"),
}
RULES |= {f"aten.{name}.default": _rounding(name) for name in ("floor", "ceil", "round")}
RULES |= {f"aten.{name}.default": _test(name) for name in ("isnan", "isinf")}
RULES |= {
    f"aten.{name}.{form}": _compare(name) for name in _COMPARE for form in ("Tensor", "Scalar")
}
RULES |= {f"aten.logical_{name}.default": _logic(name) for name in ("and", "or", "xor")}
for _name in ("and", "or", "xor"):
    for _op in (f"bitwise_{_name}", f"__{_name}__"):
        RULES |= {f"aten.{_op}.{form}": _bitwise(_name) for form in ("Tensor", "Scalar")}


def _kind(value: Any) -> Any:
    """An operand as promotion sees it: a size counts as an integer."""
    return value if isinstance(value, Value | bool | int | float) else 1


# -- functions with settings


@rule("gelu.default")
def _gelu(t: Tape, a: Args, out: TensorType) -> Value:
    return t.unary("gelu", a["self"], approximate=a["approximate"])


@rule("logical_not.default")
def _logical_not(t: Tape, a: Args, out: TensorType) -> Value:
    return t.unary("not", t.cast(a["self"], "bool"))


@rule("bitwise_not.default")
def _bitwise_not(t: Tape, a: Args, out: TensorType) -> Value:
    if out.dtype != "bool":
        raise DeclinedError("bits of integers")
    return t.unary("not", a["self"])


@rule("hardtanh.default")
def _hardtanh(t: Tape, a: Args, out: TensorType) -> Value:
    return _clamped(t, a["self"], a["min_val"], a["max_val"], out)


@rule("relu6.default")
def _relu6(t: Tape, a: Args, out: TensorType) -> Value:
    return _clamped(t, a["self"], 0.0, 6.0, out)


@rule("clamp.default")
def _clamp(t: Tape, a: Args, out: TensorType) -> Value:
    return _clamped(t, a["self"], a["min"], a["max"], out)


@rule("clamp_min.default")
def _clamp_min(t: Tape, a: Args, out: TensorType) -> Value:
    return _clamped(t, a["self"], a["min"], None, out)


@rule("clamp_max.default")
def _clamp_max(t: Tape, a: Args, out: TensorType) -> Value:
    return _clamped(t, a["self"], None, a["max"], out)


def _clamped(t: Tape, x: Value, low: Any, high: Any, out: TensorType) -> Value:
    x = t.cast(x, out.dtype)
    if out.dtype == "f32":
        least = -_INF if low is None else number(low, "a bound")
        most = _INF if high is None else number(high, "a bound")
        if math.isnan(least) or math.isnan(most):
            raise InexactError("a bound is nan")
        if least <= most:
            return t.unary("clamp", x, low=least, high=most)
    if low is not None:
        x = t.binary("max", x, operand(t, low, out.dtype))
    return x if high is None else t.binary("min", x, operand(t, high, out.dtype))


@rule("leaky_relu.default")
def _leaky_relu(t: Tape, a: Args, out: TensorType) -> Value:
    return t.unary("leaky_relu", a["self"], slope=number(a["negative_slope"], "the slope"))


@rule("elu.default")
def _elu(t: Tape, a: Args, out: TensorType) -> Value:
    if a["scale"] != 1 or a["input_scale"] != 1:
        raise DeclinedError("a scaled elu")
    return t.unary("elu", a["self"], alpha=number(a["alpha"], "alpha"))


@rule("softplus.default")
def _softplus(t: Tape, a: Args, out: TensorType) -> Value:
    if a["beta"] != 1 or a["threshold"] != 20:
        raise DeclinedError("softplus with settings of its own")
    return t.unary("softplus", a["self"])


@rule("prelu.default")
def _prelu(t: Tape, a: Args, out: TensorType) -> Value:
    x, weight = a["self"], a["weight"]
    slope = weight
    if weight.rank == 1 and x.rank > 1:
        slope = t.reshape(weight, (weight.shape[0], *(1,) * (x.rank - 2)))
    return t.call("prelu", [x, slope], "f32", x.shape)


@rule("log2.default")
def _log2(t: Tape, a: Args, out: TensorType) -> Value:
    return t.scaled(t.unary("log", t.cast(a["self"], out.dtype)), 1 / math.log(2))


@rule("reciprocal.default")
def _reciprocal(t: Tape, a: Args, out: TensorType) -> Value:
    return t.binary("div", t.scalar(1.0, out.dtype), t.cast(a["self"], out.dtype))


@rule("square.default")
def _square(t: Tape, a: Args, out: TensorType) -> Value:
    return _power(t, a["self"], 2, out)


@rule("trunc.default", "fix.default")
def _trunc(t: Tape, a: Args, out: TensorType) -> Value:
    x = a["self"]
    return x if out.dtype != "f32" else _toward_zero(t, x)


def _toward_zero(t: Tape, x: Value) -> Value:
    floor, ceil = t.unary("floor", x), t.unary("ceil", x)
    return t.where(t.compare("lt", x, t.scalar(0.0, "f32")), ceil, floor)


# -- arithmetic


@rule("add.Tensor", "add.Scalar")
def _add(t: Tape, a: Args, out: TensorType) -> Value:
    return _sum(t, a["self"], a["other"], a["alpha"], out, "add")


@rule("sub.Tensor", "sub.Scalar")
def _sub(t: Tape, a: Args, out: TensorType) -> Value:
    return _sum(t, a["self"], a["other"], a["alpha"], out, "sub")


@rule("rsub.Scalar", "rsub.Tensor")
def _rsub(t: Tape, a: Args, out: TensorType) -> Value:
    return _sum(t, a["other"], a["self"], a["alpha"], out, "sub")


def _sum(t: Tape, x: Any, y: Any, alpha: Any, out: TensorType, kind: str) -> Value:
    left, right = operand(t, x, out.dtype), operand(t, y, out.dtype)
    if out.dtype == "bool":
        raise DeclinedError("arithmetic of flags")
    if alpha != 1:
        right = t.mul(right, operand(t, alpha, out.dtype))
    return t.binary(kind, left, right)


@rule("mul.Tensor", "mul.Scalar")
def _mul(t: Tape, a: Args, out: TensorType) -> Value:
    left, right = operand(t, a["self"], out.dtype), operand(t, a["other"], out.dtype)
    return t.binary("and" if out.dtype == "bool" else "mul", left, right)


@rule("div.Tensor", "div.Scalar", "true_divide.Tensor")
def _div(t: Tape, a: Args, out: TensorType) -> Value:
    return t.binary("div", operand(t, a["self"], out.dtype), operand(t, a["other"], out.dtype))


@rule("div.Tensor_mode", "div.Scalar_mode")
def _div_mode(t: Tape, a: Args, out: TensorType) -> Value:
    mode = a["rounding_mode"]
    if mode is None:
        return _div(t, a, out)
    if out.dtype == "f32" and mode == "trunc":
        return _toward_zero(t, _div(t, a, out))
    return _floor_divide(t, a, out) if mode == "floor" else _declined("truncated integer division")


@rule("floor_divide.default", "floor_divide.Scalar")
def _floor_divide(t: Tape, a: Args, out: TensorType) -> Value:
    return _whole_division("floordiv", t, a, out)


@rule("remainder.Tensor", "remainder.Scalar")
def _remainder(t: Tape, a: Args, out: TensorType) -> Value:
    return _whole_division("mod", t, a, out)


def _whole_division(kind: str, t: Tape, a: Args, out: TensorType) -> Value:
    other = a["other"]
    if out.dtype not in ("i64", "i32"):
        raise InexactError("remainders of floats round elsewhere")
    if not isinstance(other, int) or other == 0:
        raise InexactError("a division by what may be zero")
    return t.binary(kind, operand(t, a["self"], out.dtype), operand(t, other, out.dtype))


def _declined(reason: str) -> Value:
    raise DeclinedError(reason)


@rule("pow.Tensor_Scalar")
def _pow_scalar(t: Tape, a: Args, out: TensorType) -> Value:
    return _power(t, a["self"], a["exponent"], out)


@rule("pow.Tensor_Tensor", "pow.Scalar")
def _pow(t: Tape, a: Args, out: TensorType) -> Value:
    if out.dtype != "f32":
        raise DeclinedError("powers of integers")
    return t.binary("pow", operand(t, a["self"], "f32"), operand(t, a["exponent"], "f32"))


def _power(t: Tape, base: Value, exponent: Any, out: TensorType) -> Value:
    """The exponents that torch has kernels of their own for, and any other."""
    x = t.cast(base, out.dtype)
    match number(exponent, "the exponent"):
        case 1.0:
            return x
        case 2.0:
            return t.unary("square", x) if out.dtype == "f32" else t.mul(x, x)
        case 3.0:
            return t.mul(t.mul(x, x), x)
    if out.dtype != "f32":
        raise DeclinedError("powers of integers")
    match exponent:
        case 0.5:
            return t.unary("sqrt", x)
        case -0.5:
            return t.unary("rsqrt", x)
        case -1.0:
            return t.binary("div", t.scalar(1.0, "f32"), x)
        case -2.0:
            return t.binary("div", t.scalar(1.0, "f32"), t.unary("square", x))
    return t.binary("pow", x, t.scalar(float(exponent), "f32"))


@rule("maximum.default", "max.other")
def _maximum(t: Tape, a: Args, out: TensorType) -> Value:
    return t.binary("max", t.cast(a["self"], out.dtype), t.cast(a["other"], out.dtype))


@rule("minimum.default", "min.other")
def _minimum(t: Tape, a: Args, out: TensorType) -> Value:
    return t.binary("min", t.cast(a["self"], out.dtype), t.cast(a["other"], out.dtype))


@rule("where.self", "where.ScalarSelf", "where.ScalarOther", "where.Scalar")
def _where(t: Tape, a: Args, out: TensorType) -> Value:
    x, y = operand(t, a["self"], out.dtype), operand(t, a["other"], out.dtype)
    return t.where(t.cast(a["condition"], "bool"), x, y)


@rule("masked_fill.Scalar", "masked_fill.Tensor")
def _masked_fill(t: Tape, a: Args, out: TensorType) -> Value:
    return t.where(a["mask"], operand(t, a["value"], out.dtype), a["self"])


@rule("addcmul.default")
def _addcmul(t: Tape, a: Args, out: TensorType) -> Value:
    x, y, z = (t.cast(a[name], out.dtype) for name in ("self", "tensor1", "tensor2"))
    return t.add(x, t.mul(t.scaled(y, number(a["value"], "value")), z))


@rule("_to_copy.default", "to.dtype")
def _to(t: Tape, a: Args, out: TensorType) -> Value:
    x: Value = a["self"]
    if out.dtype in ("i32", "i16", "i8", "u8") and x.dtype != "bool" and x.dtype != out.dtype:
        raise InexactError("integers that may not fit wrap differently")
    return t.cast(x, out.dtype)


# -- reductions


def _reduction(kind: str) -> Rule:
    def apply(t: Tape, a: Args, out: TensorType) -> Value:
        x = t.cast(a["self"], out.dtype)
        return t.reduce(kind, x, axes_of(x, a.get("dim")), keep=a.get("keepdim", False))

    return apply


RULES |= {f"aten.mean.{form}": _reduction("mean") for form in ("dim", "default")}
RULES |= {f"aten.sum.{form}": _reduction("sum") for form in ("dim_IntList", "default")}
RULES |= {
    "aten.amax.default": _reduction("reduce_max"),
    "aten.amin.default": _reduction("reduce_min"),
}
RULES |= {
    "aten.max.default": _reduction("reduce_max"),
    "aten.min.default": _reduction("reduce_min"),
}
RULES |= {f"aten.prod.{form}": _reduction("prod") for form in ("dim_int", "default")}


@rule("any.dim", "any.default", "any.dims")
def _any(t: Tape, a: Args, out: TensorType) -> Value:
    return flags_reduced(t, "reduce_max", a["self"], axes_of(a["self"], a.get("dim")), a)


@rule("all.dim", "all.default", "all.dims")
def _all(t: Tape, a: Args, out: TensorType) -> Value:
    return flags_reduced(t, "reduce_min", a["self"], axes_of(a["self"], a.get("dim")), a)


def flags_reduced(t: Tape, kind: str, x: Value, axes: tuple[int, ...], a: Args) -> Value:
    """Whether any (`reduce_max`) or all (`reduce_min`) along `axes` are true."""
    numbers = t.cast(t.cast(x, "bool"), "f32")
    return t.cast(t.reduce(kind, numbers, axes, keep=a.get("keepdim", False)), "bool")


@rule("linalg_vector_norm.default")
def _vector_norm(t: Tape, a: Args, out: TensorType) -> Value:
    x: Value = a["self"]
    axes, keep = axes_of(x, a["dim"]), a["keepdim"]
    if x.dtype != "f32" or out.dtype != "f32":
        raise DeclinedError("a norm in another dtype")
    match a["ord"]:
        case 2 | 2.0:
            return t.reduce("l2", x, axes, keep=keep)
        case 1 | 1.0:
            return t.reduce("sum", t.unary("abs", x), axes, keep=keep)
    raise DeclinedError(f"a norm of order {a['ord']}")


def _variance_of(t: Tape, a: Args) -> Value:
    x: Value = a["self"]
    axes = axes_of(x, a["dim"])
    if x.dtype != "f32":
        raise DeclinedError("a variance of integers")
    centred = t.binary("sub", x, t.reduce("mean", x, axes, keep=True))
    total = t.reduce("sum", t.unary("square", centred), axes, keep=a["keepdim"])
    count: Dim = elements(tuple(x.shape[axis] for axis in axes))
    correction = 1 if a["correction"] is None else a["correction"]
    if not isinstance(correction, int) or (isinstance(count, int) and count <= correction):
        raise DeclinedError("a variance over too few elements")
    return t.binary("div", total, operand(t, count - correction, "f32"))


RULES["aten.var.correction"] = lambda t, a, out: _variance_of(t, a)
RULES["aten.std.correction"] = lambda t, a, out: t.unary("sqrt", _variance_of(t, a))


@rule("argmax.default")
def _argmax(t: Tape, a: Args, out: TensorType) -> Value:
    x: Value = a["self"]
    if a["dim"] is None or x.rank == 0:
        raise DeclinedError("an argmax over all elements")
    axis = axis_of(x, a["dim"])
    return t.call("argmax", [x], "i64", out.shape, axis=axis, keep=a["keepdim"])


@rule("softmax.int", "_softmax.default")
def _softmax(t: Tape, a: Args, out: TensorType) -> Value:
    x = t.cast(a["self"], out.dtype)
    return t.unary("softmax", x, axis=axis_of(x, a["dim"])) if x.rank else _declined("one number")


@rule("log_softmax.int", "_log_softmax.default")
def _log_softmax(t: Tape, a: Args, out: TensorType) -> Value:
    x = t.cast(a["self"], out.dtype)
    return (
        t.unary("log_softmax", x, axis=axis_of(x, a["dim"])) if x.rank else _declined("one number")
    )


@rule("cumsum.default")
def _cumsum(t: Tape, a: Args, out: TensorType) -> Value:
    x = t.cast(a["self"], out.dtype)
    return t.unary("cumsum", x, axis=axis_of(x, a["dim"])) if x.rank else x
