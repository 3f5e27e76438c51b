"""Proof that a candidate step computes what the eager step computes.

The judge is the same region run in float64 (constants and inputs cast up, float32 casts inside it
too): the candidate's error against it may be 4 times that of the eager float32 run plus 1e-6 of the
output's scale, so a region that is ill-conditioned by nature allows more and a well-conditioned one
less. A candidate within 1e-6 of the scale of the eager run itself is within its bound of the judge
too, by the triangle inequality; the judge, which takes longest, is not asked then. A region that
cannot run in float64 (half precision inside, an op without a double kernel) is compared with the
eager run under a stated tolerance. Where a candidate chooses kernels by the size of the request,
both sides of every choice are run.

Deliberately absent: speed, and any proof for sizes at which a kernel would behave differently for
other reasons than its own choice.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from graphopt.analysis.facts import Facts
from graphopt.executor.codegen import Function, compile_source, eager_source
from graphopt.executor.plan import Step
from graphopt.executor.runs import run_region
from graphopt.executor.samples import Sample, capture_boundaries, sample_inputs

__all__ = ["Sample", "Verdict", "capture_boundaries", "sample_inputs", "verify_step"]

EAGER_ERROR_FACTOR = 4.0  # a blocked or fused sum rounds in another order, rarely four times worse
SCALE_FRACTION = 1e-6  # about 8 units in the last place of the largest output
# Of the output's scale, where there is no float64 run: float32 sums of 1e4 terms stay well within.
UNJUDGED_FRACTION = 1e-4
_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a candidate may stand for the reference; errors are those of the worst output, against
    float64 or, where that was close enough, against the eager run.
    """

    ok: bool
    reason: str  # empty when ok
    max_error: float
    allowed: float
    n_samples: int


class _RefusedError(Exception):
    """A fault that ends the comparison; its text is the verdict's reason."""

    def __init__(self, reason: str, max_error: float = float("nan"), allowed: float = 0.0) -> None:
        super().__init__(reason)
        self.max_error, self.allowed = max_error, allowed


@torch.no_grad()
def answers_of(reference: Step, samples: Iterable[Sample]) -> list[tuple[Any, ...]]:
    """What the eager step answers to each sample: for a proof whose candidate is still being built."""
    return [_outputs(reference.function, reference, each.reads, each) for each in samples]


@torch.no_grad()
def verify_step(
    facts: Facts,
    block: str,
    candidate: Step,
    reference: Step,
    samples: Sequence[Sample],
    expected: Sequence[tuple[Any, ...]] | None = None,
) -> Verdict:
    """Compares `candidate` with `reference`, the eager step of the same block or run of blocks.

    Args:
        facts: of the graph that both steps were made for.
        block: the block's name, for the reason.
        candidate: runs once or more on copies of every sample.
        reference: as made by `EagerBuilder` or `eager_run`.
        samples: what crosses into the block in real or made-up requests; at least one.
        expected: `answers_of` them, where that is known already.

    A candidate that raises, writes into an input or a constant, answers differently when asked
    again, or differs in dtype, shape, finiteness or value beyond the tolerance is refused.
    """
    if not samples:
        return Verdict(False, f"{block}: nothing to compare on", float("nan"), 0.0, 0)
    if (candidate.reads, candidate.writes) != (reference.reads, reference.writes):
        reason = f"{block}: it does not read and write what {', '.join(reference.blocks)} does"
        return Verdict(False, reason, float("nan"), 0.0, 0)
    judge = cache(partial(_double_function, facts, reference))  # most candidates do without
    functions = (candidate.function, *getattr(candidate.function, "variants", ()))
    worst, allowed = 0.0, 0.0
    try:
        for i, sample in enumerate(samples):
            eager = expected[i] if expected is not None else answers_of(reference, [sample])[0]
            exact: tuple[Any, ...] | None = None
            for function in functions:
                given = _run_twice(function, candidate, sample)
                error, bound = _compare(given, eager, _from_eager)
                if error > bound:
                    if exact is None and (in_double := judge()) is not None:
                        exact = in_double(sample)
                    error, bound = _compare(given, eager, _from_exact(exact))
                if error > bound:
                    text = f"{block}: error {error:.3g} where {bound:.3g} is allowed"
                    raise _RefusedError(text, error, bound)
                if _ratio(error, bound) >= _ratio(worst, allowed):
                    worst, allowed = error, bound
    except _RefusedError as refused:
        text = str(refused)
        reason = text if text.startswith(block) else f"{block}: {text}"
        return Verdict(False, reason, refused.max_error, refused.allowed, len(samples))
    return Verdict(True, "", worst, allowed, len(samples))


# -- running


def _outputs(
    function: Function, step: Step, reads: Iterable[Any], sample: Sample, constants: Any = None
) -> tuple[Any, ...]:
    symbols = [sample.symbols[name] for name in step.symbols]
    out = function(*reads, *(step.constants if constants is None else constants), *symbols)
    return (out,) if len(step.writes) == 1 else tuple(out)


