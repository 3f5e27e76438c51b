"""`python -m graphopt.builder --commands FD --answers FD --parent PID [--backend MODULE:CLASS ...]`.

Started by the engine, not by people. First it makes sure that it dies with its parent and gives way
to everybody; then it loads torch, which takes most of its start.
"""

import argparse
import ctypes
import faulthandler
import gc
import os
import signal
import sys
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(argv: list[str]) -> int:
    """Serves the engine at the other end of two inherited pipes; returns only when that failed."""
    parser = argparse.ArgumentParser(prog="graphopt.builder")
    parser.add_argument("--commands", type=int, required=True)
    parser.add_argument("--answers", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--backend", action="append", default=[], metavar="MODULE:CLASS")
    parser.add_argument("--path", action="append", default=[], metavar="FOLDER")
    options = parser.parse_args(argv)
    _die_with(options.parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the engine's to act on
    faulthandler.enable(all_threads=False)
    sys.path[:0] = [folder for folder in options.path if folder not in sys.path]

    from graphopt.builder.pace import settle_down
    from graphopt.builder.records import encode_line

    os.write(options.answers, encode_line({"say": "policy", "policy": settle_down()}))

    import torch

    from graphopt.builder.serve import Server
    from graphopt.builder.workshop import Workshop, register

    torch.set_num_threads(1)
    register(tuple(options.backend))
    gc.freeze()  # torch alone is 100 ms of every collection
    workshop = Workshop(time.monotonic, time.process_time)
    Server(options.commands, options.answers, workshop).run()
    return 1


def _die_with(parent: int) -> None:
    """The kernel ends this process with its parent, however that ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        os._exit(0)


if __name__ == "__main__":
    if not __package__:  # run by path: the engine's own sources, wherever they lie
        own = str(Path(__file__).resolve().parents[2])
        sys.path[:0] = [own] if own not in sys.path else []
    sys.exit(main(sys.argv[1:]))
