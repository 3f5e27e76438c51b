"""The threads of the engine: a fixed set that runs requests, and one that works in the background.

torch keeps an OpenMP team for each calling thread and a thread count that is the caller's own, so
requests run on threads made once, each with the intra-op count of the call it runs. The background
thread runs jobs one at a time, latest first for each key: a job that a newer one replaced never runs.
"""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

from graphopt.executor.shares import Admission, Share

T = TypeVar("T")
Job = Callable[[], None]
_Call = tuple[Future[Any], Callable[[], Any], Share]


def own_thread_count(count: int) -> None:
    """Sets the count of torch's intra-op threads for calls of this thread.

    At its first look a thread takes over what any other thread set last, which would undo an earlier
    setting: so it looks first.
    """
    torch.get_num_threads()
    torch.set_num_threads(count)


def keep_thread_count(count: int) -> None:
    """As `own_thread_count`, and cheap where it is the count already."""
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)


class ExecutorThreads:
    """`count` threads that run calls in the order they were submitted, each with as many torch
    threads as its share has.

    Where shares differ, running calls have no more than `cpus` threads together (`shares`). None:
    they are all alike, so that the number of threads bounds them, and nothing is counted.
    """

    def __init__(self, count: int, intra_op: int, cpus: int | None = None) -> None:
        """`intra_op` is for calls that name no share."""
        self.count = count
        self._share = Share(count, intra_op)
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._admission = Admission(cpus, self._calls.put) if cpus is not None else None
        self._threads = [
            threading.Thread(target=self._work, name=f"graphopt-executor-{i}", daemon=True)
            for i in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, call: Callable[[], T], share: Share | None = None) -> "Future[T]":
        """Queues `call`, of whoever has that share.

        Bounding the queue is the caller's part, who knows what to answer when it is full.
        """
        share = share or self._share
        future: Future[T] = Future()
        if self._admission is None:
            self._calls.put((future, call, share))
        else:
            self._admission.enter(share, (future, call, share))
        return future

    def close(self) -> None:
        """Runs what is queued, then ends the threads."""
        if self._admission is not None:
            self._admission.wait_started()
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        own = self._share.each
        own_thread_count(own)
        while (item := self._calls.get()) is not None:
            future, call, share = item
            try:
                if future.set_running_or_notify_cancel():
                    if share.each != own:
                        own = share.each
                        torch.set_num_threads(own)
                    future.set_result(call())
            except BaseException as error:  # it belongs to whoever waits for the future
                future.set_exception(error)
            finally:
                if self._admission is not None:
                    self._admission.leave(share)
            del item, future, call  # do not keep the last request's tensors until the next one


class LoneThread:
    """One daemon thread that runs `work` until it returns: it waits on files, not for calls."""

    def __init__(self, name: str, work: Job) -> None:
        self._thread = threading.Thread(target=work, name=name, daemon=True)
        self._thread.start()

    def join(self, timeout_s: float | None = None) -> bool:
        """Waits until the work has returned; False when `timeout_s` passed first."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()


def run_beside(name: str, work: Callable[[], T]) -> "Future[T]":
    """What `work` returns or raises, on a daemon thread of its own."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    LoneThread(name, run)
    return future


class BackgroundThread:
    """One thread that runs keyed jobs; a job submitted under a key replaces the waiting one.

    Jobs for later wait beside the others: `wait_idle` does not wait for them.
    """

    def __init__(
        self,
        name: str,
        intra_op: int,
        on_error: Callable[[str, Exception], None],
        monotonic_s: Callable[[], float],
    ) -> None:
        self._jobs: dict[str, Job] = {}
        self._later: dict[str, tuple[float, Job]] = {}  # when it is due, and the job
        self._wake = threading.Condition()
        self._running: str | None = None
        self._closed = False
        self._intra_op = intra_op
        self._on_error = on_error
        self._now_s = monotonic_s
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, key: str, job: Job) -> None:
        """Runs `job` when those before it are done, unless another job of this key comes first."""
        with self._wake:
            self._jobs.pop(key, None)
            self._later.pop(key, None)
            self._jobs[key] = job
            self._wake.notify_all()

    def submit_after(self, delay_s: float, key: str, job: Job) -> None:
        """Submits `job` when `delay_s` passed, unless another job of this key comes first."""
        with self._wake:
            if key not in self._jobs:
                self._later[key] = (self._now_s() + delay_s, job)
                self._wake.notify_all()

    def wait_idle(self, timeout_s: float | None) -> bool:
        """Waits until nothing is queued or running; False when `timeout_s` passed first."""
        with self._wake:
            return self._wake.wait_for(lambda: not self._jobs and self._running is None, timeout_s)

    def close(self) -> None:
        """Ends the thread after the running job; waiting jobs are dropped."""
        with self._wake:
            self._closed = True
            self._jobs.clear()
            self._later.clear()
            self._wake.notify_all()
        self._thread.join()

    def _work(self) -> None:
        own_thread_count(self._intra_op)
        while True:
            with self._wake:
                self._running = None
                self._wake.notify_all()
                while not (self._take_due() or self._closed):
                    self._wake.wait(self._until_due())
                if self._closed:
                    return
                key = next(iter(self._jobs))
                self._running, job = key, self._jobs.pop(key)
            try:
                job()
            except Exception as error:
                self._on_error(key, error)
            del job

    def _take_due(self) -> bool:
        """Moves what is due to the jobs; whether there is a job."""
        if self._later:
            now_s = self._now_s()
            for key in [key for key, (due_s, _) in self._later.items() if due_s <= now_s]:
                self._jobs[key] = self._later.pop(key)[1]
        return bool(self._jobs)

    def _until_due(self) -> float | None:
        if not self._later:
            return None
        return max(0.0, min(due_s for due_s, _ in self._later.values()) - self._now_s())
