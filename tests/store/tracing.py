"""A small ptrace tracer (x86-64 Linux): strikes the n-th write-like call of a forked child.

It replaces `strace -e inject`, which a test machine may not have. Run it only in a process of its
own, with one thread: it forks without exec.
"""

import ctypes
import ctypes.util
import os
import platform
import signal
import struct
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass

WRITES = {1: "write", 18: "pwrite64", 20: "writev"}
SYNCS = {74: "fsync", 75: "fdatasync"}
NAMES = {
    82: "rename",
    87: "unlink",
    83: "mkdir",
    77: "ftruncate",
    86: "link",
    263: "unlinkat",
    316: "renameat2",
}
CALLS = WRITES | SYNCS | NAMES

_TRACEME, _CONT, _SYSCALL, _SETOPTIONS = 0, 7, 24, 0x4200
_PEEKUSER, _POKEUSER = 3, 6
_GOOD_SYSCALL_STOPS, _EXIT_KILL = 0x01, 0x100000
_RDI, _ORIG_RAX, _RAX = 14 * 8, 15 * 8, 10 * 8  # offsets in user_regs_struct
_ARGUMENTS = (_RDI, 13 * 8, 12 * 8, 7 * 8)  # rdi rsi rdx r10

_libc = ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long] * 4


@dataclass(frozen=True)
class Fault:
    """What happens to call number `at` (from 1) among `calls`: the child dies, or gets `error`."""

    at: int
    calls: frozenset[int]
    error: int = 0  # an errno; 0 kills the child before the call is made


@dataclass(frozen=True)
class Outcome:
    acks: list[str]  # lines the child wrote to its ack pipe
    struck: str  # the call the fault hit, or "" when there were fewer calls
    status: int  # as of os.waitpid


def traced(work: Callable[[Callable[[str], None]], None], fault: Fault) -> Outcome:
    """Fork, run `work(ack)` under `fault`, and wait for its end."""
    pid, receive, ack_fd = start(work)
    struck, status = _drive(pid, ack_fd, fault)
    with open(receive) as pipe:
        return Outcome(pipe.read().splitlines(), struck, status)


def start(work: Callable[[Callable[[str], None]], None]) -> tuple[int, int, int]:
    """Fork a child that waits to be traced: its pid, the pipe of its acks, and the child's end of it."""
    assert platform.machine() == "x86_64", "register offsets are those of x86-64"
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(receive)
        _child(work, send)
    os.close(send)
    return pid, receive, send


def _child(work: Callable[[Callable[[str], None]], None], send: int) -> None:
    status = 1
    try:
        _ptrace(_TRACEME, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        work(lambda line: _all(send, f"{line}\n".encode()))
        status = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _all(fd: int, data: bytes) -> None:
    assert os.write(fd, data) == len(data)


def _drive(pid: int, ack_fd: int, fault: Fault) -> tuple[str, int]:
    seen, struck, pending = 0, "", False
    stops = Stops(pid)
    for entering in stops:
        if not entering:
            if pending:
                _ptrace(_POKEUSER, pid, _RAX, -fault.error)
            pending = False
            continue
        call = stops.register(_ORIG_RAX)
        if call in fault.calls and stops.register(_RDI) not in (ack_fd, 2):
            seen += 1
            if seen != fault.at:
                continue
            struck = CALLS[call]
            if fault.error:
                _ptrace(_POKEUSER, pid, _ORIG_RAX, -1)  # no such call: nothing is done
                pending = True
            else:
                os.kill(pid, signal.SIGKILL)
    return struck, stops.status


class Stops:
    """Iterates over the system calls of a child that waits to be traced: True on entry, False on return.

    The child stands still between two steps of the iteration. `status` is that of os.waitpid afterwards.
    """

    def __init__(self, pid: int) -> None:
        self.status = 0
        self._pid = pid
        os.waitpid(pid, 0)
        _ptrace(_SETOPTIONS, pid, 0, _GOOD_SYSCALL_STOPS | _EXIT_KILL)

    def __iter__(self) -> Iterator[bool]:
        entering, deliver = True, 0
        while True:
            _ptrace(_SYSCALL, self._pid, 0, deliver)
            _, self.status = os.waitpid(self._pid, 0)
            if not os.WIFSTOPPED(self.status):
                return
            stop = os.WSTOPSIG(self.status)
            deliver = 0
            if stop == signal.SIGTRAP | 0x80:
                yield entering
                entering = not entering
            elif stop != signal.SIGTRAP:
                deliver = stop

    def register(self, offset: int) -> int:
        """One register of the stopped child; the C library's wrapper returns the word."""
        word = _libc.ptrace(_PEEKUSER, self._pid, offset, 0)
        return int(struct.unpack("q", struct.pack("q", word))[0])

    def call(self) -> tuple[int, int, tuple[int, ...]]:
        """On return: number of the call, its result, its first four arguments."""
        return (
            self.register(_ORIG_RAX),
            self.register(_RAX),
            tuple(self.register(offset) for offset in _ARGUMENTS),
        )

    def memory(self, address: int, count: int) -> bytes:
        """Bytes of the stopped child."""
        with open(f"/proc/{self._pid}/mem", "rb", buffering=0) as memory:
            memory.seek(address)
            return memory.read(count)

    def text(self, address: int) -> str:
        """A string of the stopped child, such as a path."""
        with open(f"/proc/{self._pid}/mem", "rb", buffering=0) as memory:
            memory.seek(address)
            return memory.read(4_096).split(b"\0")[0].decode()


def _ptrace(request: int, pid: int, address: int = 0, data: int = 0) -> None:
    if _libc.ptrace(request, pid, address, data) == -1:
        code = ctypes.get_errno()
        if code != 3:  # ESRCH: killed between two stops; waitpid tells
            raise OSError(code, os.strerror(code))
