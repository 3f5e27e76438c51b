"""Which queries an edit re-runs, literally: work follows the change, never the size of the graph."""

import pytest
import torch

from graphopt.analysis.facts import Facts, Update, analyse, update
from graphopt.delta import (
    AddNode,
    Delta,
    Edit,
    PutConstant,
    RemoveNode,
    Rewire,
    SetAttr,
    SetOutputs,
    apply_fully,
)
from graphopt.graph import Graph, Ref
from graphopt.types import TensorType
from helpers.graphs import transformer

LAYERS = 4
UP = Ref("layer.1/up")


@pytest.fixture(scope="module")
def model() -> Facts:
    return analyse(transformer(LAYERS))


def edited(model: Facts, *edits: Edit) -> Update:
    applied = apply_fully(model.graph, Delta(edits))
    return update(model, applied.graph, applied.change)


def test_a_node_that_keeps_the_shape_reruns_itself_its_user_and_one_block(model: Facts) -> None:
    done = edited(model, AddNode("gate", "aten.sigmoid.default", (UP,)), Rewire(UP, Ref("gate")))
    assert done.reran == {
        "type": ["gate", "layer.1/gelu"],
        "traits": ["gate", "layer.1/gelu"],
        "live": ["layer.1/gelu", "gate", "layer.1/up"],
        "blocks": ["layer.1/add"],
        "region": ["layer.1/add"],
    }
    assert done.regions_changed == {"layer.1/add"}
    assert not done.regions_gone | done.weights_changed | done.released


def test_weights_of_the_same_shape_rerun_nothing(model: Facts) -> None:
    done = edited(model, PutConstant("layer.1/up.weight", torch.zeros(16, 8)))
    assert done.reran == {}
    assert done.weights_changed == {"layer.1/add"}
    assert not done.regions_changed | done.regions_gone | done.released
    assert done.facts.regions == model.regions


def test_weights_of_another_shape_rerun_types_up_to_where_the_shape_is_the_same_again(
    model: Facts,
) -> None:
    wider = (("up.weight", (12, 8)), ("up.bias", (12,)), ("down.weight", (8, 12)))
    done = edited(
        model, *(PutConstant(f"layer.1/{name}", torch.zeros(shape)) for name, shape in wider)
    )
    assert done.reran == {
        "type": ["layer.1/up", "layer.1/gelu", "layer.1/down"],
        "traits": ["layer.1/up", "layer.1/down"],
        "region": ["layer.1/add"],
    }


def test_a_new_head_reruns_the_head(model: Facts) -> None:
    done = edited(
        model,
        PutConstant("classifier.weight", torch.zeros(5, 8)),
        PutConstant("classifier.bias", torch.zeros(5)),
    )
    assert done.reran == {
        "type": ["classifier"],
        "traits": ["classifier"],
        "region": ["classifier"],
    }
    assert done.facts.type_of(Ref("classifier")).shape[1] == 5


def test_a_node_in_the_mask_reruns_its_readers_and_cuts_off_there(model: Facts) -> None:
    done = edited(
        model,
        AddNode("mask/soft", "aten.mul.Tensor", (Ref("mask"), 0.5)),
        Rewire(Ref("mask"), Ref("mask/soft")),
    )
    readers = [f"layer.{idx}/attention" for idx in range(LAYERS)]
    assert done.reran == {
        "type": ["mask/soft", *readers],
        "traits": ["mask/soft", *readers],
        "live": [*reversed(readers), "mask/soft", "mask"],
        "home": ["mask/soft", "mask"],
        "region": [*(f"layer.{idx}/attention/add" for idx in range(LAYERS)), "$context"],
        "reader": ["$attention_mask", "$mask/soft"],
    }


def test_an_attribute_of_the_mask_reruns_the_context_region_alone(model: Facts) -> None:
    done = edited(model, SetAttr("mask", "other", -1e3))
    assert done.reran == {
        "type": ["mask"],
        "traits": ["mask"],
        "live": ["mask"],
        "home": ["mask", "mask/inverse"],
        "region": ["$context"],
        "reader": ["$attention_mask"],
    }
    assert done.regions_changed == {"$context"}


