"""`adapter_config.json`: every field is honoured, ignored for a written reason, or refused by name.

The fields are those of `peft.LoraConfig` 0.21; a test compares the lists with the installed one. A
field that is in neither list is refused unless it is empty, because a newer PEFT may mean something
by it that changes the answers. Deliberately absent: choosing target modules from the model type
(PEFT writes the choice down when it saves).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from graphopt.errors import AdapterError

IGNORED: Mapping[str, str] = MappingProxyType(
    {
        "auto_mapping": "names the Python class of the base model",
        "base_model_name_or_path": "names the base model; shapes and module names are checked instead",
        "corda_config": "parameters of an initialiser, which init_lora_weights names",
        "eva_config": "parameters of an initialiser; its outcome is in the tensors and patterns",
        "fan_in_fan_out": "PEFT itself overrides it by the type of the layer, and so do we",
        "inference_mode": "whether gradients are kept",
        "lora_dropout": "dropout is the identity when serving",
        "lora_ga_config": "parameters of an initialiser, which init_lora_weights names",
        "loftq_config": "parameters of an initialiser, which init_lora_weights names",
        "megatron_core": "a library name, used only with megatron_config",
        "peft_version": "which PEFT wrote the file",
        "qalora_group_size": "used only with use_qalora",
        "revision": "which revision of the base model was fetched",
        "runtime_config": "where tensors are kept while training",
        "task_type": "which wrapper class PEFT builds",
        "velora_config": "changes only the backward pass",
    }
)
"""Fields without effect on the answers, each with the reason."""

REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "alora_invocation_tokens": "it switches the adapter on by token; train a plain LoRA",
        "arrow_config": "it routes between adapters by token; attach the adapters singly",
        "ensure_weight_tying": "tied adapters are not supported; train with it off",
        "kasa_config": "it changes the base weights; merge it into the model and import that",
        "layer_replication": "it changes the model's depth; merge it into the model and import that",
        "lora_bias": "a bias of lora_B is not supported; train with lora_bias=False",
        "megatron_config": "tensor-parallel layers are not supported; gather and save a plain adapter",
        "monteclora_config": "it samples while answering; train a plain LoRA",
        "target_parameters": "bare parameters are not supported; target modules, or merge and import",
        "trainable_token_indices": "use modules_to_save for the embedding, or merge and import",
        "use_bdlora": "block-diagonal factors are not supported; merge into the model and import that",
        "use_dora": "DoRA is not supported; merge it with merge_and_unload() and import the model",
        "use_qalora": "it pools the inputs; merge it into the model and import that",
    }
)
"""Fields refused when set, each with what to do."""

HONOURED = frozenset(
    {
        "alpha_pattern",
        "bias",
        "exclude_modules",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "modules_to_save",
        "peft_type",
        "r",
        "rank_pattern",
        "target_modules",
        "use_rslora",
    }
)
"""Fields that decide what the adapter does."""

ALL_LINEAR = "all-linear"
# Initialisers whose outcome lies wholly in A and B. The others (pissa, olora, corda, lora_ga, loftq)
# also change the base weights: PEFT computes that change again at load time.
_INITS_KEPT_IN_FACTORS = ("gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """What an adapter config says, in the words of PEFT.

    Attributes:
        r: rank where no pattern says otherwise.
        lora_alpha: scale numerator where no pattern says otherwise.
        use_rslora: the scale is alpha / sqrt(r) instead of alpha / r.
        target_modules: name suffixes, or one regular expression, or `ALL_LINEAR`.
        exclude_modules: name suffixes, or one regular expression; empty for none.
        layers_to_transform: layer numbers; None for all.
        layers_pattern: names of the module list that the layer number follows; empty for any.
        rank_pattern: (expression, rank), the first that matches counts.
        alpha_pattern: (expression, alpha), the first that matches counts.
        bias: `none`, `all` or `lora_only`: which biases the file replaces.
        modules_to_save: ends of names of modules that are replaced as a whole.
    """

    r: int
    lora_alpha: float
    use_rslora: bool
    target_modules: tuple[str, ...] | str
    exclude_modules: tuple[str, ...] | str
    layers_to_transform: frozenset[int] | None
    layers_pattern: tuple[str, ...]
    rank_pattern: tuple[tuple[str, int], ...]
    alpha_pattern: tuple[tuple[str, float], ...]
    bias: str
    modules_to_save: tuple[str, ...]


def parse_config(document: Mapping[str, object], where: str) -> LoraSettings:
    """Check every field of an adapter config.

    Args:
        document: the decoded JSON object.
        where: how errors name the file.

    Raises:
        AdapterError: a field of the wrong type, a field that is not supported, or another method.
    """
    reader = _Reader(document, where)
    _refuse_unsupported(document, reader)
    targets = reader.names_or_text("target_modules")
    if targets is None:
        raise reader.bad("target_modules", "missing", "write the list of adapted modules")
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        targets = ALL_LINEAR
    layers = reader.layers()
    patterns = reader.names_or_text("layers_pattern") or ()
    if isinstance(targets, str) and (layers is not None or patterns):
        raise reader.bad(
            "layers_to_transform",
            "cannot go with a text as target_modules",
            "write a list of names",
        )
    if patterns and layers is None:
        raise reader.bad("layers_pattern", "needs layers_to_transform", "add it, or drop both")
    bias = document.get("bias", "none")
    if bias not in ("none", "all", "lora_only"):
        raise reader.bad("bias", f"{bias!r} is not none, all or lora_only", "correct the field")
    saved = reader.names_or_text("modules_to_save") or ()
    if isinstance(saved, str):
        raise reader.bad("modules_to_save", "must be a list of names", "write a list")
    return LoraSettings(
        r=reader.rank(document.get("r", 8), "r"),
        lora_alpha=reader.number(document.get("lora_alpha", 8), "lora_alpha"),
        use_rslora=reader.flag("use_rslora"),
        target_modules=targets,
        exclude_modules=reader.names_or_text("exclude_modules") or (),
        layers_to_transform=layers,
        layers_pattern=(patterns,) if isinstance(patterns, str) else patterns,
        rank_pattern=tuple((k, reader.rank(v, k)) for k, v in reader.table("rank_pattern")),
        alpha_pattern=tuple((k, reader.number(v, k)) for k, v in reader.table("alpha_pattern")),
        bias=str(bias),
        modules_to_save=saved,
    )


def _refuse_unsupported(document: Mapping[str, object], reader: "_Reader") -> None:
    method = document.get("peft_type")
    if method != "LORA":
        raise reader.bad(
            "peft_type", f"{method!r} is not LORA", "only LoRA adapters can be attached"
        )
    faults = []
    for name, value in document.items():
        if name in HONOURED or name in IGNORED or not value:
            continue
        faults.append(
            (name, REFUSED.get(name, "unknown here; save with PEFT 0.21 or leave it empty"))
        )
    init = document.get("init_lora_weights", True)
    plain_init = init is None or isinstance(init, bool)
    if not plain_init and str(init).lower() not in _INITS_KEPT_IN_FACTORS:
        faults.append(
            (
                "init_lora_weights",
                f"{init!r} also changes the base weights; save again with "
                "save_pretrained(..., path_initial_model_for_weight_conversion=...)",
            )
        )
    if faults:
        raise AdapterError(
            f"{faults[0][0]} is set, which is not supported"
            if len(faults) == 1
            else f"{', '.join(name for name, _ in faults)} are set, which is not supported",
            where=reader.where,
            remedy="see each field",
            detail=faults,
        )


class _Reader:
    """Typed access to the fields, with errors that name them."""

    def __init__(self, document: Mapping[str, object], where: str) -> None:
        self.document = document
        self.where = where

    def bad(self, field: str, reason: str, remedy: str) -> AdapterError:
        return AdapterError(f"{field}: {reason}", where=self.where, remedy=remedy)

    def names_or_text(self, field: str) -> tuple[str, ...] | str | None:
        value = self.document.get(field)
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, list) and all(isinstance(name, str) and name for name in value):
            return tuple(value)
        raise self.bad(field, "must be a list of names or a text", "correct the field")

    def layers(self) -> frozenset[int] | None:
        value = self.document.get("layers_to_transform")
        if value is None or value == []:
            return None
        numbers = value if isinstance(value, list) else [value]
        if not all(type(number) is int for number in numbers):
            raise self.bad("layers_to_transform", "must hold whole numbers", "correct the field")
        return frozenset(numbers)

    def table(self, field: str) -> list[tuple[str, object]]:
        value = self.document.get(field) or {}
        if not isinstance(value, dict):
            raise self.bad(field, "must be a table of names", "correct the field")
        return list(value.items())

    def flag(self, field: str) -> bool:
        value = self.document.get(field, False)
        if not isinstance(value, bool):
            raise self.bad(field, "must be true or false", "correct the field")
        return value

    def rank(self, value: object, field: str) -> int:
        if type(value) is not int or value <= 0:
            raise self.bad(
                field, f"rank {value!r} is not a positive whole number", "correct the field"
            )
        return value

    def number(self, value: object, field: str) -> float:
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise self.bad(field, f"{value!r} is not a finite number", "correct the field")
        return float(value)
