"""Weights as oneDNN's kernels want them: folded in float64, rounded once, laid out in blocks, and shared.

A `Packing` says how one tensor is made from a region's constants, by position, so every region of
one key has the same packings. Packs are kept by what they are made of (content hashes), weakly:
forks and revisions with equal weights share them, and a pack is freed with the last step that
uses it. Nothing here holds the GIL for long: torch releases it inside each call, and each call
packs one weight.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from threading import Lock
from weakref import WeakValueDictionary

import torch

from graphopt.executor.fused_patterns import Convolution
from graphopt.graph import Constant

FOLD_ROWS = (
    1024  # rows folded at a time: a float64 copy of a whole vocabulary projection would be 0.3 GB
)

_reorder_linear = torch.ops.mkldnn._reorder_linear_weight
_reorder_conv = torch.ops.mkldnn._reorder_convolution_weight


@dataclass(frozen=True, slots=True)
class Packing:
    """How to make one tensor; integers are positions among the region's constants.

    `kind`: "linear" and "conv" are packed weights, "plain" a folded weight [out, in] in ordinary
    layout, "transposed" a view of one, "bias" a convolution's bias with batch-norm folded in,
    "scale" and "shift" a batch-norm on its own.
    """

    kind: str
    weight: int = -1
    bias: int | None = None
    transposed: bool = False
    adapters: tuple[tuple[int, int, float], ...] = ()
    batch_norm: tuple[int | None, int | None, int, int, float] | None = (
        None  # scale, shift, mean, var, eps
    )
    convolution: Convolution | None = None
    size: tuple[int, ...] = ()  # [1, channels, height, width] of the image the convolution reads


class PackCache:
    """Packs by content; a pack lives as long as something outside uses it."""

    def __init__(self) -> None:
        self._packs: WeakValueDictionary[str, torch.Tensor] = WeakValueDictionary()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._packs)

    def get(self, packing: Packing, constants: Sequence[Constant]) -> torch.Tensor:
        """The tensor that `packing` makes of `constants`, made now if nobody has it."""
        key = _content_key(packing, constants)
        with self._lock:
            found = self._packs.get(key)
        if found is not None:
            return found
        with torch.no_grad():
            made = _make(packing, [constant.tensor for constant in constants])
        with self._lock:
            return self._packs.setdefault(key, made)


def _make(packing: Packing, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    match packing.kind:
        case "transposed":
            return tensors[packing.weight].t()
        case "plain":
            return _fold_adapters(packing, tensors)
        case "linear":
            weight = tensors[packing.weight]
            if packing.adapters:
                weight = _fold_adapters(packing, tensors)
            elif packing.transposed:
                weight = weight.t().contiguous()
            packed: torch.Tensor = _reorder_linear(weight, None)
            return packed
        case "conv":
            return _pack_conv(packing, tensors)
        case "bias":
            scale, shift = _scale_and_shift(packing, tensors)
            bias = 0.0 if packing.bias is None else tensors[packing.bias].double()
            return (bias * scale + shift).float()
    scale, shift = _scale_and_shift(packing, tensors)
    return (scale if packing.kind == "scale" else shift).float()


def _fold_adapters(packing: Packing, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    base = tensors[packing.weight].t() if packing.transposed else tensors[packing.weight]
    folded = torch.empty(base.shape, dtype=torch.float32)
    for start in range(0, len(base), FOLD_ROWS):
        rows = slice(start, start + FOLD_ROWS)
        total = base[rows].double()
        for a, b, scale in packing.adapters:
            total.addmm_(tensors[b][rows].double(), tensors[a].double(), alpha=scale)
        folded[rows] = total
    return folded


def _pack_conv(packing: Packing, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    weight, geometry = tensors[packing.weight], packing.convolution
    assert geometry is not None
    if packing.batch_norm is not None:
        scale, _ = _scale_and_shift(packing, tensors)
        weight = (weight.double() * scale.view(-1, 1, 1, 1)).float()
    packed: torch.Tensor = _reorder_conv(
        weight,
        list(geometry.padding),
        list(geometry.stride),
        list(geometry.dilation),
        geometry.groups,
        list(packing.size),
    )
    return packed


def _scale_and_shift(
    packing: Packing, tensors: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Batch-norm as `x * scale + shift`, float64."""
    assert packing.batch_norm is not None
    weight, bias, mean, var, eps = packing.batch_norm
    scale = torch.rsqrt(tensors[var].double() + eps)
    if weight is not None:
        scale = scale * tensors[weight].double()
    shift = -tensors[mean].double() * scale
    return scale, shift if bias is None else shift + tensors[bias].double()


def _content_key(packing: Packing, constants: Sequence[Constant]) -> str:
    """The packing with content hashes in the place of positions."""

    def digest(position: int | None) -> str:
        return "-" if position is None or position < 0 else constants[position].digest

    values = {field.name: getattr(packing, field.name) for field in fields(packing)}
    values["weight"], values["bias"] = digest(packing.weight), digest(packing.bias)
    values["adapters"] = [(digest(a), digest(b), scale) for a, b, scale in packing.adapters]
    if packing.batch_norm is not None:
        *tensors, eps = packing.batch_norm
        values["batch_norm"] = [*map(digest, tensors), eps]
    return repr(values)
