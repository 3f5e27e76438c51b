"""Tests that need systemd, root or a GPU run only when this folder is named: `make test-system`."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from system.installed import Installed
from system.manager import Manager

HERE = Path(__file__).parent


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    base = config.invocation_params.dir
    named = [(base / argument.split("::")[0]).resolve() for argument in config.args]
    return None if any(path.is_relative_to(HERE) for path in named) else True


@pytest.fixture(scope="session")
def installed() -> Iterator[Installed]:
    """graphoptd as `make install` leaves it, on a machine with a systemd of its own."""
    manager = Manager()
    try:
        yield Installed(manager)
    finally:
        manager.close()


@pytest.fixture
def service(installed: Installed) -> Iterator[Installed]:
    """The running service, at revision 1 of one model and with nothing else in its state."""
    installed.begin()
    yield installed
    installed.end()
