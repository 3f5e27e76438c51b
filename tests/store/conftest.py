import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from graphopt.store import StateFolder

Opener = Callable[[], StateFolder]


@contextmanager
def memory_folder() -> Iterator[Path]:
    """For tests with thousands of syncs, whose claim is not about the disk under them."""
    with TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as parent:
        yield Path(parent)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def open_state(state: Path) -> Iterator[Opener]:
    """Opens the state folder with a clock that counts; what a test leaves open is closed after it."""
    ticks = itertools.count(1_000)
    with ExitStack() as stack:
        yield lambda: stack.enter_context(StateFolder.open(state, wall_ns=lambda: next(ticks)))
