"""Which tests are left out of `make test-fast`: those that start processes by the dozen or import
whole model families. `make test` runs them all.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

SLOW = (
    "adapters/test_peft_oracle.py",
    "backends",
    "builder",
    "control/test_unprivileged_daemon.py",
    "core/test_families.py",
    "core/test_rules.py",
    "data/test_http_guards.py",
    "engine/test_better_path.py",
    "executor/test_fused.py",
    "executor/test_fused_families.py",
    "frontend",
    "macros/test_adapters_live.py",
    "oracle",
    "property/test_incremental.py",
    "service",
    "spool",
    "store/test_bit_rot.py",
    "store/test_crash.py",
    "test_readme.py",
    "text/test_text_form.py",
)
TESTS = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = [TESTS / path for path in SLOW]
    for item in items:
        if any(item.path == path or path in item.path.parents for path in slow):
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch on one thread and without gradients, for tests that compare kernels."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)
