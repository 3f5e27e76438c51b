"""Every pattern of the fused tier against the eager one."""

import gc

import pytest
import torch
from fused_graphs import assert_equal_to_eager, fused_plan, fused_steps, graph_of, verdicts
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.analysis.facts import Facts, analyse, update
from graphopt.constants import constant_of
from graphopt.draft import Draft
from graphopt.executor.build import EagerBuilder, build_plan, replan
from graphopt.executor.fused import FusedBuilder
from graphopt.executor.plan import Step, run_plan
from graphopt.executor.runs import run_of
from graphopt.graph import Const, Graph, Ref
from graphopt.nodes import make_node


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


def kernel_objects(steps: list[Step]) -> list[object]:
    return [s.function.__globals__[n] for s in steps for n in s.function.__code__.co_names
            if n in s.function.__globals__]  # fmt: skip


PACKED = torch.ops.mkldnn._linear_pointwise.default._op
PACKED_BINARY = torch.ops.mkldnn._linear_pointwise.binary._op

UNARIES = {
    "relu": ("relu.default", "$fc"),
    "gelu": ("gelu.default", "$fc"),
    "gelu_tanh": ("gelu.default", "$fc", {"approximate": "tanh"}),
    "silu": ("silu.default", "$fc"),
    "tanh": ("tanh.default", "$fc"),
    "sigmoid": ("sigmoid.default", "$fc"),
    "hardtanh": ("hardtanh.default", "$fc", -0.5, 2.0),
    "relu6": ("relu6.default", "$fc"),
    "clamp": ("clamp.default", "$fc", -1, 3),
    "hardswish": ("hardswish.default", "$fc"),
    "hardsigmoid": ("hardsigmoid.default", "$fc"),
    "leaky_relu": ("leaky_relu.default", "$fc", 0.2),
}


def weights(*shapes: tuple[int, ...], names: str = "wbcdef") -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) for name, shape in zip(names, shapes, strict=False)}


def linear_then(row, rows: int = 128, symbols=()) -> Graph:
    first = symbols[0] if symbols else rows
    return graph_of(
        [("fc", "linear.default", "$x", "@w", "@b"), ("act", *row)],
        {"x": f"f32[{first}, 256]"},
        weights((256, 256), (256,)),
        ["act"],
        symbols,
    )


@pytest.mark.parametrize("name", UNARIES)
def test_a_linear_takes_in_each_activation(name: str):
    plan = assert_equal_to_eager(linear_then(UNARIES[name]), {"x": torch.randn(128, 256)})
    assert [len(step.blocks) for step in plan.steps] == [2]
    assert kernel_objects(plan.steps) == [PACKED]


@pytest.mark.parametrize("op", ["add", "mul"])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_linear_takes_in_a_second_operand(op: str, is_first: bool):
    args = ("$fc", "$x") if is_first else ("$x", "$fc")
    graph = graph_of(
        [("fc", "linear.default", "$x", "@w", "@b"), ("sum", f"{op}.Tensor", *args)],
        {"x": "f32[3, 100, 256]"},
        weights((256, 256), (256,)),
        ["sum"],
    )
    plan = assert_equal_to_eager(graph, {"x": torch.randn(3, 100, 256)})
    assert kernel_objects(plan.steps) == [PACKED_BINARY]


def test_an_operand_that_must_be_broadcast_is_not_taken_in():
    graph = graph_of(
        [
            ("fc", "linear.default", "$x", "@w", "@b"),
            ("mean", "mean.dim", "$x", [-1], True),
            ("sum", "add.Tensor", "$fc", "$mean"),
        ],
        {"x": "f32[64, 512]"},
        weights((512, 512), (512,)),
        ["sum"],
    )
    plan = assert_equal_to_eager(graph, {"x": torch.randn(64, 512)})
    assert PACKED in kernel_objects(plan.steps)
    assert PACKED_BINARY not in kernel_objects(plan.steps)


