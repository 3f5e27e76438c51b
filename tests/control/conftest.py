"""A service for each test that changes models, and short socket paths (107 bytes at most)."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from control_serving import Service, serving


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with serving(tmp_path) as running:
        yield running
