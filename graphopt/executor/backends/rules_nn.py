"""What matrix products, convolutions, pools, norms and attention mean: see `rule_table`.

Deliberately absent: windows in ceil mode that average, transposed convolutions, training.
"""

import math
from typing import Any

import torch

from graphopt.dims import Dim
from graphopt.executor.backends.rule_table import Args, fixed, number, pair, rule
from graphopt.executor.backends.rules_math import flags_reduced
from graphopt.executor.backends.rules_shape import lower_triangle
from graphopt.executor.backends.tape import Tape, broadcast_or_decline
from graphopt.executor.backends.target import DeclinedError, InexactError, Value
from graphopt.types import TensorType

# -- matrix products


@rule("linear.default")
def _linear(t: Tape, a: Args, out: TensorType) -> Value:
    x, weight, bias = a["input"], a["weight"], a["bias"]
    if weight.rank != 2 or x.rank < 1:
        raise DeclinedError("a linear whose weight is no matrix")
    return t.linear(x, weight, bias, out.shape, transposed=False)


@rule("addmm.default")
def _addmm(t: Tape, a: Args, out: TensorType) -> Value:
    bias, left, right = a["self"], a["mat1"], a["mat2"]
    alpha, beta = number(a["alpha"], "alpha"), number(a["beta"], "beta")
    if alpha == 1 and beta == 1 and bias.shape == (right.shape[1],) and right.data is not None:
        return t.linear(left, right, bias, out.shape, transposed=True)
    if beta == 0:
        raise InexactError("a bias that does not count, not even where it is nan")
    return t.add(t.scaled(t.matmul(left, right), alpha), t.scaled(bias, beta))


@rule("baddbmm.default")
def _baddbmm(t: Tape, a: Args, out: TensorType) -> Value:
    alpha, beta = number(a["alpha"], "alpha"), number(a["beta"], "beta")
    if beta == 0:
        raise InexactError("a bias that does not count, not even where it is nan")
    product = t.scaled(t.matmul(a["batch1"], a["batch2"]), alpha)
    return t.add(product, t.scaled(a["self"], beta))


@rule("mm.default", "bmm.default", "matmul.default")
def _matmul(t: Tape, a: Args, out: TensorType) -> Value:
    left: Value = a["self"]
    right: Value = a["mat2"] if "mat2" in a else a["other"]
    if left.rank == 0 or right.rank == 0:
        raise DeclinedError("a product of numbers")
    if right.rank == 2 and right.data is not None and left.rank >= 2:
        return t.linear(left, right, None, out.shape, transposed=True)
    rows = t.reshape(left, (1, *left.shape)) if left.rank == 1 else left
    columns = t.reshape(right, (*right.shape, 1)) if right.rank == 1 else right
    return t.reshape(t.matmul(rows, columns), out.shape)


# -- attention


@rule("scaled_dot_product_attention.default")
def _attention(t: Tape, a: Args, out: TensorType) -> Value:
    q, k, v, mask = a["query"], a["key"], a["value"], a["attn_mask"]
    if min(q.rank, k.rank, v.rank) < 2 or q.dtype != "f32":
        raise DeclinedError("attention of another dtype or rank")
    if a["enable_gqa"]:
        k, v = _repeated(t, k, q), _repeated(t, v, q)
    (size,) = fixed(q.shape[-1:], "the head size")
    scale = 1 / math.sqrt(size) if a["scale"] is None else number(a["scale"], "the scale")
    causal, alive = a["is_causal"], None
    if causal and mask is not None:
        raise DeclinedError("a mask and is_causal")
    rows, columns = q.shape[-2], k.shape[-2]
    if causal and not (t.capabilities.knows_causal and rows == columns):
        causal, mask = False, lower_triangle(t, rows, columns)
    if mask is not None:
        mask, alive = _additive(t, mask)
    batch = broadcast_or_decline(broadcast_or_decline(q.shape[:-2], k.shape[:-2]), v.shape[:-2])
    if any(x.shape[:-2] != batch for x in (q, k, v)):
        raise DeclinedError("attention that broadcasts its batch")
    settings = {"scale": scale, "causal": causal}
    mixed = t.call("attention", [q, k, v, mask], "f32", out.shape, **settings)
    return mixed if alive is None else t.where(alive, mixed, t.scalar(0.0, "f32"))


