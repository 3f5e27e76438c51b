"""What was looked up, within a bound: structures repeat, and what is asked about them with them."""

import threading
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Kept(dict[K, V]):
    """A dict that forgets what it was told first once it holds more than so many. Any thread may tell it."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most
        self._telling = threading.Lock()

    def __setitem__(self, key: K, value: V) -> None:
        with self._telling:
            super().__setitem__(key, value)
            while len(self) > self._most:
                del self[next(iter(self))]
