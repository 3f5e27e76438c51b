"""A control server in a process of its own, which gives its privileges away before it listens.

    python unprivileged_daemon.py SOCKET UID FORBIDDEN_PATH

Prints `ready` and whether FORBIDDEN_PATH could be opened; ends with its standard input.
"""

import asyncio
import os
import sys
import time
from pathlib import Path

from graphopt.engine import EngineSettings, Host
from graphoptd.config import Reload
from graphoptd.control import ControlContext, ControlServer
from graphoptd.logs import Ring
from graphoptd.settings import ControlSettings, Settings
from helpers.graphs import transformer


async def serve(host: Host, path: str, forbidden: str) -> None:
    settings = Settings(control=ControlSettings(socket=Path(path), group=""))

    async def reload() -> Reload:
        return Reload(settings)

    ring = Ring(100, 1 << 16)
    context = ControlContext(host, lambda: settings, ring, reload, "0.1.0", time.time())
    server = ControlServer(context)
    await server.start()
    try:
        os.close(os.open(forbidden, os.O_RDONLY))
        opened = "yes"
    except PermissionError:
        opened = "no"
    sys.stdout.write(f"ready {opened}\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(1)
    host.close()


def main() -> None:
    path, uid, forbidden = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    # Loading first: torch imports the rest of itself at the first op, from files that the other
    # user may not be able to read.
    host = Host(EngineSettings(threads=1, intra_op=1, improve=False))
    host.load(transformer(1))
    if uid != os.getuid():
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
    asyncio.run(serve(host, path, forbidden))


main()
