"""Each result as people read it."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from graphopt.explained import (
    CANDIDATE_HEAD,
    CANDIDATE_NUMBERS,
    STEP_HEAD,
    STEP_NUMBERS,
    builder_line,
    candidate_rows,
    head_lines,
    pin_line,
    step_rows,
)
from graphopt.tables import bytes_word, seconds_word, short_seconds_word, word
from graphoptd.ctl.output import clean, show_lines, show_pairs, show_table

Result = Mapping[str, Any]

_BAR_CHARS = 40
_HASH_CHARS = 12  # of a hash that people compare at sight
_ID_CHARS = 20  # of a delta id in a table; --json has all of it


def status(result: Result) -> None:
    """The service in a line, its models in a table, below it pins, builder and figures."""
    line = (
        f"graphoptd {result['version']}, pid {result['pid']}, up {seconds_word(result['uptime_s'])}"
    )
    line += f", {result['executor_threads']} x {result['intra_op_threads']} threads"
    line += f", state in {result['state']}" if result["state"] else ", state in memory only"
    if peer := result.get("peer"):
        line += f"; you may {peer['level']}"
    show_lines([line])
    if result["models"]:
        models(result)
    else:
        show_lines(["no model is loaded: graphoptctl load NAME BUNDLE"])
    show_lines(map(_threads_line, _of_other_threads(result)))
    show_lines(pin_line(row["pin"]) for row in result["models"] if row["pin"])
    show_lines([builder_line(result["builder"])])
    if result["statistics"]:
        show_pairs(result["statistics"])


def _of_other_threads(result: Result) -> list[Result]:
    """The models that have other threads than those of the first line."""
    usual = (result["executor_threads"], result["intra_op_threads"])
    return [row for row in result["models"] if (row["threads"], row["intra_op_threads"]) != usual]


def _threads_line(row: Result) -> str:
    return f"{row['name']} has {row['threads']} x {row['intra_op_threads']} threads"


def models(result: Result) -> None:
    """One row a model."""
    head = ("model", "revision", "nodes", "blocks", "tiers", "constants", "adapters")
    rows = [
        (
            row["name"],
            row["revision"],
            row["nodes"],
            row["blocks"],
            row["tiers"],
            bytes_word(row["constant_bytes"]),
            row["adapters"],
        )
        for row in result["models"]
    ]
    show_table(head, rows, "revision nodes blocks constants")


def nodes(result: Result) -> None:
    """One row a node."""
    rows = [
        (row["id"], row["op"], row["types"], row["block"], row["tier"]) for row in result["nodes"]
    ]
    show_table(("node", "op", "type", "block", "tier"), rows)


def drawn(result: Result) -> None:
    """A drawing, as it is."""
    show_lines(result["lines"])


def shown(result: Result) -> None:
    """A graph as text, or a node with what is around it."""
    if "lines" in result:
        show_lines(result["lines"])
        return
    node = result["node"]
    show_lines([node["line"]])
    pairs = {
        "operands": node["operands"],
        "constants": {name: each["type"] for name, each in node["constants"].items()},
        "users": node["users"],
        "block": node["block"],
        "tier": node["tier"],
    }
    show_pairs({f"  {name}": value for name, value in pairs.items()})


def history(result: Result) -> None:
    """One row a revision."""
    rows = [
        (
            row["revision"],
            datetime.fromtimestamp(row["wall_s"]).strftime("%Y-%m-%d %H:%M:%S"),
            row["kind"],
            row["summary"],
            _shortened(row["delta_id"]),
            row["graph_hash"][:_HASH_CHARS],
        )
        for row in result["history"]
    ]
    show_table(("revision", "time", "kind", "what", "id", "graph"), rows, "revision")


def explanation(result: Result) -> None:
    """One row a step, one a candidate, and the builder."""
    show_lines([*head_lines(result), ""])
    show_table(STEP_HEAD, step_rows(result), " ".join(STEP_NUMBERS))
    show_lines([""])
    if result["candidates"]:
        show_table(CANDIDATE_HEAD, candidate_rows(result), " ".join(CANDIDATE_NUMBERS))
        show_lines([""])
    show_lines([builder_line(result["builder"])])


def difference(result: Result) -> None:
    """Counts, lines that went and came, and what runs what differs."""
    if not result["lines"]:
        show_lines(["the graphs are equal"])
        return
    kinds = [_counted(kind, counts) for kind, counts in result["counts"].items()]
    show_lines(["; ".join(kinds), *result["lines"]] if kinds else result["lines"])
    plan = result["plan"]
    if plan is None:
        return
    show_lines([f"revision {plan['revision']} runs plan {plan['plan_id']}: {word(plan['tiers'])}"])
    for step in plan["touched"]:
        on = f"{step['tier']} ({step['options']})" if step["options"] else step["tier"]
        over = f", {step['blocks']} blocks" if step["blocks"] > 1 else ""
        show_lines([f"  {step['block']}{over}: {on}"])


def pinned(result: Result) -> None:
    """The pin, and what runs now."""
    show_lines([pin_line(result["pin"]) if result["pin"] else f"{result['model']} is not pinned"])
    what = f"it runs plan {result['plan_id']}: {word(result['tiers'])}"
    if not result["in_force"]:
        what += "; the background is busy and acts on the pin next: see graphoptctl explain"
    show_lines([what])


def applied(result: Result) -> None:
    """What a delta did."""
    show_lines(
        [
            f"{result['model']} is at revision {result['revision']}: "
            f"{result['affected_nodes']} nodes affected, {result['inferred_nodes']} inferred, "
            f"{result['blocks_replanned']} of "
            f"{result['blocks_replanned'] + result['blocks_reused']} blocks planned again"
            + (f", live after {result['live_s'] * 1e3:.2f} ms" if result["live_s"] else "")
        ]
    )


def tried(result: Result) -> None:
    """What a delta would do."""
    blocks = result["blocks"]
    show_pairs(
        {
            f"{result['model']} would stay as it is at revision": result["revision"],
            "nodes affected": len(result["nodes"]),
            "nodes inferred": result["inferred_nodes"],
            "blocks planned again": f"{len(blocks)} of {len(blocks) + result['blocks_reused']}",
            "bytes to stage": bytes_word(result["staged_bytes"]),
            "inputs or outputs change": result["changes_interface"],
            **_foreseen(result.get("cost")),
        }
    )


def costs(result: Result) -> None:
    """One row a coefficient."""
    rows = [
        (
            row["name"], f"{row['value']:.4g}", row["unit"],
            f"{row['low']:.3g} to {row['high']:.3g}", row["origin"],
        )
        for row in result["coefficients"]
    ]  # fmt: skip
    show_table(("coefficient", "value", "unit", "range", "origin"), rows, "value")


def bar(progress: Result) -> str:
    """How far a calibration is."""
    done, of = progress["done"], max(1, progress["of"])
    filled = _BAR_CHARS * done // of
    return f"[{'#' * filled}{'.' * (_BAR_CHARS - filled)}] {done}/{of} {clean(progress['about'])}"


def calibrated(result: Result) -> None:
    """Where the layer lies."""
    show_lines(
        [
            f"measured in {result['took_s']:.0f} s, {result['changed']} coefficients changed: "
            f"{result['path']}"
        ]
    )


def forked(result: Result) -> None:
    """Both names."""
    show_lines(
        [
            f"{result['model']} is live at revision {result['revision']}, forked from {result['from_model']}"
        ]
    )


def loaded(result: Result) -> None:
    """The new model."""
    show_lines(
        [f"{result['model']} is live at revision {result['revision']}: {result['nodes']} nodes"]
    )


def unloaded(result: Result) -> None:
    """The model that went."""
    show_lines([f"{result['model']} is unloaded; it was at revision {result['revision']}"])


def reloaded(result: Result) -> None:
    """Keys by effect."""
    if "started" in result:
        show_lines(["the configuration is being read; graphoptctl logs says how it ended"])
        return
    changed = {
        "in force": result["applied"],
        "at the next start": result["needs_restart"],
        "decided by the state": result["kept_by_state"],
    }
    if any(changed.values()):
        show_pairs(changed)
    else:
        show_lines(["nothing has changed"])


def settled(result: Result) -> None:
    """Whether, and after how long."""
    what = "settled" if result["settled"] else "not settled: the service stops"
    show_lines([f"{what}, waited {result['waited_s']:.1f} s"])


def template(result: Result) -> None:
    """The document itself."""
    show_lines(result["text"].splitlines())


def log_line(line: dict[str, Any]) -> None:
    """A line of the log as on a terminal of the service."""
    time, severity, event = (str(line.get(key, "")) for key in ("ts", "severity", "event"))
    fields = [
        f"{name}={_field(value)}"
        for name, value in line.items()
        if name not in ("ts", "severity", "event", "schema", "exception")
    ]
    show_lines([f"{time[11:23]} {severity:<7} {event:<16} {' '.join(fields)}".rstrip()])
    for row in str(line.get("exception", "")).splitlines():
        show_lines([f"    {row}"])


def _foreseen(cost: Mapping[str, Any] | None) -> dict[str, str]:
    """Predicted seconds before and after; what cannot be predicted is left out."""
    if cost is None:
        return {}
    names = {
        "before": "a request takes now",
        "live": "as soon as it is applied",
        "settled": "once regions are built again",
    }
    at = ", ".join(f"{name}={size}" for name, size in cost["sizes"].items())
    return {
        f"{name} ({at})" if at else name: _band(cost[key])
        for key, name in names.items()
        if cost[key] is not None
    }


def _band(cost: Mapping[str, Any]) -> str:
    """`3.1 ms (2.7 ms to 3.6 ms), 4 of 12 steps measured`."""
    low, seconds, high = (short_seconds_word(cost[key]) for key in ("low_s", "seconds", "high_s"))
    return (
        f"{seconds} ({low} to {high}), {cost['measured_steps']} of {cost['steps']} steps measured"
    )


def _counted(kind: str, counts: Mapping[str, int]) -> str:
    """`nodes: 2 added, 1 changed`."""
    name = {"const": "constants", "alias": "aliases"}.get(kind, f"{kind}s")
    return f"{name}: " + ", ".join(f"{count} {how}" for how, count in counts.items() if count)


def _field(value: Any) -> str:
    text = word(value)
    return f'"{clean(text)}"' if not text or set(text) & set(' ="') else text


def _shortened(id_: str | None) -> str | None:
    return id_ if id_ is None or len(id_) <= _ID_CHARS else f"{id_[: _ID_CHARS - 3]}..."
