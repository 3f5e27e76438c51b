"""What an explanation says, as people read it: the same words in the library and in `graphoptctl`.

Everything here takes the JSON form of `graphopt.engine.explain.Explanation` and of its parts, because
the client has no other and loads no engine.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from graphopt.tables import (
    bytes_word,
    count_word,
    plain_table,
    seconds_word,
    short_seconds_word,
    word,
)

Record = Mapping[str, Any]

STEP_HEAD = (
    "step", "blocks", "nodes", "tier", "options", "predicted", "measured", "touched", "key", "why",
)  # fmt: skip
STEP_NUMBERS = ("blocks", "nodes", "predicted", "measured", "touched")
CANDIDATE_HEAD = (
    "candidate", "state", "predicted", "latency", "ratio", "build", "memory", "revision", "why",
)  # fmt: skip
CANDIDATE_NUMBERS = ("predicted", "latency", "ratio", "build", "memory", "revision")

_HASH_CHARS = 12  # of a hash that people compare at sight
_PHASES = {
    "trial": "a candidate is on trial",
    "watch": "the plan is under watch",
    "confirmation": "the plan is slower than it was, and is compared with the last good one",
}


def text_of(explanation: Record) -> str:
    """The whole of it as plain text."""
    lines = [*head_lines(explanation), "", *_steps(explanation)]
    if explanation["candidates"]:
        lines += ["", *_candidates(explanation)]
    return "\n".join([*lines, "", builder_line(explanation["builder"])])


def head_lines(explanation: Record) -> list[str]:
    """Which plan it is, what the switch is at, and the pin."""
    head = (
        f"{explanation['model']} revision {explanation['revision']}, plan {explanation['plan_id']}, "
        f"graph {explanation['graph_hash'][:_HASH_CHARS]}"
    )
    if phase := _PHASES.get(explanation["phase"]):
        head += f"; {phase}"
    pin = explanation["pin"]
    return [head] if pin is None else [head, pin_line(pin)]


def step_rows(explanation: Record) -> list[tuple[Any, ...]]:
    """Cells of one row a step, as `STEP_HEAD` names them."""
    return [
        (
            row["block"], row["blocks"], row["nodes"], row["tier"], row["options"] or None,
            predicted_word(row), _shown(row["measured_s"], short_seconds_word),
            _shown(row["touched"], "r{}".format), row["key"][:_HASH_CHARS], row["reason"],
        )
        for row in explanation["steps"]
    ]  # fmt: skip


def candidate_rows(explanation: Record) -> list[tuple[Any, ...]]:
    """Cells of one row a candidate, as `CANDIDATE_HEAD` names them; absent is None."""
    return [
        (
            row["label"], row["state"], _shown(row["predicted_s"], short_seconds_word),
            _shown(row["latency_s"], short_seconds_word), _shown(row["ratio"], "{:.2f}x".format),
            _shown(row["build_s"], short_seconds_word),
            _shown(row["resident_bytes"], bytes_word), row["revision"], row["reason"] or None,
        )
        for row in explanation["candidates"]
    ]  # fmt: skip


def predicted_word(row: Record) -> str | None:
    """A prediction and its band: `3.1 ms (2.7 to 3.6)`; None where there is none."""
    if row["predicted_s"] is None:
        return None
    low, high = (row[f"predicted_{end}_s"] / row["predicted_s"] for end in ("low", "high"))
    return f"{short_seconds_word(row['predicted_s'])} ({low:.2f}x to {high:.2f}x)"


def pin_line(pin: Record) -> str:
    """Who holds what, for how long, and why."""
    left = seconds_word(round(pin["left_s"]))
    what = "keeps its plan"
    if pin["tiers"] is not None:
        what = f"keeps to {word(_with_eager(pin['tiers']))}"
    return f"{pin['model']} {what} for another {left}, pinned by {pin['owner']}: {pin['reason']}"


def builder_line(builder: Record) -> str:
    """State, job and queue, share of a core, restarts and quarantine."""
    parts = [f"builder {builder['state']}"]
    if builder["job"] is not None:
        parts.append(f"at job {builder['job']}")
    if builder["queued"]:
        parts.append(f"{count_word(builder['queued'], 'job')} without an answer")
    if builder["share_pct"] is not None:
        parts.append(f"{builder['share_pct']:.3g}% of a core")
    if builder["rss_bytes"] is not None:
        parts.append(bytes_word(builder["rss_bytes"]))
    if builder["restarts"]:
        parts.append(count_word(builder["restarts"], "restart"))
    if builder["quarantined"]:
        parts.append(f"{count_word(builder['quarantined'], 'candidate')} quarantined")
    return ", ".join(parts)


def _steps(explanation: Record) -> list[str]:
    return _table(STEP_HEAD, step_rows(explanation), STEP_NUMBERS)


def _candidates(explanation: Record) -> list[str]:
    return _table(CANDIDATE_HEAD, candidate_rows(explanation), CANDIDATE_NUMBERS)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]], numbers: Sequence[str]) -> list[str]:
    return plain_table(head, [[word(cell) for cell in row] for row in rows], numbers)


def _with_eager(tiers: Sequence[str]) -> list[str]:
    """A pin of tiers always allows `eager`: the live path needs it."""
    return list(dict.fromkeys(("eager", *tiers)))


def _shown(value: Any, show: Any) -> str | None:
    return None if value is None else show(value)
