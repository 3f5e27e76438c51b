"""Transformers models from config, unmodified: the graph answers exactly as the model does."""

from functools import lru_cache

import pytest
import torch
from torch.testing import assert_close

from frontend import zoo
from frontend.interpret import run
from graphopt.frontend.huggingface import from_model
from graphopt.frontend.torch_export import from_torch
from graphopt.graph import Graph, Symbol
from graphopt.signature import signature_of

TEXT_FAMILIES = ["bert", "bert-classifier", "gpt2", "llama"]
CACHES = ("past_key_values", "cache")  # until transformers 5.23, and from 5.24 on


@lru_cache
def imported(family: str) -> Graph:
    return from_model(zoo.build(family), family)


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_outputs_equal_the_model_at_batch_one_and_at_other_batches_and_lengths(family):
    model, graph = zoo.build(family), imported(family)
    for batch, size in ((1, 1), (1, 9), (3, 5), (2, 2)):
        inputs = zoo.inputs(family, batch, size)
        with torch.no_grad():
            expected = model(**inputs)
        outputs = run(graph, inputs)
        assert list(outputs) == [name for name in expected if name not in CACHES]
        for name, value in outputs.items():
            assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_constants_bear_the_names_of_the_state_dict(family):
    model, graph = zoo.build(family), imported(family)
    state = model.state_dict()
    params = {name for name, constant in graph.constants.items() if constant.is_param}
    assert params <= set(state)
    assert all(torch.equal(graph.constants[name].tensor, state[name]) for name in params)
    # What the model never reads (MobileNet's counters, for one) is not carried along.
    assert set(graph.constants) == set(graph.const_users)


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_text_models_have_dynamic_batch_and_sequence_from_one_up(family):
    longest = 512 if family.startswith("bert") else 64
    assert imported(family).symbols == (Symbol("batch", 1, None), Symbol("seq", 1, longest))


def test_nothing_of_training_or_tracing_is_left():
    ops = {node.op for family in zoo.FAMILIES for node in imported(family).iter_nodes()}
    left = {
        op for op in ops if any(word in op for word in ("dropout", "assert", "detach", "alias"))
    }
    assert not left
    assert "aten._native_batch_norm_legit_no_training.default" not in ops
    assert "aten.batch_norm.default" in ops
    assert "aten.clone.default" not in {node.op for node in imported("bert").iter_nodes()}


def test_attention_is_one_op():
    ops = [node.op for node in imported("bert").iter_nodes()]
    assert ops.count("aten.scaled_dot_product_attention.default") == 1


def test_a_tied_head_is_an_alias_of_one_constant():
    graph = imported("gpt2")
    assert dict(graph.aliases) == {"lm_head.weight": "transformer.wte.weight"}
    assert "lm_head" in graph.const_users["transformer.wte.weight"]
    assert graph.get_constant("lm_head.weight") is graph.constants["transformer.wte.weight"]


def test_ids_are_module_paths():
    graph = imported("bert-classifier")
    for id in (
        "bert.embeddings.word_embeddings",
        "bert.encoder.layer.0.attention.self.query",
        "bert.encoder.layer.0.attention.output/add",
        "bert.encoder.layer.0.output.LayerNorm",
        "bert.pooler.activation",
        "classifier",
        "sym_size/batch",
        "sym_size/seq",
    ):
        assert id in graph.nodes, id


def test_ids_and_content_are_the_same_when_imported_again():
    again = from_model(zoo.build("vit"), "vit")
    assert set(again.nodes) == set(imported("vit").nodes)
    assert again == imported("vit")


def test_a_wrapper_around_the_module_does_not_change_ids():
    compiled = torch.compile(zoo.build("vit"), backend="eager")
    graph = from_torch(compiled, zoo.inputs("vit", 1, 0), "batch", "vit")
    assert graph == imported("vit")


def test_the_answer_has_the_models_structure():
    signature = signature_of(imported("bert"))
    inputs = zoo.inputs("bert", 2, 4)
    assert signature.bind((inputs["input_ids"],), {"attention_mask": 1}).keys() == inputs.keys()
    answer = signature.rebuild(run(imported("bert"), inputs))
    assert answer.last_hidden_state is answer["last_hidden_state"] is answer[0]
