"""Nodes that mean the same are the same, however their arguments were given."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.errors import TypeMismatchError, UnknownOpError
from graphopt.graph import Const, Ref
from graphopt.nodes import make_node

CONV = {
    "input": Ref("x"),
    "weight": Const("w"),
    "bias": None,
    "stride": (2, 2),
    "padding": (0, 0),
    "dilation": (1, 1),
    "groups": 1,
}


@given(st.integers(0, len(CONV)), st.permutations(list(CONV)))
def test_position_keyword_and_spelled_out_defaults_make_no_difference(positional, order):
    args = list(CONV.values())[:positional]
    kwargs = {name: CONV[name] for name in order if name not in list(CONV)[:positional]}
    node = make_node("conv", "aten.conv2d.default", args, kwargs)
    assert node == make_node("conv", "aten.conv2d.default", [Ref("x"), Const("w"), None, [2, 2]])
    assert len(node.args) == 4
    assert node.bound() | {"stride": (2, 2)} == CONV


def test_keyword_only_defaults_are_left_out_and_the_rest_sorted():
    node = make_node("a", "aten.add.Tensor", [Ref("x"), Ref("y")], {"alpha": 1})
    assert node.kwargs == ()
    node = make_node(
        "z",
        "aten._to_copy.default",
        [Ref("x")],
        {"memory_format": "channels_last", "dtype": "float32"},
    )
    assert node.kwargs == (("dtype", "f32"), ("memory_format", "channels_last"))


def test_placement_is_left_out():
    node = make_node("z", "aten.zeros.default", [(2,)], {"pin_memory": False, "layout": "strided"})
    assert node.kwargs == ()
    with pytest.raises(TypeMismatchError, match="the engine places values"):
        make_node("z", "aten.zeros.default", [(2,)], {"device": "cuda:0"})


@pytest.mark.parametrize(
    ("op", "args", "kwargs", "where"),
    [
        ("aten.relu.default", [], {}, "n.self"),
        ("aten.relu.default", [Ref("x"), 1], {}, "n"),
        ("aten.relu.default", [Ref("x")], {"inplace": True}, "n.inplace"),
        ("aten.relu.default", [Ref("x")], {"self": Ref("x")}, "n.self"),
        ("aten.softmax.int", [Ref("x"), "last"], {}, "n.dim"),
        ("aten.softmax.int", [Ref("x"), [1]], {}, "n.dim"),
        ("aten.sum.dim_IntList", [Ref("x"), [0.5]], {}, "n.dim"),
        ("sym.add", [Ref("x")], {}, "n.b"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_node_and_parameter(op, args, kwargs, where):
    with pytest.raises(TypeMismatchError) as refusal:
        make_node("n", op, args, kwargs)
    assert refusal.value.where == where
    assert refusal.value.remedy


def test_an_op_is_random_only_when_its_switch_says_so():
    operands = [Ref("q"), Ref("k"), Ref("v")]
    make_node("n", "aten.scaled_dot_product_attention.default", operands, {"dropout_p": 0.0})
    with pytest.raises(UnknownOpError, match="dropout_p"):
        make_node("n", "aten.scaled_dot_product_attention.default", operands, {"dropout_p": 0.5})
