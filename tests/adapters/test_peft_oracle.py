"""What we read from a PEFT folder is what peft makes of it: merged weights agree."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from adapters.families import build, merged_by_peft, quiet, save_adapter, sites_of
from graphopt.adapters import Resolved, adapter_files, read_adapter
from graphopt.safetensors_file import write_tensors

torch.set_num_threads(1)

QV = ["query", "value"]
GRID: list[tuple[str, dict[str, Any]]] = [
    ("bert", {"target_modules": QV}),
    ("bert", {"target_modules": QV, "use_rslora": True, "r": 4, "lora_alpha": 3}),
    ("bert", {"target_modules": r".*layer\.[02]\..*\.(query|key)"}),
    ("bert", {"target_modules": r"(?!.*pooler).*dense"}),
    ("bert", {"target_modules": "all-linear"}),
    ("bert", {"target_modules": ["dense"], "exclude_modules": ["pooler.dense", "output.dense"]}),
    ("bert", {"target_modules": ["dense"], "exclude_modules": r".*(pooler|output)\.dense"}),
    ("bert", {"target_modules": QV, "layers_to_transform": [0, 2]}),
    ("bert", {"target_modules": QV, "layers_to_transform": 1, "layers_pattern": "layer"}),
    ("bert", {"target_modules": QV, "layers_to_transform": [1], "layers_pattern": ["h", "layer"]}),
    ("bert", {"target_modules": QV, "rank_pattern": {"query": 3, r"layer\.1\..*\.(value|x)": 5}}),
    (
        "bert",
        {
            "target_modules": QV,
            "alpha_pattern": {"^encoder.layer.0.attention.self.query": 64, "value": 1},
            "rank_pattern": {"encoder.layer.2.attention.self.value": 1},
            "use_rslora": True,
        },
    ),
    ("bert", {"target_modules": QV, "bias": "all"}),
    ("bert", {"target_modules": QV, "bias": "lora_only"}),
    ("bert", {"target_modules": ["word_embeddings", "query"]}),
    ("bert", {"target_modules": QV, "modules_to_save": ["pooler", "LayerNorm"]}),
    ("bert", {"target_modules": QV, "init_lora_weights": "gaussian", "lora_dropout": 0.2}),
    ("bert", {"target_modules": QV, "init_lora_weights": "orthogonal", "r": 4}),
    ("bert", {"target_modules": QV, "init_lora_weights": "mica"}),
    ("bert_classifier", {"target_modules": QV, "task_type": "SEQ_CLS"}),
    ("bert_classifier", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    ("bert_classifier", {"target_modules": QV, "task_type": "SEQ_CLS", "bias": "all"}),
    ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": False}),
    ("gpt2", {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    ("gpt2", {"target_modules": ["mlp.c_proj", "wpe"], "bias": "all"}),
    ("llama", {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}),
    ("llama", {"target_modules": "all-linear", "rank_pattern": {"mlp.(up|down)_proj": 2}}),
    ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    ("llama", {"target_modules": r"model\.layers\.\d+\.self_attn\.[qkv]_proj"}),
    ("vit", {"target_modules": ["query", "projection"], "modules_to_save": ["classifier"]}),
    ("vit", {"target_modules": "all-linear", "bias": "all"}),
]  # fmt: skip


def read_and_resolve(model: nn.Module, folder: Path) -> Resolved:
    return read_adapter(adapter_files(folder)).resolve(sites_of(model), model.state_dict())


def assert_merged_alike(model: nn.Module, folder: Path) -> None:
    ours = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    resolved = read_and_resolve(model, folder)
    sites = sites_of(model)
    assert resolved.pairs
    changed = set(resolved.replaced)
    ours.update(resolved.replaced)
    for pair in resolved.pairs:
        ours[sites[pair.module].weight] = ours[sites[pair.module].weight] + pair.delta()
    theirs = merged_by_peft(model, folder)
    adapted = {sites[pair.module].weight for pair in resolved.pairs}
    # Tied tables: peft changes the one object under both names; ours names the one that was adapted.
    aliases = {
        name
        for name, tensor in model.state_dict().items()
        for other in adapted | changed
        if name != other and tensor.data_ptr() == model.state_dict()[other].data_ptr()
    }
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        if name in adapted:
            torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=1e-6)
            assert not torch.equal(tensor, model.state_dict()[name])
        elif name not in aliases:
            assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize(("family", "config"), GRID)
def test_merged_weights_equal_pefts(family: str, config: dict[str, Any], tmp_path: Path) -> None:
    model = build(family)
    save_adapter(model, peft.LoraConfig(**config), tmp_path)
    assert_merged_alike(model, tmp_path)


LEAVES = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "pooler.dense"]


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    targets = draw(st.lists(st.sampled_from(LEAVES[:5]), min_size=1, unique=True))
    config: dict[str, Any] = {
        "target_modules": targets,
        "r": draw(st.integers(1, 6)),
        "lora_alpha": draw(st.integers(1, 64)),
        "use_rslora": draw(st.booleans()),
        "bias": draw(st.sampled_from(["none", "all", "lora_only"])),
        "rank_pattern": draw(
            st.dictionaries(st.sampled_from(LEAVES), st.integers(1, 9), max_size=2)
        ),
        "alpha_pattern": draw(
            st.dictionaries(st.sampled_from(LEAVES), st.integers(1, 9), max_size=2)
        ),
    }
    if draw(st.booleans()):
        config["layers_to_transform"] = draw(
            st.lists(st.integers(0, 2), min_size=1, max_size=2, unique=True)
        )
    if draw(st.booleans()):
        config["modules_to_save"] = ["pooler"]
    return config


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(config=configs(), seed=st.integers(0, 1000))
def test_any_mixture_of_settings_merges_as_pefts(
    config: dict[str, Any], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("adapter")
    model = build("bert")
    save_adapter(model, peft.LoraConfig(**config), folder, seed)
    assert_merged_alike(model, folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_of_16_bits_are_widened_as_peft_does(dtype: torch.dtype, tmp_path: Path) -> None:
    model = build("bert")
    save_adapter(model.to(dtype), peft.LoraConfig(target_modules=QV), tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    stored = {
        name: tensor.to(dtype) for name, tensor in peft.utils.load_peft_weights(tmp_path).items()
    }
    write_tensors(weights, stored)
    model = model.float()
    assert {pair.a.dtype for pair in read_and_resolve(model, tmp_path).pairs} == {torch.float32}
    assert_merged_alike(model, tmp_path)


def test_forward_with_pairs_equals_pefts_forward(tmp_path: Path) -> None:
    """The unfolded form, y + scale * B(A(x)), as hooks on the base layers."""
    model = build("gpt2")
    save_adapter(model, peft.LoraConfig(target_modules=["c_attn", "wte"]), tmp_path)
    ids = torch.randint(0, 40, (2, 7))
    with quiet():
        loaded = peft.PeftModel.from_pretrained(build("gpt2"), tmp_path).eval()
    with torch.no_grad():
        want = loaded(ids).logits
    for pair in read_and_resolve(model, tmp_path).pairs:
        module = model.get_submodule(pair.module)

        def add(_: nn.Module, args: Any, out: torch.Tensor, pair: Any = pair) -> torch.Tensor:
            low = pair.a.t()[args[0]] if pair.kind == "embedding" else args[0] @ pair.a.t()
            return out + pair.scale * (low @ pair.b.t())

        module.register_forward_hook(add)
    with torch.no_grad():
        got = model(ids).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
