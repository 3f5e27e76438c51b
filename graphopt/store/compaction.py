"""Which rows a journal needs: pure functions from its rows to the ones that are kept.

A model that is loaded needs one base (a `load`, `fork` or `snapshot` row, each of which holds a
whole graph) and the rows that came after that graph. A snapshot is written beside the live path, so
increments of a higher revision may stand before it; what a base supersedes is therefore told by
revision, and by place only for rows of its own revision. A model that was unloaded needs nothing.
`reach` keeps an older base, for rollback and history.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from graphopt.store.chain import (
    ANCHOR,
    BASES,
    FORK,
    INTERNAL,
    LOAD,
    UNLOAD,
    Record,
    Row,
    anchor,
    first_seq,
)


@dataclass(frozen=True, slots=True)
class Lineage:
    """What recovery of one model needs: a base, and the increments to apply to it, in order."""

    base: Record
    increments: tuple[Record, ...]


@dataclass(frozen=True, slots=True)
class Outline:
    """A row without its body. `first_seq` differs from `seq` only for an anchor."""

    seq: int
    first_seq: int
    parent_sha: str
    sha: str
    kind: str
    model: str
    revision: int
    blobs: tuple[str, ...]


def outline(row: Record) -> Outline:
    """The outline of a verified row."""
    return Outline(
        row.seq,
        first_seq(row),
        row.parent_sha,
        row.sha,
        row.kind,
        row.model,
        row.revision,
        row.blobs,
    )


_RowT = TypeVar("_RowT", Record, Outline)


def lineages(records: Iterable[Record]) -> dict[str, Lineage]:
    """Per loaded model the youngest base and what follows it."""
    found = {}
    for model, rows in _by_model(records).items():
        base = _youngest_base(rows, None)
        increments = (r for r in rows if r.kind not in BASES and not _superseded(r, base))
        found[model] = Lineage(base, tuple(increments))
    return found


def needed(rows: Iterable[Outline], reach: Mapping[str, int]) -> set[int]:
    """The rows (by `seq`) that recovery needs, and those that rebuild revisions back to `reach`.

    Args:
        rows: All rows in order.
        reach: Model name to the oldest revision that must stay reachable; a model that is not in it
            keeps its youngest base and what follows.
    """
    kept: set[int] = set()
    for model, group in _by_model(rows).items():
        base = _youngest_base(group, reach.get(model))
        kept.update(r.seq for r in group if not _superseded(r, base))
    return kept


def anchors(rows: Iterable[Outline], kept: Collection[int]) -> Iterator[Row]:
    """One anchor for each run of rows that are not kept; runs that are one anchor already are left out."""
    run: list[Outline] = []
    for row in rows:
        if row.seq not in kept:
            run.append(row)
            continue
        yield from _anchor_of(run)
        run = []
    yield from _anchor_of(run)


def _anchor_of(run: list[Outline]) -> Iterator[Row]:
    if run and (len(run) > 1 or run[0].kind != ANCHOR):
        yield anchor(run[0].first_seq, run[-1].seq, run[0].parent_sha, run[-1].sha)


def _by_model(rows: Iterable[_RowT]) -> dict[str, list[_RowT]]:
    """The rows of each loaded model since it was loaded, in order; the first is a base or follows one."""
    models: dict[str, list[_RowT]] = {}
    for row in rows:
        if row.kind == UNLOAD:
            models.pop(row.model, None)
        elif row.kind in (LOAD, FORK):
            models[row.model] = [row]
        elif row.kind not in INTERNAL:
            models.setdefault(row.model, []).append(row)
    return models


def _youngest_base(rows: list[_RowT], revision_max: int | None) -> _RowT:
    """The base of the highest revision up to `revision_max`, else the oldest one there is."""
    bases = sorted((r for r in rows if r.kind in BASES), key=lambda r: (r.revision, r.seq))
    within = [r for r in bases if revision_max is None or r.revision <= revision_max]
    return within[-1] if within else bases[0]


def _superseded(row: _RowT, base: _RowT) -> bool:
    return row.revision <= base.revision and row.seq < base.seq
