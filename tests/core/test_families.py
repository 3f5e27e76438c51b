"""Facts of the six families at a real depth: how far blocks reach, what layers share, and that
torch agrees with every type.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
import transformers

from frontend import zoo
from graphopt.analysis.blocks import CONTEXT
from graphopt.analysis.check import check_facts
from graphopt.analysis.facts import Facts, analyse, update
from graphopt.delta import AddNode, Delta, Rewire, apply_fully
from graphopt.executor.build import EagerBuilder, build_plan, replan
from graphopt.executor.plan import run_plan
from graphopt.frontend.huggingface import from_model
from graphopt.graph import Ref
from helpers.graphs import reference, same_outputs

torch.set_num_threads(1)

LARGEST_BLOCK = (
    40  # nodes: the bound, and what a candidate search inside one block can bear
)
DEEP = zoo.SMALL | {"num_hidden_layers": 4}
VIT = {key: value for key, value in DEEP.items() if key != "vocab_size"} | {
    "image_size": 32,
    "patch_size": 8,
}
MODELS: dict[str, Callable[[], Any]] = {
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**DEEP)),
    "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**VIT)),
    "resnet": lambda: transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16, 32, 64], depths=[2, 2, 2, 2], image_size=32
        )
    ),
    "mobilenet": lambda: transformers.MobileNetV2ForImageClassification(
        transformers.MobileNetV2Config(image_size=32, depth_multiplier=0.25)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=32, n_layer=4, n_head=4, vocab_size=zoo.VOCAB, n_positions=64, **zoo.IDS
        )
    ),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **DEEP, num_key_value_heads=2, max_position_embeddings=64, **zoo.IDS
        )
    ),
}
# family -> blocks, data nodes of the largest, nodes of its region (with the context nodes only it
# reads), as transformers 5 writes the models. A Llama region has 42: two unsqueezes of the rotary
# table a layer, which merging equal nodes makes one context value.
SHAPES = {
    "bert": (24, 14, 14),
    "vit": (16, 15, 15),
    "resnet": (23, 11, 11),
    "mobilenet": (94, 12, 12),
    "gpt2": (12, 18, 18),
    "llama": (12, 40, 42),
}


@lru_cache
def facts_of(family: str) -> Facts:
    torch.manual_seed(0)
    return analyse(from_model(MODELS[family]().eval(), family))


def feeds(family: str, batch: int, seq: int) -> dict[str, torch.Tensor]:
    return zoo.inputs(family, batch, seq)


@pytest.mark.parametrize("family", MODELS)
def test_blocks_are_small_enough_to_search(family: str) -> None:
    facts = facts_of(family)
    sizes = [len(block.nodes) for block in facts.blocks]
    assert max(sizes) <= LARGEST_BLOCK
    largest_region = max(len(facts.regions[block.exit].order) for block in facts.blocks)
    assert (len(sizes), max(sizes), largest_region) == SHAPES[family]


@pytest.mark.parametrize("family", MODELS)
def test_facts_are_what_graph_theory_and_torch_say(family: str) -> None:
    check_facts(facts_of(family))


@pytest.mark.parametrize("family", ["bert", "vit", "gpt2", "llama"])
def test_layers_share_their_structure(family: str) -> None:
    facts = facts_of(family)
    keys = [facts.regions[block.exit].key for block in facts.blocks]
    repeated = [key for key in set(keys) if keys.count(key) >= 4]
    assert len(repeated) >= 2, "four layers compile once"


@pytest.mark.parametrize("family", MODELS)
def test_an_edit_in_the_middle_touches_two_percent_and_equals_scratch(family: str) -> None:
    facts, make = facts_of(family), EagerBuilder()
    plan = build_plan(facts, 1, make)
    chain = [block.exit for block in facts.blocks]
    cut = Ref(chain[len(chain) // 2])
    applied = apply_fully(
        facts.graph, Delta([AddNode("gate", "aten.tanh.default", (cut,)), Rewire(cut, Ref("gate"))])
    )
    done = update(facts, applied.graph, applied.change)
    after, remade = replan(plan, done, 2, make)
    assert len(done.reran["type"]) <= max(0.02 * len(facts.graph), 5)
    assert remade <= 4
    assert after.id == build_plan(analyse(applied.graph), 2, make).id
    given = feeds(family, 2, 7)
    assert same_outputs(run_plan(after, given), reference(applied.graph, given))


@pytest.mark.parametrize("family", MODELS)
def test_context_runs_once_and_first(family: str) -> None:
    facts = facts_of(family)
    plan = build_plan(facts, 1, EagerBuilder())
    blocks = [step.block for step in plan.steps]
    assert blocks == [
        *([CONTEXT] if CONTEXT in facts.regions else []),
        *(block.exit for block in facts.blocks),
    ]
