"""The coefficients of a cost model: names, units, ranges, and the layers of files they come from.

    packaged defaults  <  STATE/calibration/HOST.yaml  <  the operator's cost/*.yaml in name order

A layer says what it changes and leaves the rest alone. A document is a tree; the path to a value,
joined with dots, is the coefficient's name: `backends.openvino.threads_2.linear.compute`. All layers
are read, or none: a fault anywhere leaves everything as it was. Deliberately absent: what the
figures mean together (`roofline.py`).
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from graphopt.costs.model import Effective
from graphopt.costs.op_work import CLASSES
from graphopt.documents import Document, Reader, load_yaml
from graphopt.errors import DocumentError, nearest
from graphopt.limits import DOCUMENT_BYTES_MAX

FORMAT = 1
DEFAULTS = Path(__file__).with_name("defaults.yaml")
LEVELS = ("near", "middle", "far")
FILES_MAX = 64  # of an operator's folder; a loop of links ends
BACKENDS_MAX = 32
THREADS_MAX = 1_024

_THREADS = re.compile(r"threads_([1-9][0-9]{0,3})")
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")


@dataclass(frozen=True, slots=True)
class Spec:
    """What a coefficient may be: unit, and the range outside of which it is a mistake."""

    unit: str
    low: float
    high: float


# Ranges hold for any host from a single-board computer to a large server, ten times beyond each.
PEAK = Spec("operations/s", 1e8, 1e15)
BANDWIDTH = Spec("bytes/s", 1e7, 1e14)
BYTES = Spec("bytes", 1 << 10, 1 << 40)
SECONDS = Spec("s", 0.0, 1.0)
FACTOR = Spec("times", 0.0, 1e4)
WEIGHT = Spec("seconds a second", 0.0, 1e3)
SHARPNESS = Spec("exponent", 1.0, 32.0)
ERROR = Spec("log seconds", 0.01, 3.0)
_CLASS_SPECS = {"kernel_s": SECONDS, "compute": FACTOR, "memory": FACTOR}
_BACKEND_SPECS = {"call_s": SECONDS, "error": ERROR}

Trail = tuple[str, ...]


def spec_of(trail: Trail) -> Spec | None:
    """What the coefficient at a path may be; None where there is none of that name."""
    found = _TREE.get(trail[0]) if trail else None
    for step in trail[1:]:
        found = _child(found, step) if isinstance(found, Mapping) else None
    return found if isinstance(found, Spec) else None


@dataclass(frozen=True, slots=True)
class Coefficients:
    """Values by name, with the file that each one comes from; an immutable value."""

    values: Mapping[str, float]
    origins: Mapping[str, str]

    def get(self, *trail: str) -> float | None:
        """The value at a path; None where no layer has one."""
        return self.values.get(".".join(trail))

    def threads(self, *trail: str) -> list[int]:
        """The thread counts for which there is anything under a path, ascending."""
        start = ".".join(trail) + "."
        names = (n[len(start) :].partition(".")[0] for n in self.values if n.startswith(start))
        return sorted({int(match[1]) for name in names if (match := _THREADS.fullmatch(name))})

    def effective(self) -> Iterator[Effective]:
        """Every coefficient in force, by name."""
        for name in sorted(self.values, key=_natural):
            spec = spec_of(tuple(name.split(".")))
            assert spec is not None
            yield Effective(
                name, self.values[name], spec.unit, spec.low, spec.high, self.origins[name]
            )

    def changed(self, other: "Coefficients") -> list[str]:
        """Names whose value differs, or that only one of the two has."""
        names = self.values.keys() | other.values.keys()
        return sorted(n for n in names if self.values.get(n) != other.values.get(n))


def read_layers(paths: Iterable[Path]) -> Coefficients:
    """The coefficients of files, each over those before it. Raises DocumentError for any of them."""
    values: dict[str, float] = {}
    origins: dict[str, str] = {}
    for path in paths:
        for name, value in read_document(load_yaml(_contents(path), source=str(path))).items():
            values[name] = value
            origins[name] = str(path)
    return Coefficients(values, origins)


def layer_paths(calibration: Path | None, operator: Path | None) -> list[Path]:
    """The files that there are, lowest layer first.

    Raises DocumentError when the operator's folder cannot be read or holds too many files.
    """
    paths = [DEFAULTS]
    if calibration is not None and calibration.exists():
        paths.append(calibration)
    if operator is not None:
        paths += operator_files(operator)
    return paths


def operator_files(folder: Path) -> list[Path]:
    """The `*.yaml` files of the operator's folder in name order; a missing folder has none."""
    try:
        found = sorted(each for each in folder.iterdir() if each.suffix == ".yaml")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DocumentError(
            f"cannot be read: {error.strerror}",
            where=str(folder),
            remedy="check the path and that the service's user may read it",
        ) from None
    if len(found) > FILES_MAX:
        raise DocumentError(
            f"holds {len(found)} files, at most {FILES_MAX} are read", where=str(folder)
        )
    return found


