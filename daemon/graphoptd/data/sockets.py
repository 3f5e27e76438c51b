"""Opening listening sockets, with errors that say who is in the way."""

import errno
import os
import socket
import stat
from typing import NoReturn

from graphopt.errors import GraphoptError


class ListenError(GraphoptError):
    """An address cannot be listened on."""

    code = "listen.failed"


def open_tcp(host: str, port: int) -> socket.socket:
    """A bound TCP socket, not listening yet.

    Raises:
        ListenError: the port is taken, the address is not of this machine, or not permitted.
    """
    where = f"{host}:{port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ListenError(
            str(error.strerror or error), where=where, remedy="give an address of this host"
        ) from None
    try:
        listener.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # past TIME_WAIT of our predecessor
        listener.bind(address)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        remedy = (
            "stop the other process, or choose another port"
            if error.errno == errno.EADDRINUSE
            else ("choose a port from 1024 and an address of this host")
        )
        raise ListenError(str(error.strerror), where=where, remedy=remedy) from None
    return listener


def open_unix(path: str, mode: int) -> socket.socket:
    """A bound Unix socket with these permissions, not listening yet. A dead predecessor's socket is replaced.

    Raises:
        ListenError: somebody listens there, something else than a socket is there, or the folder is
            not writable.
    """
    _clear_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # Nobody connects between bind and chmod: it does not listen yet.
    try:
        listener.bind(path)
        os.chmod(path, mode)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        _refuse(path, str(error.strerror or error), "check the folder and its permissions")
    return listener


def unlink_own(path: str, inode: int) -> None:
    """Remove our socket file, unless a successor has put its own there."""
    try:
        if os.stat(path).st_ino == inode:
            os.unlink(path)
    except FileNotFoundError:
        return


def _clear_stale(path: str) -> None:
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            _refuse(
                path, "something else than a socket is there", "remove it, or choose another path"
            )
    except OSError:
        return  # nothing there; bind tells the rest
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError as error:
            _refuse(path, str(error.strerror), "stop the process that listens there")
    _refuse(path, "another process listens there", "stop it, or choose another path")


def _refuse(path: str, why: str, remedy: str) -> NoReturn:
    raise ListenError(why, where=path, remedy=remedy)
