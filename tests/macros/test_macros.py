"""The macros other than adapters: each means primitives, and undoing them restores the graph."""

from pathlib import Path
from typing import Any

import pytest
import torch

import graphopt
from graphopt.analysis.facts import analyse
from graphopt.delta import apply_fully, difference
from graphopt.errors import (
    BundleError,
    DeltaError,
    GraphoptError,
    TypeMismatchError,
    UnknownNodeError,
)
from graphopt.graph import Symbol
from graphopt.macros import (
    Bypass,
    InsertAfter,
    LoadWeights,
    ReplaceRegion,
    SetShapeProfile,
    SwapHead,
)
from graphopt.safetensors_file import write_tensors
from helpers.graphs import transformer

GRAPH = transformer(n_layers=3)
FACTS = analyse(GRAPH)


def applied(*edits: Any, allow: bool = False) -> graphopt.Graph:
    """The graph after `edits`; checks that the way back restores the hash and that types hold."""
    done = apply_fully(GRAPH, graphopt.Delta(edits, allow_interface_change=allow), FACTS.type_of)
    analyse(done.graph)
    assert graphopt.apply(done.graph, difference(done.graph, GRAPH, done.change)).hash == GRAPH.hash
    assert graphopt.apply(GRAPH, done.expansion).hash == done.graph.hash
    return done.graph


def first(op: str) -> str:
    return next(node.id for node in GRAPH.iter_nodes() if node.op == op)


def weights(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Path]:
    path = folder / "weights.safetensors"
    write_tensors(path, tensors)
    return {path.name: path}


def parameters() -> dict[str, torch.Tensor]:
    return {
        name: constant.tensor for name, constant in GRAPH.constants.items() if constant.is_param
    }


def test_bypassing_a_layer_takes_out_its_nodes_and_nothing_else() -> None:
    after = applied(Bypass("layer.1"))
    gone = set(GRAPH.nodes) - set(after.nodes)
    assert gone == {id for id in GRAPH.nodes if id.startswith("layer.1/") or id == "layer.1"}


def test_bypassing_a_node_that_changes_the_type_is_refused() -> None:
    with pytest.raises(TypeMismatchError, match="nothing it reads has that type"):
        applied(Bypass(first("aten.select.int")))


def test_bypassing_what_is_not_there_names_what_is() -> None:
    with pytest.raises(UnknownNodeError, match="did you mean"):
        applied(Bypass("layer.7"))


def test_insert_after_takes_over_every_user_and_outputs() -> None:
    name, ref = GRAPH.outputs[0]
    after = applied(InsertAfter(ref, "extra", "aten.tanh.default"))
    assert dict(after.outputs)[name] == graphopt.Ref("extra")
    assert set(after.users[ref.id]) == {"extra"}


def test_replace_region_swaps_nodes_in_one_edit() -> None:
    gelu = first("aten.gelu.default")
    node = graphopt.AddNode(gelu, "aten.relu.default", GRAPH.nodes[gelu].args)
    after = applied(ReplaceRegion((gelu,), (node,), ()))
    assert after.nodes[gelu].op == "aten.relu.default"
    assert after.users[gelu] == GRAPH.users[gelu]


def test_load_weights_puts_only_what_differs(tmp_path: Path) -> None:
    tensors = parameters()
    changed = sorted(tensors)[0]
    tensors[changed] = tensors[changed] + 1
    done = apply_fully(GRAPH, graphopt.Delta([LoadWeights(weights(tmp_path, tensors))]))
    assert done.change.constants == {changed}
    assert len(done.expansion.edits) == 1


@pytest.mark.parametrize(
    "what", ["missing", "unexpected", "shape", "dtype", "nothing fits", "truncated", "pickle"]
)
def test_weights_that_do_not_fit_are_refused_by_name(what: str, tmp_path: Path) -> None:
    tensors = parameters()
    name = sorted(tensors)[0]
    if what == "missing":
        del tensors[name]
    elif what == "unexpected":
        tensors["unheard.of"] = torch.ones(2)
    elif what == "shape":
        tensors[name] = torch.ones(3, 5)
    elif what == "dtype":
        tensors[name] = tensors[name].double()
    elif what == "nothing fits":
        tensors = {"unheard.of": torch.ones(2)}
    files = weights(tmp_path, tensors)
    if what == "truncated":
        path = files["weights.safetensors"]
        path.write_bytes(path.read_bytes()[:-8])
    if what == "pickle":
        files = {"weights.bin": files["weights.safetensors"]}
    with pytest.raises(GraphoptError) as caught:
        applied(LoadWeights(files, strict=what != "nothing fits"))
    assert isinstance(caught.value, BundleError if what == "truncated" else DeltaError)
    assert str(caught.value)


def test_a_subset_of_the_weights_loads_when_not_strict(tmp_path: Path) -> None:
    name = sorted(parameters())[0]
    files = weights(tmp_path, {name: parameters()[name] * 2, "unheard.of": torch.ones(1)})
    done = apply_fully(GRAPH, graphopt.Delta([LoadWeights(files, strict=False)]))
    assert done.change.constants == {name}


def test_a_head_may_have_another_number_of_outputs(tmp_path: Path) -> None:
    head = GRAPH.outputs[0][1].id
    columns = GRAPH.constants[GRAPH.nodes[head].args[1].name].type.shape[1]
    files = weights(
        tmp_path, {"classifier.weight": torch.ones(7, columns), "classifier.bias": torch.zeros(7)}
    )
    after = applied(SwapHead(head, files), allow=True)
    assert analyse(after).types[head][0].shape[-1] == 7


def test_a_head_without_bias_takes_the_old_bias_away(tmp_path: Path) -> None:
    head = GRAPH.outputs[0][1].id
    columns = GRAPH.constants[GRAPH.nodes[head].args[1].name].type.shape[1]
    after = applied(
        SwapHead(head, weights(tmp_path, {"weight": torch.ones(7, columns)})), allow=True
    )
    assert after.nodes[head].bound()["bias"] is None
    assert GRAPH.nodes[head].args[2].name not in after.constants


def test_a_head_that_is_no_linear_layer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeMismatchError, match=r"a head is aten\.linear\.default"):
        applied(
            SwapHead(first("aten.gelu.default"), weights(tmp_path, {"weight": torch.ones(2, 2)}))
        )


def test_a_shape_profile_bounds_what_requests_may_bring() -> None:
    name = GRAPH.symbols[0].name
    after = applied(SetShapeProfile((Symbol(name, 1, 8),)))
    assert Symbol(name, 1, 8) in after.symbols
    assert dict(after.inputs) == dict(GRAPH.inputs)
    with pytest.raises(UnknownNodeError):
        applied(SetShapeProfile((Symbol("nosuch", 1, 8),)))
    with pytest.raises(DeltaError, match="empty"):
        applied(SetShapeProfile((Symbol(name, 9, 8),)))