def test_alpha_keeps_an_addition_outside():
    graph = graph_of(
        [
            ("fc", "linear.default", "$x", "@w", "@b"),
            ("sum", "add.Tensor", "$fc", "$x", {"alpha": 2}),
        ],
        {"x": "f32[64, 512]"},
        weights((512, 512), (512,)),
        ["sum"],
    )
    plan = assert_equal_to_eager(graph, {"x": torch.randn(64, 512)})
    assert PACKED_BINARY not in kernel_objects(plan.steps)


def test_a_value_read_twice_or_handed_out_does_not_disappear():
    rows = [("fc", "linear.default", "$x", "@w", "@b"), ("act", "relu.default", "$fc"),
            ("sum", "add.Tensor", "$fc", "$act")]  # fmt: skip
    for outputs in (["sum"], ["sum", "fc"], ["act", "fc"]):
        graph = graph_of(rows, {"x": "f32[64, 512]"}, weights((512, 512), (512,)), outputs)
        assert_equal_to_eager(graph, {"x": torch.randn(64, 512)})


def test_conv1d_of_gpt2_loses_its_views_and_its_written_out_gelu():
    act = [
        ("half", "mul.Tensor", "$up", 0.5),
        ("cube", "pow.Tensor_Scalar", "$up", 3.0),
        ("scaled", "mul.Tensor", "$cube", 0.044715),
        ("inner", "add.Tensor", "$up", "$scaled"),
        ("root", "mul.Tensor", "$inner", 0.7978845608028654),
        ("tanh", "tanh.default", "$root"),
        ("one", "add.Tensor", "$tanh", 1.0),
        ("gelu", "mul.Tensor", "$half", "$one"),
    ]
    graph = graph_of(
        [
            ("flat", "view.default", "$x", [-1, 256]),
            ("mm", "addmm.default", "@b", "$flat", "@w"),
            ("up", "view.default", "$mm", [2, 32, 256]),
            *act,
            ("sum", "add.Tensor", "$x", "$gelu"),
        ],
        {"x": "f32[2, 32, 256]"},
        weights((256, 256), (256,)),
        ["sum"],
    )
    plan = assert_equal_to_eager(graph, {"x": torch.randn(2, 32, 256)})
    assert kernel_objects(plan.steps) == [PACKED, torch.add]


