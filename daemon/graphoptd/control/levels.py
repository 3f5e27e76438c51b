"""Who may do what: the kernel says who is at the other end, the configuration what that one may.

*read* looks, *operate* changes models that are loaded, *admin* changes what is loaded and how the
service runs. Root and the service's own user may all. Deliberately absent: passwords and tokens;
whoever may open the socket has been let in by its file mode, and the rest is by user and group.
"""

import ctypes
import errno
import grp
import os
import pwd
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

from graphoptd.settings import LevelSettings, Principal

_SO_PEERGROUPS = 59  # asm-generic/socket.h, Linux 4.13; the socket module does not name it
_GROUPS_MAX = 65_536  # NGROUPS_MAX


class Level(IntEnum):
    """What a method needs and a peer has; each includes those below."""

    NONE = 0
    READ = 1
    OPERATE = 2
    ADMIN = 3

    @property
    def word(self) -> str:
        """As the configuration and the log spell it."""
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Peer:
    """The process that connected, as it was when it did.

    Attributes:
        groups: its group and its supplementary groups.
    """

    pid: int
    uid: int
    groups: frozenset[int]


def peer_of(connection: socket.socket) -> Peer:
    """Who is at the other end of a Unix stream socket. Raises OSError when it is none."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, gid = struct.unpack("iII", raw)
    return Peer(pid, uid, frozenset((gid, *_peer_groups(connection))))


def user_of(uid: int, gid: int) -> Peer:
    """The owner of a file as a peer, with the groups that the user database gives it."""
    groups = {gid} if uid == 0 else set()
    try:
        entry = pwd.getpwuid(uid)
        groups.update(os.getgrouplist(entry.pw_name, entry.pw_gid))
    except (KeyError, OSError):
        pass  # a user without a name has no groups that we could trust
    return Peer(0, uid, frozenset(groups))


def level_of(peer: Peer, settings: LevelSettings, own_uid: int | None = None) -> Level:
    """What `peer` may do. Looks names up, so it may wait for a user database."""
    own = os.geteuid() if own_uid is None else own_uid
    if peer.uid in (0, own):
        return Level.ADMIN
    if _among(peer, settings.admin_users, settings.admin_groups):
        return Level.ADMIN
    if _among(peer, settings.operate_users, settings.operate_groups):
        return Level.OPERATE
    return Level.READ if settings.others == "read" else Level.NONE


def _among(peer: Peer, users: Iterable[Principal], groups: Iterable[Principal]) -> bool:
    if any(peer.uid == _uid(user) for user in users):
        return True
    return any(_gid(group) in peer.groups for group in groups)


def _uid(user: Principal) -> int | None:
    if isinstance(user, int):
        return user
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError:  # not on this host; a configuration may be shared by many
        return None


def _gid(group: Principal) -> int | None:
    if isinstance(group, int):
        return group
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        return None


def _peer_groups(connection: socket.socket) -> tuple[int, ...]:
    """Supplementary groups by the kernel. Python's getsockopt stops at 1 KiB, so libc is called."""
    size = ctypes.c_uint32(0)
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(0)
    for _ in range(2):  # first for the size, which cannot change after connect
        code = libc.getsockopt(
            connection.fileno(), socket.SOL_SOCKET, _SO_PEERGROUPS, buffer, ctypes.byref(size)
        )
        if code == 0:
            count = size.value // 4
            return struct.unpack(f"{count}I", buffer.raw[: 4 * count])
        if ctypes.get_errno() != errno.ERANGE or size.value > 4 * _GROUPS_MAX:
            return ()  # an old kernel: the group in SO_PEERCRED has to do
        buffer = ctypes.create_string_buffer(size.value)
    return ()
