"""One system and one network in a process of its own, which runs only when it is told to.

The parent and the child speak lines of JSON over the child's standard input and a copy of its
standard output; what libraries print goes to the standard error, which is kept in a file. Between
two requests the child blocks in a read.

A request is `{"do": "build", "batch": 1}`, `{"do": "turn", "batch": 1, "calls": 20}`,
`{"do": "drive", "batch": 1, "seconds": 0.5}` or `{"do": "check", "batch": 1}`; the answer carries
`error` when it failed, and the process lives on.
"""

import argparse
import gc
import json
import os
import select
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from benchmarks.choosing import (
    TOLERANCE,
    Chosen,
    Client,
    Job,
    choose,
    drive,
    error_share,
    turn,
)
from benchmarks.quiet import tree_cpu_s, wait_quiet

WARM_S = 0.005  # of calls before a turn is measured: others had the caches meanwhile
LONG_S = 0.05  # a call of this length warms itself: its weights do not fit the caches anyway
SWITCH_S = 0.0005  # of the GIL where several clients share a process, as graphoptd sets it
ERROR_LINES = 3  # of the standard error, when the process died


class PeerError(Exception):
    """The system could not do what it was asked; the message is its own reason."""


class Peer:
    """The parent's handle of one child. `idle_cpu_s` counts what it used between turns."""

    def __init__(self, system: str, model: str, folder: Path, **options: Any) -> None:
        self.system = system
        self.idle_cpu_s = 0.0
        self._log = (folder / f"{system}.log").open("w+b")
        command = [sys.executable, "-m", "benchmarks.peer_process", "--system", system]
        command += ["--model", model, "--folder", str(folder)]
        for name, value in options.items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=Path(__file__).resolve().parent.parent,
        )
        self._partial = b""

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    def ask(self, timeout_s: float, **request: Any) -> dict[str, Any]:
        """The answer to `request`; PeerError with the reason when there is none."""
        self.send(**request)
        return self.receive(timeout_s)

    def send(self, **request: Any) -> None:
        """Sends `request`; the answer is for `receive`."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise PeerError(self._last_words()) from None

    def receive(self, timeout_s: float) -> dict[str, Any]:
        """The answer to the request sent last."""
        assert self._process.stdout is not None
        descriptor, until = self._process.stdout.fileno(), time.monotonic() + timeout_s
        while b"\n" not in self._partial:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                self._process.kill()
                raise PeerError(f"no answer after {timeout_s:.0f} s")
            piece = os.read(descriptor, 1 << 20)
            if not piece:
                self._process.wait()
                raise PeerError(self._last_words())
            self._partial += piece
        line, _, self._partial = self._partial.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def rest(self) -> None:
        """Waits until the child's threads have stopped spinning."""
        wait_quiet(self.pid)

    def cpu_s(self) -> float:
        """CPU seconds of the child and of what it started."""
        return tree_cpu_s(self.pid)

    def close(self) -> None:
        """Ends the child."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                stream.close()

    def _last_words(self) -> str:
        self._log.flush()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        code = self._process.poll()
        return f"ended with {code}: " + " | ".join(lines[-ERROR_LINES:])[-300:]


class Child:
    """The other end: opens what it is told to and calls it."""

    def __init__(self, options: argparse.Namespace) -> None:
        from benchmarks.peers import SYSTEMS

        self.options = options
        self.system = SYSTEMS[options.system]()
        self.jobs: dict[int, Job] = {}
        self.chosen: dict[int, Chosen] = {}
        self.clients: dict[int, Client] = {}
        self.call_s: dict[int, float] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to one request."""
        batch: int = request["batch"]
        match request["do"]:
            case "build":
                return self.build(batch)
            case "turn":
                return self.turn(batch, request["calls"])
            case "drive":
                rate, times = drive(
                    self.chosen[batch].connect, self.options.clients, request["seconds"]
                )
                return {"rate": rate, "times": times}
            case "check":
                return self.check(batch)
        raise PeerError(f"unknown request {request['do']}")

    def build(self, batch: int) -> dict[str, Any]:
        """Opens one batch at its best setting."""
        start = time.perf_counter()
        job = self.jobs[batch] = self.job(batch)
        known = next((chosen.settings for chosen in self.chosen.values()), None)
        chosen = self.chosen[batch] = choose(self.system, job, known)
        client = self.clients[batch] = chosen.connect()
        self.call_s[batch] = min(turn(client, 3))
        gc.collect()
        gc.freeze()  # collections during turns look at what the calls made, not at the libraries
        return {
            "settings": chosen.settings,
            "tried": chosen.tried,
            "build_s": time.perf_counter() - start,
            "call_s": self.call_s[batch],
        }

    def turn(self, batch: int, calls: int) -> dict[str, Any]:
        """Seconds of each call, after a few that are not counted."""
        used = time.process_time()
        client = self.clients[batch]
        start = time.perf_counter()
        while self.call_s[batch] < LONG_S and time.perf_counter() - start < WARM_S:
            client()
        times = turn(client, calls)
        return {"times": times, "used_s": time.process_time() - used}

    def check(self, batch: int) -> dict[str, Any]:
        """Whether the answer is still right, and what the system says of itself."""
        share = error_share(self.clients[batch](), self.jobs[batch].reference)
        if share > TOLERANCE:
            raise PeerError(f"WRONG: differs from eager float32 by {share:.2g} of its scale")
        return {"error_share": share, "notes": self.system.notes()}

    def job(self, batch: int) -> Job:
        """The job of one batch, from the files of `benchmarks.exports`."""
        options, folder = self.options, self.options.folder
        with np.load(folder / f"inputs-{batch}.npz") as file:
            inputs = {name: file[name] for name in file.files}
        return Job(
            options.model,
            batch,
            options.threads,
            options.clients,
            options.settle_s,
            folder,
            inputs,
            json.loads((folder / f"sizes-{batch}.json").read_text()),
            np.load(folder / f"reference-{batch}.npy"),
        )


def main() -> None:
    """Answers requests until the parent closes the pipe."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--system")
    parser.add_argument("--model")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--clients", type=int, default=0)
    parser.add_argument("--settle-s", type=float, default=60.0)
    options = parser.parse_args()
    if options.system is None:
        return
    warnings.simplefilter("ignore")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(options.folder / "inductor"))
    if options.clients:
        sys.setswitchinterval(SWITCH_S)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not look like an answer
    serve(Child(options), sys.stdin.buffer, answers)


def serve(child: Child, requests: BinaryIO, answers: BinaryIO) -> None:
    """One answer a request."""
    while line := requests.readline():
        try:
            answer = child.answer(json.loads(line))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {str(error).strip()[:300]}"}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    main()
