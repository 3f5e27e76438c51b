"""The service's side of systemd: notifications, inherited sockets, the watchdog.

The protocols are sd_notify(3), sd_listen_fds(3) and sd_watchdog_enabled(3), stable by promise, and
small enough that a library would be more to read. Without systemd every call does nothing and says
so by its result. `take` clears what it reads from the environment: the builder process must not
believe that it was started by systemd.

Deliberately absent: the descriptor store (the journal on disk is the truth, and a stored connection
never hangs up), and the journal's native socket.
"""

import os
import socket
import stat
import time
from collections.abc import MutableMapping
from dataclasses import dataclass

from graphopt.errors import DocumentError

CONTROL, DATA = "control", "data"  # FileDescriptorName= of our socket units
FIRST_FD = 3  # SD_LISTEN_FDS_START
STATUS_CHARS_MAX = 400  # one line of `systemctl status`
SOCKETS_MAX = 64  # inherited; a unit has a handful
SEND_TIMEOUT_S = 1.0  # the manager's queue is full only when the host is in deep trouble


class Notifier:
    """Tells the manager about the service; every method returns whether it was told."""

    def __init__(self, address: str = "") -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket: socket.socket | None = None
        if address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.settimeout(SEND_TIMEOUT_S)

    def ready(self, status: str = "") -> bool:
        """Start-up, or a reload, is over."""
        return self.send("READY=1", *_status(status))

    def reloading(self) -> bool:
        """A reload begins; `ready` ends it. Type=notify-reload waits for the time stamp."""
        return self.send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1_000}")

    def stopping(self, status: str = "") -> bool:
        """The service is going down."""
        return self.send("STOPPING=1", *_status(status))

    def status(self, text: str) -> bool:
        """One line for `systemctl status`."""
        return self.send(*_status(text))

    def watchdog(self) -> bool:
        """The service still serves; to be called only by what has just seen it serve."""
        return self.send("WATCHDOG=1")

    def extend_timeout(self, seconds: float) -> bool:
        """Start-up or stop needs at least that much longer, from now."""
        return self.send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    def send(self, *assignments: str) -> bool:
        """One datagram of VARIABLE=value lines."""
        if self._socket is None or not assignments:
            return False
        try:
            self._socket.sendto("\n".join(assignments).encode("utf-8", "replace"), self._address)
        except OSError:  # the manager is restarting, or the socket is gone: not our end
            return False
        return True

    def close(self) -> None:
        """Stop telling."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


@dataclass(frozen=True, slots=True)
class Inherited:
    """What systemd handed to this process.

    Attributes:
        notifier: connected to the manager, or silent.
        control: listening sockets of the control plane.
        data: listening sockets of the data plane, Unix and TCP.
        refused: name and reason of each descriptor that was closed.
        watchdog_s: the manager kills a service silent for so long; None: no watchdog.
    """

    notifier: Notifier
    control: tuple[socket.socket, ...]
    data: tuple[socket.socket, ...]
    refused: tuple[tuple[str, str], ...]
    watchdog_s: float | None

    @property
    def ping_period_s(self) -> float | None:
        """How often to call `notifier.watchdog`: half the limit, as sd_watchdog_enabled(3) asks."""
        return None if self.watchdog_s is None else self.watchdog_s / 2


def take(environ: MutableMapping[str, str] | None = None) -> Inherited:
    """Everything systemd passed, taken out of the environment; call once, first thing.

    Raises:
        DocumentError: one of the variables is malformed; `where` names it.
    """
    environ = os.environ if environ is None else environ
    names = _listen_names(environ)
    watchdog_s = _watchdog_s(environ)
    address = environ.pop("NOTIFY_SOCKET", "")
    if address and address[0] not in "/@":
        raise _malformed("NOTIFY_SOCKET", address, "a path or an abstract name")
    sockets: dict[str, list[socket.socket]] = {CONTROL: [], DATA: []}
    refused = []
    for fd, name in enumerate(names, start=FIRST_FD):
        found = _listener(fd)
        if isinstance(found, str):
            refused.append((name, found))
        elif name in sockets:
            sockets[name].append(found)
        else:
            found.close()
            refused.append((name, f"no socket is known by this name, only {CONTROL} and {DATA}"))
    return Inherited(
        Notifier(address), tuple(sockets[CONTROL]), tuple(sockets[DATA]), tuple(refused), watchdog_s
    )


def _listen_names(environ: MutableMapping[str, str]) -> list[str]:
    """The name of each inherited descriptor, from `FIRST_FD` on."""
    count = _number(environ.pop("LISTEN_FDS", ""), "LISTEN_FDS")
    pid = _number(environ.pop("LISTEN_PID", ""), "LISTEN_PID")
    text = environ.pop("LISTEN_FDNAMES", "")
    environ.pop("LISTEN_PIDFDID", None)
    if not count or pid != os.getpid():  # nothing, or meant for a process further up
        return []
    if count > SOCKETS_MAX:
        raise _malformed("LISTEN_FDS", str(count), f"at most {SOCKETS_MAX}")
    names = text.split(":") if text else ["unknown"] * count
    if len(names) != count:
        raise _malformed("LISTEN_FDNAMES", text, f"{count} names")
    return names


def _listener(fd: int) -> socket.socket | str:
    """The listening stream socket `fd`, not inheritable; else it is closed, and the reason."""
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            os.close(fd)
            return "not a socket"
        found = socket.socket(fileno=fd)
    except OSError as error:
        return f"cannot be used: {error.strerror}"
    found.set_inheritable(False)
    listening = found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if found.type != socket.SOCK_STREAM or not listening:
        found.close()
        return "not a listening stream socket"
    return found


def _watchdog_s(environ: MutableMapping[str, str]) -> float | None:
    period_us = _number(environ.pop("WATCHDOG_USEC", ""), "WATCHDOG_USEC")
    pid = _number(environ.pop("WATCHDOG_PID", ""), "WATCHDOG_PID")
    if not period_us or (pid and pid != os.getpid()):
        return None
    return period_us / 1e6


def _number(text: str, variable: str) -> int:
    """The variable as a number; 0 when it is not set."""
    if not text:
        return 0
    if not (text.isascii() and text.isdigit() and len(text) <= 20):
        raise _malformed(variable, text, "a number")
    return int(text)


def _malformed(variable: str, text: str, wanted: str) -> DocumentError:
    return DocumentError(
        f"{text!r} is not {wanted}",
        where=f"environment variable {variable}",
        remedy="it is set by systemd; unset it to start by hand",
    )


def _status(text: str) -> tuple[str, ...]:
    """STATUS= as one line; a line break would begin another assignment."""
    line = " ".join(text.split())[:STATUS_CHARS_MAX]
    return (f"STATUS={line}",) if line else ()
