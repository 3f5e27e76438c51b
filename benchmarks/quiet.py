"""Whether a process is at rest: runtimes spin for a while after a call, and a spinning neighbour
must not be measured as somebody else's latency.
"""

import os
import threading
import time
from pathlib import Path

import psutil

REST_S = 0.002  # between two looks
LOOKS = 2  # in a row that must find nobody running
PATIENCE_S = 0.25


def wait_quiet(pid: int | None = None, patience_s: float = PATIENCE_S) -> bool:
    """Waits until no thread of `pid` (this process: but the caller's) is running; False if one
    still is when the patience ends.
    """
    until, calm = time.perf_counter() + patience_s, 0
    while calm < LOOKS:
        calm = 0 if _is_running(pid or os.getpid()) else calm + 1
        if time.perf_counter() > until:
            return False
        time.sleep(REST_S)
    return True


def tree_cpu_s(pid: int, *, without_root: bool = False) -> float:
    """CPU seconds of a process and those it started, or of these alone, to 10 ms."""
    total = 0.0
    try:
        process = psutil.Process(pid)
        started = process.children(recursive=True)
        for each in started if without_root else [process, *started]:
            times = each.cpu_times()
            total += times.user + times.system
    except psutil.NoSuchProcess:
        pass
    return total


def _is_running(pid: int) -> bool:
    me = str(threading.get_native_id()) if pid == os.getpid() else ""
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        if stat.parent.name == me:
            continue
        try:
            state = stat.read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state == "R":
            return True
    return False
