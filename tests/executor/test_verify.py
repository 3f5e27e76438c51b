"""What `verify_step` accepts and what it refuses, and the inputs it is fed with."""

from dataclasses import replace

import pytest
import torch
from fused_graphs import graph_of, verdicts
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.analysis.facts import Facts, analyse
from graphopt.executor import verify
from graphopt.executor.build import EagerBuilder, build_plan
from graphopt.executor.plan import Step, run_plan
from graphopt.executor.verify import (
    Sample,
    Verdict,
    capture_boundaries,
    sample_inputs,
    verify_step,
)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


def layer(rows: str = "4") -> tuple[Facts, str, Step, Sample]:
    graph = graph_of(
        [("fc", "linear.default", "$x", "@w", "@b"), ("sum", "add.Tensor", "$fc", "$x")],
        {"x": f"f32[{rows}, 64]"},
        {"w": torch.randn(64, 64), "b": torch.randn(64)},
        ["sum"],
        ["batch"] if rows == "batch" else [],
    )
    facts = analyse(graph)
    step = EagerBuilder()(facts, "sum")
    return facts, "sum", step, Sample((torch.randn(4, 64),), {"batch": 4})


def judged(function) -> Verdict:
    facts, block, step, sample = layer()
    return verify_step(facts, block, replace(step, function=function), step, [sample])


def right(x, w, b):
    return torch.nn.functional.linear(x, w, b) + x


def test_the_same_function_passes():
    verdict = judged(right)
    assert verdict.ok
    assert verdict.reason == ""
    assert verdict.max_error == 0 < verdict.allowed  # it is the eager function
    assert verdict.n_samples == 1


def test_the_judge_is_asked_where_the_eager_run_does_not_settle_it(monkeypatch: pytest.MonkeyPatch):
    asked: list[Sample] = []
    make = verify._double_function

    def watched(facts: Facts, reference: Step):
        judge = make(facts, reference)
        return lambda sample: asked.append(sample) or judge(sample)

    monkeypatch.setattr(verify, "_double_function", watched)
    assert judged(right).ok
    assert not asked
    assert not judged(lambda x, w, b: right(x, w, b) * (1 + 3e-5)).ok
    assert len(asked) == 1


@given(st.floats(-7.5, -4.5), st.integers(0, 1000))
def test_what_the_eager_run_settles_the_judge_would_pass(exponent: float, seed: int):
    signs = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)).sign()

    def disturbed(x, w, b):
        exact = right(x, w, b)
        return exact + exact.abs().max() * 10**exponent * signs

    torch.manual_seed(seed)
    verdict = judged(disturbed)
    torch.manual_seed(seed)  # the same weights and inputs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "_from_eager", lambda *_: (float("inf"), 0.0))
        strict = judged(disturbed)
    assert verdict.ok == strict.ok
    if exponent > -5:
        assert not verdict.ok
    if exponent < -7:
        assert verdict.ok


def test_another_order_of_the_sums_passes():
    def blocked(x, w, b):
        return x + b + x[:, :32] @ w[:, :32].t() + x[:, 32:] @ w[:, 32:].t()

    assert judged(blocked).ok


@pytest.mark.parametrize("fault", [1e-3, 3e-5])
def test_a_small_systematic_error_is_refused_with_its_size(fault: float):
    verdict = judged(lambda x, w, b: right(x, w, b) * (1 + fault))
    assert not verdict.ok
    assert verdict.max_error > verdict.allowed > 0
    assert "error" in verdict.reason


def test_one_wrong_element_is_refused():
    def wrong(x, w, b):
        out = right(x, w, b)
        out[2, 5] += 0.01
        return out

    assert "error" in judged(wrong).reason


def test_writing_into_an_input_is_refused_though_the_answer_is_right():
    def mutating(x, w, b):
        out = right(x, w, b)
        x.add_(0.0)
        x[0, 0] = 7.0
        return out

    assert "writes into its input x" in judged(mutating).reason


def test_writing_into_a_constant_is_refused():
    def mutating(x, w, b):
        b.add_(0.0)
        return right(x, w, b)

    assert "constant" in judged(mutating).reason


def test_an_answer_that_changes_is_refused():
    calls = []

    def drifting(x, w, b):
        calls.append(1)
        return right(x, w, b) + 1e-7 * len(calls)

    assert "differently" in judged(drifting).reason


def test_an_accumulating_output_buffer_is_refused():
    buffer = torch.zeros(4, 64)

    def accumulating(x, w, b):
        return buffer.add_(right(x, w, b))

    assert "differently" in judged(accumulating).reason


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda y: y.double(), "float64"),
        (lambda y: y[:2], "[2, 64]"),
        (lambda y: y / 0, "not finite"),
    ],
)
def test_other_dtypes_shapes_and_infinities_are_refused(fault, words: str):
    assert words in judged(lambda x, w, b: fault(right(x, w, b))).reason


def test_a_candidate_that_raises_costs_a_verdict_and_not_the_process():
    def broken(x, w, b):
        raise RuntimeError("no such kernel")

    assert "no such kernel" in judged(broken).reason


