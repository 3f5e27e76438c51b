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
class Stage:
    """How often something happened and how long it took in all."""

    count: int = 0
    total_ns: int = 0

    def add(self, duration_ns: int) -> None:
        """Count one more."""
        self.count += 1
        self.total_ns += duration_ns

    def as_json(self) -> dict[str, int]:
        """In the protocol's words."""
        return {"count": self.count, "ns": self.total_ns}


@dataclass(slots=True)
class BatchStages:
    """Executions of one batch size."""

    compute_input: Stage = field(default_factory=Stage)
    compute_infer: Stage = field(default_factory=Stage)
    compute_output: Stage = field(default_factory=Stage)


@dataclass(slots=True)
class ModelStatistics:
    """Counters of one model: stages count requests, `rows` rows, `executions` runs of the engine."""

    rows: int = 0
    executions: int = 0
    batches_retried: int = 0
    last_unix_ms: int = 0
    success: Stage = field(default_factory=Stage)
    fail: Stage = field(default_factory=Stage)
    queue: Stage = field(default_factory=Stage)
    compute_input: Stage = field(default_factory=Stage)
    compute_infer: Stage = field(default_factory=Stage)
    compute_output: Stage = field(default_factory=Stage)
    by_batch_size: dict[int, BatchStages] = field(default_factory=dict)

    def add_success(
        self, rows: int, total_ns: int, queue_ns: int, input_ns: int, infer_ns: int, output_ns: int
    ) -> None:
        """Count one answered request."""
        self.rows += rows
        self.success.add(total_ns)
        self.queue.add(queue_ns)
        self.compute_input.add(input_ns)
        self.compute_infer.add(infer_ns)
        self.compute_output.add(output_ns)
        self.last_unix_ms = time.time_ns() // 1_000_000

    def add_execution(self, rows: int, input_ns: int, infer_ns: int, output_ns: int) -> None:
        """Count one successful run of the engine, on `rows` rows."""
        self.executions += 1
        stages = self.by_batch_size.get(rows)
        if stages is None:
            if len(self.by_batch_size) >= _BATCH_SIZES_MAX:
                return
            stages = self.by_batch_size[rows] = BatchStages()
        stages.compute_input.add(input_ns)
        stages.compute_infer.add(infer_ns)
        stages.compute_output.add(output_ns)

    def as_json(self, name: str, revision: int) -> dict[str, Any]:
        """One entry of `model_stats`."""
        stages = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")
        return {
            "name": name,
            "version": str(revision),
            "last_inference": self.last_unix_ms,
            "inference_count": self.rows,
            "execution_count": self.executions,
            "inference_stats": {stage: getattr(self, stage).as_json() for stage in stages},
            "batch_stats": [
                {
                    "batch_size": size,
                    "compute_input": stages.compute_input.as_json(),
                    "compute_infer": stages.compute_infer.as_json(),
                    "compute_output": stages.compute_output.as_json(),
                }
                for size, stages in sorted(self.by_batch_size.items())
            ],
        }


_BATCH_SIZES_MAX = 256  # clients choose their batches' sizes; further ones count in the total only
