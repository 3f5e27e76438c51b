"""The names of inputs and outputs spell the module's calling convention."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.errors import RequestError
from graphopt.signature import Signature, leaf_name, output_name

leaf = st.integers(0, 99)
tree = st.recursive(
    leaf,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(tuple),
        st.dictionaries(st.sampled_from(["a", "b", "key"]), inner, min_size=1, max_size=3),
    ),
    max_leaves=8,
)


def flat(value, path=()):
    if isinstance(value, tuple):
        return [leaf for i, item in enumerate(value) for leaf in flat(item, (*path, str(i)))]
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in flat(item, (*path, key))]
    return [(path, value)]


@given(tree)
def test_any_answer_is_rebuilt_from_its_flat_outputs(value):
    is_tuple = isinstance(value, tuple)
    outputs = {output_name(path, is_tuple=is_tuple): item for path, item in flat(value)}
    assert Signature((), tuple(outputs)).rebuild(outputs) == value


@given(tree, tree)
def test_any_argument_is_bound_to_flat_inputs(first, second):
    wanted = {
        leaf_name(root, path): item
        for root, value in (("x", first), ("y", second))
        for path, item in flat(value)
    }
    signature = Signature(tuple(wanted), ("output",))
    assert signature.bind((first, second), {}) == wanted
    assert signature.bind((first,), {"y": second}) == wanted
    assert signature.bind((), {"y": second, "x": first}) == wanted


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((1, 2, 3), {}, "takes 2 inputs, not 3"),
        ((1,), {"ids": 2}, "ids is given twice"),
        ((1,), {"musk": 2}, "no input 'musk'"),
        ((1,), {}, "input 'mask' is missing"),
        ((None,), {"mask": 1}, "input 'ids' is missing"),
    ],
)
def test_calls_that_do_not_fit_are_refused_by_input_name(args, kwargs, message):
    with pytest.raises(RequestError, match=message):
        Signature(("ids", "mask"), ("output",)).bind(args, kwargs)


def test_gaps_of_a_tuple_are_none():
    assert Signature((), ("output_0", "output_2")).rebuild({"output_0": 1, "output_2": 2}) == (
        1,
        None,
        2,
    )


def test_a_field_that_is_not_there_is_named():
    answer = Signature((), ("logits",)).rebuild({"logits": 1})
    with pytest.raises(AttributeError, match="there are logits"):
        _ = answer.loss