def _repeated(t: Tape, x: Value, q: Value) -> Value:
    """Heads of keys or values repeated for the query heads that share them."""
    have, want = x.shape[-3], q.shape[-3]
    if not isinstance(have, int) or not isinstance(want, int) or want % have:
        raise DeclinedError("groups of heads that are dynamic")
    batch, rest = x.shape[:-3], x.shape[-2:]
    wide = t.expand(t.reshape(x, (*batch, have, 1, *rest)), (*batch, have, want // have, *rest))
    return t.reshape(wide, (*batch, want, *rest))


def _additive(t: Tape, mask: Value) -> tuple[Value | None, Value | None]:
    """A mask as numbers to add, and which rows see anything: torch makes the others zero.

    Several layers share one mask, so what is made of it is remembered.
    """
    key = ("mask", id(mask))
    if key in t.remembered:
        alive = t.remembered.get(("alive", id(mask)))
        return t.remembered[key], alive
    if mask.data is not None:
        return _known_mask(t, mask, key)
    if mask.lean is not None:
        return _additive(t, mask.lean)
    zero, never = t.scalar(0.0, "f32"), t.scalar(-math.inf, "f32")
    last = (mask.rank - 1,)
    if mask.dtype == "bool":
        alive = flags_reduced(t, "reduce_max", mask, last, {"keepdim": True})
        added = t.where(mask, zero, never)
    else:
        alive = t.compare("gt", t.reduce("reduce_max", mask, last, keep=True), never)
        added = mask
    t.remembered |= {key: added, ("alive", id(mask)): alive, ("kept", id(mask)): mask}
    return added, alive


def _known_mask(t: Tape, mask: Value, key: Any) -> tuple[Value | None, Value | None]:
    data = mask.data
    assert data is not None
    if data.dtype == torch.bool:
        if bool(data.all()):
            return None, None
        data = torch.zeros(data.shape).masked_fill(~data, -math.inf)
    dead = (data == -math.inf).all(-1, keepdim=True)
    added = t.remembered[key] = t.constant(data)
    t.remembered["kept", id(mask)] = mask
    if bool(dead.any()):
        t.remembered["alive", id(mask)] = t.constant(~dead)
    return added, t.remembered.get(("alive", id(mask)))


# -- norms


@rule("layer_norm.default")
def _layer_norm(t: Tape, a: Args, out: TensorType) -> Value:
    x: Value = a["input"]
    shape = fixed(a["normalized_shape"], "normalized_shape")
    axes = tuple(range(x.rank - len(shape), x.rank))
    operands = [x, a["weight"], a["bias"]]
    return t.call("layer_norm", operands, "f32", x.shape, axes=axes, eps=a["eps"], sizes=shape)


@rule("rms_norm.default")
def _rms_norm(t: Tape, a: Args, out: TensorType) -> Value:
    x: Value = a["input"]
    if len(a["normalized_shape"]) != 1:
        raise DeclinedError("a norm over several dims")
    eps = torch.finfo(torch.float32).eps if a["eps"] is None else number(a["eps"], "eps")
    (size,) = fixed(x.shape[-1:], "the width")
    return t.call("rms_norm", [x, a["weight"]], "f32", x.shape, eps=eps, size=size)


@rule("group_norm.default")
def _group_norm(t: Tape, a: Args, out: TensorType) -> Value:
    x, weight, bias = a["input"], a["weight"], a["bias"]
    (channels,) = fixed(x.shape[1:2], "the number of channels")
    weight = t.constant(torch.ones(channels)) if weight is None else weight
    bias = t.constant(torch.zeros(channels)) if bias is None else bias
    groups = a["num_groups"]
    return t.call("group_norm", [x, weight, bias], "f32", x.shape, groups=groups, eps=a["eps"])


@rule("batch_norm.default")
def _batch_norm(t: Tape, a: Args, out: TensorType) -> Value:
    x, mean, var = a["input"], a["running_mean"], a["running_var"]
    if a["training"] or mean is None or var is None:
        raise DeclinedError("training")
    (channels,) = fixed(x.shape[1:2], "the number of channels")
    weight = t.constant(torch.ones(channels)) if a["weight"] is None else a["weight"]
    bias = t.constant(torch.zeros(channels)) if a["bias"] is None else a["bias"]
    return t.call("batch_norm", [x, weight, bias, mean, var], "f32", x.shape, eps=a["eps"])


# -- windows


@rule("conv1d.default", "conv2d.default", "convolution.default")
def _convolution(t: Tape, a: Args, out: TensorType) -> Value:
    x, weight, bias = a["input"], a["weight"], a["bias"]
    if a.get("transposed"):
        raise DeclinedError("a transposed convolution")
    n = weight.rank - 2
    if n not in (1, 2) or x.rank != weight.rank:
        raise DeclinedError("a convolution without a batch or of other than one or two dims")
    if x.dtype != "f32":
        raise DeclinedError("a convolution of another dtype")
    padding = pair(a["padding"], n)
    settings = {
        "stride": pair(a["stride"], n),
        "begin": padding,
        "end": padding,
        "dilation": pair(a["dilation"], n),
        "groups": a["groups"],
    }
    return t.call("conv", [x, weight, bias], "f32", out.shape, **settings)


@rule("max_pool1d.default", "max_pool2d.default")
def _max_pool(t: Tape, a: Args, out: TensorType) -> Value:
    x: Value = a["self"]
    n, settings = _window(x, a)
    dilation = settings["dilation"] = pair(a["dilation"], n)
    if a["ceil_mode"]:
        settings["end"] = tuple(
            max(pad, (size - 1) * stride + d * (k - 1) + 1 - have - pad)
            for size, have, k, stride, pad, d in zip(
                fixed(out.shape[-n:], "an image"),
                fixed(x.shape[-n:], "an image"),
                settings["kernel"],
                settings["stride"],
                settings["begin"],
                dilation,
                strict=True,
            )
        )
    return t.call("max_pool", [x], x.dtype, out.shape, **settings)


@rule("avg_pool1d.default", "avg_pool2d.default")
def _avg_pool(t: Tape, a: Args, out: TensorType) -> Value:
    x: Value = a["self"]
    _, settings = _window(x, a)
    if a["ceil_mode"] or a.get("divisor_override") is not None:
        raise DeclinedError("an average in ceil mode or with a divisor of its own")
    settings["count_padding"] = a["count_include_pad"]
    return t.call("avg_pool", [x], x.dtype, out.shape, **settings)


@rule("adaptive_avg_pool1d.default", "adaptive_avg_pool2d.default")
def _adaptive_avg_pool(t: Tape, a: Args, out: TensorType) -> Value:
    x: Value = a["self"]
    n = len(a["output_size"])
    if x.rank != n + 2:
        raise DeclinedError("a pool without a batch")
    wanted: tuple[Dim, ...] = out.shape[-n:]
    if all(size == 1 for size in wanted):
        return t.reduce("mean", x, range(x.rank)[-n:], keep=True)
    have, want = fixed(x.shape[-n:], "an image"), fixed(wanted, "an image")
    if any(h % w for h, w in zip(have, want, strict=True)):
        raise DeclinedError("windows of several sizes")
    kernel = tuple(h // w for h, w in zip(have, want, strict=True))
    zeros = (0,) * n
    settings: dict[str, Any] = {"kernel": kernel, "stride": kernel, "begin": zeros, "end": zeros}
    return t.call("avg_pool", [x], x.dtype, out.shape, count_padding=True, **settings)


def _window(x: Value, a: Args) -> tuple[int, dict[str, Any]]:
    n = x.rank - 2
    if n not in (1, 2) or len(pair(a["kernel_size"], n)) != n or x.dtype != "f32":
        raise DeclinedError("a pool without a batch or of another dtype")
    kernel = pair(a["kernel_size"], n)
    stride = pair(a["stride"], n) if a["stride"] else kernel
    padding = pair(a["padding"], n)
    return n, {"kernel": kernel, "stride": stride, "begin": padding, "end": padding}
