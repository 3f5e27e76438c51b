"""Every key of the configuration file, as frozen dataclasses.

`configs/graphoptd.yaml` is the manual of these keys (unit, reason, default); a test holds the two
together. The metadata of a field says what a reload does with a changed value:

- `LIVE`: the running service takes it;
- `RESTART`: it counts from the next start;
- `STATE`: it counts only while the state folder has never seen the model; afterwards the journal
  decides, and `graphoptctl load` and `unload` change it.

Deliberately absent: file access (`graphoptd.config`), meaning of `auto` on this host (the service
decides), and every bound that nobody needs to tune (`graphopt.limits`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from graphopt.documents import Rule
from graphopt.engine.thread_budget import Prefer, ThreadBudget, budget, usable_cpus

LIVE, RESTART, STATE = "live", "restart", "state"

PORT_MAX = 65_535
THREADS_MAX = 1_024  # beyond any host; catches a byte count written into the wrong key
BYTES_MAX = 1 << 50  # 1 PiB, as above
SECONDS_MAX = 86_400.0  # a day; a longer time-out is a mistake
MODELS_MAX = 1_024  # names in one configuration
DEVICE_PATTERN = r"auto|cpu"  # GPUs are not used yet; a key that does nothing would be a lie

# Not empty: an empty host would mean every interface to `bind`, which nobody should get by accident.
HOST_PATTERN = r"[0-9A-Za-z.:_-]{1,253}"
# Names of models appear in URLs, journal rows and log lines.
MODEL_NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"

ThreadCount = int | Literal["auto"]
Principal = str | int  # a user or group by name, or by number


def live(**bounds: Any) -> Mapping[str, Any]:
    """Metadata of a key that a reload changes; `bounds` are those of `documents.Rule`."""
    return {"reload": LIVE, "rule": Rule(**bounds)}


def restart(**bounds: Any) -> Mapping[str, Any]:
    """Metadata of a key that counts from the next start."""
    return {"reload": RESTART, "rule": Rule(**bounds)}


def journaled(**bounds: Any) -> Mapping[str, Any]:
    """Metadata of a key that the state folder overrules."""
    return {"reload": STATE, "rule": Rule(**bounds)}


@dataclass(frozen=True, slots=True)
class StateSettings:
    """Where the journal, the blobs and the artifact cache lie."""

    path: Path = field(default=Path("/var/lib/graphoptd"), metadata=restart())


@dataclass(frozen=True, slots=True)
class LevelSettings:
    """Who may call what over the control socket; root and the daemon's own user may all."""

    admin_users: tuple[Principal, ...] = field(default=(), metadata=live(low=0, count_max=64))
    admin_groups: tuple[Principal, ...] = field(default=(), metadata=live(low=0, count_max=64))
    operate_users: tuple[Principal, ...] = field(default=(), metadata=live(low=0, count_max=64))
    operate_groups: tuple[Principal, ...] = field(
        default=("graphoptd-ctl",), metadata=live(low=0, count_max=64)
    )
    others: Literal["read", "none"] = field(default="read", metadata=live())


@dataclass(frozen=True, slots=True)
class ControlSettings:
    """The control socket."""

    socket: Path = field(default=Path("/run/graphoptd.sock"), metadata=restart())
    group: str = field(default="graphoptd-ctl", metadata=restart(chars_max=64))
    levels: LevelSettings = field(default_factory=LevelSettings, metadata=live())


