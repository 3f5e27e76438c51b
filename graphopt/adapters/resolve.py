"""Fit a LoRA adapter to the layers and constants of a model: which pair goes where, what is replaced.

Either every tensor of the file finds its place and every layer that the config names has its pair, or
nothing is returned and the error lists each place. Deliberately absent: adding the pairs to a graph,
and LoRA on Conv1d, Conv3d, grouped convolutions, MultiheadAttention and bare parameters.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from graphopt.adapters.config import ALL_LINEAR, LoraSettings
from graphopt.adapters.placement import Placement, bounded, find_placement
from graphopt.adapters.targets import Targets
from graphopt.errors import AdapterError

SiteKind = Literal["linear", "conv1d_transposed", "embedding", "conv2d"]

# Embedding tables that PEFT saves along when they are adapted or were resized (constants.py of peft).
_SAVED_EMBEDDINGS = ("embed_tokens", "lm_head")
_TRAINING_BUFFERS = ("num_batches_tracked",)  # read only while training, so no graph has them


class ConstantLike(Protocol):
    """A constant's type; a tensor is one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the constant."""

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the constant."""


@dataclass(frozen=True, slots=True)
class LinearSite:
    """A layer of the live graph that can take a LoRA pair.

    Attributes:
        module: module path in the graph.
        weight: name of the weight constant.
        bias: name of the bias constant, if it has one.
        in_features: inputs; for an embedding the number of rows, for conv2d the input channels.
        out_features: outputs; for an embedding the row length, for conv2d the output channels.
        kind: `linear` weight [out, in]; `conv1d_transposed` (GPT-2's Conv1D) weight [in, out];
            `embedding` weight [in, out]; `conv2d` weight [out, in, *kernel], groups 1.
        kernel: height and width of a conv2d kernel.
    """

    module: str
    weight: str
    bias: str | None
    in_features: int
    out_features: int
    kind: SiteKind = "linear"
    kernel: tuple[int, ...] = ()

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored [in, out]."""
        return self.kind in ("conv1d_transposed", "embedding")


@dataclass(frozen=True, slots=True)
class Factors:
    """A and B of one module as stored, before anything is checked against a model."""

    a: torch.Tensor
    b: torch.Tensor
    embedding: bool


@dataclass(frozen=True, slots=True)
class LoraPair:
    """What one layer gets: its output y becomes y + scale * B(A(x)).

    16-bit factors are widened to float32, as PEFT does when it loads them.

    Attributes:
        module: module path in the graph.
        a: [r, in]; for conv2d [r, in, *kernel], a convolution with the base's stride and padding.
        b: [out, r]; for conv2d [out, r, 1, 1].
        scale: alpha / r, or alpha / sqrt(r).
        kind: kind of the site. For an embedding A(x) is the rows x of A transposed.
    """

    module: str
    a: torch.Tensor
    b: torch.Tensor
    scale: float
    kind: SiteKind

    def delta(self) -> torch.Tensor:
        """Scale * B A in the layout of the site's weight: what folding adds to it."""
        product = (self.b.flatten(1) @ self.a.flatten(1)) * self.scale
        if self.kind == "conv2d":
            return product.view(self.b.shape[0], *self.a.shape[1:])
        return product if self.kind == "linear" else product.t()


@dataclass(frozen=True, slots=True)
class Resolved:
    """An adapter fitted to a model.

    Attributes:
        pairs: by module path, sorted.
        replaced: constants with a new value (saved modules, biases), in the constant's dtype.
        placement: how trained names became the model's; the identity in most cases.
    """

    pairs: tuple[LoraPair, ...]
    replaced: Mapping[str, torch.Tensor]
    placement: Placement


def resolve(
    settings: LoraSettings,
    targets: Targets,
    factors: Mapping[str, Factors],
    plain: Mapping[str, torch.Tensor],
    sites: Mapping[str, LinearSite],
    constants: Mapping[str, ConstantLike],
    label: str,
) -> Resolved:
    """Fit; the arguments are those of `LoraAdapter` and `LoraAdapter.resolve`.

    Raises:
        AdapterError: some tensor or layer has no counterpart, or shapes differ.
    """
    if not factors:
        raise AdapterError(
            "the file holds no LoRA tensors", where=label, remedy="save the adapter again with PEFT"
        )
    wanted = [name for name in plain if name.rpartition(".")[2] not in _TRAINING_BUFFERS]
    named = set(constants)
    for site in sites.values():  # a site's constants may bear other names than its module
        named.update((f"{site.module}.weight", *((f"{site.module}.bias",) if site.bias else ())))
    placement = find_placement(sorted(factors), wanted, sites, named, label)
    fit = _Fit(settings, targets, placement, sites, constants)
    pairs = [fit.pair(trained, factors[trained]) for trained in factors]
    fit.check_untouched(factors)
    replaced = fit.replaced(plain, wanted, factors)
    fit.check_saved(plain)
    if fit.faults:
        raise AdapterError(
            "the adapter does not fit the model",
            where=label,
            remedy="attach it to the model it was trained on, with the config it was saved with",
            detail=bounded(fit.faults),
        )
    found = sorted((pair for pair in pairs if pair), key=lambda pair: pair.module)
    return Resolved(tuple(found), replaced, placement)


class _Fit:
    """One fitting: collects every fault so that one error can list them."""

    def __init__(
        self,
        settings: LoraSettings,
        targets: Targets,
        placement: Placement,
        sites: Mapping[str, LinearSite],
        constants: Mapping[str, ConstantLike],
    ) -> None:
        self.settings = settings
        self.targets = targets
        self.placement = placement
        self.sites = sites
        self.constants = constants
        self.faults: list[tuple[str, str]] = []

    def pair(self, trained: str, factors: Factors) -> LoraPair | None:
        """The checked pair of one module, or None after noting why not."""
        site = self.sites[str(self.placement.place(trained))]
        rank = self.targets.rank(trained)
        if not self.targets.adapted(trained, site.kind):
            self.faults.append((trained, "has tensors, but adapter_config.json does not target it"))
            return None
        if factors.embedding != (site.kind == "embedding"):
            stored = "an embedding" if factors.embedding else "a linear layer"
            self.faults.append(
                (trained, f"has the tensors of {stored}, the model's is {site.kind}")
            )
            return None
        kernel = site.kernel if site.kind == "conv2d" else ()
        want_a = (rank, site.in_features, *kernel)
        want_b = (site.out_features, rank, *(1 for _ in kernel))
        for letter, tensor, want in (("A", factors.a, want_a), ("B", factors.b, want_b)):
            if tuple(tensor.shape) != want:
                self.faults.append(
                    (
                        f"{trained}.lora_{letter}",
                        f"has shape {list(tensor.shape)}; rank {rank} of the config and the model's "
                        f"layer need {list(want)}",
                    )
                )
                return None
        return LoraPair(
            site.module,
            _widened(factors.a),
            _widened(factors.b),
            self.targets.scale(trained),
            site.kind,
        )

    def check_untouched(self, factors: Mapping[str, Factors]) -> None:
        """Note every layer that the config targets and the file has nothing for."""
        if self.settings.target_modules == ALL_LINEAR:
            return  # PEFT leaves the output head out by asking the model's class: the file decides
        for name, site in self.sites.items():
            trained = self.placement.origin(name)
            if trained is None or trained in factors:
                continue
            if self.targets.adapted(trained, site.kind):
                self.faults.append(
                    (trained, "adapter_config.json targets it, the file has no tensors")
                )

    def replaced(
        self, plain: Mapping[str, torch.Tensor], wanted: list[str], factors: Mapping[str, Factors]
    ) -> dict[str, torch.Tensor]:
        """New values of constants, in their dtype."""
        found: dict[str, torch.Tensor] = {}
        for trained in wanted:
            module, _, leaf = trained.rpartition(".")
            if not self._meant(trained, module, leaf, factors):
                self.faults.append(
                    (
                        trained,
                        "left over: neither LoRA, nor a bias or a module that the config saves",
                    )
                )
                continue
            name = self._constant(str(self.placement.place(trained)))
            constant, tensor = self.constants[name], plain[trained]
            if tuple(tensor.shape) != tuple(constant.shape):
                self.faults.append(
                    (
                        trained,
                        f"has shape {list(tensor.shape)}, the model's is {list(constant.shape)}: "
                        "import the model with the size it was trained with",
                    )
                )
            elif tensor.is_floating_point() != constant.dtype.is_floating_point:
                self.faults.append((trained, f"is {tensor.dtype}, the model's is {constant.dtype}"))
            else:
                found[name] = tensor.to(constant.dtype)
        return found

    def check_saved(self, plain: Mapping[str, torch.Tensor]) -> None:
        """Note every weight or bias of a saved module that the file does not have."""
        if not self.settings.modules_to_save:
            return
        for name in self.constants:
            trained = self.placement.origin(name)
            if trained is None or trained in plain:
                continue
            module, _, leaf = trained.rpartition(".")
            if leaf in ("weight", "bias") and self._saved(module):
                self.faults.append((trained, "is in modules_to_save, the file does not have it"))

    def _meant(self, trained: str, module: str, leaf: str, factors: Mapping[str, Factors]) -> bool:
        if self._saved(module):
            return True
        if leaf == "bias" and self.settings.bias == "all":
            return True
        if leaf == "bias" and self.settings.bias == "lora_only":
            return module in factors
        if leaf not in ("weight", "bias"):
            return False
        site = self.sites.get(str(self.placement.place(module)))
        is_table = site is not None and site.kind == "embedding"
        return is_table or module.rpartition(".")[2] in _SAVED_EMBEDDINGS

    def _saved(self, module: str) -> bool:
        parts = module.split(".")
        return any(self.targets.saved(".".join(parts[: i + 1])) for i in range(len(parts)))

    def _constant(self, name: str) -> str:
        if name in self.constants:
            return name
        module, _, leaf = name.rpartition(".")
        site = self.sites[module]
        return site.weight if leaf == "weight" else str(site.bias)


def _widened(factor: torch.Tensor) -> torch.Tensor:
    return factor.float() if factor.itemsize < 4 else factor
