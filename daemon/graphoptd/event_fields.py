"""The words of the log: every field that a line may have, with type, unit and meaning.

A unit belongs to the name of a field (`_ms`, `_bytes`).
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Field:
    """A word of the vocabulary.

    Attributes:
        type: string, integer, number, boolean, list or mapping.
        unit: of a number, or what a text consists of; may be empty.
    """

    name: str
    type: str
    unit: str
    meaning: str


def _fields(*rows: tuple[str, str, str, str]) -> Mapping[str, Field]:
    return {row[0]: Field(*row) for row in rows}


FIELDS: Mapping[str, Field] = _fields(
    # -- what it is about
    ("graph", "string", "name", "model the line is about"),
    ("revision", "integer", "number", "revision of the graph, after the event"),
    ("from_revision", "integer", "number", "revision before the event"),
    ("from_graph", "string", "name", "model that was forked"),
    ("plan_id", "string", "id", "plan the line is about"),
    ("from_plan_id", "string", "id", "plan it replaces"),
    ("delta_id", "string", "id", "delta, as its client named it"),
    ("request_id", "string", "id", "request, as its client named it"),
    ("region", "string", "key", "region of the graph, by its structural key"),
    ("backend", "string", "name", "backend of a candidate: eager, fused, onnxruntime, ..."),
    ("block", "string", "id", "block of the graph, by the node whose value leaves it"),
    # -- who and where
    ("peer_uid", "integer", "uid", "user at the other end of the socket"),
    ("peer_pid", "integer", "pid", "process at the other end of the socket"),
    ("source", "string", "control, spool, http, config, cli or recovery", "how the wish arrived"),
    ("method", "string", "name", "control method that was called"),
    ("level", "string", "read, operate or admin", "level that the method needs"),
    ("path", "string", "path", "file or folder"),
    ("addresses", "list", "host:port or path", "where a plane listens"),
    ("plane", "string", "control or data", "which listener"),
    ("inherited", "boolean", "", "whether systemd passed the listener in"),
    ("pid", "integer", "pid", "process the line is about"),
    ("owner", "string", "name", "who set a pin"),
    # -- what and why
    ("kind", "string", "delta or rollback", "how a revision came about"),
    ("summary", "string", "text", "edits of a delta by kind"),
    ("job", "string", "text", "what the background was doing"),
    ("version", "string", "", "version of graphopt"),
    ("torch_version", "string", "", "version of torch"),
    ("code", "string", "dotted", "error code, one of the closed set of graphopt.errors"),
    ("message", "string", "text", "what went wrong, or what another library said"),
    ("where", "string", "file:line:column path", "place of a fault inside a document or a graph"),
    ("remedy", "string", "text", "what to do about it"),
    ("detail", "list", "[path, reason]", "single faults of a document"),
    ("reason", "string", "text", "why this was decided"),
    ("signal", "string", "name", "Unix signal, or measured signal of the host"),
    ("rule", "string", "name", "feedback rule of the cost model"),
    ("action", "string", "text", "what a feedback rule did"),
    ("limit", "string", "name", "bound of graphopt.limits or key of the configuration"),
    ("bound", "number", "of the limit", "the bound's value"),
    ("value", "number", "of the limit or signal", "value that was met"),
    ("logger", "string", "dotted", "logger of another library"),
    ("exception", "string", "text", "traceback"),
    ("exit_code", "integer", "", "exit status; negative: the signal that ended the process"),
    ("dry_run", "boolean", "", "whether nothing was to be changed"),
    ("repeated", "boolean", "", "whether this delta id had been answered before"),
    ("clean", "boolean", "", "whether every request finished before the stop"),
    (
        "stage",
        "string",
        "unsupported, build, load, verify, trial, crashed, hung, quarantined",
        "where a candidate failed",
    ),
    (
        "cause",
        "string",
        "trial, known_cost, watch, fault or superseded",
        "what a decision rests on",
    ),
    ("rewrites", "string", "text", "passes that changed a region before it was built, with edits"),
    (
        "converted",
        "string",
        "text",
        "ops of a region that the runtime's own converter wrote, with numbers of nodes",
    ),
    ("options", "string", "text", "how a candidate is to run: threads, shapes, settings"),
    ("policy", "string", "idle, autogroup or nice", "how the builder is scheduled"),
    ("last_words", "string", "text", "what a process wrote before it ended"),
    ("artifact", "string", "id", "artifact on disk, by the hash of what it is made of"),
    # -- configuration
    ("applied", "list", "keys", "keys whose new value is in force"),
    ("needs_restart", "list", "keys", "keys whose new value counts from the next start"),
    ("kept_by_state", "list", "keys", "keys of models that the state folder decides"),
    # -- counts
    ("models", "integer", "count", "models loaded"),
    ("nodes", "integer", "count", "nodes of the graph"),
    ("blocks", "integer", "count", "blocks of the graph"),
    ("edits", "integer", "count", "primitive edits of a delta, macros expanded"),
    ("affected_nodes", "integer", "count", "nodes that a delta touched or whose inputs it changed"),
    ("inferred_nodes", "integer", "count", "nodes whose type was inferred again"),
    ("blocks_replanned", "integer", "count", "blocks that got a new step"),
    ("blocks_reused", "integer", "count", "blocks whose step was kept"),
    ("deltas", "integer", "count", "deltas replayed from the journal"),
    ("requests", "integer", "count", "requests concerned"),
    ("requests_cancelled", "integer", "count", "requests given up at a stop"),
    ("lines", "integer", "count", "log lines"),
    ("attempt", "integer", "count", "how many starts in a row this is"),
    ("count", "integer", "count", "how many in the period"),
    (
        "failures",
        "list",
        "{graph, code, count, message}",
        "by model and code, each with one message",
    ),
    ("tiers", "mapping", "tier -> count", "steps of a plan by tier"),
    ("tiers_allowed", "list", "tiers", "what a pin leaves the better path to choose from"),
    (
        "capabilities",
        "mapping",
        "signal -> text",
        "each signal of the host: its source, or why it is absent",
    ),
    # -- sizes and times
    ("bytes", "integer", "bytes", "size of constants, a file or an artifact"),
    ("duration_ms", "number", "ms", "how long it took"),
    ("live_ms", "number", "ms", "from the call of apply to the publication, journal included"),
    ("silent_s", "number", "s", "how long a part of the service has not answered"),
    ("period_s", "number", "s", "period that counts were taken over"),
    ("build_ms", "number", "ms", "wall time of building a candidate"),
    ("cpu_ms", "number", "ms", "processor time of building, loading and verifying a candidate"),
    ("startup_ms", "number", "ms", "from the start of a process until it takes work"),
    ("share_pct", "number", "percent of a core", "what a process got of the processor"),
    ("floor_pct", "number", "percent of a core", "what it should get at least"),
    (
        "ratio",
        "number",
        "",
        "time of a request on this plan over the other one's, as a trial found",
    ),
    ("ratio_low", "number", "", "lower bound of the ratio"),
    ("ratio_high", "number", "", "upper bound of the ratio"),
    ("pairs", "integer", "count", "paired measurements that a trial rests on"),
    ("backoff_s", "number", "s", "how long a candidate is not tried again"),
    ("until_s", "number", "s", "when a pin ends by itself, since 1970"),
    ("predicted_ms", "number", "ms", "latency that the cost model expects"),
    ("measured_ms", "number", "ms", "latency that was measured"),
    ("from_predicted_ms", "number", "ms", "prediction for what is replaced"),
    ("error_max", "number", "of the output", "largest deviation from the reference, absolute"),
    ("tolerance", "number", "of the output", "deviation allowed"),
)
