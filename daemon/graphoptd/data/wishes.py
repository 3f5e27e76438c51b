"""What a request asks for: which outputs, in which form, and until when."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graphopt.errors import RequestError, nearest
from graphoptd.data.datatypes import DATATYPES
from graphoptd.data.fields import read_flag, read_object, read_text, refuse
from graphoptd.data.served import TensorSpec
from graphoptd.data.shm import RegionRef, SharedMemory, region_ref


@dataclass(frozen=True, slots=True)
class OutputWish:
    """How one output is to be returned."""

    name: str
    binary: bool
    region: RegionRef | None = None


def read_outputs(
    entries: Any,
    parameters: dict[str, Any],
    known: Mapping[str, TensorSpec],
    memory: SharedMemory | None,
) -> tuple[OutputWish, ...]:
    """What to return and how, in order; without a list, every output.

    Raises:
        RequestError: an output is unknown, named twice, or cannot be given as asked.
    """
    by_default = read_flag(
        parameters.get("binary_data_output", False), "parameters.binary_data_output"
    )
    if entries is None or entries == []:
        wishes = [OutputWish(name, by_default) for name in known]
    else:
        if not isinstance(entries, list):
            refuse("`outputs`", "a list", "outputs")
        wishes = []
        for position, entry in enumerate(entries):
            where = f"outputs[{position}]"
            name = read_text(read_object(entry, where).get("name"), f"{where}.name")
            if name not in known:
                raise RequestError(
                    f"no output {name!r}; the model returns {', '.join(known)}",
                    where=f"{where}.name",
                    remedy=nearest(name, known) or "use the names in the model's metadata",
                )
            if any(wish.name == name for wish in wishes):
                raise RequestError(
                    f"output {name!r} twice", where=f"{where}.name", remedy="ask for it once"
                )
            asked = read_object(entry.get("parameters", {}), f"{where}.parameters")
            if asked.get("classification"):
                raise RequestError(
                    "classification is not offered",
                    where=f"{where}.parameters",
                    remedy="ask for the tensor",
                )
            binary = read_flag(
                asked.get("binary_data", by_default), f"{where}.parameters.binary_data"
            )
            ref = region_ref(asked, f"{where}.parameters", memory) if asked else None
            wishes.append(OutputWish(name, binary, ref))
    for wish in wishes:
        datatype = DATATYPES[known[wish.name].datatype]
        if not wish.binary and wish.region is None and not datatype.array_code:
            raise RequestError(
                f"output {wish.name!r} is {datatype.name}, which has no JSON form",
                where="outputs",
                remedy="ask for it with `binary_data: true`",
            )
    return tuple(wishes)


def read_timeout(parameters: dict[str, Any]) -> int:
    """The client's deadline in microseconds, 0 when it names none; raises RequestError."""
    value = parameters.get("timeout", 0)
    if type(value) is not int or value < 0:
        refuse("it", "a number of microseconds", "parameters.timeout")
    return int(value)
