"""Where calls run: never on the event loop, which also serves requests in the same process.

Three lanes, so that one kind of work cannot starve another: changes go one after the other on a
single thread (the engine takes one writer at a time anyway, and order of arrival is then order of
application); looks run on two threads; waiting for files and for the background has threads of its
own. Each lane is bounded, and a full one says *busy* instead of growing.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import TypeVar

from graphopt.errors import BusyError

T = TypeVar("T")

WAITING_MAX = 64  # calls of one lane: more writers than that wait longer than a client will


class Lane:
    """Threads with a bounded queue."""

    def __init__(self, name: str, threads: int) -> None:
        self.name = name
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=f"graphoptd-control-{name}")
        self._waiting = 0  # touched on the event loop only

    async def run(self, work: Callable[[], T]) -> T:
        """Runs `work` on a thread of the lane. BusyError when too much waits already."""
        if self._waiting >= WAITING_MAX:
            raise BusyError(
                f"{self._waiting} calls wait already", where=self.name, remedy="try again shortly"
            )
        self._waiting += 1
        try:
            loop = asyncio.get_running_loop()
            # Shielded: a client that leaves must not cut off a change that has begun.
            future = loop.run_in_executor(self._pool, copy_context().run, work)
            future.add_done_callback(self._done)
        except BaseException:
            self._waiting -= 1
            raise
        return await asyncio.shield(future)

    def close(self) -> None:
        """Takes nothing more; what runs is not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _done(self, future: "asyncio.Future[T]") -> None:
        self._waiting -= 1
        if not future.cancelled():
            future.exception()  # seen, even when its caller has left


class Lanes:
    """The lanes of one server."""

    def __init__(self) -> None:
        self.change = Lane("change", 1)
        self.look = Lane("look", 2)
        self.wait = Lane("wait", 4)

    def close(self) -> None:
        """Closes all."""
        for lane in (self.change, self.look, self.wait):
            lane.close()
