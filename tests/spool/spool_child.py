"""A process with a state folder that works a spool off, saying each delta as soon as it is applied.

    python spool_child.py STATE SPOOL

Meant to be killed at any moment; ends when the spool is empty.
"""

import sys
from functools import partial
from pathlib import Path

from graphopt.delta import Delta
from graphopt.engine import Applied, EngineSettings, Host
from graphoptd.control.changes import apply_to
from graphoptd.settings import Settings, SpoolSettings
from graphoptd.spool import Spool
from helpers.graphs import transformer


def main() -> None:
    settings = Settings(spool=SpoolSettings(path=Path(sys.argv[2])))
    host = Host(EngineSettings(threads=1, intra_op=1, improve=False), sys.argv[1])
    if not host.models():
        host.load(transformer(1))
    apply = partial(apply_to, host)

    def aloud(delta: Delta) -> tuple[str, Applied]:
        done = apply(delta)
        sys.stdout.write(f"{done[1].revision}\n")
        sys.stdout.flush()
        return done

    spool = Spool(lambda: settings, aloud)
    for name in ("accepted", "rejected"):
        (spool.path / name).mkdir(exist_ok=True)
    spool.rescan()
    model = host.get("transformer")
    puts = [line.summary for line in model.past.lines() if line.kind == "delta"]
    sys.stdout.write(f"done {model.revision} {len(puts)}\n")
    host.close()


main()
