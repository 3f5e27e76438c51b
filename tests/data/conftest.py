"""One server for tests that only read from it."""

from collections.abc import Iterator

import pytest
from data_serving import Running, directory, every_type, failing, identity, serving, simple


@pytest.fixture(scope="session")
def server() -> Iterator[Running]:
    with serving(directory(identity(), simple(), failing(), *every_type())) as running:
        yield running
