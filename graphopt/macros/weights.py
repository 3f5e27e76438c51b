"""Macros that bring weights from safetensors files."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from graphopt.constants import TORCH_DTYPES, constant_of
from graphopt.delta import DropConstant, Primitive, PutConstant, SetAttr
from graphopt.draft import Draft
from graphopt.errors import DeltaError, TypeMismatchError, nearest
from graphopt.graph import Const, Constant, Node
from graphopt.safe_file import Source
from graphopt.safetensors_file import read_tensors

FAULTS_SHOWN_MAX = 20  # names listed by one error; a whole model's would fill the screen


@dataclass(frozen=True, slots=True)
class LoadWeights:
    """Constants get the values of the tensors of the same name.

    `strict`: the names must be exactly the model's parameters.
    """

    files: Mapping[str, Source]
    strict: bool = True

    def expand(self, draft: Draft) -> Iterator[Primitive]:
        """One put for each constant whose content differs."""
        tensors = read_weight_files(self.files)
        known = draft.known_constants()
        unexpected = [name for name in tensors if name not in set(known)]
        given = {draft.aliases.get(name, name) for name in tensors}
        missing = [
            name
            for name in known
            if name not in draft.aliases and draft.constants[name].is_param and name not in given
        ]
        if self.strict and (unexpected or missing):
            faults = [
                (name, f"the model has no such constant{_hint(name, known)}") for name in unexpected
            ]
            faults += [(name, "not in the file") for name in missing]
            raise DeltaError(
                "the file does not hold exactly the model's parameters",
                remedy="say strict: false to load what matches", detail=faults[:FAULTS_SHOWN_MAX],
            )  # fmt: skip
        if not given & {draft.aliases.get(name, name) for name in known}:
            raise DeltaError(
                "no tensor of the file is a constant of the model",
                remedy=f"it holds {', '.join(list(tensors)[:5])}",
            )
        for name, tensor in tensors.items():
            canonical = draft.aliases.get(name, name)
            if canonical in draft.constants:
                put = _put(name, draft.constants[canonical], tensor)
                if put is not None:
                    yield put


@dataclass(frozen=True, slots=True)
class SwapHead:
    """A linear layer gets another weight and bias, whose number of outputs may differ.

    The file holds `weight` and `bias`, bare or under any one prefix.
    """

    node: str
    files: Mapping[str, Source]

    def expand(self, draft: Draft) -> Iterator[Primitive]:
        """Puts the new constants.

        A weight that others use as well is left alone and a new one made.
        """
        node = draft.get_node(self.node)
        if node.op != "aten.linear.default":
            raise TypeMismatchError(
                f"{self.node} is {node.op}, a head is aten.linear.default",
                where=self.node,
                remedy="use replace_region",
            )
        tensors = read_weight_files(self.files)
        weight, bias = _suffixed(tensors, "weight"), _suffixed(tensors, "bias")
        if weight is None or weight.dim() != 2 or len(tensors) > 1 + (bias is not None):
            names = ", ".join(list(tensors)[:5])
            raise DeltaError(
                f"a head file holds weight [out, in] and bias [out]; this one holds {names}",
                where=self.node,
            )
        yield from self._put(draft, node, "weight", weight)
        if bias is not None:
            yield from self._put(draft, node, "bias", bias)
        elif node.bound()["bias"] is not None:
            yield SetAttr(self.node, "bias", None)
            if _is_only_user(draft, node.bound()["bias"].name, self.node):
                yield DropConstant(node.bound()["bias"].name)

    def _put(
        self, draft: Draft, node: Node, parameter: str, tensor: torch.Tensor
    ) -> Iterator[Primitive]:
        current = node.bound()[parameter]
        if isinstance(current, Const) and _is_only_user(draft, current.name, self.node):
            dtype = draft.constants[draft.aliases.get(current.name, current.name)].type.dtype
            yield PutConstant(current.name, tensor.to(TORCH_DTYPES[dtype]))
            return
        name = f"{self.node}.{parameter}"
        taken = set(draft.known_constants())
        while name in taken:
            name = f"{name}.head"
        yield PutConstant(name, tensor)
        yield SetAttr(self.node, parameter, Const(name))


def read_weight_files(files: Mapping[str, Source]) -> dict[str, torch.Tensor]:
    """The tensors of all safetensors files among `files`.

    DeltaError when there is none; BundleError for a damaged one.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, source in sorted(files.items()):
        if name.endswith(".safetensors"):
            tensors |= read_tensors(source, label=name, mapped=False)
    if not tensors:
        raise DeltaError(
            "no safetensors file with tensors",
            where=", ".join(files),
            remedy="name a .safetensors file or its folder",
        )
    return tensors


def _put(name: str, old: Constant, tensor: torch.Tensor) -> PutConstant | None:
    new = constant_of(tensor)
    if new.type.shape != old.type.shape or new.type.dtype != old.type.dtype:
        raise TypeMismatchError(
            f"{name} is {old.type} in the model, {new.type} in the file",
            where=name,
            remedy="convert the file",
        )
    return PutConstant(name, new) if new.digest != old.digest else None


def _is_only_user(draft: Draft, name: str, node: str) -> bool:
    name = draft.aliases.get(name, name)
    return set(draft.const_users.get(name, ())) == {node} and not draft.aliases_of(name)


def _suffixed(tensors: Mapping[str, torch.Tensor], leaf: str) -> torch.Tensor | None:
    found = [tensor for name, tensor in tensors.items() if name.rpartition(".")[2] == leaf]
    return found[0] if len(found) == 1 else None


def _hint(name: str, known: list[str]) -> str:
    near = nearest(name, known, 1)
    return f" ({near})" if near else ""