@dataclass(frozen=True, slots=True)
class DataSettings:
    """The data plane; field by field `graphoptd.data.settings.DataSettings`, which it becomes."""

    host: str = field(default="127.0.0.1", metadata=restart(pattern=HOST_PATTERN))
    port: int | None = field(default=8080, metadata=restart(low=0, high=PORT_MAX))
    socket_path: Path | None = field(default=Path("/run/graphoptd-data.sock"), metadata=restart())
    socket_mode: int = field(default=0o660, metadata=restart(low=0, high=0o777))
    backlog: int = field(default=1024, metadata=restart(low=1, high=1 << 16))
    header_bytes_max: int = field(default=16 << 10, metadata=restart(low=1 << 10, high=1 << 20))
    body_bytes_max: int = field(default=64 << 20, metadata=restart(low=1 << 10, high=BYTES_MAX))
    envelope_bytes_max: int = field(
        default=256 << 10, metadata=restart(low=1 << 10, high=BYTES_MAX)
    )
    inflight_bytes_max: int = field(
        default=256 << 20, metadata=restart(low=1 << 10, high=BYTES_MAX)
    )
    connections_max: int = field(default=1024, metadata=restart(low=1, high=1 << 20))
    connections_per_peer_max: int = field(default=256, metadata=restart(low=1, high=1 << 20))
    header_deadline_s: float = field(default=10.0, metadata=restart(low=0.1, high=SECONDS_MAX))
    body_deadline_s: float = field(default=30.0, metadata=restart(low=0.1, high=SECONDS_MAX))
    write_deadline_s: float = field(default=30.0, metadata=restart(low=0.1, high=SECONDS_MAX))
    keep_alive_s: float = field(default=75.0, metadata=restart(low=0.1, high=SECONDS_MAX))
    linger_s: float = field(default=2.0, metadata=restart(low=0, high=SECONDS_MAX))
    drain_s: float = field(default=20.0, metadata=restart(low=0, high=SECONDS_MAX))
    queue_max: int = field(default=512, metadata=restart(low=1, high=1 << 20))
    deadline_default_s: float = field(default=30.0, metadata=restart(low=0.001, high=SECONDS_MAX))
    deadline_max_s: float = field(default=600.0, metadata=restart(low=0.001, high=SECONDS_MAX))
    batch_max: int = field(default=32, metadata=restart(low=1, high=1 << 16))
    batch_bytes_max: int = field(default=4 << 20, metadata=restart(low=1, high=BYTES_MAX))
    batch_delay_us: int = field(default=1_000, metadata=restart(low=0, high=1_000_000))
    inline: Literal["auto", "never"] = field(default="auto", metadata=restart())
    retry_after_s: int = field(default=1, metadata=restart(low=0, high=3_600))
    repository_control: bool = field(default=False, metadata=restart())
    shared_memory: bool = field(default=False, metadata=restart())
    shared_memory_regions_max: int = field(default=256, metadata=restart(low=1, high=1 << 16))

    def __post_init__(self) -> None:
        if self.inflight_bytes_max < self.body_bytes_max:
            raise ValueError(
                "inflight_bytes_max is below body_bytes_max, so a body of the allowed size would "
                "never be let in"
            )


@dataclass(frozen=True, slots=True)
class SpoolSettings:
    """The folder that takes deltas as files."""

    path: Path | None = field(default=None, metadata=restart())
    rescan_s: float = field(default=10.0, metadata=live(low=0.1, high=SECONDS_MAX))
    kept_max: int = field(default=1_000, metadata=live(low=0, high=1_000_000))


