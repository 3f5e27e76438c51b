"""One builder process as its parent holds it: started by exec, three pipes, never waited for.

Lines to it are buffered here and written when the pipe has room, so a builder that hangs cannot hold
its parent. What it or a native library prints goes to a pipe of its own, of which the end is kept: a
runtime's last words are the evidence of a crash.
"""

import errno
import json
import os
import select
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import graphopt.builder
from graphopt.builder.records import encode_line

TAIL_BYTES = 16 << 10  # of what it printed: the trace of a segfault is about 3 kB
_CHUNK_BYTES = 1 << 16
_PROGRAM = Path(graphopt.builder.__file__).with_name("__main__.py")


class BuilderProcess:
    """A running builder. Not for several threads; the thread that makes it must outlive it.

    The kernel ends the builder when that thread ends (PR_SET_PDEATHSIG).
    """

    def __init__(self, backends: Sequence[str] = (), path: Sequence[str] = ()) -> None:
        """Starts `python -m graphopt.builder`, by path, so that it is this graphopt.

        Args:
            backends: extra ones as `module:Class`.
            path: folders to find them in.
        """
        theirs_in, self.commands = os.pipe()
        self.answers, theirs_out = os.pipe()
        self.errors, theirs_err = os.pipe()
        try:
            argv = [sys.executable, "-P", "-u", str(_PROGRAM), "--commands", str(theirs_in)]
            argv += ["--answers", str(theirs_out), "--parent", str(os.getpid())]
            argv += [word for name in backends for word in ("--backend", name)]
            argv += [word for folder in path for word in ("--path", folder)]
            self._process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=theirs_err, stderr=theirs_err,
                pass_fds=(theirs_in, theirs_out),
            )  # fmt: skip
        except BaseException:
            for descriptor in (self.commands, self.answers, self.errors):
                os.close(descriptor)
            raise
        finally:
            for descriptor in (theirs_in, theirs_out, theirs_err):
                os.close(descriptor)
        for descriptor in (self.commands, self.answers, self.errors):
            os.set_blocking(descriptor, False)
        self.pid = self._process.pid
        self._out: deque[memoryview] = deque()
        self._rest = b""
        self._tail = b""

    @property
    def wants_to_write(self) -> bool:
        """Whether lines wait for room in the pipe."""
        return bool(self._out)

    def send(self, message: Mapping[str, Any]) -> None:
        """Queues one line; `flush` writes it."""
        self._out.append(memoryview(encode_line(message)))

    def flush(self) -> None:
        """Writes what there is room for. A builder that is gone shows when its answers are read."""
        while self._out:
            try:
                count = os.write(self.commands, self._out[0])
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.EPIPE:
                    raise
                self._out.clear()
                return
            self._out[0] = self._out[0][count:]
            if not self._out[0]:
                self._out.popleft()

    def read(self) -> Iterable[dict[str, Any]] | None:
        """The lines that have come since; None when the builder has closed its end."""
        lines: list[bytes] = []
        while True:
            try:
                chunk = os.read(self.answers, _CHUNK_BYTES)
            except BlockingIOError:
                break
            if not chunk:
                return [json.loads(line) for line in lines] or None
            *whole, self._rest = (self._rest + chunk).split(b"\n")
            lines += whole
        return [json.loads(line) for line in lines]

    def read_errors(self) -> None:
        """Takes in what was printed and keeps the end of it."""
        with suppress(BlockingIOError):
            while chunk := os.read(self.errors, _CHUNK_BYTES):
                self._tail = (self._tail + chunk)[-TAIL_BYTES:]

    @property
    def last_words(self) -> str:
        """The end of what was printed."""
        return self._tail.decode(errors="replace").strip()

    def end(self) -> int:
        """Kills it, takes it off the process table and closes the pipes; its exit code, -N for signal N.

        For one that ended by itself, that exit code. Returns at once: nothing blocks a SIGKILL but a
        disk that does not answer.
        """
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGKILL)
        code = self._process.wait()
        self.read_errors()
        for descriptor in (self.commands, self.answers, self.errors):
            os.close(descriptor)
        return code


def wait_for(bell: int, process: BuilderProcess | None, timeout_s: float | None) -> None:
    """Until the eventfd `bell` rings, which is then silent again, or the process says or takes something."""
    poll = select.poll()
    poll.register(bell, select.POLLIN)
    if process is not None:
        poll.register(process.answers, select.POLLIN)
        poll.register(process.errors, select.POLLIN)
        if process.wants_to_write:
            poll.register(process.commands, select.POLLOUT)
    poll.poll(None if timeout_s is None else timeout_s * 1e3 + 1)
    with suppress(BlockingIOError):
        os.eventfd_read(bell)


def private_bytes(pid: int) -> int | None:
    """The memory of a process that is not mapped files; None when it is gone."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return None


def exit_name(code: int) -> str:
    """How a process ended, for people: a signal by name where `code` is negative."""
    if code >= 0:
        return f"exit code {code}"
    with suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"
