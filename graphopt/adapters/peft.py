"""A PEFT LoRA folder, read: settings and tensors under the names of the model that was trained.

Names in the file are those of PEFT's wrapper (`base_model.model.bert.encoder...query.lora_A.weight`).
Here the wrapper is taken off and each tensor is filed as a factor A or B of a module, or as a plain
tensor (a bias, a saved module). Nothing is loaded that is not safetensors. Deliberately absent: the
pickled `adapter_model.bin`, and adapters of the other PEFT methods.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from graphopt.adapters.config import LoraSettings, parse_config
from graphopt.adapters.resolve import ConstantLike, Factors, LinearSite, Resolved, resolve
from graphopt.adapters.targets import Targets
from graphopt.errors import AdapterError, BundleError, LimitError
from graphopt.safe_file import Source, open_regular, parse_json_object, read_bounded
from graphopt.safetensors_file import read_tensors

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"
ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE)
"""The files of a folder that are read; a client opens these and passes their descriptors."""

CONFIG_BYTES_MAX = 1 << 20  # a rank pattern naming each of 1,000 modules is below 100 KB
WEIGHTS_BYTES_MAX = 2 << 30  # rank 64 on every linear layer of a 70B model is 1.7 GB in 16 bits
_WRAPPER = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.(?:lora_(?P<ab>[AB])\.weight|lora_embedding_(?P<emb>[AB]))")
_BASE_LAYER = re.compile(r"(?P<module>.+)\.base_layer\.(?P<leaf>weight|bias)")


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """A LoRA adapter, independent of the model it will be attached to.

    Attributes:
        settings: what the config says.
        factors: A and B by module of the trained model, as stored.
        plain: the other tensors by their name in the trained model: biases and saved modules.
        label: how errors name the adapter.
    """

    settings: LoraSettings
    factors: Mapping[str, Factors]
    plain: Mapping[str, torch.Tensor]
    label: str

    def resolve(
        self, sites: Mapping[str, LinearSite], constants: Mapping[str, ConstantLike]
    ) -> Resolved:
        """Fit the adapter to a model.

        Args:
            sites: the layers that can be adapted, by module path.
            constants: shape and dtype of every constant by name, aliases of tied ones included.

        Raises:
            AdapterError: it does not fit; `detail` lists each module or tensor with the reason.
        """
        targets = Targets(self.settings, f"{self.label}/{CONFIG_FILE}")
        return resolve(
            self.settings, targets, self.factors, self.plain, sites, constants, self.label
        )


def adapter_files(folder: str | os.PathLike[str]) -> dict[str, Path]:
    """The entries of a folder that `read_adapter` wants, or wants to refuse; nothing is opened.

    Raises:
        AdapterError: not a folder.
    """
    path = Path(folder)
    if not path.is_dir():
        raise AdapterError(
            "not a folder", where=str(path), remedy=f"name the folder that holds {CONFIG_FILE}"
        )
    names = (*ADAPTER_FILES, PICKLED_FILE)
    return {name: path / name for name in names if os.path.lexists(path / name)}


def read_adapter(files: Mapping[str, Source], *, label: str = "adapter") -> LoraAdapter:
    """Read a LoRA folder given as its entries by name, each a path or an open descriptor.

    Tensors are copied, not mapped: the files belong to a client, who may still change them.

    Args:
        files: at least `ADAPTER_FILES`; other entries are not opened.
        label: how errors name the folder.

    Raises:
        AdapterError: a missing, damaged or pickled file, a config that is not supported, a tensor
            that has no meaning, or an A without its B.
    """
    settings = parse_config(_read_config(files, label), f"{label}/{CONFIG_FILE}")
    Targets(
        settings, f"{label}/{CONFIG_FILE}"
    )  # a bad expression is refused now, not when a model is at hand
    tensors = _read_weights(files, label)
    factors: dict[str, dict[str, torch.Tensor]] = {}
    embeddings: set[str] = set()
    plain: dict[str, torch.Tensor] = {}
    faults: list[tuple[str, str]] = []
    for name, tensor in tensors.items():
        trained = name.removeprefix(_WRAPPER)
        if match := _FACTOR.fullmatch(trained):
            module = match["module"]
            if match["emb"]:
                embeddings.add(module)
            factor = match["ab"] or match["emb"]
            if factor in factors.setdefault(module, {}):
                faults.append((name, f"{module} has a second {factor}"))
            factors[module][factor] = tensor
            faults += _factor_faults(name, tensor)
        elif "lora_" in trained:
            faults.append((name, _odd_tensor(trained)))
        elif ".original_module." not in f".{trained}":  # PEFT's frozen copy of a saved module
            _file_plain(plain, name, trained, tensor, faults)
    _drop_wrapper_copies(plain, faults)
    for module, parts in factors.items():
        if len(parts) != 2:
            missing = "B" if "A" in parts else "A"
            faults.append((module, f"lora_{missing} is missing beside its partner"))
    if faults:
        raise AdapterError(
            "tensors of the file cannot be used",
            where=f"{label}/{WEIGHTS_FILE}",
            remedy="save the adapter again with PEFT",
            detail=faults,
        )
    paired = {
        module: Factors(parts["A"], parts["B"], module in embeddings)
        for module, parts in factors.items()
    }
    return LoraAdapter(settings, MappingProxyType(paired), MappingProxyType(plain), label)


def _read_config(files: Mapping[str, Source], label: str) -> dict[str, object]:
    where = f"{label}/{CONFIG_FILE}"
    if CONFIG_FILE not in files:
        raise AdapterError("missing", where=where, remedy="name the folder that PEFT saved")
    try:
        text = read_bounded(files[CONFIG_FILE], CONFIG_BYTES_MAX, label=where)
        return parse_json_object(text, label=where)
    except (BundleError, LimitError) as fault:
        raise _as_adapter_error(fault) from None


def _read_weights(files: Mapping[str, Source], label: str) -> dict[str, torch.Tensor]:
    where = f"{label}/{WEIGHTS_FILE}"
    if WEIGHTS_FILE not in files:
        if PICKLED_FILE in files:
            raise AdapterError(
                "pickled weights can run code and are never read",
                where=f"{label}/{PICKLED_FILE}",
                remedy='convert a file you trust, in its folder: python -c "import torch, '
                "safetensors.torch as s; s.save_file({k: v.contiguous() for k, v in torch.load("
                f"'{PICKLED_FILE}', weights_only=True).items()}}, '{WEIGHTS_FILE}')\"",
            )
        raise AdapterError("missing", where=where, remedy="name the folder that PEFT saved")
    try:
        with open_regular(files[WEIGHTS_FILE], label=where) as file:
            if file.size_bytes > WEIGHTS_BYTES_MAX:
                raise LimitError(
                    f"{file.size_bytes} bytes, at most {WEIGHTS_BYTES_MAX} are read",
                    where=where,
                    remedy="merge an adapter of this size into the model and import that",
                )
            return read_tensors(file.descriptor, label=where, mapped=False)
    except (BundleError, LimitError) as fault:
        raise _as_adapter_error(fault) from None


def _file_plain(
    plain: dict[str, torch.Tensor],
    name: str,
    trained: str,
    tensor: torch.Tensor,
    faults: list[tuple[str, str]],
) -> None:
    if match := _BASE_LAYER.fullmatch(trained):
        trained = f"{match['module']}.{match['leaf']}"
    if trained in plain:
        faults.append((name, f"is the second tensor for {trained}"))
    plain[trained] = tensor


def _drop_wrapper_copies(plain: dict[str, torch.Tensor], faults: list[tuple[str, str]]) -> None:
    """With bias="all" PEFT writes the biases of a saved module twice, once as its wrapper sees them.

    The second name has `modules_to_save` in it and, in a nested module, the name of the adapter.
    """
    for name in [name for name in plain if ".modules_to_save." in name]:
        head, _, tail = name.partition(".modules_to_save.")
        copies = [f"{head}.{tail}", f"{head}.{tail.partition('.')[2]}"]
        if any(other in plain and torch.equal(plain[other], plain[name]) for other in copies):
            del plain[name]
        else:
            faults.append((name, "differs from the tensor that it should be a copy of"))


def _factor_faults(name: str, tensor: torch.Tensor) -> list[tuple[str, str]]:
    if not tensor.is_floating_point() or tensor.itemsize < 2:
        return [(name, f"dtype {tensor.dtype} is not a floating dtype of 16 bits or more")]
    if not tensor.isfinite().all():
        return [(name, "holds NaN or infinity, which would reach every answer")]
    return []


def _odd_tensor(trained: str) -> str:
    if "lora_magnitude_vector" in trained:
        return "belongs to DoRA, which is not supported: merge_and_unload() and import the model"
    if trained.endswith("lora_B.bias"):
        return "a bias of lora_B is not supported: train with lora_bias=False"
    return "is no LoRA tensor that PEFT 0.21 writes"


def _as_adapter_error(fault: BundleError | LimitError) -> AdapterError:
    return AdapterError(fault.message, where=fault.where, remedy=fault.remedy, detail=fault.detail)
