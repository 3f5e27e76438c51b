"""One server for tests that only read from it, and both ways in which a request may begin."""

from collections.abc import Iterator

import pytest
from data_serving import Running, directory, every_type, failing, identity, serving, simple

from graphoptd.data.http import GuardedProtocol


@pytest.fixture(scope="session")
def server() -> Iterator[Running]:
    with serving(directory(identity(), simple(), failing(), *every_type())) as running:
        yield running


@pytest.fixture(scope="module", params=["in a task", "where it is read"])
def begins(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every request begins in a task of its own, or every one whose body is there where it is read."""
    start = GuardedProtocol._start_what_was_read

    def started(self: GuardedProtocol) -> None:
        self.guard.last = None if request.param == "in a task" else self
        start(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GuardedProtocol, "_start_what_was_read", started)
        yield
