"""What a runtime must offer so that a region can be written for it: a small closed set of calls.

ATen has some two thousand ops; the rules (`rules_*.py`) bring those that models use down to the
`KINDS` below, once for every runtime. A target emits each kind as the node its runtime optimises
best. Shapes travel as `graphopt.dims` expressions, so the same rules serve regions of fixed and of
dynamic sizes.

Deliberately absent: control flow, random numbers, and kinds whose semantics differ between the
runtimes in a way that cannot be stated by an attribute.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

from graphopt.dims import Dim
from graphopt.types import TensorType

# kind -> what its attributes are. Operands are float32 unless said.
UNARY = frozenset(
    {
        "abs", "acos", "acosh", "asin", "asinh", "atan", "atanh", "ceil", "cos", "cosh", "erf",
        "exp", "floor", "hardsigmoid", "hardswish", "log", "mish", "neg", "not", "relu", "round",
        "rsqrt", "sigmoid", "sign", "silu", "sin", "sinh", "softplus", "sqrt", "square", "tan",
        "tanh", "isnan", "isinf",
    }
)  # fmt: skip
BINARY = frozenset({"add", "sub", "mul", "div", "pow", "max", "min", "floordiv", "mod"})
COMPARE = frozenset({"eq", "ne", "lt", "le", "gt", "ge"})
LOGIC = frozenset({"and", "or", "xor"})
REDUCE = frozenset({"sum", "mean", "reduce_max", "reduce_min", "prod", "l2"})  # axes, keep
NAMED = frozenset(
    {
        "argmax",  # axis, keep; yields i64
        "argmin",
        "arange",  # start, stop, step as i64 scalars
        "attention",  # query, key, value, additive mask or none; scale, causal
        "avg_pool",  # kernel, stride, begin, end, count_padding
        "batch_norm",  # x, weight, bias, mean, variance; eps
        "cast",  # to; never to bool
        "clamp",  # low, high: floats, either may be infinite
        "concat",  # axis
        "conv",  # x, weight, bias or none; stride, begin, end, dilation, groups
        "cumsum",  # axis
        "elu",  # alpha
        "expand",  # x, shape vector
        "flip",  # axis
        "gather",  # x, index; axis
        "gather_elements",  # x, index; axis
        "gather_nd",  # x, indices
        "gelu",  # approximate: none or tanh
        "group_norm",  # x, weight, bias; groups, eps
        "layer_norm",  # x, weight or none, bias or none; axes (the last ones), eps, sizes
        "leaky_relu",  # slope
        "linear",  # x, weight, bias or none; transposed (the weight is [in, out])
        "log_softmax",  # axis
        "matmul",  # a, b; transpose_b
        "max_pool",  # kernel, stride, begin, end, dilation
        "pad",  # x, fill or none; begin, end, mode
        "prelu",
        "reshape",  # x, shape vector; a 0 keeps the dim, one -1 is inferred
        "rms_norm",  # x, weight or none; eps, size
        "selu",
        "shape_of",  # yields an i64 vector
        "slice",  # x, starts, stops; axis, step
        "softmax",  # axis
        "transpose",  # order
        "where",  # condition, x, y
    }
)  # fmt: skip
KINDS = UNARY | BINARY | COMPARE | LOGIC | REDUCE | NAMED


class DeclinedError(Exception):
    """A node cannot be run exactly; the text says why."""


class InexactError(DeclinedError):
    """The runtime has nothing exact for it, so its own converter is not asked either."""


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """A tensor of the region on a target.

    `handle` is the target's; None for one whose content `data` is known and not emitted yet.
    `lean` is the same value before it was expanded to `shape`, of equal rank.
    """

    handle: Any
    dtype: str
    shape: tuple[Dim, ...]
    data: torch.Tensor | None = None
    lean: "Value | None" = None

    @property
    def rank(self) -> int:
        """The number of dims."""
        return len(self.shape)


class Target(Protocol):
    """A description under construction for one runtime. `Handle` is what the runtime calls a value."""

    def parameter(self, index: int, type_: TensorType) -> Any:
        """The handle of read `index`; dims that are no ints are dynamic."""

    def scalar_parameter(self, symbol: int) -> Any:
        """The handle of an i64 vector of one element: the value of symbol `symbol`."""

    def constant(self, tensor: torch.Tensor, position: int | None) -> Any:
        """The handle of a constant; `position` is that in `Region.consts`, None for a derived one."""

    def apply(self, kind: str, operands: list[Any], attributes: Mapping[str, Any]) -> Any:
        """The handle of one call; an absent optional operand is None."""

    def take_apart(self, value: Any, axis: int, sizes: list[int]) -> list[Any]:
        """The handles of adjacent pieces of `value` along `axis`, of these sizes."""


@dataclass(frozen=True, slots=True)
class Operand:
    """Where an operand stood in the arguments; `index` is that in `OpCall.operands`."""

    index: int


@dataclass(frozen=True, slots=True)
class OpCall:
    """One call of an ATen op with everything settled but the contents of its tensors.

    Its `repr` is its identity: `1`, `1.0` and `True` are equal, and yet other arguments.

    Attributes:
        op: as the graph names it.
        arguments: one for each parameter of the schema.
        operands: types of the tensors, in the order of their first use.
        constants: the operands that are constants of the graph.
        results: types of what it returns; None for one that nothing reads.
        ranges: name, least and greatest value of each symbol in the types.
    """

    op: str
    arguments: tuple[Any, ...]
    operands: tuple[TensorType, ...]
    constants: frozenset[int]
    results: tuple[TensorType | None, ...]
    ranges: tuple[tuple[str, int, int | None], ...]


class Converter(Protocol):
    """A runtime's own reader of PyTorch graphs, for one op at a time."""

    def check(self, call: OpCall) -> None:
        """DeclinedError where it cannot write `call`, or writes something else.

        Takes some 50 to 500 ms for what it has not been asked before in this process.
        """

    def convert(self, call: OpCall, handles: Sequence[Any]) -> list[Any]:
        """The handles of the results, given those of the operands; raises DeclinedError.

        One entry for each of `OpCall.results`, None for those that nothing reads.
        """


