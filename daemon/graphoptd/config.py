"""The configuration file: loaded whole or not at all, at the start and while running.

Relative paths count from the folder of the file, so a checkout can carry its own configuration.
A `Reload` lists what changed by its effect; its settings are those now in force, with the old
value wherever a restart is needed, so the next reload still says so.

Deliberately absent: watching (`graphoptd.watch`), the keys themselves (`graphoptd.settings`),
environment variables and defaults by host (a configuration reads the same everywhere).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, cast

from graphopt.documents import Reader, load_yaml
from graphopt.errors import DocumentError
from graphopt.limits import DOCUMENT_BYTES_MAX
from graphoptd.settings import (
    LIVE,
    MODEL_NAME_PATTERN,
    RESTART,
    STATE,
    ModelSettings,
    Settings,
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Reload:
    """What a reload did.

    Attributes:
        settings: in force from now on.
        live: keys whose new value is in `settings`, such as `log.level`.
        restart: keys whose new value counts from the next start.
        state: keys of models that the state folder decides; `graphoptctl load` or `unload` them.
    """

    settings: Settings
    live: tuple[str, ...] = ()
    restart: tuple[str, ...] = ()
    state: tuple[str, ...] = ()


def load(path: Path) -> Settings:
    """The settings in the file at `path`.

    Raises:
        DocumentError: the file cannot be read, is not strict YAML, or has wrong, missing or unknown
            keys; all of these are listed.
        LimitError: the file is too large or nested too deep.
    """
    document = load_yaml(_contents(path), source=str(path))
    reader = Reader(document)
    if reader.kind == "null":
        # Also what a half-written file looks like, so it does not mean "all defaults".
        reader.fault("the file is empty", "write `{}` to take every default")
        reader.finish()
    settings = reader.decode(Settings)
    if models := reader.maybe("models"):
        _check_names(models)
    reader.finish()
    return _resolved(settings, path.absolute().parent)


def of_models(bundles: Iterable[str], base: Settings | None = None) -> Settings:
    """Settings from `--model NAME=BUNDLE` arguments, for containers without a file.

    Raises:
        DocumentError: an argument is not NAME=BUNDLE, or a name is used twice or not allowed.
    """
    base = base or Settings()
    models = dict(base.models)
    for argument in bundles:
        name, equals, bundle = argument.partition("=")
        where = f"--model {argument}"
        if not equals or not bundle:
            raise DocumentError("is not NAME=BUNDLE", where=where)
        if not re.fullmatch(MODEL_NAME_PATTERN, name):
            raise DocumentError(f"{name!r} {_NAME_RULE}", where=where)
        if name in models:
            raise DocumentError(f"the model {name!r} is named twice", where=where)
        models[name] = ModelSettings(bundle=Path(bundle).absolute())
    return replace(base, models=MappingProxyType(models))


def reload(path: Path, running: Settings) -> Reload:
    """Load `path` again and say what that changes about `running`, which stays as it is.

    Raises:
        DocumentError: as `load`; nothing changes then.
        LimitError: as `load`.
    """
    return compare(running, load(path))


def compare(running: Settings, wanted: Settings) -> Reload:
    """What going from `running` to `wanted` changes, key by key."""
    changed: dict[str, list[str]] = {LIVE: [], RESTART: [], STATE: []}
    settings = _merged(running, wanted, "", changed)
    models = dict(running.models)
    for name in wanted.models:
        if name not in models:
            # Loaded at once, with the defaults of what counts from the next start
            models[name] = ModelSettings(wanted.models[name].bundle)
            changed[LIVE].append(f"models.{name}")
        models[name] = _merged(models[name], wanted.models[name], f"models.{name}.", changed)
    # A name that left the file stays loaded: the journal says what is loaded.
    changed[STATE] += [f"models.{name}" for name in running.models if name not in wanted.models]
    settings = replace(settings, models=MappingProxyType(models))
    return Reload(settings, tuple(changed[LIVE]), tuple(changed[RESTART]), tuple(changed[STATE]))


_NAME_RULE = "is no model name: letters, digits, '.', '_' and '-', at most 128, first not a sign"


def _contents(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(DOCUMENT_BYTES_MAX + 1)  # one more, so that the loader sees the excess
    except OSError as error:
        raise DocumentError(
            f"cannot be read: {error.strerror}",
            where=str(path),
            remedy="check the path and that the service's user may read it",
        ) from None


def _check_names(models: Reader) -> None:
    if models.kind != "mapping":
        return  # decode has said so
    for name, model in models.entries():
        if not re.fullmatch(MODEL_NAME_PATTERN, name):
            model.fault(_NAME_RULE, of_key=True)


def _merged(running: T, wanted: T, prefix: str, changed: Mapping[str, list[str]]) -> T:
    """`running` with the live values of `wanted`; each difference noted by its effect."""
    values: dict[str, Any] = {}
    for each in fields(cast("Any", running)):
        old, new = getattr(running, each.name), getattr(wanted, each.name)
        if isinstance(old, Mapping):
            continue  # models: `compare` goes by name
        if is_dataclass(old):
            values[each.name] = _merged(old, new, f"{prefix}{each.name}.", changed)
        elif old != new:
            effect = each.metadata["reload"]
            changed[effect].append(prefix + each.name)
            if effect == LIVE:
                values[each.name] = new
    return cast("T", replace(cast("Any", running), **values))


def _resolved(section: T, folder: Path) -> T:
    """The section with relative paths taken from `folder`."""
    values: dict[str, Any] = {}
    for each in fields(cast("Any", section)):
        value = getattr(section, each.name)
        if isinstance(value, Path):
            values[each.name] = folder / value
        elif is_dataclass(value):
            values[each.name] = _resolved(value, folder)
        elif isinstance(value, Mapping):
            values[each.name] = MappingProxyType(
                {name: _resolved(model, folder) for name, model in value.items()}
            )
    return cast("T", replace(cast("Any", section), **values))
