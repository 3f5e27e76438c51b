"""What all benchmarks share: the machine's fingerprint, percentiles, a table and a JSON file."""

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def fingerprint() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in _lines("/proc/cpuinfo")
            if line.startswith("model name")
        ),
        "?",
    )
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "cpu": cpu,
        "cpus": len(os.sched_getaffinity(0)),
        "load_1m": os.getloadavg()[0],
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
    }


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of `values` lie."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def take_turns(
    functions: Mapping[str, Callable[[], object]], rounds: int, pace: str, turn_s: float = 0.03
) -> dict[str, list[float]]:
    """Seconds of a call of each function, round by round, each round beginning with another one.

    A turn is as many calls as the function called `pace` does in `turn_s`.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    begun = time.perf_counter()
    functions[pace]()
    calls = max(1, round(turn_s / (time.perf_counter() - begun)))
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            run = functions[name]
            run()  # its weights come back into the caches
            begun = time.perf_counter()
            for _ in range(calls):
                run()
            times[name].append((time.perf_counter() - begun) / calls)
    return times


def report(name: str, rows: Sequence[Mapping[str, Any]], **extra: Any) -> None:
    """Prints `rows` as a table and writes them with the fingerprint to `results/NAME.json`."""
    table(name, rows)
    RESULTS.mkdir(exist_ok=True)
    content = {"machine": fingerprint(), "rows": list(rows), **extra}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints `rows` as a table; lists are for the JSON file and left out."""
    columns = list(
        dict.fromkeys(key for row in rows for key, v in row.items() if not isinstance(v, list))
    )
    cells = [[_text(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(len(column), *(len(row[i]) for row in cells)) for i, column in enumerate(columns)]
    print(f"\n{title}")
    print("  ".join(column.ljust(width) for column, width in zip(columns, widths, strict=True)))
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))


def rss_bytes() -> int:
    """The resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()