@dataclass(frozen=True, slots=True)
class ExecutorSettings:
    """Threads that run requests, the runtime's threads inside each, and what runs behind them."""

    prefer: Prefer = field(default="latency", metadata=restart())
    threads: ThreadCount = field(default="auto", metadata=restart(low=1, high=THREADS_MAX))
    intra_op_threads: ThreadCount = field(default="auto", metadata=restart(low=1, high=THREADS_MAX))

    def budget(self, cpus: int | None = None) -> ThreadBudget:
        """The threads of this process, as these settings say; what is `auto` fits `cpus`."""
        workers = None if self.threads == "auto" else self.threads
        each = None if self.intra_op_threads == "auto" else self.intra_op_threads
        return budget(self.prefer, workers, each, cpus)

    def budget_of(self, model: "ModelSettings", cpus: int | None = None) -> ThreadBudget:
        """The threads of one model: its share of those of the process, never wider than they are.

        A model that prefers something itself leaves these settings behind, but not the CPUs that
        they name together.
        """
        cpus = usable_cpus() if cpus is None else cpus
        own = self.budget(cpus)
        if "auto" not in (self.threads, self.intra_op_threads):
            cpus = own.workers * own.each
        if model.prefer is not None:
            own = budget(model.prefer, cpus=cpus)
        if model.threads == "auto":
            return own
        is_given = model.prefer is None and self.intra_op_threads != "auto"
        # Fewer at once does not make each of them wider: the other models have requests too.
        each = own.each if is_given else min(own.each, max(1, cpus // model.threads))
        return ThreadBudget(model.threads, each)


@dataclass(frozen=True, slots=True)
class BuilderSettings:
    """The process that builds and proves better plans beside the running server."""

    enabled: bool = field(default=True, metadata=restart())
    floor_pct: float = field(default=10.0, metadata=restart(low=0, high=100))
    artifacts_bytes_max: int = field(default=4 << 30, metadata=restart(low=0, high=BYTES_MAX))


@dataclass(frozen=True, slots=True)
class CostSettings:
    """The operator's layers of the cost model."""

    path: Path | None = field(default=None, metadata=live())


@dataclass(frozen=True, slots=True)
class LogSettings:
    """What is logged and how."""

    level: Literal["debug", "info", "warning", "error"] = field(default="info", metadata=live())
    format: Literal["auto", "json", "text"] = field(default="auto", metadata=live())
    ring_lines_max: int = field(default=10_000, metadata=live(low=100, high=1_000_000))
    ring_bytes_max: int = field(default=16 << 20, metadata=live(low=1 << 16, high=1 << 30))
    failures_period_s: float = field(default=10.0, metadata=live(low=0.1, high=3_600))


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """One model: its bundle, where it runs, and what it may have of the process.

    None takes what the section of the same word says for all models: `executor.prefer`,
    `data.queue_max`; for the memory, no bound.
    """

    bundle: Path = field(metadata=journaled())
    device: str = field(default="auto", metadata=restart(pattern=DEVICE_PATTERN))
    prefer: Prefer | None = field(default=None, metadata=restart())
    threads: ThreadCount = field(default="auto", metadata=restart(low=1, high=THREADS_MAX))
    queue_max: int | None = field(default=None, metadata=restart(low=1, high=1 << 20))
    memory_bytes_max: int | None = field(default=None, metadata=restart(low=0, high=BYTES_MAX))


@dataclass(frozen=True, slots=True)
class Settings:
    """The whole configuration file."""

    state: StateSettings = field(default_factory=StateSettings, metadata=live())
    control: ControlSettings = field(default_factory=ControlSettings, metadata=live())
    data: DataSettings = field(default_factory=DataSettings, metadata=live())
    repository: Path | None = field(default=None, metadata=live())
    spool: SpoolSettings = field(default_factory=SpoolSettings, metadata=live())
    executor: ExecutorSettings = field(default_factory=ExecutorSettings, metadata=live())
    builder: BuilderSettings = field(default_factory=BuilderSettings, metadata=live())
    costs: CostSettings = field(default_factory=CostSettings, metadata=live())
    log: LogSettings = field(default_factory=LogSettings, metadata=live())
    models: Mapping[str, ModelSettings] = field(
        default_factory=dict, metadata=journaled(count_max=MODELS_MAX)
    )

    def __post_init__(self) -> None:
        if self.data.repository_control and self.repository is None:
            raise ValueError("data.repository_control is on, but repository names no folder")

    def queue_max(self, name: str) -> int | None:
        """Requests that may wait for the model of that name; None where it says nothing itself."""
        model = self.models.get(name)
        return model.queue_max if model is not None else None
