"""Law 7: what was acknowledged is there after any crash, whole, and at most the one in flight more.

GRAPHOPT_SOAK_KILLS sets the number of a soak.
"""

import os
import random
import signal
import threading
import time
from collections import deque
from pathlib import Path
from statistics import median

import pytest

from graphoptd.ctl.client import Exit, Refused
from service.harness import Daemon, Zygote, apply, running

KILLS = 100
SOAK_KILLS = int(os.environ.get("GRAPHOPT_SOAK_KILLS", "5000"))
DELTAS_MAX = 12  # acknowledged in one life
LATE_MAX = 1.25  # and then the kill, up to so many times what a delta takes on this host later
FIRST_S = 0.004  # what a delta takes, before any was seen
SEED = 20


class Stream:
    """Deltas 1, 2, 3 ... one after the other; delta `n` makes revision `n + 1`."""

    def __init__(self) -> None:
        self.acknowledged = 0
        self.settled = 0  # in flight at a kill, and there
        self.took_s: deque[float] = deque([FIRST_S], maxlen=64)

    def run(self, daemon: Daemon, deltas: int, late: float) -> None:
        """Until the process dies, `late` times what a delta takes after `deltas` are acknowledged.

        Begins with the one in flight when the last process died.
        """
        last = self.acknowledged + deltas
        # The moment of death is the fault that is injected; nothing waits for it.
        late_s = late * median(self.took_s)
        killer = threading.Timer(late_s, daemon.signal, [signal.SIGKILL])
        try:
            with daemon.control() as client:
                while True:
                    if self.acknowledged == last:
                        killer.start()
                    begun_s = time.perf_counter()
                    revision = apply(client, self.acknowledged + 1)
                    self.took_s.append(time.perf_counter() - begun_s)
                    assert revision == self.acknowledged + 2
                    self.acknowledged += 1
        except Refused as refused:
            if refused.exit_code != Exit.UNREACHABLE:  # anything but the death of the process
                raise
        killer.join()


def check(daemon: Daemon, stream: Stream) -> None:
    """Every acknowledged delta, at most one more, and both halves of it."""
    answer = daemon.infer()
    made = answer["revision"] - 1
    assert stream.acknowledged <= made <= stream.acknowledged + 1
    assert answer["a"] == answer["b"] == [made, made]
    stream.settled += made - stream.acknowledged


def kill_in_a_stream(
    kills: int, seed: int, folder: Path, model_argv: list[str], zygote: Zygote
) -> None:
    """Start it, check what it recovered, send deltas, kill it; `kills` times over one state."""
    chance = random.Random(seed)
    stream = Stream()
    for _ in range(kills):
        with running(folder, model_argv, zygote) as daemon:
            check(daemon.until("READY=1"), stream)
            stream.run(daemon, chance.randint(0, DELTAS_MAX), chance.uniform(0, LATE_MAX))
            assert daemon.wait() == -signal.SIGKILL
    assert stream.acknowledged >= kills * DELTAS_MAX // 4
    assert stream.settled > 0  # some were durable and never answered: the case that matters
    with running(folder, model_argv, zygote) as daemon:
        check(daemon.until("READY=1"), stream)


def test_a_hundred_kills_in_a_stream_of_deltas_lose_nothing_and_halve_nothing(
    folder: Path, model_argv: list[str], zygote: Zygote
) -> None:
    kill_in_a_stream(KILLS, SEED, folder, model_argv, zygote)


@pytest.mark.soak
def test_thousands_of_kills_in_a_stream_of_deltas_lose_nothing_and_halve_nothing(
    folder: Path, model_argv: list[str], zygote: Zygote
) -> None:
    kill_in_a_stream(SOAK_KILLS, SEED + 2, folder, model_argv, zygote)


def test_kills_while_the_journal_is_recovered_lose_nothing(
    folder: Path, model_argv: list[str], zygote: Zygote
) -> None:
    chance = random.Random(SEED + 1)
    with running(folder, model_argv, zygote) as daemon, daemon.until("READY=1").control() as client:
        for number in range(1, 41):
            apply(client, number)
        daemon.signal(signal.SIGKILL)
    for _ in range(20):
        with running(folder, model_argv, zygote) as daemon:
            killer = threading.Timer(chance.uniform(0, 0.05), daemon.signal, [signal.SIGKILL])
            killer.start()
            killer.join()
            assert daemon.wait() == -signal.SIGKILL
    with running(folder, model_argv, zygote) as daemon:
        assert daemon.until("READY=1").infer() == {"a": [40, 40], "b": [40, 40], "revision": 41}


# The disk fails its syncs once the file is there; what is above os.fsync is the real thing.
FAILING_DISK = """
import errno
sync = os.fsync
def failing(fd):
    if os.path.exists({trigger!r}):
        raise OSError(errno.EIO, "Input/output error")
    sync(fd)
os.fsync = failing
"""


def test_a_failed_sync_ends_the_service_and_what_was_acknowledged_stays(
    folder: Path, model_argv: list[str], zygote: Zygote
) -> None:
    trigger = folder / "disk-fails"
    before = FAILING_DISK.format(trigger=str(trigger))
    with running(folder, model_argv, zygote, BEFORE=before) as daemon:
        with daemon.until("READY=1").control() as client:
            assert apply(client, 1) == 2
            trigger.touch()
            with pytest.raises(Refused) as refused:
                apply(client, 2)
            assert refused.value.body["code"] == "state.failed"
        assert daemon.wait() == 74
        daemon.log.text()
        assert daemon.log.events("daemon.failed")[0]["exit_code"] == 74
    trigger.unlink()
    with running(folder, model_argv, zygote) as daemon:
        assert daemon.until("READY=1").infer() == {"a": [1, 1], "b": [1, 1], "revision": 2}


def test_an_id_sent_again_answers_as_the_first_time_and_with_other_content_is_refused(
    folder: Path, model_argv: list[str], zygote: Zygote
) -> None:
    with running(folder, model_argv, zygote) as daemon, daemon.until("READY=1").control() as client:
        assert apply(client, 1) == 2
        daemon.signal(signal.SIGKILL)
        daemon.wait()
    with running(folder, model_argv, zygote) as daemon, daemon.until("READY=1").control() as client:
        assert [apply(client, 1), apply(client, 2), apply(client, 1)] == [2, 3, 2]
        assert daemon.infer()["a"] == [2, 2]
        other = '{"delta": 1, "id": "d1", "edits": [{"put_constant": {"name": "a", "data": [5.0, 5.0]}}]}'
        with pytest.raises(Refused) as refused:
            client.ask("apply", {"document": other, "format": "json"})
        assert refused.value.body["code"] == "delta.duplicate_id"
        assert daemon.infer()["revision"] == 3
