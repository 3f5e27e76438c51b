"""Golden files: expected text beside the test that expects it, rewritten on request.

    check_golden("minilm.graph", print_graph(graph))

compares with `golden/minilm.graph` in the folder of the calling test file. `UPDATE_GOLDEN=1 pytest
...` writes the file instead; read the diff before committing it.
"""

import os
import sys
from difflib import unified_diff
from pathlib import Path


def check_golden(name: str, text: str) -> None:
    """Assert that `text` is what the golden file `name` holds, or write it when asked to."""
    path = Path(sys._getframe(1).f_code.co_filename).parent / "golden" / name
    remedy = "UPDATE_GOLDEN=1 writes it"
    if os.environ.get("UPDATE_GOLDEN") == "1":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return
    assert path.is_file(), f"no golden file {path}; {remedy}"
    expected = path.read_text(encoding="utf-8")
    if text != expected:
        diff = unified_diff(
            expected.splitlines(), text.splitlines(), "golden", "this run", lineterm="", n=2
        )
        raise AssertionError(f"{name} differs; {remedy}\n" + "\n".join(diff))
