"""The sheet that lies beside every artifact: which runtime wrote it, and how it is called.

`call.json` is small, strict and checked on reading, so that a truncated or foreign artifact is
refused before the runtime sees it. Deliberately absent: weights, paths, anything of the graph.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from graphopt.analysis.facts import Facts
from graphopt.analysis.regions import Region
from graphopt.dims import substitute, symbol
from graphopt.executor.backend import BuildError
from graphopt.executor.backends.translate import Guard, Written
from graphopt.types import TensorType, parse_type

FORMAT = 2
SHEET = "call.json"


@dataclass(frozen=True, slots=True)
class Sheet:
    """How an artifact is called.

    Types are texts over the symbols `s0, s1 …` of the region; `sizes` are those of the options it
    was built for; `converted` are the ops that the runtime's own converter wrote, one for each node.
    `files` maps each file of the artifact to its size in bytes.
    """

    runtime: str
    version: str
    reads: tuple[str, ...]
    exits: tuple[str, ...]
    echoes: tuple[tuple[int, int], ...]  # exits that are reads as they came
    n_symbols: int
    scalars: tuple[int, ...]
    guards: tuple[Guard, ...]
    sizes: tuple[int, ...] | None
    constants: tuple[str, ...]  # types of `Region.consts`
    converted: tuple[str, ...]

    def exit_types(self) -> list[TensorType]:
        """The types of the exits, settled where sizes are fixed."""
        return [self._settled(text) for text in self.exits]

    def computed_types(self) -> list[TensorType]:
        """The types of the exits that the runtime computes."""
        echoes = dict(self.echoes)
        return [type_ for i, type_ in enumerate(self.exit_types()) if i not in echoes]

    def read_types(self) -> list[TensorType]:
        """The types of the reads."""
        return [self._settled(text) for text in self.reads]

    def _settled(self, text: str) -> TensorType:
        type_ = parse_type(text)
        assert isinstance(type_, TensorType)
        sizes = {f"s{i}": size for i, size in enumerate(self.sizes or ())}
        return TensorType(type_.dtype, tuple(substitute(dim, sizes) for dim in type_.shape))


def sheet_of(
    facts: Facts,
    region: Region,
    written: Written,
    runtime: str,
    version: str,
    sizes: tuple[int, ...] | None,
) -> Sheet:
    """The sheet for a region as it was written."""
    names = {name: symbol(f"s{i}") for i, name in enumerate(region.symbols)}

    def text(type_: Any) -> str:
        return str(TensorType(type_.dtype, tuple(substitute(dim, names) for dim in type_.shape)))

    return Sheet(
        runtime,
        version,
        tuple(text(facts.type_of(ref)) for ref in region.reads),
        tuple(text(facts.type_of(ref)) for ref in region.exits),
        written.echoes,
        len(region.symbols),
        written.scalars,
        written.guards,
        sizes,
        tuple(text(facts.graph.constants[name].type) for name in region.consts),
        written.converted,
    )


def write_sheet(folder: Path, sheet: Sheet, files: Sequence[str]) -> None:
    """Writes the sheet last: an artifact without one is not finished."""
    document = {"format": FORMAT, **asdict(sheet)}
    document["files"] = {name: (folder / name).stat().st_size for name in files}
    text = json.dumps(document, sort_keys=True)
    (folder / SHEET).write_text(json.dumps({"digest": _digest(text), "sheet": text}))


def read_sheet(folder: Path, runtime: str, version: str) -> Sheet:
    """The sheet of an artifact in `folder`; BuildError when it is not what this version wrote."""
    try:
        envelope = json.loads((folder / SHEET).read_text())
        text = envelope["sheet"]
        if envelope["digest"] != _digest(text):
            raise ValueError("its digest does not fit")
        document = json.loads(text)
        if document.pop("format") != FORMAT:
            raise ValueError("another format")
        files = document.pop("files")
        sheet = Sheet(
            document["runtime"],
            document["version"],
            tuple(document["reads"]),
            tuple(document["exits"]),
            tuple((exit_, read) for exit_, read in document["echoes"]),
            document["n_symbols"],
            tuple(document["scalars"]),
            tuple(Guard(**guard) for guard in document["guards"]),
            None if document["sizes"] is None else tuple(document["sizes"]),
            tuple(document["constants"]),
            tuple(document["converted"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BuildError(
            f"no finished artifact: {error}", where=str(folder), remedy="build it again"
        ) from error
    if (sheet.runtime, sheet.version) != (runtime, version):
        raise BuildError(
            f"it was built by {sheet.runtime} {sheet.version}, this is {runtime} {version}",
            where=str(folder),
            remedy="build it again",
        )
    for name, size in files.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else -1
        if found != size:
            raise BuildError(
                f"{name} has {max(found, 0)} bytes and not {size}",
                where=str(folder),
                remedy="build it again",
            )
    return sheet


def _digest(text: str) -> str:
    return blake2b(text.encode(), digest_size=16).hexdigest()