def test_a_fault_on_one_side_of_a_choice_by_size_is_found_at_any_size():
    def function(x, w, b):
        return right(x, w, b)

    function.variants = (lambda x, w, b: right(x, w, b) * 1.5,)
    assert "error" in judged(function).reason


def test_nothing_to_compare_on_is_no_proof():
    facts, block, step, _ = layer()
    assert not verify_step(facts, block, step, step, []).ok


def test_a_step_of_other_blocks_is_no_candidate():
    facts, block, step, sample = layer()
    other = replace(step, writes=("fc",))
    assert "read and write" in verify_step(facts, block, other, step, [sample]).reason


def test_where_the_reference_is_infinite_the_candidate_may_differ():
    facts, block, step, sample = layer()
    reads = (sample.reads[0].index_fill(0, torch.tensor([1]), float("inf")),)
    assert verify_step(facts, block, step, step, [Sample(reads, {"batch": 4})]).ok


def test_integer_results_must_be_equal():
    graph = graph_of(
        [("r", "round.default", "$x"), ("i", "_to_copy.default", "$r", {"dtype": "i64"})],
        {"x": "f32[8]"},
        {},
        ["i"],
    )
    facts = analyse(graph)
    step = EagerBuilder()(facts, "i")
    sample = Sample((torch.arange(8.0),), {})
    assert verify_step(facts, "i", step, step, [sample]).ok
    off = replace(step, function=lambda *args: step.function(*args) + 1)
    assert "int64" in verify_step(facts, "i", off, step, [sample]).reason


def test_a_region_with_half_precision_inside_is_judged_by_the_eager_run():
    graph = graph_of(
        [
            ("half", "_to_copy.default", "$x", {"dtype": "bf16"}),
            ("back", "_to_copy.default", "$half", {"dtype": "f32"}),
            ("sum", "add.Tensor", "$back", "$x"),
        ],
        {"x": "f32[64]"},
        {},
        ["sum"],
    )
    facts = analyse(graph)
    step = EagerBuilder()(facts, "sum")
    sample = Sample((torch.randn(64),), {})
    assert verify_step(facts, "sum", step, step, [sample]).ok
    exact = replace(step, function=lambda x: x + x)
    assert not verify_step(facts, "sum", exact, step, [sample]).ok


def test_made_up_inputs_fit_masks_tables_and_ranges():
    graph = graph_of(
        [
            ("shifted", "add.Tensor", "$ids", 2),
            ("seen", "embedding.default", "@table", "$shifted"),
            ("mask4", "unsqueeze.default", "$mask", -1),
            ("out", "mul.Tensor", "$seen", "$mask4"),
            ("kept", "index_select.default", "@table", 0, "$picks"),
        ],
        {"ids": "i64[batch, seq]", "mask": "i64[batch, seq]", "picks": "i64[5]"},
        {"table": torch.randn(500, 4)},
        ["out", "kept"],
        ["batch", "seq"],
    )
    facts = analyse(graph)
    inputs = sample_inputs(facts)
    assert inputs["ids"].shape == inputs["mask"].shape
    assert set(inputs["mask"].unique().tolist()) <= {0, 1}
    assert bool((inputs["mask"][:, 0] == 1).all())
    assert all(
        torch.equal(a, b)
        for a, b in zip(inputs.values(), sample_inputs(facts).values(), strict=True)
    )
    assert sample_inputs(facts, {"batch": 3})["ids"].shape[0] == 3
    run_plan(build_plan(facts, 1, EagerBuilder()), inputs)


def test_captured_boundaries_are_what_each_step_reads():
    facts, block, _, _ = layer("batch")
    plan = build_plan(facts, 1, EagerBuilder())
    inputs = {"x": torch.randn(3, 64)}
    found = capture_boundaries(plan, plan.steps, inputs, {block, "unknown"})
    assert set(found) == {block}
    assert found[block].reads[0] is inputs["x"]
    assert found[block].symbols == {"batch": 3}


@settings(max_examples=30, deadline=None)
@given(
    st.permutations(range(3)),
    st.sampled_from([(6, 4, 5), (1, 4, 5), (6, 1, 1)]),
    st.booleans(),
    st.integers(0, 3),
)
def test_samples_of_any_layout_are_copied_as_they_lie(order, shape, is_expanded, offset):
    base = torch.randn(shape[0] * shape[1] * shape[2] + offset)[offset:].view(shape)
    x = base.permute(order)
    if is_expanded:
        x = x[:1].expand(3, *x.shape[1:])
    seen = []
    graph = graph_of(
        [("y", "relu.default", "$x")], {"x": f"f32[{', '.join(map(str, x.shape))}]"}, {}, ["y"]
    )
    facts = analyse(graph)
    step = EagerBuilder()(facts, "y")

    def spying(value):
        seen.append((value.stride(), value.data_ptr()))
        return torch.relu(value)

    assert verify_step(facts, "y", replace(step, function=spying), step, [Sample((x,), {})]).ok
    assert {stride for stride, _ in seen} == {x.stride()}
    assert all(pointer != x.data_ptr() for _, pointer in seen)


def test_a_graph_without_fusions_has_no_verdicts():
    graph = graph_of([("y", "relu.default", "$x")], {"x": "f32[4]"}, {}, ["y"])
    assert verdicts(analyse(graph)) == {}
