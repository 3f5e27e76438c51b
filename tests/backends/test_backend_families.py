"""Imported model families on both runtimes: whole, block by block, and at sizes they were not built for."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from regions_built import lowered_and_built

from frontend import zoo
from graphopt.analysis.facts import Facts, analyse
from graphopt.executor.backend import Options, backends
from graphopt.executor.build import EagerBuilder, bind_run, build_plan
from graphopt.executor.plan import Step
from graphopt.executor.runs import eager_run, run_region
from graphopt.executor.samples import capture_boundaries, sample_inputs
from graphopt.executor.verify import Sample, verify_step
from graphopt.frontend.torch_export import from_torch

NAMES = ("openvino", "onnxruntime")
# With its mask as an input, and without: then transformers makes one of the positions.
FAMILIES = (*zoo.FAMILIES, "bert alone", "gpt2 alone", "llama alone")


pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def imported(family: str) -> Facts:
    name = family.removesuffix(" alone")
    module, inputs = zoo.build(name), zoo.inputs(name, 2, 8)
    if hasattr(module.config, "use_cache"):
        module.config.use_cache = False
    if family != name:
        del inputs["attention_mask"]
    is_text = "input_ids" in inputs
    dynamic: Any = {key: {0: "batch", 1: "seq"} for key in inputs} if is_text else "batch"
    return analyse(from_torch(module, inputs, dynamic, name))


def every_block(facts: Facts) -> tuple[str, ...]:
    context = ("$context",) if "$context" in facts.regions else ()
    return (*context, *(block.exit for block in facts.blocks))


def samples_at(facts: Facts, batch: int, seq: int) -> dict[str, Sample]:
    blocks = every_block(facts)
    plan = build_plan(facts, 1, EagerBuilder())
    steps = [eager_run(facts, (block,)) for block in blocks]
    inputs = sample_inputs(facts, {"batch": batch, "seq": seq}, seed=batch)
    return capture_boundaries(plan, steps, inputs, set(blocks))


def candidate(
    name: str, facts: Facts, run: tuple[str, ...], options: Options, folder: Path
) -> Step:
    backend, region = backends()[name], run_region(facts, run)
    assert backend.unsupported(facts, region) == {}
    loaded = lowered_and_built(backend, facts, region, options, folder)
    return bind_run(facts, run, region, name, loaded.function, ())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", ["bert", "vit", "resnet", "gpt2 alone", "llama"])
def test_a_whole_family_is_proven_at_sizes_it_was_not_built_for(
    name: str, family: str, tmp_path: Path
) -> None:
    facts = imported(family)
    run = every_block(facts)
    step, reference = (
        candidate(name, facts, run, Options(), tmp_path / "any"),
        eager_run(facts, run),
    )
    samples = []
    for batch, seq in ((1, 3), (2, 16)):
        inputs = sample_inputs(facts, {"batch": batch, "seq": seq}, seed=seq)
        reads = tuple(inputs[key] for key in step.reads)
        samples.append(Sample(reads, {"batch": batch, "seq": seq}))
    verdict = verify_step(facts, run[-1], step, reference, samples)
    assert verdict.ok, verdict


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_family_of_fixed_sizes_is_proven(name: str, family: str, tmp_path: Path) -> None:
    facts = imported(family)
    run = every_block(facts)
    sizes = {"batch": 2, "seq": 7}
    fixed = tuple(sizes[symbol] for symbol in run_region(facts, run).symbols)
    step = candidate(name, facts, run, Options(sizes=fixed), tmp_path / "fixed")
    inputs = sample_inputs(facts, sizes, seed=1)
    sample = Sample(tuple(inputs[key] for key in step.reads), sizes)
    verdict = verify_step(facts, run[-1], step, eager_run(facts, run), [sample])
    assert verdict.ok, verdict


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", ["bert alone", "vit", "resnet", "gpt2", "llama alone"])
def test_every_block_of_a_family_is_proven(name: str, family: str, tmp_path: Path) -> None:
    facts = imported(family)
    rounds = [samples_at(facts, batch, seq) for batch, seq in ((1, 3), (2, 9))]
    seen: set[str] = set()
    for position, block in enumerate(every_block(facts)):
        region = facts.regions[block]
        if region.key in seen:
            continue
        seen.add(region.key)
        step = candidate(name, facts, (block,), Options(), tmp_path / str(position))
        samples = [sample[block] for sample in rounds]
        verdict = verify_step(facts, block, step, eager_run(facts, (block,)), samples)
        assert verdict.ok, verdict
