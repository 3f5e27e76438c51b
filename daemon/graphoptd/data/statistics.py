"""What one model has served, in the terms of the statistics extension.

Counts are honest: they cover the model since it was loaded, over all its revisions (a revision may
live for milliseconds); nothing that is not measured is reported. `queue` is the time in our own
queue; `compute_infer` runs from the hand-over to the engine until its answer, its thread queue
included. There is no response cache, so no cache figures.
"""

import time
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Executions:
    """Successful runs of the engine on one batch size, and where their time went."""

    count: int = 0
    input_ns: int = 0
    infer_ns: int = 0
    output_ns: int = 0


@dataclass(slots=True)
class ModelStatistics:
    """Counters of one model.

    Attributes:
        answered: requests that succeeded; `total_ns` to `output_ns` are theirs.
        failed: requests that did not.
        rows: in the answered requests; the protocol calls each an inference.
        executions: successful runs of the engine.
        batches_retried: batches that failed and whose members ran again, each alone.
        last_unix_ms: when the last request was answered, 0 before the first.
        by_rows: executions by batch size.
    """

    answered: int = 0
    total_ns: int = 0
    queue_ns: int = 0
    input_ns: int = 0
    infer_ns: int = 0
    output_ns: int = 0
    failed: int = 0
    failed_ns: int = 0
    rows: int = 0
    executions: int = 0
    batches_retried: int = 0
    last_unix_ms: int = 0
    by_rows: dict[int, Executions] = field(default_factory=dict)

    def add_success(
        self, rows: int, total_ns: int, queue_ns: int, input_ns: int, infer_ns: int, output_ns: int
    ) -> None:
        """Count one answered request."""
        self.answered += 1
        self.rows += rows
        self.total_ns += total_ns
        self.queue_ns += queue_ns
        self.input_ns += input_ns
        self.infer_ns += infer_ns
        self.output_ns += output_ns
        self.last_unix_ms = time.time_ns() // 1_000_000

    def add_failure(self, total_ns: int) -> None:
        """Count one refused or failed request."""
        self.failed += 1
        self.failed_ns += total_ns

    def add_execution(self, rows: int, input_ns: int, infer_ns: int, output_ns: int) -> None:
        """Count one successful run of the engine, on `rows` rows."""
        self.executions += 1
        same = self.by_rows.get(rows)
        if same is None:
            if len(self.by_rows) >= _BATCH_SIZES_MAX:
                return
            same = self.by_rows[rows] = Executions()
        same.count += 1
        same.input_ns += input_ns
        same.infer_ns += infer_ns
        same.output_ns += output_ns

    def as_json(self, name: str, revision: int) -> dict[str, Any]:
        """One entry of `model_stats`."""
        return {
            "name": name,
            "version": str(revision),
            "last_inference": self.last_unix_ms,
            "inference_count": self.rows,
            "execution_count": self.executions,
            "inference_stats": {
                "success": _stage(self.answered, self.total_ns),
                "fail": _stage(self.failed, self.failed_ns),
                "queue": _stage(self.answered, self.queue_ns),
                "compute_input": _stage(self.answered, self.input_ns),
                "compute_infer": _stage(self.answered, self.infer_ns),
                "compute_output": _stage(self.answered, self.output_ns),
            },
            "batch_stats": [
                {
                    "batch_size": rows,
                    "compute_input": _stage(runs.count, runs.input_ns),
                    "compute_infer": _stage(runs.count, runs.infer_ns),
                    "compute_output": _stage(runs.count, runs.output_ns),
                }
                for rows, runs in sorted(self.by_rows.items())
            ],
        }


_BATCH_SIZES_MAX = 256  # clients choose their batches' sizes; further ones count in the total only


def _stage(count: int, total_ns: int) -> dict[str, int]:
    return {"count": count, "ns": total_ns}