# Calls that CPU runtimes do on integers exactly as torch does, within the range of their type
EXACT_INTEGERS = frozenset(
    {
        "add", "sub", "mul", "max", "min", "eq", "ne", "lt", "le", "gt", "ge", "cumsum", "sum",
        "reduce_max", "reduce_min", "neg", "abs", "floordiv", "mod",
    }
)  # fmt: skip


class Capabilities(Protocol):
    """What a runtime can do exactly, known without loading it."""

    dtypes: ClassVar[frozenset[str]]  # of any value
    integers: ClassVar[frozenset[str]]  # kinds that may be given integers
    absent: ClassVar[frozenset[str]]  # kinds without an exact kernel
    flat_linear: ClassVar[bool]  # a linear takes a matrix only
    knows_causal: ClassVar[bool]  # attention takes `causal` for square scores
    converter: ClassVar[Converter | None]  # of single ops that no rule writes


class Rehearsal:
    """A target that emits nothing and raises DeclinedError where a runtime has no exact kernel."""

    def __init__(self, capabilities: Capabilities) -> None:
        self.capabilities = capabilities

    def parameter(self, index: int, type_: TensorType) -> Any:
        """See `Target`."""
        return index

    def scalar_parameter(self, symbol: int) -> Any:
        """See `Target`."""
        return symbol

    def constant(self, tensor: torch.Tensor, position: int | None) -> Any:
        """See `Target`."""
        return position

    def apply(self, kind: str, operands: list[Any], attributes: Mapping[str, Any]) -> Any:
        """See `Target`."""
        return kind

    def take_apart(self, value: Any, axis: int, sizes: list[int]) -> list[Any]:
        """See `Target`."""
        return list(sizes)
