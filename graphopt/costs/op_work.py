"""How much work one node is: its class, operations, and bytes, from op, arguments and sizes alone.

Operations of matrix products, convolutions and attention are counted as torch's own
`torch.utils.flop_counter` counts them (a multiplication and an addition are two). The other classes
it takes for free; here they count elements, weighed by how many simple instructions one takes.
Deliberately absent: how fast a host does any of it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

LINEAR, CONVOLUTION, DEPTHWISE, ATTENTION = "linear", "convolution", "depthwise", "attention"
NORMALISATION, REDUCTION, ELEMENTWISE = "normalisation", "reduction", "elementwise"
EPILOGUE, MOVING, VIEW, LOOKUP = "epilogue", "moving", "view", "lookup"
POOLING, TRANSCENDENTAL = "pooling", "transcendental"
CLASSES = (
    LINEAR, CONVOLUTION, DEPTHWISE, ATTENTION, NORMALISATION, REDUCTION, POOLING, ELEMENTWISE,
    EPILOGUE, TRANSCENDENTAL, MOVING, VIEW, LOOKUP,
)  # fmt: skip
COUNTED_BY_TORCH = frozenset({LINEAR, CONVOLUTION, DEPTHWISE, ATTENTION})

_NAMES = {
    LINEAR: "linear mm addmm bmm baddbmm matmul mv addmv dot",
    CONVOLUTION: "conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d",
    ATTENTION: "scaled_dot_product_attention",
    NORMALISATION: "layer_norm native_layer_norm group_norm native_group_norm rms_norm instance_norm",
    REDUCTION: "softmax _softmax log_softmax _log_softmax mean sum amax amin max argmax argmin cumsum "
    "var std prod any all linalg_vector_norm norm logsumexp topk sort adaptive_avg_pool1d "
    "adaptive_avg_pool2d",
    POOLING: "max_pool2d avg_pool2d max_pool1d avg_pool1d adaptive_max_pool2d",
    TRANSCENDENTAL: "gelu erf sin cos exp expm1 tanh sigmoid silu log log1p softplus mish",
    LOOKUP: "embedding gather index _unsafe_index index_select take take_along_dim scatter index_put",
    VIEW: "view reshape _unsafe_view transpose permute t mT unsqueeze squeeze expand slice select alias "
    "detach narrow split chunk unbind flatten unflatten swapaxes movedim split_with_sizes view_as",
    MOVING: "cat stack clone contiguous _to_copy pad constant_pad_nd repeat roll flip arange full ones "
    "zeros new_ones new_zeros new_full empty tril triu copy fill expand_copy",
}  # fmt: skip
_CLASS = {name: kind for kind, names in _NAMES.items() for name in names.split()}
_TRANSPOSING = frozenset({"transpose", "permute", "t", "mT", "swapaxes", "movedim"})
# Simple instructions an element, in round figures: polynomials of exp and erf take some twenty, and
# torch's own tanh and erf several times that.
_INSTRUCTIONS = {
    **dict.fromkeys(("gelu", "sin", "cos", "softmax", "_softmax", "log_softmax"), 20),
    **dict.fromkeys(("sigmoid", "silu", "log", "log1p"), 15),
    "tanh": 90,
    "erf": 45,
    "exp": 30,
    "expm1": 30,
    **dict.fromkeys(
        ("sqrt", "rsqrt", "div", "reciprocal", "layer_norm", "rms_norm", "hardswish"), 4
    ),
    **dict.fromkeys(("batch_norm", "_native_batch_norm_legit_no_training", "native_batch_norm"), 2),
}

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Kernel:
    """One node's work at certain sizes.

    Attributes:
        op_class: one of `CLASSES`.
        ops: operations; for `COUNTED_BY_TORCH` floating-point operations as torch counts them.
        read_bytes: of operands that are values, each counted once.
        weight_bytes: of operands that are constants.
        write_bytes: of results.
    """

    op_class: str
    ops: int
    read_bytes: int
    weight_bytes: int
    write_bytes: int

    @property
    def bytes(self) -> int:
        """All that it touches."""
        return self.read_bytes + self.weight_bytes + self.write_bytes


def class_of(op: str) -> str:
    """The class of an op such as `aten.linear.default`; what is not known counts as elementwise."""
    return _CLASS.get(op.split(".")[1], ELEMENTWISE)


def operations(
    op: str, shapes: Mapping[str, Shape], results: Sequence[Shape], arguments: Mapping[str, object]
) -> int:
    """Operations of one node.

    Args:
        op: full name.
        shapes: of the operands that are tensors, by parameter.
        results: shapes of the results.
        arguments: the other arguments by parameter.
    """
    name = op.split(".")[1]
    rule = _RULES.get(name)
    if rule is not None:
        return rule(shapes, results, arguments)
    kind = class_of(op)
    if kind in (VIEW, MOVING, LOOKUP):
        return 0
    elements = sum(map(prod, results))
    if kind in (REDUCTION, POOLING, NORMALISATION):
        elements = max([elements, *map(prod, shapes.values())])
        elements *= _window(arguments)
    return elements * _INSTRUCTIONS.get(name, 1)


def moves(op: str) -> bool:
    """Whether a view of this op needs its bytes moved by a runtime that knows no strides."""
    return op.split(".")[1] in _TRANSPOSING


def kernel_class(kind: str, arguments: Mapping[str, object], shapes: Mapping[str, Shape]) -> str:
    """`kind`, told apart from depthwise where it is a convolution of as many groups as channels."""
    if kind != CONVOLUTION:
        return kind
    groups, source = arguments.get("groups", 1), shapes.get("input") or shapes.get("self")
    channels = source[-3] if source is not None and len(source) >= 3 else 0
    is_depthwise = isinstance(groups, int) and groups > 1 and groups == channels
    return DEPTHWISE if is_depthwise else kind


# -- as torch.utils.flop_counter counts


def _linear(shapes: Mapping[str, Shape], results: Sequence[Shape], _: object) -> int:
    return 2 * prod(results[0]) * shapes["input"][-1]


def _mm(shapes: Mapping[str, Shape], results: Sequence[Shape], _: object) -> int:
    first = shapes.get("mat1") or shapes.get("batch1") or shapes.get("self") or (1,)
    return 2 * prod(results[0]) * first[-1]


def _convolution(
    shapes: Mapping[str, Shape], results: Sequence[Shape], arguments: Mapping[str, object]
) -> int:
    source, weight = shapes.get("input") or shapes.get("self") or (), shapes["weight"]
    is_transposed = arguments.get("transposed", False)
    per_element = 2 * prod(weight[2:]) * weight[0] * weight[1]
    places = source[-(len(weight) - 2) :] if is_transposed else results[0][-(len(weight) - 2) :]
    batch = source[0] if len(source) == len(weight) else 1
    return batch * prod(places) * per_element


def _transposed(
    shapes: Mapping[str, Shape], results: Sequence[Shape], arguments: Mapping[str, object]
) -> int:
    return _convolution(shapes, results, {**arguments, "transposed": True})


def _attention(shapes: Mapping[str, Shape], _: Sequence[Shape], __: object) -> int:
    query, key, value = shapes["query"], shapes["key"], shapes["value"]
    rows = prod(query[:-1])
    return 2 * rows * key[-2] * query[-1] + 2 * rows * key[-2] * value[-1]


def _window(arguments: Mapping[str, object]) -> int:
    """Elements that each element of a pooling layer takes part in, at stride 1; 1 for the others."""
    size = arguments.get("kernel_size")
    if not isinstance(size, tuple) or not size:
        return 1
    stride = arguments.get("stride") or size
    steps = stride if isinstance(stride, tuple) else (stride,)
    window = prod(each for each in size if isinstance(each, int))
    step = prod(each for each in steps if isinstance(each, int))
    return max(1, window // max(1, step))


Rule = Callable[[Mapping[str, Shape], Sequence[Shape], Mapping[str, object]], int]
_RULES: dict[str, Rule] = {
    "linear": _linear,
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm", "matmul", "mv", "addmv", "dot"), _mm),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d"), _transposed),
    "scaled_dot_product_attention": _attention,
}
