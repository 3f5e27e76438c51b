"""Which nodes of a region one oneDNN call can compute.

`find_fusions` grows each fusion from its linear or convolution along sole users: adapters and
batch-norm fold into the weight, then an activation or an addition becomes the epilogue of the
kernel. An intermediate value disappears only if it has exactly one reader and is no exit of the
region. What is found depends on nothing but the region, so equal region keys have equal fusions.

Deliberately absent: whether a fusion pays (`graphopt.executor.fused`), and merging the linears of
one input (a rewrite of its own).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from graphopt.analysis.facts import Facts
from graphopt.analysis.regions import Region
from graphopt.executor.fused_epilogues import Unary, match_gelu_new, unary_of
from graphopt.graph import Const, Node, Ref
from graphopt.types import TensorType

_LINEARS = frozenset({"aten.linear.default", "aten.addmm.default"})
_CONVOLUTIONS = frozenset({"aten.conv2d.default", "aten.convolution.default"})
_PADS = frozenset({"aten.pad.default", "aten.constant_pad_nd.default"})
_VIEWS = frozenset({"aten.view.default", "aten.reshape.default", "aten._unsafe_view.default"})


@dataclass(frozen=True, slots=True)
class Adapter:
    """A low-rank addition `scale * linear(linear(x, a), b)`; `a` and `b` name constants."""

    a: str
    b: str
    scale: float


@dataclass(frozen=True, slots=True)
class BatchNorm:
    """Constants of a batch-norm in inference: names, None where it has no scale or shift."""

    weight: str | None
    bias: str | None
    mean: str
    var: str
    eps: float


@dataclass(frozen=True, slots=True)
class Convolution:
    """The geometry of a two-dimensional convolution."""

    padding: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


@dataclass(frozen=True, slots=True)
class Fusion:
    """Nodes that one kernel computes.

    `root` is the node whose value it yields, `absorbed` the others. `weight` and `bias` name
    constants. `other` is added to the result (or multiplied with it, as `binary` says) before
    `unary` is applied.
    """

    kind: str  # "linear", "conv", "gelu", "batch_norm"
    root: str
    absorbed: frozenset[str]
    source: Ref
    weight: str = ""
    bias: str | None = None
    transposed: bool = False  # the weight is [in, out]
    adapters: tuple[Adapter, ...] = ()
    batch_norm: BatchNorm | None = None
    convolution: Convolution | None = None
    binary: str = ""  # "", "add" or "mul"
    other: Ref | None = None
    unary: Unary | None = None


def find_fusions(region: Region, facts: Facts) -> list[Fusion]:
    """The fusions of a region, no node in two of them. O(nodes of the region)."""
    return _Finder(region, facts).run()


class _Finder:
    def __init__(self, region: Region, facts: Facts) -> None:
        self.region, self.facts = region, facts
        self.nodes = facts.graph.nodes
        self.inside = set(region.order)
        self.uses: dict[Ref, list[str]] = {}
        for id in region.order:
            for ref in self.nodes[id].refs:
                self.uses.setdefault(ref, []).append(id)
        self.exits = set(region.exits)
        self.claimed: set[str] = set()

    def run(self) -> list[Fusion]:
        found: list[Fusion] = []
        starts: tuple[tuple[frozenset[str], Callable[[Node], Fusion | None]], ...] = (
            (_LINEARS, self._linear),
            (_CONVOLUTIONS, self._conv),
            (frozenset({"aten.batch_norm.default"}), self._batch_norm),
        )
        for ops, match in starts:
            for id in self.region.order:
                if id in self.claimed or self.nodes[id].op not in ops:
                    continue
                fusion = match(self.nodes[id])
                if fusion is not None:
                    found.append(fusion)
                    self.claimed |= fusion.absorbed | {fusion.root}
        for here in (*self.region.reads, *map(Ref, self.region.order)):
            gelu = match_gelu_new(self, here)  # behind something that is no linear
            if gelu is not None and not ({gelu.root} | gelu.absorbed) & self.claimed:
                found.append(Fusion("gelu", gelu.root, gelu.absorbed, here, unary=gelu.unary))
                self.claimed |= gelu.absorbed | {gelu.root}
        return found

    # -- the cores

    def _linear(self, node: Node) -> Fusion | None:
        bound = node.bound()
        if node.op == "aten.addmm.default":
            source, weight, bias = bound["mat1"], bound["mat2"], bound["self"]
            if bound["beta"] != 1 or bound["alpha"] != 1:
                return None
        else:
            source, weight, bias = bound["input"], bound["weight"], bound["bias"]
        if (
            not isinstance(source, Ref)
            or not self._is_weight(weight, 2)
            or not self._is_f32(source)
        ):
            return None
        transposed = node.op == "aten.addmm.default"
        n_out = self._shape(weight)[1 if transposed else 0]
        if bias is not None and not (self._is_weight(bias, 1) and self._shape(bias) == (n_out,)):
            return None
        name = self._const(bias) if bias is not None else None
        fusion = Fusion(
            "linear", node.id, frozenset(), source, self._const(weight), name, transposed
        )
        fusion = self._with_adapters(self._unflattened(self._with_adapters(fusion)))
        return self._epilogue(fusion)

    def _conv(self, node: Node) -> Fusion | None:
        bound = node.bound()
        if bound.get("transposed") or any(bound.get("output_padding", ())):
            return None
        source, weight, bias = bound["input"], bound["weight"], bound["bias"]
        if (
            not isinstance(source, Ref)
            or not self._is_weight(weight, 4)
            or not self._is_f32(source)
        ):
            return None
        if bias is not None and not self._is_weight(bias, 1):
            return None
        shape = self._type(source).shape
        if len(shape) != 4 or not all(isinstance(dim, int) for dim in shape[2:]):
            return None  # without the image's size a pack may be a slow one
        geometry = Convolution(
            _pair(bound["padding"]),
            _pair(bound["stride"]),
            _pair(bound["dilation"]),
            bound["groups"],
        )
        name = self._const(bias) if bias is not None else None
        fusion = Fusion(
            "conv", node.id, frozenset(), source, self._const(weight), name, convolution=geometry
        )
        fusion = self._unpadded(fusion, geometry)
        user = self._sole_user(Ref(fusion.root))
        norm = self._norm_of(user) if user is not None else None
        if user is not None and norm is not None:
            fusion = _grown(fusion, user.id, batch_norm=norm)
        return self._epilogue(fusion)

    def _batch_norm(self, node: Node) -> Fusion | None:
        norm, source = self._norm_of(node), node.args[0]
        if norm is None or not isinstance(source, Ref) or not self._is_f32(source):
            return None
        return Fusion("batch_norm", node.id, frozenset(), source, batch_norm=norm)

    # -- what they take in

    def _unflattened(self, fusion: Fusion) -> Fusion:
        """A linear between two views that only flatten and restore the leading dims, without the views."""
        before = self.nodes.get(fusion.source.id)
        after = self._sole_user(Ref(fusion.root))
        if before is None or after is None or before.op not in _VIEWS or after.op not in _VIEWS:
            return fusion
        source = before.args[0]
        if not isinstance(source, Ref) or before.id not in self.inside:
            return fusion
        given, wanted = self._type(source).shape, self._type(Ref(after.id)).shape
        flat_in, flat_out = self._type(fusion.source).shape, self._type(Ref(fusion.root)).shape
        if given[-1:] != flat_in[-1:] or wanted != (*given[:-1], flat_out[-1]):
            return fusion
        return _grown(fusion, after.id, source=source)

    def _unpadded(self, fusion: Fusion, geometry: Convolution) -> Fusion:
        """Takes a symmetric padding with zeros into the convolution."""
        pad = self.nodes.get(fusion.source.id)
        if pad is None or pad.op not in _PADS or not self._is_private(pad.id):
            return fusion
        bound = pad.bound()
        widths, source = bound["pad"], bound["self"]
        is_zero = bound.get("mode", "constant") == "constant" and not bound["value"]
        if (
            not is_zero
            or not isinstance(source, Ref)
            or not all(isinstance(w, int) for w in widths)
        ):
            return fusion
        sides = [*widths, *([0] * (4 - len(widths)))]
        if len(widths) > 4 or sides[0] != sides[1] or sides[2] != sides[3] or min(sides) < 0:
            return fusion
        padding = (geometry.padding[0] + sides[2], geometry.padding[1] + sides[0])
        return replace(
            fusion,
            source=source,
            absorbed=fusion.absorbed | {pad.id},
            convolution=replace(geometry, padding=padding),
        )

    def _with_adapters(self, fusion: Fusion) -> Fusion:
        while (user := self._sole_user(Ref(fusion.root))) is not None:
            found = self._adapter(user, fusion)
            if found is None:
                break
            adapter, inner = found
            fusion = _grown(fusion, user.id, adapters=(*fusion.adapters, adapter))
            fusion = replace(fusion, absorbed=fusion.absorbed | inner)
        return fusion

    def _adapter(self, user: Node, fusion: Fusion) -> tuple[Adapter, set[str]] | None:
        """The low-rank branch that `user` adds to the fusion, and the nodes it is made of."""
        if user.op != "aten.add.Tensor":
            return None
        bound = user.bound()
        if bound["self"] != Ref(fusion.root) or not isinstance(bound["other"], Ref):
            return None  # scale of `alpha` belongs to the second operand
        scale, inner = float(bound["alpha"]), set()
        node = self._private(bound["other"])
        if node is not None and node.op in ("aten.mul.Tensor", "aten.mul.Scalar"):
            factor = node.bound()["other"]
            if isinstance(factor, bool) or not isinstance(factor, int | float):
                return None
            scale, inner = scale * factor, {node.id}
            node = self._private(node.args[0])
        up = self._bare_linear(node)
        down = (
            self._bare_linear(self._private(up[0])) if node is not None and up is not None else None
        )
        if node is None or up is None or down is None or down[0] != fusion.source:
            return None
        inner |= {node.id, up[0].id}
        return (Adapter(down[1], up[1], scale), inner) if not inner & self.claimed else None

    def _bare_linear(self, node: Node | None) -> tuple[Ref, str] | None:
        """Input and weight of a linear without bias."""
        if node is None or node.op != "aten.linear.default" or node.bound()["bias"] is not None:
            return None
        source, weight = node.args[0], node.args[1]
        if not isinstance(source, Ref) or not self._is_weight(weight, 2):
            return None
        return source, self._const(weight)

    def _epilogue(self, fusion: Fusion) -> Fusion:
        """Takes in an activation, or an operand of the same shape (and a relu, of a convolution)."""
        here = Ref(fusion.root)
        gelu = match_gelu_new(self, here) if fusion.kind == "linear" else None
        if gelu is not None and not ({gelu.root} | gelu.absorbed) & self.claimed:
            grown = _grown(fusion, gelu.root, unary=gelu.unary)
            return replace(grown, absorbed=grown.absorbed | gelu.absorbed)
        user = self._sole_user(here)
        if user is None or user.id in self.claimed:
            return fusion
        unary = unary_of(user)
        if unary is not None:
            return _grown(fusion, user.id, unary=unary)
        other = self._other_operand(user, here)
        if other is None:
            return fusion
        name = user.op.split(".")[1]
        if fusion.kind == "linear":
            return _grown(fusion, user.id, binary=name, other=other)
        if name != "add":
            return fusion
        fusion = _grown(fusion, user.id, binary=name, other=other)
        after = self._sole_user(Ref(user.id))
        relu = unary_of(after) if after is not None and after.id not in self.claimed else None
        if after is not None and relu is not None and relu.attr == "relu":
            fusion = _grown(fusion, after.id, unary=relu)
        return fusion

    def _other_operand(self, user: Node, here: Ref) -> Ref | None:
        if user.op not in ("aten.add.Tensor", "aten.mul.Tensor"):
            return None
        bound = user.bound()
        if bound.get("alpha", 1) != 1:
            return None
        operands = [bound["self"], bound["other"]]
        other = operands[1] if operands[0] == here else operands[0]
        if not isinstance(other, Ref) or other == here or not self._is_f32(other):
            return None
        return other if self._type(other).shape == self._type(here).shape else None

    def _norm_of(self, node: Node) -> BatchNorm | None:
        if node.op != "aten.batch_norm.default":
            return None
        bound = node.bound()
        weight, bias, mean, var = (
            bound[n] for n in ("weight", "bias", "running_mean", "running_var")
        )
        if bound["training"] or not (self._is_weight(mean, 1) and self._is_weight(var, 1)):
            return None
        if any(part is not None and not self._is_weight(part, 1) for part in (weight, bias)):
            return None
        names = [self._const(part) if part is not None else None for part in (weight, bias)]
        return BatchNorm(names[0], names[1], self._const(mean), self._const(var), bound["eps"])

    # -- the neighbourhood

    def sole_users(self, ref: Ref) -> list[Node]:
        """Every use of `ref`, or nothing when it is handed out of the region."""
        return [] if ref in self.exits else [self.nodes[id] for id in self.uses.get(ref, ())]

    def _sole_user(self, ref: Ref) -> Node | None:
        users = self.sole_users(ref)
        return users[0] if len(users) == 1 else None

    def _is_private(self, id: str) -> bool:
        return id in self.inside and self._sole_user(Ref(id)) is not None

    def _private(self, ref: Any) -> Node | None:
        """The node of a value that exactly one node reads."""
        is_mine = isinstance(ref, Ref) and ref.idx == 0 and self._is_private(ref.id)
        return self.nodes[ref.id] if is_mine else None

    def _type(self, ref: Ref) -> TensorType:
        type_ = self.facts.type_of(ref)
        assert isinstance(type_, TensorType)
        return type_

    def _is_f32(self, ref: Ref) -> bool:
        type_ = self.facts.type_of(ref)
        return isinstance(type_, TensorType) and type_.dtype == "f32"

    def _is_weight(self, arg: Any, rank: int) -> bool:
        if not isinstance(arg, Const):
            return False
        type_ = self.facts.graph.get_constant(arg.name).type
        return type_.dtype == "f32" and type_.rank == rank

    def _shape(self, arg: Const) -> tuple[Any, ...]:
        return self.facts.graph.get_constant(arg.name).type.shape

    def _const(self, arg: Const) -> str:
        return self.facts.graph.aliases.get(arg.name, arg.name)


def _grown(fusion: Fusion, root: str, **changes: Any) -> Fusion:
    """The fusion that also computes `root`, the only reader of what it computed so far."""
    return replace(fusion, root=root, absorbed=fusion.absorbed | {fusion.root}, **changes)


def _pair(value: tuple[int, ...]) -> tuple[int, int]:
    return (value[0], value[-1])
