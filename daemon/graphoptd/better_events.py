"""The events of the better path, from the engine's fields to the log's: builds, trials, watch, builder,
pins.

Seconds become milliseconds, a trial its ratio with bounds and pairs, texts are cut to a line's
worth. What has no value is left out.
"""

from collections.abc import Mapping
from typing import Any

from graphoptd.events import emit

TEXT_CHARS_MAX = 4_096
# Events whose fields need nothing but the renaming below.
BETTER = (
    "plan.built", "plan.declined", "plan.confirmed", "plan.rolled_back", "plan.kept", "pin.set",
    "pin.cleared", "pin.expired", "builder.started", "builder.exited", "builder.starved",
    "builder.quarantined", "backend.missing", "artifact.dropped",
)  # fmt: skip
_NAMES = {
    "tier": "backend", "max_error": "error_max", "allowed": "tolerance",
    "other_plan_id": "from_plan_id", "artifact_bytes": "bytes", "tiers": "tiers",
}  # fmt: skip
_SECONDS = {"build_s": "build_ms", "cpu_s": "cpu_ms", "startup_s": "startup_ms"}
_LEFT_OUT = frozenset({"weights", "alarm", "trial"})


def emit_better(name: str, fields: Mapping[str, Any]) -> None:
    """Writes the line of one event of `BETTER`."""
    emit(name, **better_fields(fields))


def better_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a line."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if value is None or name in _LEFT_OUT:
            continue
        if name in _SECONDS:
            found[_SECONDS[name]] = round(value * 1e3, 3)
        else:
            found[_NAMES.get(name, name)] = _plain(name, value)
    trial = fields.get("trial")
    if trial is not None:
        found["pairs"] = trial["pairs"]
        known = {"ratio": "ratio", "low": "ratio_low", "high": "ratio_high"}
        found |= {new: round(trial[old], 4) for old, new in known.items() if old in trial}
    if isinstance(fields.get("tiers"), list):
        found["tiers_allowed"] = found.pop("tiers")
    return {name: value for name, value in found.items() if value is not None}


def cut(text: str) -> str:
    """`text`, or its beginning where it is too long for a line."""
    return text if len(text) <= TEXT_CHARS_MAX else text[:TEXT_CHARS_MAX] + "..."


def number(value: float | None) -> float | None:
    """The number, or None for one that JSON has no word for."""
    return value if value is not None and value - value == 0 else None


def _plain(name: str, value: Any) -> Any:
    if name == "options" and not isinstance(value, str):
        return ", ".join(f"{key}={each}" for key, each in value.items() if each)
    if name in ("signal", "job"):
        return str(value)
    if isinstance(value, str):
        return cut(value)
    return number(value) if isinstance(value, float) else value
