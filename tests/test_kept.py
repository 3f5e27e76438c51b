"""What is looked up is bounded: services and builders live for months."""

import sys
import threading

from graphopt.kept import Kept


def test_the_oldest_goes_first_and_an_update_is_no_newcomer() -> None:
    kept = Kept[str, int](2)
    kept["a"], kept["b"] = 1, 2
    kept["a"] = 3
    assert kept == {"a": 3, "b": 2}
    kept["c"] = 4
    assert kept == {"b": 2, "c": 4}


def test_threads_that_tell_at_once_keep_the_bound() -> None:
    kept = Kept[tuple[int, int], int](4)
    faults: list[BaseException] = []

    def tell(thread: int) -> None:
        try:
            for i in range(20_000):
                kept[thread, i] = i
        except (KeyError, RuntimeError) as fault:
            faults.append(fault)

    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=tell, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval_s)
    assert faults == []
    assert len(kept) == 4
