"""The command `graphoptctl`: parse, connect, run, and leave with a code that scripts can use."""

import os
import sys
from collections.abc import Sequence

from graphoptd.ctl.client import TIMEOUT_S, Client, Exit, Refused, find_socket
from graphoptd.ctl.commands import run
from graphoptd.ctl.completion import script
from graphoptd.ctl.output import show_error
from graphoptd.ctl.parser import build_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code; SystemExit(2) on wrong usage."""
    options = build_parser().parse_args(argv)
    if options.command == "completion":
        print(script(options.shell), end="")
        return Exit.OK
    try:
        path = find_socket(options.socket, os.environ)
        with Client(path, options.timeout or TIMEOUT_S) as client:
            code = run(client, options)
        sys.stdout.flush()
    except Refused as refused:
        show_error(refused.body, options.json)
        return refused.exit_code
    except KeyboardInterrupt:
        # The service goes on with what it has begun; whoever waits for it has left.
        return Exit.INTERRUPTED
    except BrokenPipeError:  # `graphoptctl nodes | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.OK
    return code


if __name__ == "__main__":
    sys.exit(main())