def conv_graph(
    channels: int, out: int, kernel: int, size: int, *, groups: int = 1, stride: int = 1,
    norm: bool = True, act: str = "relu", residual: bool = False, pad: tuple[int, ...] = (),
    bias: bool = False, padding: int | None = None,
) -> Graph:  # fmt: skip
    """A convolution with what usually surrounds it."""
    padding = (kernel // 2 if not pad else 0) if padding is None else padding
    rows, here = [], "$x"
    if pad:
        rows.append(("pad", "pad.default", here, list(pad), "constant", 0.0))
        here = "$pad"
    rows.append(("conv", "conv2d.default", here, "@w", "@b" if bias else None, [stride, stride],
                 [padding, padding], [1, 1], groups))  # fmt: skip
    here = "$conv"
    if norm:
        rows.append(
            ("bn", "batch_norm.default", here, "@g", "@h", "@m", "@v", False, 0.1, 1e-5, True)
        )
        here = "$bn"
    if residual:
        rows.append(("sum", "add.Tensor", here, "$x"))
        here = "$sum"
    if act:
        rows.append(("act", f"{act}.default", here, *((0.0, 6.0) if act == "hardtanh" else ())))
        here = "$act"
    constants = {"w": torch.randn(out, channels // groups, kernel, kernel)}
    constants |= {name: torch.randn(out) for name in "bghm"} | {"v": torch.rand(out) + 0.1}
    used = {a[1:] for row in rows for a in row if isinstance(a, str) and a[:1] == "@"}
    return graph_of(
        rows, {"x": f"f32[batch, {channels}, {size}, {size}]"}, {n: constants[n] for n in used},
        [here[1:]], ["batch"], frozenset("mv"),
    )  # fmt: skip


CONVOLUTIONS = {
    "plain": {"channels": 8, "out": 16, "kernel": 3, "size": 14},
    "bias": {"channels": 8, "out": 16, "kernel": 3, "size": 14, "bias": True},
    "stride": {"channels": 3, "out": 16, "kernel": 7, "size": 33, "stride": 2},
    "pointwise": {"channels": 32, "out": 8, "kernel": 1, "size": 9},
    "depthwise": {
        "channels": 24,
        "out": 24,
        "kernel": 3,
        "size": 15,
        "groups": 24,
        "act": "hardtanh",
    },
    "grouped": {"channels": 12, "out": 24, "kernel": 3, "size": 10, "groups": 3, "act": "silu"},
    "residual": {"channels": 16, "out": 16, "kernel": 3, "size": 12, "residual": True},
    "residual_bare": {
        "channels": 16,
        "out": 16,
        "kernel": 3,
        "size": 12,
        "residual": True,
        "act": "",
    },
    "residual_gelu": {
        "channels": 16,
        "out": 16,
        "kernel": 3,
        "size": 12,
        "residual": True,
        "act": "gelu",
    },
    "padded": {"channels": 8, "out": 16, "kernel": 3, "size": 14, "pad": (1, 1, 1, 1)},
    "padded_by_none": {"channels": 8, "out": 16, "kernel": 1, "size": 14, "pad": (0, 0, 0, 0)},
    "padded_unevenly": {
        "channels": 8,
        "out": 16,
        "kernel": 3,
        "size": 14,
        "pad": (0, 1, 0, 1),
        "stride": 2,
    },
    "padded_twice": {
        "channels": 8,
        "out": 16,
        "kernel": 3,
        "size": 14,
        "pad": (2, 2, 1, 1),
        "padding": 1,
    },
    "no_norm": {"channels": 32, "out": 64, "kernel": 3, "size": 28, "norm": False, "bias": True},
    "one_pixel": {"channels": 8, "out": 16, "kernel": 1, "size": 1},
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_takes_in_its_neighbours(name: str):
    given = CONVOLUTIONS[name]
    graph = conv_graph(**given)
    for batch in (1, 3):
        x = torch.randn(batch, given["channels"], given["size"], given["size"])
        for image in (x, x.contiguous(memory_format=torch.channels_last), x.mT):
            assert_equal_to_eager(graph, {"x": image})


def test_pad_convolution_norm_and_activation_are_one_step_of_one_call():
    plan = fused_plan(analyse(conv_graph(8, 16, 3, 14, pad=(1, 1, 1, 1))))
    (step,) = plan.steps
    assert step.blocks == ("pad", "conv", "bn", "act")
    conv = torch.ops.mkldnn._convolution_pointwise.default._op
    assert [k for k in kernel_objects([step]) if callable(k)] == [conv]


def test_batch_norm_of_vectors_is_one_multiply_add():
    graph = graph_of(
        [("bn", "batch_norm.default", "$x", "@g", None, "@m", "@v", False, 0.1, 1e-5, True)],
        {"x": "f32[batch, 64]"},
        {"g": torch.randn(64), "m": torch.randn(64), "v": torch.rand(64) + 0.1},
        ["bn"],
        ["batch"],
        frozenset("mv"),
    )
    plan = assert_equal_to_eager(graph, {"x": torch.randn(5, 64)})
    assert kernel_objects(plan.steps) == [torch.addcmul]


def adapted(n_adapters: int, style: str, rank: int = 4) -> Graph:
    """A linear with adapters as the macro writes them."""
    rows = [("fc", "linear.default", "$x", "@w", "@b")]
    constants = {"w": torch.randn(256, 256) / 16, "b": torch.randn(256)}
    here = "$fc"
    for i in range(n_adapters):
        a, b = f"a{i}", f"b{i}"
        constants |= {a: torch.randn(rank, 256) / 16, b: torch.randn(256, rank)}
        rows += [
            (f"down{i}", "linear.default", "$x", f"@{a}"),
            (f"up{i}", "linear.default", f"$down{i}", f"@{b}"),
        ]
        branch, keywords = f"$up{i}", {}
        if style.startswith("mul"):
            rows.append((f"scaled{i}", style, branch, 0.5 + i))
            branch = f"$scaled{i}"
        elif style == "alpha":
            keywords = {"alpha": 0.5 + i}
        rows.append((f"out{i}", "add.Tensor", here, branch, keywords))
        here = f"$out{i}"
    rows.append(("act", "gelu.default", here))
    return graph_of(rows, {"x": "f32[batch, 256]"}, constants, ["act"], ["batch"])


@pytest.mark.parametrize("style", ["mul.Tensor", "mul.Scalar", "alpha", "bare"])
@pytest.mark.parametrize("n_adapters", [1, 3])
def test_adapters_fold_into_one_weight(style: str, n_adapters: int):
    graph = adapted(n_adapters, style)
    for rows in (1, 70):
        plan = assert_equal_to_eager(graph, {"x": torch.randn(rows, 256)})
        assert kernel_objects(plan.steps) == [PACKED]


def test_folding_rounds_once():
    graph = adapted(2, "mul.Tensor")
    facts = analyse(graph)
    (step,) = fused_steps(facts)
    c = {name: constant.tensor.double() for name, constant in graph.constants.items()}
    exact = c["w"] + 0.5 * c["b0"] @ c["a0"] + 1.5 * c["b1"] @ c["a1"]
    assert torch.equal(step.constants[-1].to_dense(), exact.float())


def test_an_adapter_of_another_input_is_not_folded():
    graph = graph_of(
        [
            ("other", "relu.default", "$x"),
            ("fc", "linear.default", "$x", "@w", "@b"),
            ("down", "linear.default", "$other", "@c"),
            ("up", "linear.default", "$down", "@d"),
            ("out", "add.Tensor", "$fc", "$up"),
        ],
        {"x": "f32[64, 512]"},
        weights((512, 512), (512,), (4, 512), (512, 4)),
        ["out"],
    )
    assert_equal_to_eager(graph, {"x": torch.randn(64, 512)})


def test_small_linears_keep_the_ordinary_kernel():
    graph = graph_of(
        [("fc", "linear.default", "$x", "@w", "@b")],
        {"x": "f32[8, 32]"},
        weights((32, 32), (32,)),
        ["fc"],
    )
    facts, builder = analyse(graph), FusedBuilder()
    assert builder.prepare(facts, "fc") is None
    assert builder.why(facts, "fc") == "too small for oneDNN's call"


def test_other_dtypes_are_declined_with_a_reason():
    graph = graph_of(
        [("fc", "linear.default", "$x", "@w", "@b")],
        {"x": "f64[64, 512]"},
        {"w": torch.randn(512, 512).double(), "b": torch.randn(512).double()},
        ["fc"],
    )
    facts, builder = analyse(graph), FusedBuilder()
    assert builder.prepare(facts, "fc") is None
    assert "nothing" in builder.why(facts, "fc")


def test_rows_of_the_request_decide_where_they_are_dynamic():
    graph = linear_then(UNARIES["relu"], symbols=["batch"])
    facts = analyse(graph)
    plan = fused_plan(facts)
    (step,) = plan.steps
    assert set(kernel_objects([step])) >= {PACKED, torch._C._nn.linear}
    eager = build_plan(facts, 1, EagerBuilder())
    few, many = torch.randn(2, 256), torch.randn(128, 256)
    assert torch.equal(run_plan(plan, {"x": few})["act"], run_plan(eager, {"x": few})["act"])
    for verdict in verdicts(facts).values():
        assert verdict.ok
    torch.testing.assert_close(
        run_plan(plan, {"x": many})["act"], run_plan(eager, {"x": many})["act"], rtol=0, atol=1e-3
    )


def test_packs_are_shared_by_content_and_freed_with_the_last_step():
    builder = FusedBuilder()
    facts = analyse(linear_then(UNARIES["relu"]))
    run = run_of(facts, "act")
    first, second = builder.prepare_run(facts, run), builder.prepare_run(facts, run)
    assert first is not None
    assert second is not None
    assert first.function is second.function
    assert first.constants[-1] is second.constants[-1]
    assert len(builder.packs) == 1
    del first
    gc.collect()
    assert len(builder.packs) == 1
    del second
    gc.collect()
    assert len(builder.packs) == 0


def test_equal_regions_share_code_but_not_weights():
    def layer(i: int, x: str):
        return [
            (f"fc{i}", "linear.default", x, f"@w{i}", f"@b{i}"),
            (f"sum{i}", "add.Tensor", f"$fc{i}", x),
        ]

    constants = {}
    for i in range(2):
        constants |= {f"w{i}": torch.randn(512, 512) / 20, f"b{i}": torch.randn(512)}
    graph = graph_of(
        [*layer(0, "$x"), *layer(1, "$sum0")], {"x": "f32[64, 512]"}, constants, ["sum1"]
    )
    first, second = fused_plan(analyse(graph)).steps
    assert first.function is second.function
    assert first.constants[-1] is not second.constants[-1]
    assert_equal_to_eager(graph, {"x": torch.randn(64, 512)})


def test_a_channels_last_result_is_not_given_to_an_op_that_reads_strides():
    graph = conv_graph(8, 16, 3, 14)
    draft = Draft(graph)
    draft.add_node(make_node("raw", "aten.as_strided.default", [Ref("act"), [4, 4], [4, 1]]))
    draft.set_outputs((("raw", Ref("raw")),))
    facts, builder = analyse(draft.finish()), FusedBuilder()
    run = run_of(facts, "act")
    assert builder.prepare_run(facts, run) is None
    assert "raw" in builder.why_run(facts, run)


# -- runs in plans


def chain() -> tuple[Graph, Facts]:
    rows = [("fc0", "linear.default", "$x", "@w0", "@b0"), ("act0", "relu.default", "$fc0"),
            ("fc1", "linear.default", "$act0", "@w1", "@b1"), ("act1", "relu.default", "$fc1"),
            ("fc2", "linear.default", "$act1", "@w2", "@b2")]  # fmt: skip
    constants = {f"w{i}": torch.randn(512, 512) / 20 for i in range(3)}
    constants |= {f"b{i}": torch.randn(512) for i in range(3)}
    graph = graph_of(rows, {"x": "f32[64, 512]"}, constants, ["fc2"])
    return graph, analyse(graph)


EDITS = {
    "weight": lambda d: d.put_constant("w1", constant_of(torch.randn(512, 512), is_param=True)),
    "insert_inside": lambda d: (
        d.add_node(make_node("new", "aten.tanh.default", [Ref("fc1")])),
        d.replace_node(make_node("act1", "aten.relu.default", [Ref("new")])),
    ),
    "tap": lambda d: d.set_outputs((("fc2", Ref("fc2")), ("fc1", Ref("fc1")))),
    "second_reader": lambda d: (
        d.add_node(make_node("twice", "aten.add.Tensor", [Ref("act1"), Ref("fc1")])),
        d.replace_node(
            make_node("fc2", "aten.linear.default", [Ref("twice"), Const("w2"), Const("b2")])
        ),
    ),
    "remove_activation": lambda d: (
        d.replace_node(
            make_node("fc2", "aten.linear.default", [Ref("fc1"), Const("w2"), Const("b2")])
        ),
        d.remove_node("act1"),
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_inside_a_run_dissolves_it_and_leaves_the_others(edit: str):
    graph, facts = chain()
    plan = fused_plan(facts)
    assert [step.blocks for step in plan.steps] == [("fc0", "act0"), ("fc1", "act1"), ("fc2",)]
    draft = Draft(graph)
    EDITS[edit](draft)
    new = draft.finish()
    change = update(facts, new, draft.change(new))
    after, _ = replan(plan, change, 2, EagerBuilder())
    assert after.steps[0] is plan.steps[0]
    scratch = build_plan(analyse(new), 2, EagerBuilder())
    covered = [block for step in after.steps for block in step.blocks]
    assert covered == [step.block for step in scratch.steps]
    assert all(
        step.tier == "eager"
        for step in after.steps
        if len(step.blocks) == 1 and step.block in ("fc1", "act1")
    )
    x = {"x": torch.randn(64, 512)}
    got, want = run_plan(after, x), run_plan(scratch, x)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=1e-3)


def test_replanning_can_make_runs_at_once_and_matches_from_scratch():
    graph, facts = chain()
    builder, eager = FusedBuilder(), EagerBuilder()

    def make(f: Facts, block: str) -> Step:
        run = run_of(f, block)
        return (builder.prepare_run(f, run) if run[0] == block else None) or eager(f, block)

    plan = build_plan(facts, 1, eager)
    draft = Draft(graph)
    EDITS["weight"](draft)
    new = draft.finish()
    after, _ = replan(plan, update(facts, new, draft.change(new)), 2, make)
    covered = [block for step in after.steps for block in step.blocks]
    assert covered == ["fc0", "act0", "fc1", "act1", "fc2"]
    assert ("fc1", "act1") in [step.blocks for step in after.steps]
    assert after.digest == sum(step.digest for step in after.steps)


# -- random chains


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_random_chains_equal_eager(data: st.DataObject):
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    width = data.draw(st.sampled_from([8, 96, 320]))
    rows, values, constants = [], ["$x"], {}
    for i in range(data.draw(st.integers(2, 7))):
        here = data.draw(st.sampled_from(values[-2:]))
        match data.draw(st.sampled_from(["linear", "addmm", "unary", "add", "mul", "scale"])):
            case "linear":
                constants |= {
                    f"w{i}": torch.randn(width, width) / width**0.5,
                    f"b{i}": torch.randn(width),
                }
                bias = data.draw(st.sampled_from([f"@b{i}", None]))
                rows.append((f"n{i}", "linear.default", here, f"@w{i}", bias))
            case "addmm":
                constants |= {
                    f"w{i}": torch.randn(width, width) / width**0.5,
                    f"b{i}": torch.randn(width),
                }
                rows.append((f"n{i}", "addmm.default", f"@b{i}", here, f"@w{i}"))
            case "unary":
                op, _, *args = UNARIES[data.draw(st.sampled_from(sorted(UNARIES)))]
                rows.append((f"n{i}", op, here, *args))
            case "scale":
                rows.append((f"n{i}", "mul.Tensor", here, 0.5))
            case op:
                rows.append((f"n{i}", f"{op}.Tensor", here, data.draw(st.sampled_from(values))))
        values.append(f"$n{i}")
    outputs = sorted({values[-1][1:], data.draw(st.sampled_from(values[1:]))[1:]})
    used = {a[1:] for row in rows for a in row if isinstance(a, str) and a[:1] == "@"}
    size = data.draw(st.sampled_from(["batch", "96"]))
    graph = graph_of(
        rows, {"x": f"f32[{size}, {width}]"}, {n: constants[n] for n in used}, outputs,
        ["batch"] if size == "batch" else [],
    )  # fmt: skip
    facts = analyse(graph)
    for block, verdict in verdicts(facts).items():
        assert verdict.ok, (block, verdict, str(graph))
    x = {"x": torch.randn(96, width)}
    got, want = run_plan(fused_plan(facts), x), run_plan(build_plan(facts, 1, EagerBuilder()), x)
    for name, value in want.items():
        scale = max(1.0, float(value.abs().max()))
        torch.testing.assert_close(got[name], value, rtol=0, atol=2e-4 * scale)
