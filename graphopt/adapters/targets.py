"""Which modules a LoRA config names: PEFT's matching rules, word for word.

Rules from peft 0.21 (`tuners_utils.check_target_module_exists`, `utils.other.get_pattern_key` and
`_set_trainable`). Names are those of the model that was trained, without `base_model.model.`, because
expressions and layer numbers were written against them. Deliberately absent: the output head that
PEFT leaves out of `all-linear`; it asks the model's class, which a graph does not have.
"""

import math
import re
from typing import TypeVar

from graphopt.adapters.config import ALL_LINEAR, LoraSettings
from graphopt.adapters.name_pattern import NamePattern
from graphopt.errors import AdapterError

_PLAIN_NAME = re.compile(r"[\w.]+")  # names of module lists; an expression there is not needed
_FIRST_NUMBER = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")
_Number = TypeVar("_Number", int, float)
LINEAR_KINDS = ("linear", "conv1d_transposed")


class Targets:
    """A config's matching rules, compiled.

    Args:
        settings: the config.
        where: how errors name its file.

    Raises:
        AdapterError: an expression is invalid or not supported.
    """

    def __init__(self, settings: LoraSettings, where: str) -> None:
        self._settings = settings
        self._target = _whole(settings.target_modules, f"{where}: target_modules")
        self._exclude = _whole(settings.exclude_modules, f"{where}: exclude_modules")
        self._saved = [
            NamePattern(r"(^|.*\.)", name, r"($|\..*)", f"{where}: modules_to_save")
            for name in settings.modules_to_save
        ]
        self._ranks = _endings(settings.rank_pattern, f"{where}: rank_pattern")
        self._alphas = _endings(settings.alpha_pattern, f"{where}: alpha_pattern")
        for pattern in settings.layers_pattern:
            if not _PLAIN_NAME.fullmatch(pattern):
                raise AdapterError(
                    f"{pattern!r} is not a plain name",
                    where=f"{where}: layers_pattern",
                    remedy="name the list",
                )
        self._layer_lists = [
            re.compile(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.")
            for pattern in settings.layers_pattern
        ] or [_FIRST_NUMBER]

    def adapted(self, name: str, kind: str) -> bool:
        """Whether the config asks for LoRA on module `name`, which is of site kind `kind`."""
        settings = self._settings
        if self._excluded(name):
            return False
        if settings.target_modules == ALL_LINEAR:
            return kind in LINEAR_KINDS
        if self._target is not None:
            return self._target.fullmatch(name)
        if name in settings.target_modules:
            return True
        if not _has_suffix(name, settings.target_modules):
            return False
        return (
            settings.layers_to_transform is None
            or self._layer(name) in settings.layers_to_transform
        )

    def saved(self, module: str) -> bool:
        """Whether `modules_to_save` replaces `module` as a whole (PEFT compares bare endings)."""
        return module.endswith(self._settings.modules_to_save) if module else False

    def rank(self, name: str) -> int:
        """The rank for module `name`."""
        return next((r for pattern, r in self._ranks if pattern.match(name)), self._settings.r)

    def scale(self, name: str) -> float:
        """What B A is multiplied by for module `name`."""
        default = self._settings.lora_alpha
        alpha = next((a for pattern, a in self._alphas if pattern.match(name)), default)
        rank = self.rank(name)
        return alpha / math.sqrt(rank) if self._settings.use_rslora else alpha / rank

    def _excluded(self, name: str) -> bool:
        excluded = self._settings.exclude_modules
        if self._exclude is not None:
            if self._exclude.fullmatch(name):
                return True
        elif name in excluded or _has_suffix(name, excluded):
            return True
        return any(pattern.match(name) for pattern in self._saved)

    def _layer(self, name: str) -> int | None:
        for pattern in self._layer_lists:
            if match := pattern.match(name):
                return int(match["idx"])
        return None


def _whole(value: tuple[str, ...] | str, where: str) -> NamePattern | None:
    return NamePattern("", value, "", where) if isinstance(value, str) and value else None


def _endings(
    table: tuple[tuple[str, _Number], ...], where: str
) -> list[tuple[NamePattern, _Number]]:
    return [(NamePattern(r"(.*\.)?(", key, ")$", where), value) for key, value in table]


def _has_suffix(name: str, suffixes: tuple[str, ...] | str) -> bool:
    return any(name.endswith(f".{suffix}") for suffix in suffixes)
