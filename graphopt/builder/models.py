"""The models as the builder knows them: graph, facts and eager plan of the last few revisions.

A model arrives as text with the files that its constants lie in, and goes on by deltas, each applied
to the facts as the engine does (law 3: the facts come out the same). Constants are mapped from those
files, never copied.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from graphopt.analysis.facts import Facts, Update, analyse, update
from graphopt.constants import constant_of
from graphopt.delta import apply_fully
from graphopt.delta_document import decode_delta
from graphopt.documents import from_value
from graphopt.errors import DocumentError, GraphoptError
from graphopt.executor.build import EagerBuilder, build_plan, replan
from graphopt.executor.plan import Plan
from graphopt.graph import Constant
from graphopt.safe_file import Source
from graphopt.safetensors_file import read_tensors
from graphopt.text_parser import parse_graph

VERSIONS_KEPT = (
    4  # of one model: a queued job may be a few revisions behind; they share all but edits
)
CHANGES_MAX = 32  # beyond so many a plan is as soon made as repaired
_C128 = "c128:"  # before the digest of a tensor that is stored as pairs of f64


class UnknownRevisionError(GraphoptError):
    """The builder lacks the revision that a delta starts from, or a file that it names."""

    code = "builder.unknown_revision"


class Version:
    """One revision of one model; its eager plan is made when somebody first needs it.

    Attributes:
        standing: what the planner kept of the last revision that it was asked about, and what led
            from there to here, oldest first; None where it was not asked, or too long ago.
    """

    def __init__(self, revision: int, facts: Facts, eager: EagerBuilder) -> None:
        self.revision = revision
        self.facts = facts
        self.standing: tuple[Any, tuple[Update, ...]] | None = None
        self._eager = eager
        self._plan: Plan | None = None

    @property
    def plan(self) -> Plan:
        """Eager steps for the whole graph."""
        if self._plan is None:
            self._plan = build_plan(self.facts, self.revision, self._eager)
        return self._plan

    def after(self, revision: int, change: Update) -> "Version":
        """The version that `change` leads to; steps of unchanged blocks are the same objects."""
        new = Version(revision, change.facts, self._eager)
        if self._plan is not None:
            new._plan = replan(self._plan, change, revision, self._eager)[0]
        standing = self.standing  # read once: a proposal may be under way
        if standing is not None and len(standing[1]) < CHANGES_MAX:
            new.standing = (standing[0], (*standing[1], change))
        return new


class _Model:
    """One model's versions by revision, the current one last, and the constants at hand."""

    def __init__(self) -> None:
        self.versions: OrderedDict[int, Version] = OrderedDict()
        self.constants: dict[str, Constant] = {}  # by digest
        self.samples: tuple[Path, ...] = ()

    def map_files(self, files: Iterable[str]) -> None:
        for path in files:
            for key, tensor in read_tensors(path).items():
                digest = key.removeprefix(_C128)
                if digest not in self.constants:
                    data = torch.view_as_complex(tensor) if key.startswith(_C128) else tensor
                    self.constants[digest] = constant_of(data, digest=digest)

    def add(self, version: Version) -> None:
        self.versions[version.revision] = version
        while len(self.versions) > VERSIONS_KEPT:
            self.versions.popitem(last=False)
        used = {
            constant.digest
            for kept in self.versions.values()
            for constant in kept.facts.graph.constants.values()
        }
        self.constants = {d: c for d, c in self.constants.items() if d in used}


class ModelTable:
    """Every model of the engine that has had a job, by name."""

    def __init__(self) -> None:
        self._models: dict[str, _Model] = {}
        self._eager = EagerBuilder()

    def load(self, name: str, revision: int, text: str, files: Iterable[str]) -> None:
        """Takes in a whole model.

        Args:
            name: the model's.
            revision: of the graph.
            text: path of the file with the graph's text form.
            files: paths of safetensors files that hold every constant under its digest.

        Raises UnknownRevisionError when a file is gone or not what it should be.
        """
        model = _Model()
        known = self._models.get(name)
        if known is not None:
            model.samples = known.samples
        try:
            model.map_files(files)
            graph = parse_graph(Path(text).read_text(encoding="utf-8"), model.constants)
            model.add(Version(revision, analyse(graph), self._eager))
        except (GraphoptError, OSError) as error:
            self._models.pop(name, None)
            raise UnknownRevisionError(
                f"revision {revision} cannot be read: {error}", where=name, remedy="send it again"
            ) from error
        self._models[name] = model

    def revise(
        self,
        name: str,
        since: int,
        revision: int,
        document: Mapping[str, Any],
        files: Iterable[str],
    ) -> None:
        """Applies a journaled delta, which leads from revision `since` to `revision`.

        Raises UnknownRevisionError when `since` is not the current revision here, and when the
        delta does not apply: the whole model is needed then.
        """
        model = self._models.get(name)
        current = self.current(name)
        if model is None or current is None or current.revision != since:
            have = current.revision if current else "nothing"
            raise UnknownRevisionError(
                f"the delta starts from revision {since}, here is {have}",
                where=name,
                remedy="send the whole model",
            )
        try:
            model.map_files(files)
            delta = decode_delta(
                from_value(document, source=f"{name} {revision}"), _Known(model.constants)
            )
            applied = apply_fully(current.facts.graph, delta, current.facts.type_of)
            change = update(current.facts, applied.graph, applied.change)
        except (GraphoptError, OSError) as error:
            raise UnknownRevisionError(
                f"the delta to revision {revision} does not apply: {error}",
                where=name,
                remedy="send the whole model",
            ) from error
        model.add(current.after(revision, change))

    def at(self, name: str, revision: int) -> Version | None:
        """One revision of a model, None when it is not here."""
        model = self._models.get(name)
        return model.versions.get(revision) if model else None

    def current(self, name: str) -> Version | None:
        """The newest revision of a model, None when the model is not here."""
        model = self._models.get(name)
        return next(reversed(model.versions.values())) if model and model.versions else None

    def samples(self, name: str) -> tuple[Path, ...]:
        """Files with real inputs of a model, one request each."""
        model = self._models.get(name)
        return model.samples if model else ()

    def set_samples(self, name: str, files: Iterable[str]) -> None:
        """Replaces the real inputs of a model; they outlive `load`."""
        self._models.setdefault(name, _Model()).samples = tuple(map(Path, files))

    def forget(self, name: str) -> None:
        """Lets go of a model and its mappings."""
        self._models.pop(name, None)


class _Known:
    """What a journaled delta may refer to: constants of mapped files."""

    def __init__(self, constants: Mapping[str, Constant]) -> None:
        self._constants = constants

    def files(self, path: str) -> Mapping[str, Source]:
        """Refuses: journaled deltas name no files."""
        raise DocumentError(
            f"a journaled delta names the file {path!r}", where=path, remedy="send its expansion"
        )

    def constant(self, digest: str) -> Constant | None:
        """The constant of that content hash."""
        return self._constants.get(digest)
