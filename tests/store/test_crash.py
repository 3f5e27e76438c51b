"""Killed processes, failing and full disks: acked rows are there; others wholly or not at all.

GRAPHOPT_SOAK_KILLS and GRAPHOPT_SOAK_IMAGES set the numbers of a soak.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from graphopt.limits import DELTA_IDS_KEPT_MAX
from graphopt.store import LOAD, Entry, StateFolder

from .conftest import memory_folder

KILLS = 40
IMAGES = 500  # of the disk after a power loss
SOAK_KILLS = int(os.environ.get("GRAPHOPT_SOAK_KILLS", "5000"))
SOAK_IMAGES = int(os.environ.get("GRAPHOPT_SOAK_IMAGES", "50000"))

WRITER = """
import itertools, json, sys
from graphopt.store import *
ticks = itertools.count()
with StateFolder.open(sys.argv[1], wall_ns=lambda: next(ticks)) as folder:
    revision = max([r.revision for r in folder.journal.records()], default=0)
    print("open", flush=True)
    for revision in range(revision + 1, 10**9):
        body = json.dumps({"n": revision, "fill": "x" * (revision * 37 % 3000)})
        digests = [folder.blobs.put(b"graph %d" % revision)] if revision % 4 == 0 else []
        if revision % 12 == 0:
            folder.journal.append([Entry(SNAPSHOT, "m", revision - 1, body, tuple(digests))])
        folder.journal.append([Entry(DELTA, "m", revision, body, tuple(digests), f"id-{revision}")])
        print(revision, flush=True)
        if revision % 7 == 0:
            folder.journal.checkpoint()
        if revision % 24 == 0:
            folder.compact()
"""

FILLER = """
import resource, sys
from graphopt.errors import StateFailedError, StateFullError
from graphopt.store import *
folder = StateFolder.open(sys.argv[1], wall_ns=lambda: 0)
folder.journal.append([Entry(LOAD, "m", 0, "{}", (folder.blobs.put(b"base"),))])
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
try:
    folder.blobs.put([bytes(150_000)] * 2)
except StateFullError:
    print("blob refused", flush=True)
print(sorted(p.name for p in folder.path.joinpath("blobs").iterdir()), flush=True)
for revision in range(1, 1_000):
    try:
        folder.journal.append([Entry(DELTA, "m", revision, '"%s"' % ("x" * 5_000))])
    except StateFailedError as error:
        print("journal refused", flush=True)
        break
    print(revision, flush=True)
assert [r.revision for r in folder.journal.records()] == list(range(revision))
"""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def sweep(mode: str, *arguments: str) -> dict[str, dict[str, int]]:
    with memory_folder() as scratch:
        command = [sys.executable, "-m", "store.faults", mode, str(scratch / "run"), *arguments]
        ran = subprocess.run(
            command, env=environment(), capture_output=True, text=True, check=False
        )
    assert ran.returncode == 0, ran.stderr
    print(mode, ran.stdout.strip())
    found: dict[str, dict[str, int]] = json.loads(ran.stdout)
    return found


def test_killed_before_any_write_sync_or_rename_an_acked_row_is_never_lost() -> None:
    found = sweep("kill")
    assert found["struck"]["pwrite64"] > 50
    assert found["struck"]["fdatasync"] > 20
    assert found["struck"]["rename"] >= 5
    assert found["endings"]["closed"] == 1


def test_after_any_failed_sync_nothing_is_acked_any_more() -> None:
    """Five runs may end well: the one without a fault, two syncs at close when all was acked, and two
    syncs of the directory, whose result SQLite ignores and which the store repeats.
    """
    found = sweep("sync-error")
    assert found["struck"]["fsync"] > 10
    assert found["endings"]["failed"] > 30
    assert found["endings"]["closed"] <= 5


def test_a_disk_that_is_full_for_one_write_costs_one_retry() -> None:
    found = sweep("disk-full")
    assert found["struck"]["pwrite64"] > 50
    assert set(found["endings"]) == {"closed"}


def test_a_write_error_at_any_place_loses_nothing_that_was_acked() -> None:
    found = sweep("write-error")
    assert found["struck"]["write"] >= 5
    assert set(found["endings"]) <= {"closed", "failed", "failed to open"}


def lose_power(images: int) -> None:
    """Unsynced writes arrive by sectors in any choice, unsynced names in order but not all."""
    seed = random.randrange(2**32)
    found = sweep("power-loss", str(images), str(seed))
    assert found["images"] == images
    assert len(found["acked"]) > 10


def test_a_power_loss_at_any_moment_loses_no_acked_row() -> None:
    lose_power(IMAGES)


@pytest.mark.soak
def test_power_losses_by_the_ten_thousand_lose_no_acked_row() -> None:
    lose_power(SOAK_IMAGES)


def kill_again_and_again(kills: int) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    acked = 0
    with memory_folder() as path:
        with StateFolder.open(path, wall_ns=lambda: 0) as folder:
            folder.journal.append([Entry(LOAD, "m", 0, "{}", (folder.blobs.put(b"base"),))])
        for _ in range(kills):
            acked = max(acked, run_and_kill(path, rng.randrange(1, 60)))
            acked = last_revision(path, acked)


def test_sigkill_at_random_moments_loses_no_acked_row() -> None:
    kill_again_and_again(KILLS)


@pytest.mark.soak
def test_thousands_of_sigkills_lose_no_acked_row() -> None:
    kill_again_and_again(SOAK_KILLS)


def last_revision(path: Path, acked: int) -> int:
    """Recover, check that all of `acked` is there and at most one more, and return what is there."""
    with StateFolder.open(path, wall_ns=lambda: 0) as folder:
        lineage = folder.journal.lineages()["m"]
        found = [r.revision for r in lineage.increments]
        last = found[-1] if found else lineage.base.revision
        assert last in (acked, acked + 1)
        assert found == list(range(lineage.base.revision + 1, last + 1))
        for row in (lineage.base, *lineage.increments):
            for digest in row.blobs:
                folder.blobs.verify(digest)
        for revision in range(max(1, last + 1 - DELTA_IDS_KEPT_MAX), last + 1):
            assert folder.journal.find_delta("m", f"id-{revision}"), f"id of {revision} is lost"
    return last


def run_and_kill(path: Path, after_acks: int) -> int:
    """Kill the writer as soon as `after_acks` acks were read; returns the last ack."""
    command = [sys.executable, "-S", "-c", WRITER, str(path)]
    last = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as writer:
        assert writer.stdout is not None
        for count, line in enumerate(writer.stdout):
            if line != "open\n":
                last = int(line)
            if count == after_acks:
                writer.kill()
    assert writer.returncode == -9
    return last


def test_a_full_disk_leaves_no_half_blob_and_no_half_row(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", FILLER, str(tmp_path)],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    refused, blobs, *acked, last = ran.stdout.splitlines()
    assert (refused, last) == ("blob refused", "journal refused")
    assert "tmp" not in blobs
    with StateFolder.open(tmp_path, wall_ns=lambda: 0) as folder:
        found = [r.revision for r in folder.journal.records()]
    assert found[-1] in (len(acked), len(acked) + 1)
    assert found == list(range(len(found)))
