"""What one line of a model's history says of a delta."""

import re

from graphopt.delta import Delta

SUMMARY_EDITS_MAX = 3  # edits that are named; the rest are counted


def summary_of(delta: Delta) -> str:
    """What the delta says it does, as documents spell it: `attach_adapter intent`."""
    words = []
    for edit in delta.edits[:SUMMARY_EDITS_MAX]:
        kind = re.sub(r"(?<!^)([A-Z])", r"_\1", type(edit).__name__).lower()
        about = next(
            (getattr(edit, f) for f in ("name", "id", "node", "source") if hasattr(edit, f)), ""
        )
        words.append(f"{kind} {about}".strip())
    more = len(delta.edits) - len(words)
    return ", ".join(words) + (f" and {more} more" if more else "") or "no edits"
