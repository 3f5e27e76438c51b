import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.harness import Zygote, save_pair


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    made = Zygote()
    yield made
    made.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short name: paths of Unix sockets end at 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="gs"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pair(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def model_argv(bundle: Path, folder: Path) -> list[str]:
    """The command line that serves the pair of constants on sockets in `folder`."""
    return [
        "--model",
        f"pair={bundle}",
        "--run-dir",
        str(folder / "run"),
        "--port",
        "0",
        "--no-builder",
    ]
