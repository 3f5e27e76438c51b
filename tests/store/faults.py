"""Runs the story under one kind of fault at every place, and prints what was found as JSON.

    python -m store.faults MODE SCRATCH [IMAGES SEED]

Each run is a forked child under the tracer; the state it leaves is opened here and compared with
what was acked.
"""

import errno
import itertools
import json
import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from graphopt.errors import StateError, StateFailedError, StateFullError
from graphopt.store import StateFolder

from .powerloss import record, write_image
from .story import Engine, Op, recovered, script, states_of
from .tracing import CALLS, SYNCS, WRITES, Fault, Outcome, traced

OPS = script(6)
EXPECTED = list(states_of(OPS))


def work(path: Path, ack: Callable[[str], None]) -> None:
    """Run the story, ack each operation. A full disk is tried again, a failed store is left."""
    ticks = itertools.count()
    for attempt in itertools.count():
        try:
            folder = StateFolder.open(path, wall_ns=lambda: next(ticks))
            break
        except StateFailedError:
            ack("failed to open")
            return
        except StateError:
            assert attempt < 3
            ack("open again")
    engine = Engine(folder)
    for op in OPS:
        if not _done(folder, engine, op, ack):
            return
        ack("op")
    folder.close()
    ack("closed")


def _done(folder: StateFolder, engine: Engine, op: Op, ack: Callable[[str], None]) -> bool:
    for _ in range(3):
        try:
            engine.apply(op)
        except StateFailedError:
            ack("failed")
            _refuses_everything(folder, engine)
            return False
        except StateFullError:
            ack("full")
        except StateError as error:
            ack(f"refused {type(error).__name__}: {error}")
        else:
            return True
    ack("given up")
    return False


def _refuses_everything(folder: StateFolder, engine: Engine) -> None:
    for attempt in (Op("load", "later", "x"), Op("checkpoint"), Op("compact")):
        try:
            engine.apply(attempt)
        except StateFailedError:
            continue
        raise AssertionError(f"{attempt.kind} was accepted after a failed sync")
    list(folder.journal.records())
    folder.close()


def check(path: Path, outcome: Outcome) -> None:
    """Every acked operation is there, at most the one in flight beside it, and the folder works."""
    acked = outcome.acks.count("op")
    with StateFolder.open(path, wall_ns=lambda: 0) as folder:
        found = recovered(folder)
        allowed = EXPECTED[acked : acked + 2]
        assert found in allowed, f"{outcome}: {found} is not in {allowed}"
        at = acked + allowed.index(found)
        for model, (_, tags) in found.items():
            for op in OPS[:at]:
                if op.kind == "delta" and op.model == model and op.tag in tags:
                    assert folder.journal.find_delta(model, f"id-{op.tag}"), op
        engine = Engine(folder)
        engine.apply(Op("load", "afterwards", "y"))
        folder.compact()
        named = {d for row in folder.journal.records() for d in row.blobs}
        assert {p.name for p in folder.blobs.path("0" * 64).parent.iterdir()} == named


def sweep(scratch: Path, calls: dict[int, str], error: int) -> dict[str, object]:
    """The fault at the first call, at the second one, ... until a run has fewer calls."""
    struck: Counter[str] = Counter()
    endings: Counter[str] = Counter()
    for at in itertools.count(1):
        path = scratch / "state"
        outcome = traced(lambda ack, path=path: work(path, ack), Fault(at, frozenset(calls), error))
        assert outcome.status in (0, 9), outcome
        check(path, outcome)
        shutil.rmtree(path)
        endings.update(set(outcome.acks[-1:]) if outcome.acks else {"nothing"})
        if not outcome.struck:
            return {"runs": at, "struck": struck, "endings": endings}
        struck[outcome.struck] += 1
        assert outcome.status == (0 if error else 9), outcome
    raise AssertionError


def power_losses(scratch: Path, images: int, seed: int) -> dict[str, object]:
    """Record one run, build `images` disks that a power loss may have left, and recover each."""
    rng = random.Random(seed)
    recording = record(lambda ack: work(scratch / "recorded", ack))
    found: Counter[int] = Counter()
    for _ in range(images):
        at = rng.randrange(len(recording.events) + 1)
        acks = write_image(recording.events[:at], scratch / "recorded", scratch / "state", rng)
        check(scratch / "state", Outcome(acks, f"power loss after event {at}, seed {seed}", 0))
        shutil.rmtree(scratch / "state")
        found[acks.count("op")] += 1
    return {"events": len(recording.events), "images": images, "acked": found}


def main() -> None:
    """MODE is kill, sync-error, disk-full, write-error or power-loss."""
    mode, scratch = sys.argv[1], Path(sys.argv[2])
    os.makedirs(scratch, exist_ok=True)
    found = {
        "kill": lambda: sweep(scratch, CALLS, 0),
        "sync-error": lambda: sweep(scratch, SYNCS, errno.EIO),
        "disk-full": lambda: sweep(scratch, WRITES, errno.ENOSPC),
        "write-error": lambda: sweep(scratch, WRITES, errno.EIO),
        "power-loss": lambda: power_losses(scratch, int(sys.argv[3]), int(sys.argv[4])),
    }[mode]()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
