"""Which host a measurement or an artifact was made on: what decides whether it holds here.

Runtimes generate code for the instruction sets they find, and a time measured on another processor
says nothing. Deliberately absent: frequency, load and memory, which change while the host stays the
same.
"""

import platform
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
# Instruction sets that kernels are chosen by; the rest of the flags (a hundred, some of which a
# kernel update adds) would make a host foreign to itself.
_ISA = (
    "sse4_2", "avx", "avx2", "fma", "f16c", "avx512", "avx_vnni", "amx", "asimd", "sve", "bf16", "i8mm",
)  # fmt: skip


def host_fingerprint(extra: Iterable[str] = (), cpuinfo: str | None = None) -> str:
    """Processor model, instruction sets and `extra` as one short text: `x86_64 AMD EPYC 3f2a91c0`.

    Args:
        extra: what else artifacts depend on, as accelerators by name.
        cpuinfo: the text to read in the place of /proc/cpuinfo.
    """
    if cpuinfo is None:
        try:
            cpuinfo = CPUINFO.read_text(encoding="utf-8", errors="replace")
        except OSError:  # no /proc: the architecture alone must do
            cpuinfo = ""
    model, flags = "", set[str]()
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "CPU part") and not model:
            model = " ".join(value.split())
        elif name.strip() in ("flags", "Features"):
            flags.update(flag for flag in value.split() if flag.startswith(_ISA))
    about = " ".join((platform.machine(), model)).strip()
    digest = sha256("\n".join((about, *sorted(flags), *extra)).encode()).hexdigest()
    return f"{about} {digest[:8]}"