def read_document(document: Document) -> dict[str, float]:
    """Values by name. Raises FaultsError naming file, line, column and path of each fault."""
    reader = Reader(document)
    found: dict[str, float] = {}
    if reader.kind == "null":
        reader.fault(
            "the file is empty", f"write `cost: {FORMAT}` for a layer that changes nothing"
        )
        reader.finish()
    reader.field("cost").integer(low=FORMAT, high=FORMAT)
    for part in _TREE:
        if (section := reader.maybe(part)) is not None:
            _read(section, _TREE[part], (part,), found)
    reader.finish()
    return found


def write_document(values: Mapping[str, float], comment: str) -> str:
    """The document of `values`, which `read_document` reads back to the last digit."""
    tree: dict[str, object] = {}
    for name, value in values.items():
        place = tree
        *folders, leaf = name.split(".")
        for folder in folders:
            branch = place.setdefault(folder, {})
            assert isinstance(branch, dict)
            place = branch
        place[leaf] = value
    lines = [f"# {line}".rstrip() for line in comment.splitlines()]
    return "\n".join([*lines, f"cost: {FORMAT}", *_lines(tree, 0), ""])


# -- the tree


_Tree = Mapping[str, object]
_AT_THREADS = {"peak": PEAK, "bandwidth": dict.fromkeys(LEVELS, BANDWIDTH)}
_CLASS_TREE: _Tree = {**_BACKEND_SPECS, **dict.fromkeys(CLASSES, _CLASS_SPECS)}
_ANY_THREADS, _ANY_NAME = "threads_N", "NAME"
_TREE: dict[str, object] = {
    "weights": {"alpha": WEIGHT, "beta": WEIGHT},
    "roofline": {"sharpness": SHARPNESS},
    "host": {"working_set": dict.fromkeys(LEVELS, BYTES), _ANY_THREADS: _AT_THREADS},
    "backends": {_ANY_NAME: {_ANY_THREADS: _CLASS_TREE}},
}


def _child(tree: _Tree, step: str) -> object:
    if step in tree and step not in (_ANY_THREADS, _ANY_NAME):
        return tree[step]
    match = _THREADS.fullmatch(step)
    if _ANY_THREADS in tree and match and int(match[1]) <= THREADS_MAX:
        return tree[_ANY_THREADS]
    return tree.get(_ANY_NAME) if _NAME.fullmatch(step) else None


def _read(reader: Reader, tree: object, trail: Trail, found: dict[str, float]) -> None:
    if isinstance(tree, Spec):
        value = reader.number(low=tree.low, high=tree.high)
        found[".".join(trail)] = value
        return
    assert isinstance(tree, Mapping)
    for key, entry in reader.entries(count_max=THREADS_MAX):
        child = _child(tree, key)
        if child is None:
            known = [name for name in tree if name != _ANY_NAME]
            entry.fault("unknown key", nearest(key, known) or _known(known), of_key=True)
        else:
            _read(entry, child, (*trail, key), found)


def _known(names: Iterable[str]) -> str:
    listed = ", ".join(names)
    return f"known here: {listed}" if listed else "a backend's name is lower case"


def _lines(tree: Mapping[str, object], depth: int) -> Iterator[str]:
    for key in sorted(tree, key=_natural):
        value, space = tree[key], "  " * depth
        if not isinstance(value, Mapping):
            yield f"{space}{key}: {value!r}"
        elif all(not isinstance(each, Mapping) for each in value.values()):
            inner = ", ".join(f"{name}: {each!r}" for name, each in value.items())
            yield f"{space}{key}: {{{inner}}}"
        else:
            yield f"{space}{key}:"
            yield from _lines(value, depth + 1)


def _natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sorts `threads_2` before `threads_16`."""
    parts = re.findall(r"\d+|\D+", name)
    return tuple((0, int(p), "") if p.isdigit() else (1, 0, p) for p in parts)


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
