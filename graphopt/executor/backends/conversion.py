"""One node alone, as a runtime's own reader of PyTorch graphs is asked about it where no rule writes it.

The node's tensors are taken out of its arguments, so what is left says everything about it that a
conversion may depend on, and a verdict on it holds for every node like it. Deliberately absent: how
any runtime converts it (`graphopt.executor.backends.openvino_frontend`).
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from graphopt.dims import Expr, symbols_of
from graphopt.errors import UnknownOpError
from graphopt.executor.backends.target import DeclinedError, OpCall, Operand, Value
from graphopt.graph import Node, Ref
from graphopt.ops import get_spec
from graphopt.types import TensorType

Ranges = Mapping[str, tuple[int, int | None]]

# Integers would index unguarded as operands. As results they may not fit in the 32 bits in which a
# runtime counts, or are places, and of equals (zeros after a relu) it puts another one first.
_DTYPES = frozenset({"f32", "bool"})
_ROUNDS = (
    "remainders of floats round elsewhere"  # the last bit of a quotient decides which one it is
)
_DECLINED = {
    "aten.fmod.Scalar": _ROUNDS,
    "aten.fmod.Tensor": _ROUNDS,
    "aten.masked_scatter.default": "a mask may ask for more elements than there are, unguarded",
}


def op_call(
    node: Node,
    arguments: Mapping[str, Any],
    outs: Sequence[TensorType],
    read: Collection[Ref],
    ranges: Ranges,
) -> tuple[OpCall, list[Value]]:
    """`node` as a converter takes it, and its operands.

    Args:
        node: no rule writes it.
        arguments: by parameter; tensors are values, sizes dims.
        outs: the types of its results.
        read: every value of the region that anything reads.
        ranges: of the graph's symbols, by name.
    """
    operands: list[Value] = []

    def taken_out(argument: Any) -> Any:
        if isinstance(argument, tuple):
            return tuple(taken_out(item) for item in argument)
        if not isinstance(argument, Value):
            return argument
        found = next((i for i, value in enumerate(operands) if value is argument), len(operands))
        if found == len(operands):
            operands.append(argument)
        return Operand(found)

    settled = tuple(taken_out(arguments[param.name]) for param in node.spec.params)
    names = sorted({name for x in operands for dim in x.shape for name in symbols_of(dim)})
    call = OpCall(
        node.op,
        settled,
        tuple(TensorType(value.dtype, value.shape) for value in operands),
        frozenset(i for i, value in enumerate(operands) if value.data is not None),
        tuple(
            TensorType(out.dtype, out.shape) if Ref(node.id, i) in read else None
            for i, out in enumerate(outs)
        ),
        tuple((name, *ranges[name]) for name in names),
    )
    return call, operands


def check_exact(call: OpCall) -> None:
    """DeclinedError for what no converter may be trusted with, whatever it makes of it."""
    try:
        spec = get_spec(call.op)
    except UnknownOpError as error:  # in place, random, or of no schema that a graph may hold
        raise DeclinedError(str(error)) from error
    if spec.returns is None:
        raise DeclinedError("it returns a list")
    if call.op in _DECLINED:
        raise DeclinedError(_DECLINED[call.op])
    if not call.operands:
        raise DeclinedError("it reads nothing")
    for type_ in call.operands:
        if type_.dtype not in _DTYPES:
            raise DeclinedError(f"what operands of {type_.dtype} hold is not known")
    for result in call.results:
        if result is not None and result.dtype not in _DTYPES:
            raise DeclinedError(f"a result of {result.dtype} may not fit, or be another of equals")
    if any(isinstance(item, Expr) for item in _flat(call.arguments)):
        raise DeclinedError("an argument is a dynamic size")


def _flat(argument: Any) -> list[Any]:
    if not isinstance(argument, tuple):
        return [argument]
    return [part for item in argument for part in _flat(item)]
