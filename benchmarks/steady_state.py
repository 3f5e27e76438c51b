"""graphopt beside the best peer of each network, steady state, paired and interleaved.

    python -m benchmarks.steady_state [--models a,b] [--batches 1,8] [--systems ...] [--rounds N]
    python -m benchmarks.steady_state --throughput      # 4 closed-loop clients in each process

Every system runs in a process of its own, at the settings that were fastest here (see `peers`). In
each round every system gets one turn of at least 50 ms, in rotating order, while the others block in
a read; a turn begins when the threads of the one before have stopped spinning. `ratio` is the median
over rounds of the best peer's time over graphopt's in the same round (throughput: of graphopt's rate
over the peer's), `low` and `high` its one-sided 95% bounds. The best peer is the one with the lowest
median. A verdict is `yes` when the bound reaches the target, `NO` when the other bound misses it,
`open` when the rounds were too few or too noisy to tell.

Peers that are far behind the best get a turn every few rounds only: they decide nothing. The exports
and the compiler's cache lie in a temporary folder and are shared by the processes of one run.
"""

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness import percentile, report, table
from benchmarks.paired import Bounds, bounds
from benchmarks.peer_process import Peer, PeerError
from benchmarks.peers import SYSTEMS, missing
from benchmarks.zoo import NETWORKS

US = "graphopt"
RATIO_MIN, NEAR_S = 0.98, 15e-6  # steady state: of the best peer's speed, or this close to it
THROUGHPUT_MIN = 1.0
TURN_S = 0.05
DRIVE_S, DRIVE_CALLS = 0.5, 3  # of a throughput turn: seconds, or calls of each client if longer
ROUNDS_MIN = 8  # with fewer than 8 the bounds of a median are the extremes
FAR, FAR_EVERY, FAR_AFTER = 1.5, 4, 3  # times the best; a turn each so many rounds; from this round
BUILD_TIMEOUT_S, TURN_TIMEOUT_S = 900.0, 120.0
Rows = list[dict[str, Any]]


@dataclass
class Line:
    """What one system did on one network at one batch."""

    system: str
    built: dict[str, Any] = field(default_factory=dict)
    rounds: dict[int, float] = field(default_factory=dict)  # median seconds, or requests a second
    times: list[float] = field(default_factory=list)
    idle: float = 0.0  # cores used outside its turns
    notes: str = ""
    error: str = ""


def main() -> None:
    """Measures, prints two tables and writes them as JSON."""
    options = _options()
    start, rows, lines = time.monotonic(), [], []
    name = "throughput" if options.throughput else "steady_state"
    for model in options.models:
        with tempfile.TemporaryDirectory(prefix="graphopt-bench-", dir=options.scratch) as folder:
            found, found_lines = model_rows(model, Path(folder), options)
        rows += found
        lines += found_lines
        table(name, rows)
    table(f"{name}, each system", lines)
    report(name, rows, systems=lines, seconds=time.monotonic() - start, threads=options.threads)
    print(f"{time.monotonic() - start:.0f} s")


def model_rows(model: str, folder: Path, options: argparse.Namespace) -> tuple[Rows, Rows]:
    """The lines of both tables for one network."""
    rows, details = [], []
    with ExitStack() as stack:
        peers, errors = _start(model, folder, options, stack)
        cells = {batch: {name: Line(name) for name in options.systems} for batch in options.batches}
        for system, error in errors.items():
            for cell in cells.values():
                cell[system].error = error
        _build_all(peers, cells)
        for batch, cell in cells.items():
            running = {name: peers[name] for name, line in cell.items() if not line.error}
            if running:
                rounds = _measure(running, cell, batch, options)
                _check(running, cell, batch)
            else:
                rounds = 0
            print(f"{model} batch {batch}: {rounds} rounds", file=sys.stderr, flush=True)
            rows.append(_row(model, batch, cell, throughput=options.throughput))
            details += [_detail(model, batch, line, options.throughput) for line in cell.values()]
    return rows, details


