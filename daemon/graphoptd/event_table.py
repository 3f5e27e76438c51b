"""The events, as a table; `graphoptd.events` says what they are for.

An event lists the fields it always has, then those it has when they are known.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

SCHEMA = 1  # of every line; raised when an event or field changes its meaning or goes

Severity = Literal["info", "warning", "error"]


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


def _events(*rows: tuple[str, Severity, str, str, str]) -> Mapping[str, Event]:
    return {
        name: Event(name, severity, says, tuple(required.split()), tuple(optional.split()))
        for name, severity, says, required, optional in rows
    }


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
        "cpu_ms bytes rewrites converted",
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
        "a proven candidate was tried and is no gain; it is not tried again while its regions stay alike",
        "graph revision plan_id from_plan_id reason",
        "cause block ratio ratio_low ratio_high pairs backoff_s",
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
        "cost.calibrated",
        "info",
        "this host was measured for the cost model; so many coefficients changed",
        "path count duration_ms",
        "peer_uid",
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
        "a candidate, or a call tried while planning, brought the builder down and is not tried again",
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
