"""One job at a time: build a region, load what was written, prove it on values of real requests.

An artifact that leaves here was loaded and run in this process before the serving one ever sees it
(law 5). Whatever a backend raises is the candidate's fault and its answer's reason.
"""

import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import wait
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import torch

from graphopt.analysis.blocks import CONTEXT, START
from graphopt.analysis.facts import Facts
from graphopt.analysis.regions import Region
from graphopt.builder.boundaries import Boundaries
from graphopt.builder.models import Version
from graphopt.builder.records import (
    BUILD,
    DONE,
    FUSED,
    LOAD,
    QUARANTINED,
    RAN,
    UNSUPPORTED,
    VERIFY,
    Answer,
    finite,
    quarantine_key,
)
from graphopt.errors import GraphoptError
from graphopt.executor.backend import (
    Backend,
    BackendMissingError,
    Options,
    backends,
    options_of,
    passes_of,
)
from graphopt.executor.backends.trials import Trial
from graphopt.executor.build import bind_run, weight_key
from graphopt.executor.fused import FusedBuilder
from graphopt.executor.plan import Step
from graphopt.executor.runs import eager_run, run_region
from graphopt.executor.samples import Sample
from graphopt.executor.threads import keep_thread_count, run_beside
from graphopt.executor.verify import answers_of, verify_step
from graphopt.rewrite import PassStep, lower

UNSUPPORTED_NAMED_MAX = 64  # nodes with reasons in one answer

Announce = Callable[[Region, str, str], None]
"""Called with region, weight key and version before anything of a backend runs."""
Watch = Callable[[str], None]
"""Called with the name of each stage when it begins."""


@dataclass(frozen=True, slots=True)
class _Proof:
    """What a candidate is compared with."""

    reference: Step
    samples: list[Sample]
    is_made_up: bool
    expected: list[tuple[Any, ...]]


