"""A model's interface, and whether a delta keeps it."""

from graphopt.analysis.facts import Facts
from graphopt.errors import InterfaceChangeError
from graphopt.graph import Graph
from graphopt.types import TensorType, ValueType


def interface_of(facts: Facts) -> dict[str, tuple[str, str, tuple[object, ...]]]:
    """For each `input:NAME` and `output:NAME`: position, dtype and fixed shape, with dynamic dims
    as `None`.
    """
    graph = facts.graph
    found = {}
    for position, (name, type_) in enumerate(graph.inputs):
        found[f"input:{name}"] = _outline(position, type_)
    for position, (name, ref) in enumerate(graph.outputs):
        found[f"output:{name}"] = _outline(position, facts.type_of(ref))
    return found


def check_interface(old: Facts, new: Facts) -> None:
    """InterfaceChangeError listing every input and output whose name, place, dtype, rank or fixed
    dim differs.
    """
    before, after = interface_of(old), interface_of(new)
    faults = [
        (name, f"{_show(before.get(name))} would become {_show(after.get(name))}")
        for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)
    ]  # fmt: skip
    if faults:
        raise InterfaceChangeError(
            "the delta changes what clients send or get",
            where=faults[0][0],
            remedy="say allow_interface_change: true if they are ready for it", detail=faults,
        )  # fmt: skip


def changes_interface(old: Facts, new: Facts) -> bool:
    """Whether clients would notice."""
    return interface_of(old) != interface_of(new)


def _outline(position: int, type_: ValueType) -> tuple[str, str, tuple[object, ...]]:
    assert isinstance(type_, TensorType)
    return (
        str(position),
        type_.dtype,
        tuple(dim if isinstance(dim, int) else None for dim in type_.shape),
    )


def _show(outline: tuple[str, str, tuple[object, ...]] | None) -> str:
    if outline is None:
        return "nothing"
    return f"{outline[1]}[{', '.join('?' if dim is None else str(dim) for dim in outline[2])}]"


def check_outputs(facts: Facts) -> None:
    """InterfaceChangeError when an output is not a tensor or there is none: such a model answers
    nothing.
    """
    graph: Graph = facts.graph
    for name, ref in graph.outputs:
        if not isinstance(facts.type_of(ref), TensorType):
            raise InterfaceChangeError(
                f"output {name} is {facts.type_of(ref)}",
                where=f"output:{name}",
                remedy="outputs are tensors",
            )
    if not graph.outputs:
        raise InterfaceChangeError(
            "the model would have no output", where="outputs", remedy="keep at least one"
        )
