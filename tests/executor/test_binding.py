"""The generated binder answers and refuses exactly as the checks one by one do."""

from collections.abc import Callable

import torch
from hypothesis import given
from hypothesis import strategies as st

from graphopt.dims import symbol
from graphopt.errors import RequestError
from graphopt.executor import binding
from graphopt.executor.binding import binder_of, bucket_symbols
from graphopt.graph import Symbol
from graphopt.types import TensorType

DTYPES = {"f32": torch.float32, "i64": torch.int64}
DIMS = st.sampled_from([1, 2, 3, symbol("b"), symbol("s"), symbol("b") * 2])
TYPES = st.builds(
    TensorType, st.sampled_from(sorted(DTYPES)), st.lists(DIMS, max_size=3).map(tuple)
)
INTERFACES = st.dictionaries(st.sampled_from("abc"), TYPES, max_size=3).map(
    lambda each: tuple(each.items())
)
SYMBOLS = (Symbol("b", 1, 3), Symbol("s", 2, None))
TENSORS = st.builds(
    torch.zeros,
    st.lists(st.integers(1, 4), max_size=3),
    dtype=st.sampled_from(sorted(DTYPES.values(), key=str)),
)


@given(INTERFACES, st.data())
def test_the_generated_binder_agrees_with_the_checks(interface, data) -> None:  # type: ignore[no-untyped-def]
    sizes = {"b": data.draw(st.integers(0, 4)), "s": data.draw(st.integers(1, 4))}
    given_inputs = {}
    for name, type_ in interface:
        shape = [int(binding.evaluate(dim, sizes)) for dim in type_.shape]
        fits = torch.zeros(shape, dtype=DTYPES[type_.dtype])
        given_inputs[name] = data.draw(st.one_of(st.just(fits), TENSORS))
    if data.draw(st.integers(0, 4)) == 0:
        given_inputs["other"] = torch.zeros(1)
    if given_inputs and data.draw(st.integers(0, 4)) == 0:
        given_inputs.popitem()
    specs = tuple(binding.InputSpec(n, t, DTYPES[t.dtype]) for n, t in interface)
    wanted = answer(lambda: binding._check(specs, SYMBOLS, given_inputs))
    found = answer(lambda: binder_of(interface, SYMBOLS)(given_inputs))
    assert found == wanted


def answer(call: Callable[[], binding.Bound]) -> object:
    """What can be compared of it: tensors by identity, dicts in their order, errors by their text."""
    try:
        env, sizes = call()
    except RequestError as error:
        return str(error)
    return [(name, id(value)) for name, value in env.items()], list(sizes.items())


def test_buckets_are_in_the_order_in_which_dims_are_met() -> None:
    interface = (
        ("a", TensorType("f32", (symbol("s") + 1, symbol("t")))),
        ("b", TensorType("f32", (symbol("s"), 3))),
    )
    assert bucket_symbols(interface) == ("t", "s")


def test_names_of_inputs_cannot_become_code() -> None:
    name = "x']; raise SystemExit #"
    bind = binder_of(((name, TensorType("f32", (2,))),), ())
    x = torch.zeros(2)
    assert bind({name: x}) == ({name: x}, {})