class _FailedError(Exception):
    """Ends a job; `answer` says at which stage and why."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.reason)
        self.answer = answer


class Workshop:
    """Builds and verifies; keeps boundary values between jobs."""

    def __init__(self, clock: Callable[[], float], cpu_clock: Callable[[], float]) -> None:
        self._clock, self._cpu_clock = clock, cpu_clock
        self._fused = FusedBuilder()
        self.boundaries = Boundaries()
        self.quarantined: dict[str, str] = {}  # key -> evidence

    def build(
        self,
        version: Version,
        job: Mapping[str, Any],
        files: tuple[Path, ...],
        announce: Announce,
        watch: Watch,
    ) -> Answer:
        """Builds `job` for a backend into its folder, loads it and verifies it.

        The folder is as it was, or gone, when the answer is not ok.
        """
        folder, options = Path(job["folder"]), options_of(job["options"])

        def run(region: Region, weights: str, start_cpu_s: float) -> Answer:
            facts = version.facts
            backend, runtime = _backend(job["backend"], facts, region)
            self._check_quarantine(region, job["backend"], runtime, options)
            announce(region, weights, runtime)
            _take_folder(folder)
            blocks, sizes = tuple(job["blocks"]), _sizes(region, options)
            proof = run_beside(
                "graphopt-builder-proof", lambda: self._proof_of(version, blocks, files, sizes)
            )
            steps: tuple[PassStep, ...] = ()
            try:
                watch(BUILD)
                start_s = self._clock()
                lowered = _guard(BUILD, lambda: lower(facts, region, passes_of(backend)))
                steps = lowered.steps
                _guard(
                    BUILD,
                    lambda: backend.build(lowered.facts, lowered.region, options, folder),
                )
                build_s = self._clock() - start_s
                size = sum(each.stat().st_size for each in folder.rglob("*") if each.is_file())
                watch(LOAD)
                constants = tuple(facts.graph.constants[name].tensor for name in region.consts)
                loaded = _guard(LOAD, lambda: backend.load(folder, constants, options))
                watch(VERIFY)
                function = _telling(loaded.function, lambda: watch(RAN))
                step = bind_run(facts, blocks, region, backend.name, function, ())
                answer = _verify(version, step, _guard(VERIFY, proof.result))
            except _FailedError as failed:
                wait([proof])  # what it keeps is the next job's to use
                answer, build_s, size, loaded = failed.answer, None, None, None
            if not answer.ok:
                shutil.rmtree(folder, ignore_errors=True)
            return replace(
                answer, version=runtime, build_s=build_s,
                cpu_s=self._cpu_clock() - start_cpu_s, artifact_bytes=size,
                resident_bytes=loaded.resident_bytes if loaded is not None else None,
                rewrites=_edits(steps),
                converted=tuple(Counter(loaded.converted).items()) if loaded is not None else (),
            )  # fmt: skip

        return self._judged(version, job, run)

    def verify_fused(
        self,
        version: Version,
        job: Mapping[str, Any],
        files: tuple[Path, ...],
        announce: Announce,
        watch: Watch,
    ) -> Answer:
        """Verifies the `fused` step of a run: the serving process makes the same one by itself."""
        blocks = tuple(job["blocks"])

        def run(region: Region, weights: str, start_cpu_s: float) -> Answer:
            self._check_quarantine(region, FUSED, torch.__version__, Options())
            announce(region, weights, torch.__version__)
            watch(BUILD)
            step = _guard(BUILD, lambda: self._fused.prepare_run(version.facts, blocks))
            if step is None:
                _fail(UNSUPPORTED, self._fused.why_run(version.facts, blocks))
            watch(VERIFY)
            proof = _guard(VERIFY, lambda: self._proof_of(version, blocks, files, {}))
            answer = _verify(version, step, proof)
            return replace(answer, version=torch.__version__, cpu_s=self._cpu_clock() - start_cpu_s)

        return self._judged(version, job, run)

    def _judged(
        self, version: Version, job: Mapping[str, Any], run: Callable[[Region, str, float], Answer]
    ) -> Answer:
        """The answer of `run`, or of the failure that ended it, with the region it is about."""
        start_cpu_s = self._cpu_clock()
        region_key = weights = ""
        try:
            check_run(version.facts, tuple(job["blocks"]))
            region = run_region(version.facts, tuple(job["blocks"]))
            region_key, weights = region.key, weight_key(version.facts.graph, region)
            answer = run(region, weights, start_cpu_s)
        except _FailedError as failed:
            answer = failed.answer
        return replace(answer, region_key=region_key, weight_key=weights, revision=version.revision)

    def propose(self, version: Version, document: Mapping[str, Any]) -> Mapping[str, Any]:
        """What the planner would have built. Raises what the planner raises.

        Without a forecast where that fails, as somebody's cost model may: `fault` then says why.
        """
        # Loaded when it is first asked for: a builder that only builds starts without it
        planner = import_module("graphopt.planner")
        forecast, fault = None, {}
        try:
            forecast = planner.foresee(version.facts, document, version.standing)
        except Exception as error:
            fault = {"fault": f"{type(error).__name__}: {error}"}
        version.standing = (forecast, ()) if forecast is not None else None
        proposal: dict[str, Any] = planner.propose(version.facts, document, forecast=forecast)
        return proposal | fault

    def evidence(self, trial: Trial) -> str | None:
        """Why something that a backend is about to try is banned."""
        return self.quarantined.get(
            quarantine_key(trial.subject, trial.backend, trial.version, Options().document())
        )

    def _check_quarantine(
        self, region: Region, backend: str, version: str, options: Options
    ) -> None:
        key = quarantine_key(region.key, backend, version, options.document())
        evidence = self.quarantined.get(key)
        if evidence is not None:
            raise _FailedError(Answer(False, QUARANTINED, evidence, version=version))

    def _proof_of(
        self,
        version: Version,
        blocks: tuple[str, ...],
        files: tuple[Path, ...],
        sizes: Mapping[str, int],
    ) -> _Proof:
        """Needs no candidate: it is made while one is built."""
        keep_thread_count(1)
        reference = eager_run(version.facts, blocks)
        samples, is_made_up = self.boundaries.samples(
            version, blocks[0], reference.reads, files, sizes
        )
        return _Proof(reference, samples, is_made_up, answers_of(reference, samples))


def _verify(version: Version, step: Step, proof: _Proof) -> Answer:
    verdict = verify_step(
        version.facts, step.block, step, proof.reference, proof.samples, proof.expected
    )
    return Answer(
        verdict.ok, DONE if verdict.ok else VERIFY, verdict.reason,
        max_error=finite(verdict.max_error), allowed=finite(verdict.allowed),
        n_samples=verdict.n_samples, is_made_up=proof.is_made_up,
    )  # fmt: skip


def register(extra: tuple[str, ...]) -> None:
    """Adds backends named `module:Class` to the registered ones: to try one before it is packaged.

    Raises ImportError or AttributeError when there is no such class.
    """
    for name in extra:
        module, _, attribute = name.partition(":")
        backend: Backend = getattr(import_module(module), attribute)()
        backends()[backend.name] = backend


def check_run(facts: Facts, run: tuple[str, ...]) -> None:
    """Refuses blocks that do not exist or do not follow each other."""
    after = facts.blocks.next
    pairs = [(START if a == CONTEXT else a, b) for a, b in pairwise(run)]
    if not run or any(block not in facts.regions for block in run):
        _fail(UNSUPPORTED, f"no such blocks: {', '.join(run)}")
    if any(after.get(a) != b for a, b in pairs):
        _fail(UNSUPPORTED, f"blocks do not follow each other: {', '.join(run)}")


def is_same_region(old: Facts, new: Facts, run: tuple[str, ...]) -> bool:
    """Whether `run` is the same region of the same weights in both."""
    try:
        check_run(new, run)
    except _FailedError:
        return False
    before, after = run_region(old, run), run_region(new, run)
    return before.key == after.key and weight_key(old.graph, before) == weight_key(new.graph, after)


def _backend(name: str, facts: Facts, region: Region) -> tuple[Backend, str]:
    """The backend and its version, once it says that it can run the region."""
    backend = backends().get(name)
    if backend is None:
        _fail(UNSUPPORTED, f"no backend {name!r}; there are {', '.join(backends()) or 'none'}")
    try:
        version = backend.version()
    except BackendMissingError as missing:
        _fail(UNSUPPORTED, str(missing))
    nodes = _guard(UNSUPPORTED, lambda: backend.unsupported(facts, region))
    if nodes:
        pairs = tuple(nodes.items())[:UNSUPPORTED_NAMED_MAX]
        reason = f"{name} cannot run {len(nodes)} nodes, first {pairs[0][0]}: {pairs[0][1]}"
        raise _FailedError(Answer(False, UNSUPPORTED, reason, version=version, unsupported=pairs))
    return backend, version


def _telling(function: Callable[..., Any], tell: Callable[[], None]) -> Callable[..., Any]:
    """`function`, which tells when it has run for the first time."""
    has_run = False

    def run(*args: Any) -> Any:
        nonlocal has_run
        result = function(*args)
        if not has_run:
            has_run = True
            tell()
        return result

    return run


def _edits(steps: tuple[PassStep, ...]) -> tuple[tuple[str, int], ...]:
    totals: Counter[str] = Counter()
    for step in steps:
        totals[step.name] += step.edits
    return tuple((name, count) for name, count in totals.items() if count)


def _take_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            _fail(BUILD, f"{folder.name}: the folder is not empty; name a fresh one")
    except OSError as error:
        _fail(BUILD, f"{folder.name}: {error.strerror}")


def _sizes(region: Region, options: Options) -> dict[str, int]:
    return dict(zip(region.symbols, options.sizes or (), strict=False))


def _guard(stage: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except _FailedError:
        raise
    except (Exception, SystemExit) as error:  # whatever a runtime raises costs one candidate
        known = isinstance(error, GraphoptError)
        _fail(stage, str(error) if known else f"{type(error).__name__}: {error}")


def _fail(stage: str, reason: str) -> NoReturn:
    raise _FailedError(Answer(False, stage, reason))
