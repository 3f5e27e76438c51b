"""Ops that no rule writes, by OpenVINO's own frontend: spliced in, tried, or declined with a reason."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from regions_built import built, call, differences, lowered_and_built, whole

from graphopt.analysis.facts import Facts, analyse
from graphopt.analysis.regions import build_region
from graphopt.constants import constant_of
from graphopt.dims import symbol
from graphopt.executor.backend import Backend, BuildError, Options, backends
from graphopt.executor.backends import openvino_frontend
from graphopt.executor.backends.conversion import check_exact
from graphopt.executor.backends.openvino import OpenVinoBackend
from graphopt.executor.backends.openvino_frontend import OpenVinoFrontend
from graphopt.executor.backends.openvino_target import OpenVinoTarget
from graphopt.executor.backends.target import DeclinedError, OpCall, Operand
from graphopt.executor.backends.translate import translate
from graphopt.graph import Const, Graph, Ref, Symbol
from graphopt.types import TensorType, parse_type
from helpers.graphs import Builder

pytestmark = pytest.mark.usefixtures("one_thread")
INPUTS = {
    "x": "f32[batch, 4, 6]",
    "image": "f32[batch, 4, 8, 6]",
    "i": "i64[batch, 4, 6]",
    "m": "bool[batch, 4, 6]",
}
BATCH = symbol("batch")


class Fresh(OpenVinoBackend):
    """With a frontend that nobody has asked yet."""

    def __init__(self) -> None:
        self.converter = OpenVinoFrontend()  # type: ignore[misc]


@pytest.fixture
def backend() -> Fresh:
    return Fresh()


def facts_of(b: Builder, *outputs: Ref) -> Facts:
    typed: list[Any] = [(name, parse_type(text)) for name, text in INPUTS.items()]
    used = {ref.id for node in b.nodes for ref in node.refs}
    inputs = [(name, type_) for name, type_ in typed if name in used]
    named = [(f"out{i}", ref) for i, ref in enumerate(outputs)]
    symbols = [Symbol("batch", 1, 64)]
    return analyse(Graph.build("few", b.nodes, inputs, named, b.constants, symbols=symbols))


def feeds(batch: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(batch)
    return {
        "x": torch.randn((batch, 4, 6), generator=random),
        "image": torch.randn((batch, 4, 8, 6), generator=random),
        "i": torch.randint(0, 4, (batch, 4, 6), generator=random),
    }


def converted_ops() -> Facts:
    """Ops without a rule between ops with one: several results, a list, an optional, a weight."""
    b = Builder()
    x = b.node("relu", "sin.default", Ref("x"))
    gated = b.node("gated", "glu.default", x, -1)
    top = b.node("top", "topk.default", x, 3)
    mean = b.node("mean", "var_mean.correction", x, (-1,), keepdim=True)
    einsum = b.node("einsum", "einsum.default", "bij,bkj->bik", (x, x))
    joined = b.node("joined", "add.Tensor", gated, b.node("top3", "mul.Tensor", top, mean))
    moved = b.node("moved", "add.Tensor", joined, Ref("mean", 1))
    finite = b.node("finite", "isfinite.default", einsum)
    picked = b.node("picked", "where.ScalarOther", finite, einsum, 0.0)
    wide = b.node("wide", "upsample_bilinear2d.vec", Ref("image"), None, False, (2.0, 2.0))
    kernel = b.weight("kernel", 4, 3, 2, 2)
    back = b.node("back", "conv_transpose2d.input", wide, kernel, None, (2, 2))
    most = b.node("most", "max.dim", b.node("cos", "cos.default", back), -1)
    return facts_of(b, moved, picked, b.node("last", "relu.default", most))


def test_converted_ops_in_the_middle_of_a_region_answer_as_eager_torch_at_every_size(
    backend: Fresh, tmp_path: Path
) -> None:
    facts = converted_ops()
    region = whole(facts)
    assert backend.unsupported(facts, region) == {}
    loaded = built(backend, facts, region, Options(), tmp_path / "any")
    for batch in (1, 5, 2):
        given = call(loaded, region, feeds(batch), {"batch": batch})
        assert differences(facts.graph, region, given, feeds(batch)) == []
    fixed = lowered_and_built(backend, facts, region, Options(sizes=(3,)), tmp_path / "fixed")
    given = call(fixed, region, feeds(3), {"batch": 3})
    assert differences(facts.graph, region, given, feeds(3)) == []


def test_an_artifact_says_which_ops_the_frontend_wrote(backend: Fresh, tmp_path: Path) -> None:
    facts = converted_ops()
    loaded = built(backend, facts, whole(facts), Options(), tmp_path / "a")
    assert Counter(loaded.converted) == Counter(
        f"aten.{op}"
        for op in (
            "glu.default", "topk.default", "var_mean.correction", "einsum.default",
            "isfinite.default", "upsample_bilinear2d.vec", "conv_transpose2d.input", "max.dim",
        )
    )  # fmt: skip
    again = backend.load(tmp_path / "a", [facts.graph.constants["kernel"].tensor], Options())
    assert again.converted == loaded.converted


def test_weights_of_converted_ops_lie_where_the_user_put_them(backend: Fresh) -> None:
    facts = converted_ops()
    region, target = whole(facts), OpenVinoTarget()
    model = target.model(translate(facts, region, target, backend, None).exits)
    kernel = facts.graph.constants["kernel"].tensor
    constants = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
    assert kernel.data_ptr() in [node.data.ctypes.data for node in constants]
    assert sum(tuple(node.shape) == tuple(kernel.shape) for node in constants) == 1


def test_what_neither_writes_is_declined_with_both_reasons_and_alone(backend: Fresh) -> None:
    b = Builder()
    sorted_ = b.node("sorted", "msort.default", Ref("x"))
    facts = facts_of(b, b.node("gated", "glu.default", b.node("cos", "cos.default", sorted_)))
    reasons = backend.unsupported(facts, whole(facts))
    assert list(reasons) == ["sorted"]
    assert reasons["sorted"].startswith("aten.msort.default has no rule; its own converter: ")
    assert "No conversion rule found" in reasons["sorted"]


WRONG = {
    "softplus": ("softplus.default", Ref("x"), 2.0, 20.0),
    "ceil mode": ("avg_pool2d.default", Ref("image"), (3, 3), (2, 2), (1, 1), True),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_what_the_frontend_gets_wrong_is_found_before_a_region_is_built(
    case: str, backend: Fresh
) -> None:
    b = Builder()
    facts = facts_of(b, b.node("wrong", *WRONG[case]))
    reasons = backend.unsupported(facts, whole(facts))
    assert reasons["wrong"].endswith("the frontend makes something else of it")


REFUSED = {
    "an operand of integers": (
        ("scatter.value", Ref("x"), 1, Ref("i"), 0.5),
        0,
        "what operands of i64 hold is not known",
    ),
    "a place of several equals": (("topk.default", Ref("x"), 3), 1, "another of equals"),
    "remainders": (("fmod.Scalar", Ref("x"), 0.7), 0, "remainders of floats round elsewhere"),
    "a mask": (
        ("masked_scatter.default", Ref("x"), Ref("m"), Ref("x")),
        0,
        "more elements than there are",
    ),
    "a list": (("tensor_split.sections", Ref("x"), 2, 1), 0, "returns a list"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_no_conversion_may_be_trusted_with_is_declined(case: str, backend: Fresh) -> None:
    arguments, idx, reason = REFUSED[case]
    b = Builder()
    b.node("op", *arguments)
    facts = facts_of(b, Ref("op", idx))
    (found,) = backend.unsupported(facts, whole(facts)).values()
    assert reason in found


def test_a_reason_that_is_the_runtimes_is_not_taken_to_the_frontend(backend: Fresh) -> None:
    b = Builder()
    facts = facts_of(b, b.node("op", "remainder.Scalar", Ref("x"), 0.7))
    reasons = backend.unsupported(facts, whole(facts))
    assert reasons == {"op": "remainders of floats round elsewhere"}


@pytest.mark.parametrize("op", ["aten.relu_.default", "aten.rand_like.default", "aten.none.such"])
def test_ops_that_write_into_operands_or_are_random_or_unknown_are_declined(op: str) -> None:
    type_ = TensorType("f32", (2,))
    call_ = OpCall(op, (Operand(0),), (type_,), frozenset(), (type_,), ())
    with pytest.raises(DeclinedError, match=op.replace(".", r"\.")):
        check_exact(call_)
    with pytest.raises(DeclinedError, match=op.replace(".", r"\.")):
        OpenVinoFrontend().check(call_)


def test_a_conversion_that_raises_declines_its_node_and_never_more(
    backend: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: OpenVinoFrontend, call: OpCall) -> Any:
        raise MemoryError("no room\nfor it")

    b = Builder()
    gated = b.node("gated", "glu.default", b.node("cos", "cos.default", Ref("x")))
    facts = facts_of(b, gated)
    assert backend.unsupported(facts, whole(facts)) == {}
    monkeypatch.setattr(OpenVinoFrontend, "_model", broken)
    with pytest.raises(BuildError, match=r"gated: aten\.glu\.default has no rule.*no room"):
        backend.build(facts, whole(facts), Options(), tmp_path)
    reasons = Fresh().unsupported(facts, whole(facts))
    assert reasons == {
        "gated": "aten.glu.default has no rule; its own converter: MemoryError: no room"
    }


def glu(dim: Any = -1, batch: Any = BATCH) -> OpCall:
    type_, half = TensorType("f32", (batch, 6)), TensorType("f32", (batch, 3))
    return OpCall(
        "aten.glu.default", (Operand(0), dim), (type_,), frozenset(), (half,), (("batch", 1, 64),)
    )


def test_a_call_is_tried_once_and_another_argument_or_type_is_another_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[OpCall] = []
    monkeypatch.setattr(OpenVinoFrontend, "_try", lambda self, call: tried.append(call))
    frontend = OpenVinoFrontend()
    calls = [glu(), glu(1), glu(1.0), glu(True), glu(1, batch=2), glu(1, batch=2 * BATCH)]
    for call_ in [*calls, *calls]:
        frontend.check(call_)
    assert tried == calls


def test_the_verdicts_that_are_kept_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_frontend, "VERDICTS_MAX", 8)
    monkeypatch.setattr(OpenVinoFrontend, "_try", lambda self, call: None)
    frontend = OpenVinoFrontend()
    for dim in range(50):
        frontend.check(glu(dim))
        assert len(frontend._verdicts) <= 8


def test_a_size_that_is_dynamic_is_no_argument_of_a_conversion(backend: Fresh) -> None:
    b = Builder()
    rows = b.node("rows", "sym_size.int", Ref("x"), 0)
    wide = b.node("wide", "upsample_nearest2d.default", Ref("image"), (rows, 4))
    facts = facts_of(b, wide, b.node("cos", "cos.default", Ref("x")))
    region = build_region(facts.graph, facts.type_of, (Ref("wide"),), lambda id: id == "wide")
    (reason,) = backend.unsupported(facts, region).values()
    assert reason.endswith("an argument is a dynamic size")


def test_a_runtime_without_a_converter_is_cut_as_before() -> None:
    b = Builder()
    facts = facts_of(b, b.node("gated", "glu.default", Ref("x"), -1))
    other: Backend = backends()["onnxruntime"]
    assert other.unsupported(facts, whole(facts)) == {"gated": "aten.glu.default has no rule"}


def test_constants_of_any_kind_reach_the_frontend_as_constants(
    backend: Fresh, tmp_path: Path
) -> None:
    b = Builder()
    b.constants["end"] = constant_of(torch.randn(4, 6) + 2, is_param=True)
    mixed = b.node("mixed", "lerp.Scalar", Ref("x"), Const("end"), 0.25)
    facts = facts_of(b, b.node("logs", "logaddexp.default", mixed, Const("end")))
    region = whole(facts)
    loaded = built(backend, facts, region, Options(), tmp_path / "a")
    given = call(loaded, region, feeds(3), {"batch": 3})
    assert differences(facts.graph, region, given, feeds(3)) == []
    assert loaded.converted == ("aten.lerp.Scalar", "aten.logaddexp.default")
