"""Small models of several families, wrapped by peft: the oracle of adapter reading."""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import peft
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from graphopt.adapters import LinearSite

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
BERT = {**SMALL, "vocab_size": 40, "max_position_embeddings": 16}


def bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**BERT))


def bert_classifier() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**BERT, num_labels=3))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=3, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        **{**SMALL, "vocab_size": 40, "num_key_value_heads": 1, "tie_word_embeddings": False}
    )
    return transformers.LlamaForCausalLM(config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(**SMALL, image_size=16, patch_size=8, num_labels=3)
    return transformers.ViTForImageClassification(config)


FAMILIES: Mapping[str, Callable[[], nn.Module]] = {
    "bert": bert,
    "bert_classifier": bert_classifier,
    "gpt2": gpt2,
    "llama": llama,
    "vit": vit,
}


def build(family: str) -> nn.Module:
    torch.manual_seed(3)
    return FAMILIES[family]().eval()


def sites_of(model: nn.Module) -> dict[str, LinearSite]:
    """What the graph side would offer for this model."""
    found = {}
    for name, module in model.named_modules():
        bias = f"{name}.bias" if getattr(module, "bias", None) is not None else None
        if isinstance(module, nn.Linear):
            shape, kind = (module.in_features, module.out_features), "linear"
        elif isinstance(module, Conv1D):
            shape, kind = (module.weight.shape[0], module.weight.shape[1]), "conv1d_transposed"
        elif isinstance(module, nn.Embedding):
            shape, kind = (module.num_embeddings, module.embedding_dim), "embedding"
        elif isinstance(module, nn.Conv2d):
            found[name] = LinearSite(
                name, f"{name}.weight", bias, module.in_channels, module.out_channels, "conv2d",
                module.kernel_size,
            )  # fmt: skip
            continue
        else:
            continue
        found[name] = LinearSite(name, f"{name}.weight", bias, *shape, kind)
    return found


def save_adapter(
    model: nn.Module, config: peft.LoraConfig, folder: Path, seed: int = 0, safe: bool = True
) -> None:
    """Wrap a copy of `model`, give everything trainable random values, save as PEFT does."""
    with quiet():
        wrapped = peft.get_peft_model(copy.deepcopy(model), config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn_like(parameter) * 0.3)
        wrapped.save_pretrained(folder, safe_serialization=safe)


def merged_by_peft(model: nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """The state of `model` with the adapter in `folder` merged in, by peft itself."""
    with quiet():
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder)
        return dict(loaded.merge_and_unload().state_dict())


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
