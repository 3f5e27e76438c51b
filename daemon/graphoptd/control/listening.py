"""The socket file of the control plane, where systemd does not make it.

The file mode says who may connect: owner and group. It is made under a stricter umask, so there is
no moment at which others could.
"""

import errno
import grp
import logging
import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

from graphopt.errors import GraphoptError

SOCKET_MODE = 0o660
PATH_BYTES_MAX = 107  # sun_path of Linux, less its NUL

_LOG = logging.getLogger(__name__)


class ListenError(GraphoptError):
    """The control socket cannot be made."""

    code = "listen.failed"


@dataclass(frozen=True, slots=True)
class OwnFile:
    """A socket file that we made, by inode: a successor may have put its own in its place."""

    path: Path
    inode: int

    def remove(self) -> None:
        """Removes it when it is still ours."""
        try:
            if os.lstat(self.path).st_ino == self.inode:
                os.unlink(self.path)
        except OSError:
            return


def open_socket(path: Path, group: str) -> tuple[socket.socket, OwnFile]:
    """A socket bound to `path`, for owner and `group`, not listening yet.

    A dead predecessor's file is replaced. A group that does not exist, or that we may not give
    away to, leaves the group of the process, and the log says so.

    Raises:
        ListenError: somebody listens there, something else is there, or the folder is not writable.
    """
    if len(os.fsencode(path)) > PATH_BYTES_MAX:
        raise ListenError(
            f"the path is longer than {PATH_BYTES_MAX} bytes",
            where=str(path),
            remedy="choose a shorter path for control.socket",
        )
    _clear_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        # The umask is of the whole process; the mode set afterwards only widens.
        before = os.umask(0o177)
        try:
            listener.bind(os.fspath(path))
        finally:
            os.umask(before)
        _give(path, group)
        os.chmod(path, SOCKET_MODE)
        return listener, OwnFile(path, os.lstat(path).st_ino)
    except OSError as error:
        listener.close()
        raise ListenError(
            str(error.strerror or error),
            where=str(path),
            remedy="check that its folder exists and that the service's user may write there",
        ) from None


def _give(path: Path, group: str) -> None:
    if not group:
        return
    try:
        os.chown(path, -1, grp.getgrnam(group).gr_gid, follow_symlinks=False)
    except (KeyError, OSError) as error:
        reason = "there is no such group" if isinstance(error, KeyError) else error.strerror
        _LOG.warning(
            "%s keeps the group of the process: control.group is %r, but %s", path, group, reason
        )


def _clear_stale(path: Path) -> None:
    try:
        is_socket = stat.S_ISSOCK(os.lstat(path).st_mode)
    except OSError:
        return  # nothing there; bind says the rest
    if not is_socket:
        raise ListenError(
            "something that is no socket is there",
            where=str(path),
            remedy="remove it, or choose another path for control.socket",
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        code = probe.connect_ex(os.fspath(path))
    if code == errno.ECONNREFUSED:
        os.unlink(path)
        return
    raise ListenError(
        "another process listens there" if code in (0, errno.EAGAIN) else os.strerror(code),
        where=str(path),
        remedy="stop the other graphoptd, or choose another path for control.socket",
    )
