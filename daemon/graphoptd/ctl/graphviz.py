"""Graphviz's `dot`, which lays a drawing out. It is not part of the installation."""

import shutil
import subprocess
from collections.abc import Sequence

from graphoptd.ctl.client import Exit, Refused

PROGRAM = "dot"


def as_svg(lines: Sequence[str]) -> list[str]:
    """The lines of an SVG document of a DOT document. Refused where dot is missing, or fails."""
    if shutil.which(PROGRAM) is None:
        body = {
            "message": "Graphviz's dot is not installed",
            "where": "--svg",
            "remedy": "install graphviz, or use --dot and draw it elsewhere",
        }
        raise Refused(body, Exit.REJECTED)
    text = "\n".join([*lines, ""])
    done = subprocess.run(
        [PROGRAM, "-Tsvg"], input=text, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"it left with {done.returncode}"]
        body = {
            "message": f"dot could not draw it: {said[0]}",
            "where": "--svg",
            "remedy": "use --dot and draw it elsewhere",
        }
        raise Refused(body, Exit.REJECTED)
    return done.stdout.splitlines()
