"""From artifacts to overlays: which function a runtime region gets, put together for every shape.

Deliberately absent: where artifacts come from (`gather`), and whether the result is any better.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from graphopt.analysis.facts import Facts
from graphopt.engine.shelf import Shelf
from graphopt.executor.arrangement import ArtifactKey, Overlay
from graphopt.executor.backend import Options, options_of
from graphopt.executor.build import bind_run, weight_key
from graphopt.executor.runs import eager_run, run_region
from graphopt.executor.shape_switch import Function, ShapeSwitch, closed_over


@dataclass(frozen=True, slots=True)
class Piece:
    """One artifact that a plan asks for: a run of blocks on a backend, with options."""

    blocks: tuple[str, ...]
    backend: str
    options: Options

    @property
    def about(self) -> str:
        """The piece as logs and people name it."""
        return f"{self.backend} of {self.blocks[-1]} ({self.options.label})"


Keyed = list[tuple[Piece, ArtifactKey]]


def pieces_of(plan: Mapping[str, Any]) -> list[Piece]:
    """The pieces of a proposed plan, in its order."""
    return [
        Piece(tuple(region["blocks"]), region["backend"], options_of(region["options"]))
        for region in plan["regions"]
    ]


def artifact_key(facts: Facts, piece: Piece, version: str) -> ArtifactKey:
    """What an artifact is told apart by; the first two are region key and weight key."""
    region = run_region(facts, piece.blocks)
    options = json.dumps(piece.options.document(), separators=(",", ":"))
    weights = weight_key(facts.graph, region)
    return (region.key, weights, piece.backend, version, options)


def overlays_of(
    facts: Facts, keyed: Keyed, loaded: Shelf, published: Iterable[Overlay] = ()
) -> list[Overlay]:
    """An overlay for each run of which at least one artifact is loaded.

    Those of `published`, which are of this very graph, are taken over where they are the same.
    """
    there = {(overlay.step.blocks, overlay.artifacts): overlay for overlay in published}
    by_run: dict[tuple[str, ...], list[tuple[Piece, ArtifactKey]]] = {}
    for piece, key in keyed:
        by_run.setdefault(piece.blocks, []).append((piece, key))
    found = []
    for run, entries in by_run.items():
        keys = tuple(key for _, key in entries if loaded.find(key) is not None)
        if keys:
            known = there.get((run, keys))
            found.append(known or _overlay(facts, run, entries, loaded))
    return found


def _overlay(
    facts: Facts,
    run: tuple[str, ...],
    entries: Iterable[tuple[Piece, ArtifactKey]],
    loaded: Shelf,
) -> Overlay:
    region = run_region(facts, run)
    any_shape: Function | None = None
    variants: dict[tuple[int, ...], Function] = {}
    keys: list[ArtifactKey] = []
    labels: list[str] = []
    backend = ""
    for piece, key in entries:
        candidate = loaded.find(key)
        if candidate is None:
            continue
        backend, sizes = piece.backend, piece.options.sizes
        keys.append(key)
        labels.append(piece.options.label)
        if sizes is None or not region.symbols:
            any_shape = candidate.function
        else:
            variants[sizes] = candidate.function
    if any_shape is None:
        eager = eager_run(facts, run)
        any_shape = closed_over(eager.function, eager.constants, len(region.symbols))
        labels.append("other shapes eager")
    function = ShapeSwitch(len(region.symbols), any_shape, variants) if variants else any_shape
    step = bind_run(facts, run, region, backend, function, (), "; ".join(labels))
    return Overlay(step, tuple(keys))
