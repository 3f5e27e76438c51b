"""What the engine asks of the builder and what it answers, as records and as JSON values.

A line is one JSON object. The engine's lines have `op`: `model`, `delta`, `forget`, `samples`,
`quarantine`, `build`, `verify_fused`, `propose`, `cancel`. The builder's have `say`: `policy` (how
it is scheduled), `ready`, `synced` (a state message was taken in), `unknown` (it could not be),
`started`, `trying` (native code that may bring it down, or nothing any more), `ran` (an artifact was
loaded and has run: others may load it while it is proven), `beat` (once a second while it works),
`answer`.

Deliberately absent: tensors. They lie in files that both sides map.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

FUSED = (
    "fused"  # stands where a backend's name would: the tier that the serving process makes itself
)

# What became of a job. `done` is the only one with `ok`.
DONE = "done"
UNSUPPORTED = "unsupported"  # the backend is not there, or cannot run a node of the region
BUILD, LOAD, VERIFY = "build", "load", "verify"  # the stage that failed
RAN = "ran"  # no failure: a stage that is reached within `verify`
PROPOSE = "propose"  # the planner raised
QUARANTINED = "quarantined"  # it brought a builder down before
CRASHED, HUNG = "crashed", "hung"  # it brought this builder down
CANCELLED = "cancelled"  # a newer revision made it useless, or the caller took it back
BUSY = "busy"  # the queue is full; ask again
UNKNOWN = "unknown"  # there is no such model or revision
OFF = "off"  # the builder does not start, or was closed

UNDECIDED = frozenset({CANCELLED, BUSY, UNKNOWN, OFF})
"""Stages that say nothing about the candidate: it is to be asked for again another time."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a build or a verification. What was not measured is None.

    Attributes:
        ok: verified: loaded and run in the builder, and equal within tolerance.
        stage: one of the words of `graphopt.builder.records`.
        reason: empty when ok.
        region_key: of the region's structure.
        weight_key: of the contents of its constants.
        version: the backend's.
        revision: the one whose values it was verified on: that of the job, or a newer one in which
            the region is the same.
        max_error: of the worst output against float64, or against eager where that was enough.
        allowed: error of that output.
        n_samples: requests it was compared on.
        is_made_up: whether those were made up because no captured one fits.
        build_s: wall time of `Backend.build`.
        cpu_s: processor time of building, loading and verifying, all threads.
        artifact_bytes: of the files in the folder.
        resident_bytes: memory of the loaded artifact beyond mapped files, as the backend says.
        unsupported: nodes the backend cannot run, with reasons.
        rewrites: passes that changed the region before it was built, each with its edits.
        converted: ops that the runtime's own converter wrote, each with its number of nodes.
    """

    ok: bool
    stage: str
    reason: str = ""
    region_key: str = ""
    weight_key: str = ""
    version: str = ""
    revision: int | None = None
    max_error: float | None = None
    allowed: float | None = None
    n_samples: int = 0
    is_made_up: bool = False
    build_s: float | None = None
    cpu_s: float | None = None
    artifact_bytes: int | None = None
    resident_bytes: int | None = None
    unsupported: tuple[tuple[str, str], ...] = ()
    rewrites: tuple[tuple[str, int], ...] = ()
    converted: tuple[tuple[str, int], ...] = ()

    def document(self) -> dict[str, Any]:
        """As JSON values; `answer_of` reads it back."""
        return asdict(self)


def answer_of(document: Mapping[str, Any]) -> Answer:
    """The answer that `Answer.document` wrote."""
    pairs = {
        name: tuple((first, second) for first, second in document[name])
        for name in ("unsupported", "rewrites", "converted")
    }
    return Answer(**{**document, **pairs})


def finite(value: float) -> float | None:
    """`value`, or None for what JSON has no number for."""
    return value if math.isfinite(value) else None


def quarantine_key(region: str, backend: str, version: str, options: Mapping[str, Any]) -> str:
    """The name of a candidate that brought a builder down.

    Weights are left out: what crashes one layer of an encoder crashes its eleven twins.
    """
    return f"{region} {backend} {version} {json.dumps(options, sort_keys=True)}"


def encode_line(message: Mapping[str, Any]) -> bytes:
    """One message as a line."""
    return json.dumps(message, separators=(",", ":"), allow_nan=False).encode() + b"\n"