def test_an_output_tapped_at_a_cut_changes_no_region_and_lets_its_reader_keep_it(
    model: Facts,
) -> None:
    done = edited(model, SetOutputs((*model.graph.outputs, ("hidden", Ref("layer.1/norm")))))
    assert done.reran == {"live": ["layer.1/norm"], "region": ["classifier", "layer.1/norm"]}
    assert not done.regions_changed
    assert done.released == {"layer.2/attention/add"}


def test_an_output_tapped_inside_a_block_changes_that_region(model: Facts) -> None:
    done = edited(model, SetOutputs((*model.graph.outputs, ("hidden", Ref("layer.1/out")))))
    assert done.reran == {
        "live": ["layer.1/out"],
        "region": ["classifier", "layer.1/attention/add"],
        "reader": ["$mask"],
    }
    assert done.regions_changed == {"layer.1/attention/add"}


def test_an_attribute_that_keeps_the_type_stops_at_its_node(model: Facts) -> None:
    done = edited(model, SetAttr("layer.1/gelu", "approximate", "tanh"))
    assert done.reran == {
        "type": ["layer.1/gelu"],
        "traits": ["layer.1/gelu"],
        "live": ["layer.1/gelu"],
        "region": ["layer.1/add"],
    }
    assert done.facts.blocks is model.blocks, "no block is cut anew"


def test_a_bypassed_node_reruns_its_user_and_one_block(model: Facts) -> None:
    done = edited(model, Rewire(Ref("layer.1/gelu"), UP), RemoveNode("layer.1/gelu"))
    assert done.reran == {
        "type": ["layer.1/down"],
        "traits": ["layer.1/down"],
        "live": ["layer.1/down", "layer.1/up"],
        "blocks": ["layer.1/add"],
        "region": ["layer.1/add"],
    }


def test_a_node_nothing_needs_changes_no_block(model: Facts) -> None:
    done = edited(model, AddNode("unused", "aten.relu.default", (UP,)))
    assert done.reran == {
        "type": ["unused"],
        "traits": ["unused"],
        "live": ["unused", "layer.1/up"],
    }
    assert not done.regions_changed | done.regions_gone | done.weights_changed | done.released


def test_equal_layers_share_one_structure_key(model: Facts) -> None:
    keys = {model.regions[f"layer.{idx}/add"].key for idx in range(LAYERS)}
    assert len(keys) == 1
    assert len({model.regions[f"layer.{idx}/attention/add"].key for idx in range(LAYERS)}) == 1


def test_a_key_knows_no_weights_no_names_and_no_place(model: Facts) -> None:
    swapped = edited(model, PutConstant("layer.1/up.weight", torch.zeros(16, 8))).facts
    assert swapped.regions["layer.1/add"].key == model.regions["layer.1/add"].key
    deeper = analyse(transformer(LAYERS + 1))
    assert deeper.regions["layer.4/add"].key == model.regions["layer.1/add"].key


def test_a_block_reads_the_mask_from_outside_and_hands_out_one_value(model: Facts) -> None:
    region = model.regions["layer.1/attention/add"]
    assert region.reads == (Ref("layer.0/norm"), Ref("mask"))
    assert region.exits == (Ref("layer.1/attention/add"),)


@pytest.mark.parametrize("layers", [2, 8])
def test_the_work_of_an_edit_does_not_know_the_size_of_the_graph(layers: int) -> None:
    done = edited(analyse(transformer(layers)), SetAttr("layer.1/gelu", "approximate", "tanh"))
    assert sum(map(len, done.reran.values())) == 4


def test_parallel_heads_stay_in_one_last_block() -> None:
    graph: Graph = transformer(1)
    heads = [
        PutConstant("other.weight", torch.zeros(2, 8)),
        AddNode(
            "other", "aten.linear.default", (Ref("pooler/tanh"), graph.nodes["classifier"].args[1])
        ),
        SetOutputs((*graph.outputs, ("other", Ref("other")))),
    ]
    facts = edited(analyse(graph), *heads[1:]).facts
    assert facts.blocks.tail == "$end"
    assert facts.blocks.blocks["$end"].nodes == ("classifier", "other")
    assert isinstance(facts.type_of(Ref("other")), TensorType)
