"""Pins: a person's word that a model keeps its plan, or keeps to some tiers, for a while.

Every pin has an owner, a reason and an expiry, so that none is forgotten. Pins outlive the process
where there is a state folder. A pin says nothing about deltas: they go live as always, on the tiers
of the live path; the guard, too, still takes back a plan that fails or becomes slower.
"""

import json
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile

from graphopt.engine.records import EventSink
from graphopt.errors import GraphoptError, nearest

FILE = "pins.json"
DURATION_MAX_S = 30 * 86_400.0  # a month: what should last longer belongs in the configuration
TEXT_CHARS_MAX = 200
LIVE_TIERS = ("eager", "fused")  # offered everywhere; `fused` goes live by itself, `eager` at once


class PinError(GraphoptError):
    """A pin was refused, or there is none to take away."""

    code = "pin.invalid"


@dataclass(frozen=True, slots=True)
class Pin:
    """One pin.

    Attributes:
        model: the model it holds.
        owner: who set it.
        reason: why.
        since_s: when, seconds since the epoch.
        until_s: when it ends by itself.
        tiers: those the better path may use besides `eager`; None holds the published plan as it is.
    """

    model: str
    owner: str
    reason: str
    since_s: float
    until_s: float
    tiers: tuple[str, ...] | None = None

    def allows(self, tier: str) -> bool:
        """Whether the better path may publish steps of `tier`."""
        return self.tiers is not None and (tier == "eager" or tier in self.tiers)


@dataclass(frozen=True, slots=True)
class HeldPin(Pin):
    """A pin in force. `left_s`: seconds until it ends by itself."""

    left_s: float = 0.0


class Pins:
    """The pins of one process, at most one a model. Any thread may call it."""

    def __init__(self, folder: Path | None, wall_s: Callable[[], float], events: EventSink) -> None:
        self._path = folder / FILE if folder is not None else None
        self._wall_s, self._events = wall_s, events
        self._lock = threading.Lock()
        self._pins = {pin.model: pin for pin in _read(self._path)}
        self._inherited = set(self._pins)

    def get(self, model: str) -> Pin | None:
        """The pin that holds `model` now; one that ran out is taken away and said once."""
        with self._lock:
            pin = self._pins.get(model)
            if pin is None or self._wall_s() < pin.until_s:
                return pin
            del self._pins[model]
            self._write()
        self._events("pin.expired", {"graph": model, "owner": pin.owner, "reason": pin.reason})
        return None

    def held(self, model: str) -> HeldPin | None:
        """The same as `get`, with the time that is left."""
        pin = self.get(model)
        if pin is None:
            return None
        return HeldPin(**asdict(pin), left_s=max(0.0, pin.until_s - self._wall_s()))

    def is_inherited(self, model: str) -> bool:
        """Whether the pin of `model` was set before this process began."""
        return model in self._inherited

    def set(
        self,
        model: str,
        owner: str,
        reason: str,
        duration_s: float,
        tiers: tuple[str, ...] | None = None,
    ) -> Pin:
        """Pins `model`; a pin that is there is replaced. PinError for a pin without reason or end."""
        if not reason.strip():
            raise PinError("a pin needs a reason", where=model, remedy="say why it is set")
        if not 0 < duration_s <= DURATION_MAX_S:
            raise PinError(
                f"a pin cannot last {duration_s:g} s",
                where=model,
                remedy=f"between 1 s and {DURATION_MAX_S / 86_400:g} days",
            )
        now_s = self._wall_s()
        said = reason.strip()[:TEXT_CHARS_MAX]
        pin = Pin(model, owner[:TEXT_CHARS_MAX], said, now_s, now_s + duration_s, tiers)
        with self._lock:
            self._pins[model] = pin
            self._inherited.discard(model)
            self._write()
        fields = {"graph": model, "owner": pin.owner, "reason": said, "until_s": pin.until_s}
        self._events("pin.set", {**fields, "tiers": list(tiers) if tiers is not None else None})
        return pin

    def clear(self, model: str, owner: str) -> Pin:
        """Takes the pin away; PinError when there is none."""
        with self._lock:
            pin = self._pins.pop(model, None)
            if pin is not None:
                self._write()
        if pin is None:
            raise PinError(f"{model} is not pinned", where=model, remedy="see graphoptctl status")
        self._events("pin.cleared", {"graph": model, "owner": owner, "reason": pin.reason})
        return pin

    def forget(self, model: str) -> None:
        """The model is gone, and its pin with it."""
        with self._lock:
            if self._pins.pop(model, None) is not None:
                self._write()

    def _write(self) -> None:
        if self._path is None:
            return
        rows = [asdict(pin) for pin in self._pins.values()]
        with NamedTemporaryFile("w", dir=self._path.parent, prefix=FILE, delete=False) as file:
            json.dump(rows, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, self._path)


def check_tiers(tiers: Iterable[str], offered: Iterable[str], *, where: str = "") -> None:
    """Raises PinError for the first of `tiers` that is not `offered` here."""
    known = list(offered)
    for tier in tiers:
        if tier not in known:
            raise PinError(
                f"there is no tier {tier!r} here",
                where=where,
                remedy=nearest(tier, known) or f"there are {', '.join(known)}",
            )


def _read(path: Path | None) -> list[Pin]:
    """The pins on disk; a file that is not ours or damaged holds none: a pin is no state of a model."""
    if path is None:
        return []
    try:
        rows = json.loads(path.read_text())
        return [
            Pin(**{**row, "tiers": tuple(row["tiers"]) if row["tiers"] is not None else None})
            for row in rows
        ]
    except (OSError, ValueError, TypeError, KeyError):
        return []