def _start(
    model: str, folder: Path, options: argparse.Namespace, stack: ExitStack
) -> tuple[dict[str, Peer], dict[str, str]]:
    """A process for each system that can run, and why the others cannot.

    torch.compile, which takes longest, builds while the others' files are exported.
    """
    errors = {
        system: f"not installed: {', '.join(lacking)}"
        for system in options.systems
        if (lacking := missing(system))
    }
    _export(model, folder, options, "")  # inputs and references alone: a second
    peers = {}
    for system in options.systems:
        if system not in errors:
            peers[system] = Peer(
                system,
                model,
                folder,
                threads=options.threads,
                clients=options.clients if options.throughput else 0,
                settle_s=options.settle_s,
            )
            stack.callback(peers[system].close)
    if "compile" in peers:
        peers["compile"].send(do="build", batch=options.batches[0])
    _export(model, folder, options, ",".join(peers))
    return peers, errors


def _export(model: str, folder: Path, options: argparse.Namespace, systems: str) -> None:
    command = [sys.executable, "-m", "benchmarks.exports", "--model", model]
    command += ["--folder", str(folder), "--systems", systems]
    command += ["--batches", ",".join(map(str, options.batches))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{model} cannot be exported:\n{done.stderr[-2000:]}")


def _build_all(peers: dict[str, Peer], cells: dict[int, dict[str, Line]]) -> None:
    """One after another, because building measures settings; what fails is noted in its line."""
    order = sorted(peers, key=lambda name: name != "compile")
    is_sent = "compile" in peers  # its first batch
    for system in order:
        for batch, cell in cells.items():
            try:
                if not is_sent:
                    peers[system].send(do="build", batch=batch)
                cell[system].built = peers[system].receive(BUILD_TIMEOUT_S)
            except PeerError as error:
                cell[system].error = str(error)
            is_sent = False


def _measure(
    peers: dict[str, Peer], cell: dict[str, Line], batch: int, options: argparse.Namespace
) -> int:
    """Rounds of one turn each; how many."""
    start = time.monotonic()
    cpu_before = {name: peer.cpu_s() for name, peer in peers.items()}
    used = dict.fromkeys(peers, 0.0)
    own_turns_s = dict.fromkeys(peers, 0.0)
    calls = {name: max(1, math.ceil(TURN_S / cell[name].built["call_s"])) for name in peers}
    rounds = 0
    while rounds < options.rounds:
        if rounds >= ROUNDS_MIN and time.monotonic() - start > options.cell_s:
            break
        names = list(peers)[rounds % len(peers) :] + list(peers)[: rounds % len(peers)]
        for name in names:
            line = cell[name]
            if line.error or (
                rounds % FAR_EVERY and name in _far(cell, rounds, options.throughput)
            ):
                continue
            began, before = time.monotonic(), peers[name].cpu_s()
            try:
                if options.throughput:
                    _drive_turn(peers[name], line, batch, rounds, options.clients)
                else:
                    _turn(peers[name], line, batch, rounds, calls[name])
            except PeerError as error:
                line.error = str(error)
                continue
            peers[name].rest()
            used[name] += peers[name].cpu_s() - before
            own_turns_s[name] += time.monotonic() - began
        rounds += 1
    for name, peer in peers.items():
        idle_s = time.monotonic() - start - own_turns_s[name]
        cell[name].idle = max(0.0, peer.cpu_s() - cpu_before[name] - used[name]) / max(idle_s, 1e-9)
    return rounds


def _turn(peer: Peer, line: Line, batch: int, number: int, calls: int) -> None:
    answer = peer.ask(TURN_TIMEOUT_S, do="turn", batch=batch, calls=calls)
    line.rounds[number] = median(answer["times"])
    line.times += answer["times"]


def _drive_turn(peer: Peer, line: Line, batch: int, number: int, clients: int) -> None:
    seconds = max(DRIVE_S, DRIVE_CALLS * line.built["call_s"] * clients / os.cpu_count())
    answer = peer.ask(TURN_TIMEOUT_S, do="drive", batch=batch, seconds=seconds)
    line.rounds[number] = answer["rate"]
    line.times += answer["times"]


def _far(cell: dict[str, Line], rounds: int, throughput: bool) -> set[str]:
    """Peers that need not be measured in every round."""
    if rounds < FAR_AFTER:
        return set()
    speed = {name: _speed(line, throughput) for name, line in cell.items() if line.rounds}
    best = max((value for name, value in speed.items() if name != US), default=0.0)
    return {name for name, value in speed.items() if name != US and value * FAR < best}


def _speed(line: Line, throughput: bool) -> float:
    middle = median(line.rounds.values())
    return middle if throughput else 1 / middle


def _check(peers: dict[str, Peer], cell: dict[str, Line], batch: int) -> None:
    """Answers are compared once more after the measurement: plans may have changed during it."""
    for name, peer in peers.items():
        if cell[name].error:
            continue
        try:
            cell[name].notes = peer.ask(TURN_TIMEOUT_S, do="check", batch=batch)["notes"]
        except PeerError as error:
            cell[name].error = str(error)


# -- lines of the tables


def _row(model: str, batch: int, cell: dict[str, Line], *, throughput: bool) -> dict[str, Any]:
    scale, unit = (1.0, "per_s") if throughput else (1e3, "ms")
    fine = {name: line for name, line in cell.items() if not line.error and line.rounds}
    row: dict[str, Any] = {"model": model, "batch": batch}
    rivals = {name: _speed(line, throughput) for name, line in fine.items() if name != US}
    best = max(rivals, key=rivals.__getitem__) if rivals else None
    row["best_peer"] = best or "none"
    if best is not None and US in fine:
        row |= _verdict(fine[US], fine[best], throughput=throughput)
    else:
        row["verdict"] = f"{US}: {cell[US].error or 'not measured'}" if US in cell else "no engine"
    for name, line in cell.items():
        row[f"{name}_{unit}"] = median(line.rounds.values()) * scale if name in fine else "failed"
    return row


def _verdict(ours: Line, best: Line, *, throughput: bool) -> dict[str, Any]:
    shared = sorted(ours.rounds.keys() & best.rounds.keys())
    pairs = [(ours.rounds[i], best.rounds[i]) for i in shared]
    if throughput:
        ratio = bounds([mine / theirs for mine, theirs in pairs])
        verdict = _judge(ratio, THROUGHPUT_MIN)
        return _figures(ratio) | {"rounds": len(pairs), "verdict": verdict}
    ratio = bounds([theirs / mine for mine, theirs in pairs])
    behind = bounds([mine - theirs for mine, theirs in pairs])
    verdict = _judge(ratio, RATIO_MIN)
    if behind.high <= NEAR_S:
        verdict = "yes"
    elif verdict == "NO" and behind.low <= NEAR_S:
        verdict = "open"
    figures = _figures(ratio) | {"behind_high_us": behind.high * 1e6}
    return figures | {"rounds": len(pairs), "verdict": verdict}


def _figures(ratio: Bounds) -> dict[str, Any]:
    return {"ratio": ratio.median, "low": ratio.low, "high": ratio.high}


def _judge(ratio: Bounds, target: float) -> str:
    return "yes" if ratio.low >= target else "NO" if ratio.high < target else "open"


def _detail(model: str, batch: int, line: Line, throughput: bool) -> dict[str, Any]:
    detail: dict[str, Any] = {"model": model, "batch": batch, "system": line.system}
    if line.times:
        middle = median(line.rounds.values())
        detail |= {"per_s": middle} if throughput else {"p50_ms": middle * 1e3}
        detail |= {"p99_ms": percentile(line.times, 0.99) * 1e3, "idle_cores": line.idle}
    if line.built:
        settings = ", ".join(f"{axis} {value}" for axis, value in line.built["settings"].items())
        detail |= {"build_s": line.built["build_s"], "settings": settings}
        detail["tried"] = line.built["tried"]
    detail["note"] = line.error or line.notes
    return detail


def _options() -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return text.split(",")

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser()
    parser.add_argument("--models", type=names, default=list(NETWORKS))
    parser.add_argument("--batches", type=numbers, default=None)
    parser.add_argument("--systems", type=names, default=list(SYSTEMS))
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--cell-s", type=float, default=12.0, help="of rounds beyond the first 8")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--throughput", action="store_true")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--settle-s", type=float, default=120.0, help="patience with graphopt")
    parser.add_argument("--scratch", type=Path, default=None, help="folder for exports")
    options = parser.parse_args()
    options.batches = options.batches or ([1] if options.throughput else [1, 8])
    for given, known in ((options.models, NETWORKS), (options.systems, SYSTEMS)):
        if unknown := set(given) - set(known):
            parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    return options


if __name__ == "__main__":
    main()
