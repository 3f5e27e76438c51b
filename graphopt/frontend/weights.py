"""The tensors of an exported program as constants: readable names, and one constant for tied names.

Deliberately absent: loading weights from files (`graphopt.store`), folding and casting.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from graphopt.constants import SHORT_DTYPES, constant_of
from graphopt.errors import ImportRefusedError
from graphopt.frontend.names import clean_path, unique_name
from graphopt.graph import Constant

_LIFTED = "lifted_tensor"  # tensors written in the model's code; they have no name of their own


@dataclass(frozen=True, slots=True)
class Weights:
    """The tensors a program reads: `names` by placeholder, `tensors` by canonical name.

    `aliases` maps each further name of a tied tensor to the first one in state_dict order.
    """

    names: dict[str, str]
    tensors: dict[str, torch.Tensor]
    params: frozenset[str]
    aliases: dict[str, str]

    def constants(self, used: Iterable[str], *, share_memory: bool) -> dict[str, Constant]:
        """The constants called `used`. Unless `share_memory`, they are copies of the module's tensors."""
        wanted = set(used)
        made: dict[str, Constant] = {}
        for name in [name for name in self.tensors if name in wanted]:
            tensor = self.tensors[name].detach().cpu().contiguous()
            if tensor.dtype not in SHORT_DTYPES:
                raise ImportRefusedError(
                    f"tensors of dtype {tensor.dtype} cannot be held",
                    where=name,
                    remedy=f"convert it to one of {', '.join(SHORT_DTYPES.values())}",
                )
            owned = tensor if share_memory else tensor.clone()
            made[name] = constant_of(owned, is_param=name in self.params)
        return made


def read_weights(program: ExportedProgram, homes: Mapping[str, str]) -> Weights:
    """The tensors behind the placeholders of `program`.

    `homes` gives each placeholder the path of the module that reads it first; tensors without a name
    of their own are numbered inside it (`encoder.lifted_tensor_0`).
    """
    state = {**program.state_dict, **program.constants}
    canonical, aliases = _ties(program.state_dict)
    names: dict[str, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    params: set[str] = set()
    lifted: Counter[str] = Counter()
    legal: dict[str, str] = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind == InputKind.USER_INPUT:
            continue
        target, placeholder = str(spec.target), spec.arg.name
        tensor = state.get(target)
        if not isinstance(tensor, torch.Tensor):
            raise ImportRefusedError(
                f"the model holds {target}, a {type(tensor).__name__} and not a tensor",
                where=homes.get(placeholder) or target,
                remedy="scripted objects cannot be imported",
            )
        if spec.kind == InputKind.CONSTANT_TENSOR and _LIFTED in target:
            home = homes.get(placeholder, "")
            wanted = f"{home}.{_LIFTED}_{lifted[home]}" if home else f"{_LIFTED}_{lifted[home]}"
            lifted[home] += 1
            name = unique_name(wanted, tensors)
        else:
            name = _legal(canonical.get(target, target), legal)
        names[placeholder] = name
        tensors.setdefault(name, tensor)
        if spec.kind == InputKind.PARAMETER or isinstance(tensor, torch.nn.Parameter):
            params.add(name)
    tied = {_legal(alias, legal): _legal(target, legal) for alias, target in aliases.items()}
    return Weights(names, tensors, frozenset(params), tied)


def _ties(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, str], dict[str, str]]:
    """Every name's canonical name, and the names that are not canonical themselves."""
    first: dict[tuple[object, ...], str] = {}
    canonical: dict[str, str] = {}
    for name, tensor in state.items():
        key = _memory(tensor) if isinstance(tensor, torch.Tensor) else (name,)
        canonical[name] = first.setdefault(key, name)
    return canonical, {name: target for name, target in canonical.items() if name != target}


def _memory(tensor: torch.Tensor) -> tuple[object, ...]:
    # Same bytes, same view of them. Empty tensors all sit at address 0.
    if tensor.numel() == 0:
        return (id(tensor),)
    return (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def _legal(name: str, made: dict[str, str]) -> str:
    if name not in made:
        taken: Collection[str] = made.values()
        made[name] = unique_name(clean_path(name), taken)
    return made[name]
