"""One thread budget for a process: how many requests run at once, and on how many CPUs each.

Affinity and the cgroup's quota bound it; the host's core count says nothing in a container. Every
consumer gets its share from here: the executor threads and torch inside them, the runtimes' own
pools (as threads and streams of their options), and the builder, which is scheduled behind all of
them and so has no share of its own. For latency few requests run at once with several CPUs each; for
throughput as many as there are CPUs, with one each: without a barrier inside a layer no CPU waits
for another.
"""

import math
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Prefer = Literal["latency", "throughput"]

# Beyond four threads the small layers of a typical request gain little from one more, while a second
# request beside it gains a whole share.
EACH_MAX = 4
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class ThreadBudget:
    """`workers` requests at once, `each` threads inside one of them."""

    workers: int
    each: int


def budget(
    prefer: Prefer = "latency",
    workers: int | None = None,
    each: int | None = None,
    cpus: int | None = None,
) -> ThreadBudget:
    """The budget of this process; what is not given fits the rest."""
    cpus = usable_cpus() if cpus is None else cpus
    if workers is None:
        if each is None:
            each = 1 if prefer == "throughput" else min(cpus, EACH_MAX)
        return ThreadBudget(max(1, cpus // each), each)
    return ThreadBudget(workers, max(1, cpus // workers) if each is None else each)


def usable_cpus(cgroup: Path | None = None) -> int:
    """CPUs by affinity, and no more than the cgroup's quota rounded up; at least 1."""
    count = len(os.sched_getaffinity(0))
    for folder in _with_parents(cgroup or _own_cgroup()):
        with suppress(OSError, ValueError):
            quota, period = (folder / "cpu.max").read_text().split()
            if quota != "max":
                count = min(count, math.ceil(int(quota) / int(period)))
    return max(count, 1)


def _own_cgroup() -> Path:
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::"):
                return _CGROUP / line[3:].lstrip("/")
    return _CGROUP


def _with_parents(folder: Path) -> list[Path]:
    """The cgroup and those around it: each of them may set a quota."""
    return [folder, *(each for each in folder.parents if each.is_relative_to(_CGROUP))]
