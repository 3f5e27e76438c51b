"""Every knob of the data plane, with its unit, default and reason.

One frozen value is made by the configuration loader and handed to `DataServer`; nothing here reads
a file or the environment.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from graphopt.errors import DocumentError


@dataclass(frozen=True, slots=True)
class DataSettings:
    """How the data plane listens, what it accepts, and how it queues.

    Raises:
        DocumentError: a value is out of its range; `where` is the field's name.
    """

    # -- where it listens
    host: str = "127.0.0.1"  # loopback: there is no authentication on this port
    port: int | None = 8080  # None: no TCP; 0: any free port
    socket_path: Path | None = None  # None: no Unix socket
    socket_mode: int = 0o660  # owner and group; the folder's permissions guard the rest
    backlog: int = (
        1024  # connections the kernel holds while the loop is busy; Linux caps it at somaxconn
    )

    # -- what a client may cost
    header_bytes_max: int = 16 << 10  # real clients send under 1 KiB; proxies cap at 8 or 16
    body_bytes_max: int = 64 << 20  # Triton's default; applies again after decompression
    envelope_bytes_max: int = (
        256 << 10
    )  # JSON without its numeric arrays: parsed in one piece, 1 to 3 ms
    inflight_bytes_max: int = 256 << 20  # all bodies being read or worked on: four of the largest
    connections_max: int = (
        1024  # file descriptors; leaves room under the usual limit of 4096 for artifacts
    )
    connections_per_peer_max: int = (
        256  # one address; a proxy in front is one peer and pools well below this
    )
    header_deadline_s: float = 10.0  # from the first byte of a request to the end of its headers
    body_deadline_s: float = 30.0  # from there to the end of its body: 64 MiB at 18 Mbit/s
    write_deadline_s: float = 30.0  # a client that does not read its answer holds memory
    keep_alive_s: float = (
        75.0  # idle connections; above the 60 s pools of common proxies, so that they close first
    )
    linger_s: float = 2.0  # after a refusal, so that the client reads it before the reset
    drain_s: float = 20.0  # graceful stop; systemd's default TimeoutStopSec is 90 s

    # -- how requests wait and batch
    queue_max: int = (
        512  # requests waiting for a model that names no bound; at 1 ms each the last waits 0.5 s
    )
    deadline_default_s: float = 30.0  # a request that names no `timeout`
    deadline_max_s: float = 600.0  # an asked `timeout` is cut to this
    batch_max: int = 32  # rows; 1 turns batching off
    batch_bytes_max: int = 4 << 20  # bytes concatenated for one batch: 1 ms of copying on the loop
    batch_delay_us: int = (
        1000  # how long a request waits for mates while every executor is busy; ticks of 1 ms
    )
    inline: Literal["auto", "never"] = (
        "auto"  # quick runs on the event loop: saves two hand-overs between threads, about 60 us
    )
    retry_after_s: int = 1  # told to clients with every 503

    # -- extensions
    repository_control: bool = False  # load and unload over HTTP
    shared_memory: bool = False  # any client of the port could name any region this user may open
    shared_memory_regions_max: int = 256  # each holds a descriptor

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if value < 0 or (value == 0 and field.name not in _ZERO_MEANS_SOMETHING):
                raise DocumentError(
                    f"{value} is out of range",
                    where=field.name,
                    remedy="give a number above 0",
                )
        if self.port is not None and self.port > 65535:
            raise DocumentError(f"{self.port} is not a port", where="port", remedy="0 to 65535")
        if self.inline not in ("auto", "never"):
            raise DocumentError(
                f"{self.inline!r} is no choice", where="inline", remedy="give auto or never"
            )


_ZERO_MEANS_SOMETHING = frozenset(
    {"port", "batch_delay_us", "drain_s", "linger_s", "retry_after_s", "socket_mode"}
)
