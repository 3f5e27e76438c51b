"""The fused tier on imported model families, small, from config."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
import transformers as hf
from fused_graphs import fused_plan, runs_of, verdicts

from graphopt.analysis.facts import Facts, analyse
from graphopt.executor.build import EagerBuilder, build_plan
from graphopt.executor.plan import run_plan
from graphopt.executor.verify import sample_inputs
from graphopt.frontend.torch_export import from_torch

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 256,
}
TOKENS = {"input_ids": {0: "batch", 1: "seq"}}


def bert() -> torch.nn.Module:
    return hf.BertModel(hf.BertConfig(**SMALL, vocab_size=50, max_position_embeddings=32))


def gpt2() -> torch.nn.Module:
    config = hf.GPT2Config(
        vocab_size=50, n_positions=32, n_embd=64, n_layer=2, n_head=2, use_cache=False
    )
    return hf.GPT2LMHeadModel(config)


def llama() -> torch.nn.Module:
    config = hf.LlamaConfig(**SMALL, vocab_size=50, num_key_value_heads=1, use_cache=False)
    return hf.LlamaForCausalLM(config)


def vit() -> torch.nn.Module:
    return hf.ViTForImageClassification(hf.ViTConfig(**SMALL, image_size=32, patch_size=8))


def resnet() -> torch.nn.Module:
    config = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic", num_labels=5
    )
    return hf.ResNetForImageClassification(config)


def mobilenet() -> torch.nn.Module:
    config = hf.MobileNetV2Config(depth_multiplier=0.25, num_labels=5, image_size=32)
    return hf.MobileNetV2ForImageClassification(config)


FAMILIES: dict[str, Callable[[], torch.nn.Module]] = {
    "bert": bert, "gpt2": gpt2, "llama": llama, "vit": vit, "resnet": resnet, "mobilenet": mobilenet,
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def imported(name: str) -> tuple[torch.nn.Module, Facts]:
    torch.manual_seed(4)
    module = FAMILIES[name]().eval()
    with torch.no_grad():
        for key, buffer in module.named_buffers():  # as after training, not as at the start
            if key.endswith("running_mean"):
                buffer.normal_(0, 0.2)
            elif key.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    if name in ("bert", "gpt2", "llama"):
        graph = from_torch(module, {"input_ids": torch.ones(2, 8, dtype=torch.long)}, TOKENS, name)
    else:
        graph = from_torch(module, {"pixel_values": torch.randn(2, 3, 32, 32)}, "batch", name)
    return module, analyse(graph)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_fused_step_of_a_family_is_proven(name: str):
    _, facts = imported(name)
    found = verdicts(facts)
    assert found
    assert all(verdict.ok for verdict in found.values()), found


@pytest.mark.parametrize("name", FAMILIES)
def test_the_fused_plan_answers_as_the_module_at_several_sizes(name: str):
    module, facts = imported(name)
    plan = fused_plan(facts)
    assert plan.tiers()["fused"] >= len(runs_of(facts)) // 4
    for batch, seq in ((1, 3), (2, 29)):
        inputs = sample_inputs(facts, {"batch": batch, "seq": seq}, seed=batch)
        expected = module(**inputs)[0]
        given = next(iter(run_plan(plan, inputs).values()))
        scale = float(expected.abs().max())
        torch.testing.assert_close(given, expected, rtol=0, atol=5e-5 * scale)


def test_convolutions_of_mobilenet_and_their_surroundings_are_one_call_each():
    _, facts = imported("mobilenet")
    eager = build_plan(facts, 1, EagerBuilder())
    plan = fused_plan(facts)
    assert len(plan.steps) * 2 < len(eager.steps)
    left = [
        node
        for step in plan.steps
        for node in step.function.__code__.co_names
        if "batch_norm" in node
    ]
    assert left == []


def test_token_ids_made_up_for_a_model_stay_inside_its_tables():
    for name in ("bert", "gpt2", "llama"):
        _, facts = imported(name)
        ids = sample_inputs(facts, {"batch": 8, "seq": 30})["input_ids"]
        assert ids.shape == (8, 30)
        assert 0 <= int(ids.min()) < int(ids.max()) < 50
