"""Source text of a region with fusions, and what must be packed for it.

The choice of kernel is made here, from figures of a 2-core Zen 4 guest, one thread, torch 2.13
(`python -m benchmarks.fused_tier --linears --threads 1` measures them again): a packed linear costs 9
us more a call than an ordinary one, saves a tenth of the product's time, more where a large weight
meets few rows, and the pass over memory of its epilogue.
"""

from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from graphopt.analysis.facts import Facts
from graphopt.analysis.regions import Region
from graphopt.dims import Dim, Expr, product, symbols_of
from graphopt.executor.codegen import Source
from graphopt.executor.fused_pack import Packing
from graphopt.executor.fused_patterns import Fusion
from graphopt.types import TensorType

# Which linears gain by the packed kernel, by the elements of the weight (in * out) and the rows. Beside
# each, us ordinary against packed at rows x in x out, epilogue included; the size before it loses.
HUGE_WEIGHT = 2_000_000  # from one row: 1x768x3072 1,086/768; 1x768x768 (0.6 M) 50/54
LARGE_WEIGHT = 140_000  # from two rows: 2x192x768 33/29, 2x768x768 93/61; 2x256x256 17/22
GELU_WEIGHT = 65_000  # with a costly activation from four rows: 4x256x256 52/46; 1x256x256 21/25
# Smaller weights gain by many rows only; multiply-adds (rows * in * out) from which they do.
BARE_MACS_MIN = 8_000_000  # 197x256x256: 278/266; 64x256x256 (4.2 M): 100/106
CHEAP_MACS_MIN = 6_000_000  # relu, add, mul: 197x192x192: 185/180; 64x192x192 (2.4 M): 67/73
COSTLY_MACS_MIN = 1_500_000  # gelu, silu, tanh: 64x192x192: 83/79; 64x128x128 (1.0 M): 67/66
# Rows assumed where they are dynamic and an adapter is folded: a second, ordinary copy of the folded
# weight is not kept beside the pack.
FOLDED_ROWS = 64
# From which a convolution without batch-norm takes an epilogue: the copy to channels-last costs more
# than it brings below.
CONV_MACS_MIN = 2_000_000

_COSTLY = frozenset({"gelu", "swish", "tanh", "sigmoid"})
_linear = torch.ops.mkldnn._linear_pointwise.default._op
_linear_binary = torch.ops.mkldnn._linear_pointwise.binary._op
_conv = torch.ops.mkldnn._convolution_pointwise.default._op
_conv_binary = torch.ops.mkldnn._convolution_pointwise.binary._op


@dataclass(frozen=True, slots=True)
class Emitted:
    """Generated source; `packings` are its parameters `p0 …`. `gains` counts fusions that do something."""

    text: str
    names: dict[str, Any]
    packings: tuple[Packing, ...]
    gains: int
    has_choice: bool
    is_channels_last: bool


def emit(region: Region, facts: Facts, fusions: list[Fusion]) -> Emitted:
    """The source of `region` with each fusion as one call, where that pays."""
    return _Emitter(region, facts, fusions).run()


