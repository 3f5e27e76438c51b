"""What the control plane is given by the service it is part of."""

import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from graphopt.engine.host import Host
from graphoptd.config import Reload
from graphoptd.logs import Ring
from graphoptd.settings import Settings


@dataclass(frozen=True, slots=True)
class ControlContext:
    """The service, as the control plane sees it.

    Attributes:
        settings: the settings in force; asked for at each use, because a reload replaces them.
        ring: the last log lines.
        reload: takes the configuration over; raises what `config.reload` raises.
        version: of graphopt.
        started_s: when the service started, seconds since the epoch.
        statistics: figures of the data plane for `status` and `top`; must be quick, may be empty.
        clock: seconds, monotonic.
    """

    host: Host
    settings: Callable[[], Settings]
    ring: Ring
    reload: Callable[[], Awaitable[Reload]]
    version: str
    started_s: float
    statistics: Callable[[], Mapping[str, Any]] = dict
    clock: Callable[[], float] = time.monotonic


_ORIGIN: ContextVar[Mapping[str, Any]] = ContextVar("graphoptd.origin")
_NOBODY: Mapping[str, Any] = {}


@contextmanager
def acting_for(source: str, peer_uid: int | None) -> Iterator[None]:
    """Marks engine calls of this thread with who wished for them; see `origin`."""
    token = _ORIGIN.set({"source": source, "peer_uid": peer_uid})
    try:
        yield
    finally:
        _ORIGIN.reset(token)


def origin() -> Mapping[str, Any]:
    """`source` and `peer_uid` of the call under way, for the service's event sink to log; or none.

    The engine calls the sink on the thread that makes the change, which is why this can work.
    """
    return _ORIGIN.get(_NOBODY)