def _run_twice(function: Function, step: Step, sample: Sample) -> tuple[Any, ...]:
    """The outputs of a candidate on private copies of the sample, which must stay as they were."""
    reads = [_copy(read) for read in sample.reads]
    versions = [_version(value) for value in step.constants]
    try:
        first = tuple(_copy(value) for value in _outputs(function, step, reads, sample))
        again = _outputs(function, step, reads, sample)
    except Exception as error:  # whatever a kernel raises, it costs nobody a request here
        raise _RefusedError(f"it raised {type(error).__name__}: {error}") from error
    for i, (given, kept) in enumerate(zip(reads, sample.reads, strict=True)):
        if not _same_bytes(given, kept):
            raise _RefusedError(f"it writes into its input {step.reads[i]}")
    if versions != [_version(value) for value in step.constants]:
        raise _RefusedError("it writes into a constant")
    if not all(_same_bytes(a, b) for a, b in zip(first, again, strict=True)):
        raise _RefusedError("it answers differently when asked again")
    return first


def _double_function(facts: Facts, reference: Step) -> Callable[[Sample], Any] | None:
    """The region in float64, or None where it holds half-precision casts."""
    source = eager_source(run_region(facts, reference.blocks), facts)
    if any(value in _HALVES for value in source.names.values() if isinstance(value, torch.dtype)):
        return None
    names = {
        name: torch.float64 if value is torch.float32 else value
        for name, value in source.names.items()
    }
    function = compile_source(source.text(), names, f"double {reference.key[:12]}")
    constants = tuple(_double(value) for value in reference.constants)

    def run(sample: Sample) -> tuple[Any, ...] | None:
        try:
            reads = [_double(read) for read in sample.reads]
            return _outputs(function, reference, reads, sample, constants)
        except (RuntimeError, TypeError):  # no kernel for float64, or dtypes that do not meet
            return None

    return run


# -- comparing


Errors = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], tuple[float, float]]
"""Of an output: position, the candidate's, eager's, and where that is finite; error and bound."""


def _compare(
    given: tuple[Any, ...], expected: tuple[Any, ...], errors: Errors
) -> tuple[float, float]:
    """The error and the allowed error of the output that uses up most of what it is allowed."""
    worst, allowed = 0.0, 0.0
    if len(given) != len(expected):
        raise _RefusedError(f"it yields {len(given)} values and not {len(expected)}")
    for i, (new, old) in enumerate(zip(given, expected, strict=True)):
        _check_kind(i, new, old)
        if not isinstance(new, torch.Tensor):
            continue
        if not old.is_floating_point():
            if not torch.equal(new, old):
                raise _RefusedError(f"output {i} differs, and it is {old.dtype}", float("inf"), 0.0)
            continue
        finite = torch.isfinite(old)
        if not bool(torch.isfinite(new)[finite].all()):
            raise _RefusedError(f"output {i} is not finite where it should be", float("inf"), 0.0)
        error, bound = errors(i, new, old, finite) if bool(finite.any()) else (0.0, 0.0)
        if _ratio(error, bound) >= _ratio(worst, allowed):
            worst, allowed = error, bound
    return worst, allowed


def _from_eager(
    _: int, new: torch.Tensor, old: torch.Tensor, finite: torch.Tensor
) -> tuple[float, float]:
    if old.dtype is not torch.float32:
        return math.inf, 0.0
    return _peak(new[finite] - old[finite]), SCALE_FRACTION * _peak(old[finite])


def _from_exact(exact: tuple[Any, ...] | None) -> Errors:
    """Against the region in float64; where there is none, against the eager run more generously."""

    def errors(
        i: int, new: torch.Tensor, old: torch.Tensor, finite: torch.Tensor
    ) -> tuple[float, float]:
        judge = exact[i] if exact is not None else None
        if judge is None or judge.dtype != torch.float64:
            scale = _peak(old[finite])
            return _peak(new[finite].double() - old[finite].double()), UNJUDGED_FRACTION * scale
        finite = finite & torch.isfinite(judge)
        truth = judge[finite]
        eager_error = _peak(old[finite].double() - truth)
        bound = EAGER_ERROR_FACTOR * eager_error + SCALE_FRACTION * _peak(truth)
        return _peak(new[finite].double() - truth), bound

    return errors


def _check_kind(i: int, new: Any, old: Any) -> None:
    if not isinstance(old, torch.Tensor) or not isinstance(new, torch.Tensor):
        if type(new) is not type(old) or (not isinstance(old, tuple | list) and new != old):
            raise _RefusedError(f"output {i} is {new!r} and not {old!r}")
        return
    if (new.dtype, new.shape) != (old.dtype, old.shape):
        wanted = f"{old.dtype}{list(old.shape)}"
        raise _RefusedError(f"output {i} is {new.dtype}{list(new.shape)} and not {wanted}")


def _peak(values: torch.Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def _ratio(error: float, bound: float) -> float:
    return error / bound if bound else (float("inf") if error else 0.0)


def _copy(value: Any) -> Any:
    """A copy that lies in memory as the original does, whatever its strides."""
    if not isinstance(value, torch.Tensor) or value.is_mkldnn:
        return value
    offset, shape, strides = value.storage_offset(), value.shape, value.stride()
    storage = value.untyped_storage().clone()  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=value.dtype).set_(storage, offset, shape, strides)


def _double(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
        return value.double()
    return value


def _same_bytes(a: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return bool(a == b)
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    left, right = a.contiguous().view(-1), b.contiguous().view(-1)
    return torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def _version(value: Any) -> int:
    """How often a tensor was written to; packs of oneDNN do not count."""
    return value._version if isinstance(value, torch.Tensor) else 0
