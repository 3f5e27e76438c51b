"""Measures this host and writes its layer of coefficients.

    python -m cost_models.calibration --out FILE [--threads N ...] [--backend NAME ...]

Prints a line of JSON for every graph that was measured (`done`, `of`, `about`) and one at the end
(`path`, or `error`); the service and `graphoptctl calibrate` make a progress bar of them. The file
appears whole or not at all. Deliberately absent: the operator's files, which are never touched.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import torch

from cost_models.calibration_graphs import probes
from cost_models.calm import Calm
from cost_models.coefficients import (
    DEFAULTS,
    Coefficients,
    read_document,
    read_layers,
    spec_of,
    write_document,
)
from cost_models.fitting import Fit, Measured, fit
from cost_models.measuring import Timed, available, host_figures, time_graph
from cost_models.roofline import Host
from graphopt.costs.op_work import CLASSES
from graphopt.documents import load_yaml
from graphopt.engine.artifact_entry import write_whole
from graphopt.engine.fingerprint import host_fingerprint
from graphopt.engine.thread_budget import usable_cpus
from graphopt.errors import GraphoptError
from graphopt.executor.backend import Backend

# Graphs that have no turn by then are left out; the last ones repeat classes. The host's own figures take 25
# to 35 s before that, and all of it is to stay under two minutes.
BUDGET_S = 78.0
PATIENCE_S = 20.0  # of waiting for a calm host, in all
THREADS_MAX = 4  # of one call: more than four are rarely given to a request

Progress = Callable[[int, int, str], None]


def calibrate(
    threads: Iterable[int],
    offered: Mapping[str, Backend],
    progress: Progress,
    budget_s: float = BUDGET_S,
) -> dict[str, float]:
    """Coefficients of this host by name; sets torch's threads. Graphs take up to `budget_s` seconds."""
    counts = sorted(set(threads))
    listed = list(probes())
    progress(0, len(listed), "peak and bandwidth")
    calm = Calm(PATIENCE_S)
    values = host_figures(counts, calm)
    until_s = time.monotonic() + budget_s
    timed: list[Timed] = []
    with tempfile.TemporaryDirectory(prefix="graphopt-calibration-") as folder:
        for number, probe in enumerate(listed, 1):
            if time.monotonic() > until_s:
                break
            with suppress(GraphoptError):  # a runtime that refuses one graph may take the others
                timed += time_graph(probe.graph, {}, offered, counts, Path(folder), calm)
            progress(number, len(listed), probe.graph.name)
    return fitted(values, timed)


def fitted(host: Mapping[str, float], timed: Iterable[Timed]) -> dict[str, float]:
    """Coefficients from the host's figures and what graphs took."""
    base = read_layers([DEFAULTS])
    known = Coefficients({**base.values, **host}, {})
    sharpness = known.get("roofline", "sharpness") or 4.0
    groups: dict[tuple[str, int], list[Timed]] = {}
    for each in timed:
        groups.setdefault((each.backend, each.threads), []).append(each)
    values = dict(host)
    for (backend, count), rows in sorted(groups.items()):
        machine = Host(known, count)
        measured = [Measured(row.calls, row.seconds) for row in rows]
        rates = [machine.bandwidth(row.calls[0].footprint_bytes) for row in rows]
        found = fit(measured, machine.peak, rates, sharpness)
        values |= _named(f"backends.{backend}.threads_{count}", found)
    return {name: _within(name, value) for name, value in values.items()}


def write_layer(path: Path, values: Mapping[str, float], about: str) -> None:
    """Writes the layer whole; it is read back first, so that a file that is there can be read."""
    text = write_document(values, about)
    read_document(load_yaml(text, source=str(path)))
    path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
    write_whole(path, text.encode())


def thread_counts(cpus: int) -> list[int]:
    """The counts worth calibrating on so many processors."""
    return sorted({1, min(cpus, THREADS_MAX)})


def main(argv: list[str]) -> int:
    """The command; 0 when the layer is written."""
    parser = argparse.ArgumentParser(prog="cost_models.calibration", allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--threads", type=int, action="append", metavar="N")
    parser.add_argument("--backend", action="append", metavar="NAME")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, metavar="S")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    start_s = time.monotonic()
    counts = options.threads or thread_counts(usable_cpus())
    try:
        offered = available(options.backend)
        values = calibrate(counts, offered, _say_progress, options.budget_s)
        date = time.strftime("%Y-%m-%d %H:%M:%S")
        tiers = ", ".join(("eager", "fused", *offered))
        about = f"Measured by `graphoptctl calibrate` on {host_fingerprint()}, {date}: {tiers}.\n"
        about += (
            "Written anew by every calibration: put changes into a file of the operator's folder."
        )
        write_layer(options.out, values, about)
    except (GraphoptError, OSError) as error:
        _say({"error": str(error)})
        return 1
    took_s = round(time.monotonic() - start_s, 1)
    _say({"path": str(options.out), "took_s": took_s, "coefficients": len(values)})
    return 0


def _named(trail: str, found: Fit) -> dict[str, float]:
    values = {f"{trail}.call_s": found.call_s, f"{trail}.error": found.error}
    for name, (kernel_s, compute, memory) in zip(CLASSES, found.rates, strict=True):
        values[f"{trail}.{name}.kernel_s"] = float(kernel_s)
        values[f"{trail}.{name}.compute"] = float(compute)
        values[f"{trail}.{name}.memory"] = float(memory)
    return values


def _within(name: str, value: float) -> float:
    spec = spec_of(tuple(name.split(".")))
    assert spec is not None
    return float(f"{min(max(value, spec.low), spec.high):.6g}")


def _say_progress(done: int, of: int, about: str) -> None:
    _say({"done": done, "of": of, "about": about})


def _say(line: Mapping[str, object]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
