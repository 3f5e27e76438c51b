"""How many threads run requests, from the CPUs this process may use.

Affinity and the cgroup's quota bound them; the host's core count says nothing in a container. By
default few executor threads have up to `INTRA_OP_MAX` CPUs each: one request is answered as fast as
it can be, and on a large host several run beside each other.
"""

import math
import os
from contextlib import suppress
from pathlib import Path

from graphoptd.settings import ExecutorSettings

# Beyond four threads the small layers of a typical request gain little from one more, while a second
# request beside it gains a whole share.
INTRA_OP_MAX = 4
_CGROUP = Path("/sys/fs/cgroup")


def usable(cgroup: Path | None = None) -> int:
    """CPUs by affinity, and no more than the cgroup's quota rounded up; at least 1."""
    count = len(os.sched_getaffinity(0))
    for folder in _with_parents(cgroup or _own_cgroup()):
        with suppress(OSError, ValueError):
            quota, period = (folder / "cpu.max").read_text().split()
            if quota != "max":
                count = min(count, math.ceil(int(quota) / int(period)))
    return max(count, 1)


def share(settings: ExecutorSettings, cpus: int | None = None) -> tuple[int, int]:
    """Executor threads, and torch's threads inside each; what is not given fits the rest."""
    cpus = usable() if cpus is None else cpus
    intra_op = settings.intra_op_threads
    if settings.threads == "auto":
        each = min(cpus, INTRA_OP_MAX) if intra_op == "auto" else intra_op
        return max(1, cpus // each), each
    return settings.threads, max(1, cpus // settings.threads) if intra_op == "auto" else intra_op


def _own_cgroup() -> Path:
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::"):
                return _CGROUP / line[3:].lstrip("/")
    return _CGROUP


def _with_parents(folder: Path) -> list[Path]:
    """The cgroup and those around it: each of them may set a quota."""
    return [folder, *(each for each in folder.parents if each.is_relative_to(_CGROUP))]
