"""Ids depend on the module tree and the order of execution alone, and no two are the same."""

from hypothesis import given
from hypothesis import strategies as st

from graphopt.draft import Draft
from graphopt.frontend.names import (
    Place,
    assign_ids,
    clean_path,
    module_place,
    op_name,
    unique_name,
)
from graphopt.graph import Graph

part = st.sampled_from(["a", "b", "0", "add", "linear", "x y", "we(ird)"])
paths = st.lists(part, max_size=3).map(lambda parts: clean_path(".".join(parts)))
places = st.builds(
    Place,
    path=paths,
    call=st.integers(0, 2),
    op=st.sampled_from(
        ["aten.add.Tensor", "aten.linear.default", "sym.mul", "aten._to_copy.default"]
    ),
)


@given(st.lists(places, max_size=30), st.sets(st.sampled_from(["a", "b", "add", "a.b"])))
def test_ids_are_legal_and_all_different(steps, taken):
    ids = assign_ids(steps, taken)
    assert len(set(ids) | taken) == len(ids) + len(taken)
    draft = Draft(Graph.empty("g"))
    for id in ids:
        draft._check_name(id)


@given(st.lists(places, max_size=20), st.lists(places, max_size=5))
def test_ids_of_a_module_do_not_depend_on_ops_of_other_modules(steps, others):
    moved = [Place("elsewhere." + p.path if p.path else "elsewhere", p.call, p.op) for p in others]
    assert assign_ids([*moved, *steps], ())[len(moved) :] == assign_ids(steps, ())


def ids(*steps):
    return assign_ids([Place(path, call, f"aten.{op}.default") for path, call, op in steps], ())


def test_a_leaf_with_one_op_is_called_by_its_path():
    assert ids(("enc.q", 0, "linear"), ("enc.q", 1, "linear")) == ["enc.q", "enc.q@1"]


def test_several_ops_and_ops_beside_children_are_called_by_the_op():
    assert ids(("norm", 0, "pow"), ("norm", 0, "mul"), ("norm", 0, "mul")) == [
        *("norm/pow", "norm/mul", "norm/mul_1"),
    ]
    assert ids(("layer.dense", 0, "linear"), ("layer", 0, "add")) == ["layer.dense", "layer/add"]


def test_root_ops_have_no_slash():
    assert ids(("", 0, "add"), ("", 0, "add"), ("add_1", 0, "relu")) == ["add", "add_1", "add_1_1"]


def test_wrappers_and_subscripts_are_cleaned_from_paths():
    assert clean_path("L__self___modules['enc']._orig_mod.layer") == "enc.layer"
    assert clean_path("enc._modules['x'].q") == "enc.x.q"
    assert clean_path("_orig_mod.enc._checkpoint_wrapped_module.q") == "enc.q"
    assert clean_path("heads.a b$") == "heads.a_b_"


def test_the_call_number_comes_from_the_stack():
    assert module_place([("L__self__", ""), ("L__self__enc@2", "enc")]) == ("enc", 2)
    assert module_place([("L__self__enc", "enc@1")]) == ("enc", 1)
    assert module_place([]) == ("", 0)


def test_op_names_are_short():
    assert op_name("aten._to_copy.default") == "to_copy"
    assert op_name("aten.__and__.Tensor") == "and"
    assert op_name("sym.floordiv") == "sym_floordiv"


def test_a_taken_name_is_numbered():
    assert unique_name("a b", {"a_b", "a_b_1"}) == "a_b_2"
    assert unique_name("@", set()) == "_"