class _Emitter:
    def __init__(self, region: Region, facts: Facts, fusions: list[Fusion]) -> None:
        self.region, self.facts, self.fusions = region, facts, fusions
        self.source = Source(region, facts)
        self.packings: list[Packing] = []
        self.channels_last: set[str] = set()
        self.gains = 0
        self.has_choice = False

    def run(self) -> Emitted:
        source = self.source
        producers = {f.root for f in self.fusions if f.kind == "conv"}
        chosen = {
            f.root: f for f in self.fusions if f.kind != "conv" or self._conv_pays(f, producers)
        }
        absorbed = {id for fusion in chosen.values() for id in fusion.absorbed}
        needed = self._needed(chosen, absorbed)
        for id in self.region.order:
            if id not in needed:
                continue
            fusion = chosen.get(id)
            call = (
                self._call(fusion)
                if fusion is not None
                else source.call(self.facts.graph.nodes[id])
            )
            local = f"v{len(source.values)}"
            source.values[id] = local
            source.lines.append(f"{local} = {call}")
        text = source.text(len(self.packings))
        return Emitted(
            text, source.names, tuple(self.packings), self.gains, self.has_choice, bool(self.channels_last)
        )  # fmt: skip

    def _needed(self, chosen: dict[str, Fusion], absorbed: set[str]) -> set[str]:
        needed = {ref.id for ref in self.region.exits}
        for id in reversed(self.region.order):
            fusion = chosen.get(id)
            if id not in needed or id in absorbed:
                needed.discard(id)
            elif fusion is not None:
                needed |= {ref.id for ref in (fusion.source, fusion.other) if ref is not None}
            else:
                needed |= {ref.id for ref in self.facts.graph.nodes[id].refs}
        return needed

    def _call(self, fusion: Fusion) -> str:
        match fusion.kind:
            case "linear":
                return self._linear(fusion)
            case "conv":
                return self._conv(fusion)
            case "batch_norm":
                return self._batch_norm(fusion)
        self.gains += 1
        return self._activate(fusion, self.source.operand(fusion.source))

    # -- linear

    def _linear(self, fusion: Fusion) -> str:
        shape = self._const_shape(fusion.weight)
        rows = product(self._type(fusion).shape[:-1])
        least = _rows_min(fusion, prod(shape))
        if fusion.adapters:
            self.gains += 1
            count = rows if isinstance(rows, int) else FOLDED_ROWS
            return self._packed(fusion) if count >= least else self._plain(fusion)
        if isinstance(rows, int) or least <= 1:
            if not isinstance(rows, int) or rows >= least:
                self.gains += 1
                return self._packed(fusion)
            return self._plain(fusion)
        if not symbols_of(rows) <= set(self.region.symbols):
            return self._plain(fusion)
        self.gains += 1
        self.has_choice = True
        condition = f"{self._rows(rows)} + ROWS >= {least}"
        return f"{self._packed(fusion)} if {condition} else {self._plain(fusion)}"

    def _packed(self, fusion: Fusion) -> str:
        bind, operand = self.source.bind, self.source.operand
        pack = self._pack(self._packing(fusion, "linear"))
        bias = self._weight_name(fusion.bias)
        x = operand(fusion.source)
        if fusion.other is not None:
            call = bind(_linear_binary, "linear_")
            return f"{call}({x}, {operand(fusion.other)}, {pack}, {bias}, {fusion.binary!r})"
        epilogue = fusion.unary.pack_arguments if fusion.unary else "'none', [], ''"
        return f"{bind(_linear, 'linear_')}({x}, {pack}, {bias}, {epilogue})"

    def _plain(self, fusion: Fusion) -> str:
        bind, operand = self.source.bind, self.source.operand
        weight = self._weight_name(fusion.weight)
        if fusion.adapters:
            weight = self._pack(self._packing(fusion, "plain"))
        elif fusion.transposed:
            weight = self._pack(self._packing(fusion, "transposed"))
        call = bind(torch._C._nn.linear, "linear_")
        result = f"{call}({operand(fusion.source)}, {weight}, {self._weight_name(fusion.bias)})"
        if fusion.other is not None:
            join = bind(getattr(torch, fusion.binary), f"{fusion.binary}_")
            result = f"{join}({result}, {operand(fusion.other)})"
        return self._activate(fusion, result)

    def _activate(self, fusion: Fusion, value: str) -> str:
        if fusion.unary is None:
            return value
        kernel = self.source.bind(fusion.unary.kernel, f"{fusion.unary.attr}_")
        return f"{kernel}({', '.join((value, *fusion.unary.arguments))})"

    # -- convolution

    def _conv_pays(self, fusion: Fusion, producers: set[str]) -> bool:
        if fusion.batch_norm is not None:
            return True
        has_epilogue = fusion.unary is not None or fusion.other is not None
        if fusion.source.id in producers:
            return has_epilogue
        out = self._type(fusion).shape
        if len(out) != 4 or not all(isinstance(dim, int) for dim in out[1:]):
            return False
        macs = prod(self._const_shape(fusion.weight)) * prod(int(str(dim)) for dim in out[2:])
        return has_epilogue and macs >= CONV_MACS_MIN

    def _conv(self, fusion: Fusion) -> str:
        assert fusion.convolution is not None
        self.gains += 1
        bind = self.source.bind
        pack = self._pack(self._packing(fusion, "conv"))
        bias = self._weight_name(fusion.bias)
        if fusion.batch_norm is not None:
            bias = self._pack(self._packing(fusion, "bias"))
        g = fusion.convolution
        geometry = f"{list(g.padding)}, {list(g.stride)}, {list(g.dilation)}, {g.groups}"
        x = self._image(fusion.source)
        self.channels_last.add(fusion.root)
        if fusion.other is not None:
            relu = "'relu'" if fusion.unary else "None"
            other = self._image(fusion.other)
            call = bind(_conv_binary, "conv_")
            return f"{call}({x}, {other}, {pack}, {bias}, {geometry}, 'add', 1.0, {relu}, [], '')"
        epilogue = fusion.unary.pack_arguments if fusion.unary else "'none', [], ''"
        return f"{bind(_conv, 'conv_')}({x}, {pack}, {bias}, {geometry}, {epilogue})"

    def _image(self, ref: Any) -> str:
        """An operand in channels-last layout: a copy only where it is not so already."""
        value = self.source.operand(ref)
        if ref.id in self.channels_last:
            return value
        layout = self.source.bind(torch.channels_last, "layout_")
        return f"{value}.contiguous(memory_format={layout})"

    def _batch_norm(self, fusion: Fusion) -> str:
        """One multiply-add for vectors; for images torch's kernel is as quick (51 us, 49 us)."""
        if self._type(fusion).rank != 2:
            return self.source.call(self.facts.graph.nodes[fusion.root])
        self.gains += 1
        scale, shift = (self._pack(self._packing(fusion, kind)) for kind in ("scale", "shift"))
        call = self.source.bind(torch.addcmul, "addcmul_")
        return f"{call}({shift}, {self.source.operand(fusion.source)}, {scale})"

    # -- constants

    def _packing(self, fusion: Fusion, kind: str) -> Packing:
        where = {name: i for i, name in enumerate(self.region.consts)}
        norm = None
        size: tuple[Any, ...] = ()
        if fusion.batch_norm is not None:
            n = fusion.batch_norm
            optional = (where[name] if name is not None else None for name in (n.weight, n.bias))
            norm = (*optional, where[n.mean], where[n.var], n.eps)
        if kind == "conv":
            size = (1, *self._source_type(fusion).shape[1:])
        return Packing(
            kind,
            where.get(fusion.weight, -1),
            where[fusion.bias] if fusion.bias is not None and kind == "bias" else None,
            fusion.transposed,
            tuple((where[a.a], where[a.b], a.scale) for a in fusion.adapters),
            norm,  # type: ignore[arg-type]
            fusion.convolution if kind == "conv" else None,
            size,
        )

    def _pack(self, packing: Packing) -> str:
        if packing not in self.packings:
            self.packings.append(packing)
        return f"p{self.packings.index(packing)}"

    def _weight_name(self, name: str | None) -> str:
        return "None" if name is None else f"w{self.region.consts.index(name)}"

    def _const_shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(str(dim)) for dim in self.facts.graph.constants[name].type.shape)

    # -- types

    def _type(self, fusion: Fusion) -> TensorType:
        type_ = self.facts.types[fusion.root][0]
        assert isinstance(type_, TensorType)
        return type_

    def _source_type(self, fusion: Fusion) -> TensorType:
        type_ = self.facts.type_of(fusion.source)
        assert isinstance(type_, TensorType)
        return type_

    def _rows(self, rows: Dim) -> str:
        text = self.source.dim(rows)
        return f"({text})" if isinstance(rows, Expr) else text


def _rows_min(fusion: Fusion, elements: int) -> int:
    """The rows from which the packed kernel is quicker."""
    is_costly = fusion.unary is not None and fusion.unary.attr in _COSTLY
    if elements >= HUGE_WEIGHT:
        return 1
    if elements >= LARGE_WEIGHT:
        return 2
    if is_costly and elements >= GELU_WEIGHT:
        return 4
    macs = CHEAP_MACS_MIN if fusion.unary or fusion.other is not None else BARE_MACS_MIN
    return -(-(COSTLY_MACS_MIN if is_costly else macs) // max(elements, 1))
