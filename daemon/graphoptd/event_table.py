"""The events and their fields, as two tables; `graphoptd.events` says what they are for.

A unit belongs to the name of a field (`_ms`, `_bytes`). An event lists what it always has, then what
it has when it is known.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

SCHEMA = 1  # of every line; raised when an event or field changes its meaning or goes

Severity = Literal["info", "warning", "error"]


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


@dataclass(frozen=True, slots=True)
class Event:
    """A kind of line; `says` completes "this line says that ..."."""

    name: str
    severity: Severity
    says: str
    required: tuple[str, ...]
    optional: tuple[str, ...]


# Reserved by the line itself; no event may have a field so named.
LINE_KEYS = ("ts", "severity", "event", "schema", "seq", "truncated")


def _fields(*rows: tuple[str, str, str, str]) -> Mapping[str, Field]:
    return {row[0]: Field(*row) for row in rows}


def _events(*rows: tuple[str, Severity, str, str, str]) -> Mapping[str, Event]:
    return {
        name: Event(name, severity, says, tuple(required.split()), tuple(optional.split()))
        for name, severity, says, required, optional in rows
    }


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

EVENTS: Mapping[str, Event] = _events(
    (
        "daemon.starting",
        "info",
        "the service begins to start",
        "version pid",
        "torch_version path",
    ),
    (
        "daemon.listening",
        "info",
        "a plane accepts connections",
        "plane addresses inherited",
        "",
    ),
    (
        "daemon.recovered",
        "info",
        "the journal was replayed",
        "models deltas duration_ms",
        "path",
    ),
    (
        "daemon.ready",
        "info",
        "every model serves",
        "models duration_ms",
        "",
    ),
    (
        "daemon.stalled",
        "error",
        "a part of the service stopped answering, so watchdog pings are withheld",
        "reason",
        "silent_s",
    ),
    (
        "daemon.stopping",
        "info",
        "no new requests are taken",
        "reason",
        "signal requests",
    ),
    (
        "daemon.stopped",
        "info",
        "the service is done",
        "clean duration_ms",
        "requests_cancelled",
    ),
    (
        "daemon.failed",
        "error",
        "the service cannot go on",
        "code message",
        "where remedy detail exit_code exception",
    ),
    (
        "model.loaded",
        "info",
        "a model is live",
        "graph revision nodes",
        "blocks bytes plan_id duration_ms source path peer_uid",
    ),
    (
        "model.refused",
        "error",
        "a model could not be loaded; the others go on",
        "graph code message",
        "where remedy detail source path peer_uid",
    ),
    (
        "model.unloaded",
        "info",
        "a model is gone",
        "graph revision",
        "source peer_uid requests",
    ),
    (
        "model.forked",
        "info",
        "a model got a second live name",
        "graph from_graph revision",
        "duration_ms peer_uid",
    ),
    (
        "delta.applied",
        "info",
        "a delta is durable and live",
        "graph revision",
        "kind summary edits "
        "delta_id from_revision plan_id affected_nodes inferred_nodes blocks_replanned "
        "blocks_reused live_ms predicted_ms from_predicted_ms bytes source peer_uid dry_run "
        "repeated",
    ),
    (
        "delta.rejected",
        "warning",
        "a delta was refused; nothing of it was applied",
        "graph code message",
        "delta_id revision where remedy detail source peer_uid dry_run",
    ),
    (
        "plan.verified",
        "info",
        "outputs of candidates agree with the reference; with blocks, the worst of so many",
        "graph revision",
        "blocks plan_id region backend error_max tolerance measured_ms predicted_ms duration_ms",
    ),
    (
        "plan.built",
        "info",
        "a region was built for a runtime",
        "graph revision block backend options build_ms",
        "cpu_ms bytes",
    ),
    (
        "plan.refused",
        "warning",
        "a candidate could not be built, loaded or proven, or failed a request of its trial",
        "graph revision reason",
        "stage cause block plan_id from_plan_id region backend code error_max tolerance ratio "
        "ratio_low ratio_high pairs backoff_s",
    ),
    (
        "plan.published",
        "info",
        "new requests run on this plan",
        "graph revision plan_id",
        "from_plan_id tiers cause ratio ratio_low ratio_high pairs reason",
    ),
    (
        "plan.declined",
        "info",
        "a proven candidate was tried and is no gain; it is not tried again for a while",
        "graph revision plan_id from_plan_id reason",
        "cause ratio ratio_low ratio_high pairs backoff_s",
    ),
    (
        "plan.confirmed",
        "info",
        "a plan stood its watch; rollbacks go to it",
        "graph revision plan_id reason",
        "from_plan_id",
    ),
    (
        "plan.kept",
        "info",
        "requests became slower, and the plan is not to blame: the last good one is no faster",
        "graph revision plan_id from_plan_id reason",
        "ratio ratio_low ratio_high pairs",
    ),
    (
        "plan.rolled_back",
        "warning",
        "a plan turned out worse or failed a request, and the last good one is back",
        "graph revision plan_id from_plan_id reason",
        "cause ratio ratio_low ratio_high pairs backoff_s",
    ),
    (
        "signal.capabilities",
        "info",
        "the host was probed for signals",
        "capabilities",
        "duration_ms",
    ),
    (
        "signal.degraded",
        "warning",
        "a signal became absent or doubtful",
        "signal reason",
        "value",
    ),
    (
        "signal.restored",
        "info",
        "a signal is back",
        "signal",
        "value reason",
    ),
    (
        "feedback.acted",
        "info",
        "a rule of the cost model changed what is preferred",
        "rule action",
        "signal value bound graph revision reason",
    ),
    (
        "pin.set",
        "info",
        "a model keeps its plan, or keeps to some tiers, for a while",
        "graph owner reason until_s",
        "tiers_allowed",
    ),
    (
        "pin.cleared",
        "info",
        "a pin was taken away",
        "graph owner reason",
        "",
    ),
    (
        "pin.expired",
        "info",
        "a pin ended by itself",
        "graph owner reason",
        "",
    ),
    (
        "config.reloaded",
        "info",
        "the configuration was taken over",
        "path applied needs_restart",
        "kept_by_state peer_uid duration_ms",
    ),
    (
        "config.rejected",
        "error",
        "a changed configuration was refused; the old one stays",
        "path code message",
        "where remedy detail peer_uid",
    ),
    (
        "spool.accepted",
        "info",
        "a delta from the spool is live",
        "path",
        "graph revision delta_id peer_uid duration_ms",
    ),
    (
        "spool.rejected",
        "warning",
        "an entry of the spool was moved aside",
        "path code message",
        "graph delta_id where remedy detail peer_uid",
    ),
    (
        "control.denied",
        "warning",
        "a peer asked for more than it may",
        "method level peer_uid",
        "peer_pid graph request_id",
    ),
    (
        "builder.started",
        "info",
        "the builder process runs",
        "pid policy startup_ms",
        "attempt share_pct",
    ),
    (
        "builder.exited",
        "info",
        "the builder process ended; requests are not concerned",
        "pid reason",
        "exit_code job last_words",
    ),
    (
        "builder.starved",
        "warning",
        "the builder gets less than its floor although it was lifted as far as the host allows",
        "pid share_pct floor_pct",
        "job",
    ),
    (
        "builder.quarantined",
        "warning",
        "a candidate brought the builder down and is not tried again",
        "region backend version options reason",
        "signal last_words",
    ),
    (
        "backend.missing",
        "info",
        "a runtime is not there, so its tier is not offered",
        "backend reason",
        "",
    ),
    (
        "artifact.dropped",
        "info",
        "a built artifact was removed from disk",
        "artifact reason",
        "",
    ),
    (
        "builder.failed",
        "warning",
        "a background job failed; requests are not concerned",
        "job message",
        "graph",
    ),
    (
        "request.failed",
        "warning",
        "requests failed in the last period",
        "count period_s failures",
        "",
    ),
    (
        "limit.reached",
        "warning",
        "a bound was met and work was turned away or put off",
        "limit bound",
        "value graph reason count period_s",
    ),
    (
        "log.dropped",
        "warning",
        "lines were lost because the reader of the log was too slow",
        "lines",
        "",
    ),
    (
        "log.other",
        "info",
        "another library said something; the severity is its own",
        "logger message",
        "exception",
    ),
)
