"""Where the modules of a trained model lie in a live graph that may be wrapped differently.

An adapter may have been trained on `BertModel` and meet a graph of `BertForSequenceClassification`
(its names then begin with `bert.`), the reverse, or a wrapper such as sentence-transformers'
`0.auto_model.`. A placement takes one prefix off and puts another on. The identity is what PEFT
itself would do and always wins; any other is taken only when it is the only one that places every
name. Deliberately absent: renaming inside a path, and moving one numbered layer onto another.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from graphopt.errors import AdapterError, nearest

DETAIL_MAX = 12  # faults listed in one error; the rest is counted
# Prefixes that say how a module is held rather than what it is; they may replace another prefix.
_HOLDERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "0.auto_model", "auto_model")


@dataclass(frozen=True, slots=True)
class Placement:
    """Take `strip` off the front of a trained name, put `add` there; both are dotted paths."""

    strip: str = ""
    add: str = ""

    def place(self, trained: str) -> str | None:
        """The graph's name for a trained name; None when it does not begin with `strip`."""
        return _swap(trained, self.strip, self.add)

    def origin(self, name: str) -> str | None:
        """The trained name for a graph's name; None when it lies outside the trained model."""
        return _swap(name, self.add, self.strip)

    def __str__(self) -> str:
        if self.strip and self.add:
            return f"{self.strip}. becomes {self.add}."
        return f"{self.add}. put in front" if self.add else f"{self.strip}. taken off"


def find_placement(
    modules: Sequence[str],
    tensors: Collection[str],
    graph_modules: Collection[str],
    graph_tensors: Collection[str],
    label: str,
) -> Placement:
    """The placement under which every name of the adapter is one of the graph's.

    Args:
        modules: trained modules with LoRA factors, at least one.
        tensors: trained names of the plain tensors.
        graph_modules: modules of the graph that can be adapted.
        graph_tensors: names of the graph's constants.
        label: how errors name the adapter.

    Raises:
        AdapterError: none does, or more than one does and the identity does not.
    """
    identity = Placement()

    def absent(placement: Placement) -> list[str]:
        return [m for m in modules if placement.place(m) not in graph_modules] + [
            t for t in tensors if placement.place(t) not in graph_tensors
        ]

    best, best_absent = identity, absent(identity)
    if not best_absent:
        return identity
    fitting = []
    for placement in _candidates(max(modules, key=_depth), graph_modules):
        missing = absent(placement)
        if not missing:
            fitting.append(placement)
        if len(missing) < len(best_absent):
            best, best_absent = placement, missing
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise AdapterError(
            "the adapter's names fit the model in more than one way",
            where=label,
            remedy="rename the adapter's tensors to the model's own names",
            detail=[(str(placement.place(modules[0])), str(placement)) for placement in fitting],
        )
    raise _absent_error(
        best_absent, len(modules) + len(tensors), best, graph_modules, graph_tensors, label
    )


def bounded(detail: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The first `DETAIL_MAX` faults and the count of the others."""
    rest = len(detail) - DETAIL_MAX
    return detail if rest <= 0 else [*detail[:DETAIL_MAX], ("...", f"and {rest} more")]


def _candidates(trained: str, graph_modules: Collection[str]) -> list[Placement]:
    parts = trained.split(".")
    found: dict[Placement, None] = {}
    for module in graph_modules:
        other = module.split(".")
        same = 0
        while same < min(len(parts), len(other)) and parts[-1 - same] == other[-1 - same]:
            same += 1
        if same:
            strip, add = parts[: len(parts) - same], other[: len(other) - same]
            if _allowed(strip, add):
                found[Placement(".".join(strip), ".".join(add))] = None
    found.pop(Placement(), None)
    return list(found)


def _allowed(strip: list[str], add: list[str]) -> bool:
    # A number behind the first place is a layer index: dropping it would move layers onto others.
    if any(part.isdecimal() for part in (*strip[1:], *add[1:])):
        return False
    if not strip or not add:
        return True
    return ".".join(strip) in _HOLDERS or ".".join(add) in _HOLDERS


def _absent_error(
    absent: list[str],
    total: int,
    placement: Placement,
    graph_modules: Collection[str],
    graph_tensors: Collection[str],
    label: str,
) -> AdapterError:
    known: Mapping[str, None] = dict.fromkeys([*graph_modules, *graph_tensors])
    detail = []
    for name in absent[:DETAIL_MAX]:
        placed = placement.place(name) or name
        if any(tensor.startswith(f"{placed}.") for tensor in graph_tensors):
            reason = "is there, but it is not a layer that an adapter can change"
        else:
            reason = nearest(placed, known) or "nothing in the model has a similar name"
        detail.append((name, reason))
    if len(absent) > DETAIL_MAX:
        detail.append(("...", f"and {len(absent) - DETAIL_MAX} more"))
    return AdapterError(
        f"{len(absent)} of the adapter's {total} modules and tensors have no place in the model",
        where=label,
        remedy="attach it to the model it was trained on; a layer that the answers do not depend on "
        "is not part of a graph",
        detail=detail,
    )


def _depth(name: str) -> tuple[int, str]:
    return name.count("."), name


def _swap(name: str, old: str, new: str) -> str | None:
    if old:
        if not name.startswith(f"{old}."):
            return None
        name = name[len(old) + 1 :]
    return f"{new}.{name}" if new else name
