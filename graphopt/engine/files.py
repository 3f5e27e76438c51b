"""Files that a delta names, for a process that may open them itself: the library and its caller are
one user.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from graphopt.errors import DocumentError
from graphopt.graph import Constant
from graphopt.safe_file import Source


class FolderResources:
    """Paths relative to a folder. Links are refused by those who open the files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def files(self, path: str) -> Mapping[str, Source]:
        """The entries of the folder at `path`, or the file there under its own name."""
        target = self.folder / os.path.expanduser(path)
        if target.is_dir():
            return {entry.name: entry for entry in sorted(target.iterdir())}
        if not target.exists():
            raise DocumentError(
                f"no file or folder {path!r}",
                where=str(target),
                remedy=f"paths are relative to {self.folder}",
            )
        return {target.name: target}

    def constant(self, digest: str) -> Constant | None:
        """None: a file that names a content hash is for an engine that has it."""
        return None
