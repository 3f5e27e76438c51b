"""Small transformers models built from config, one a family, with inputs of any batch and length."""

from collections.abc import Callable
from typing import Any

import torch
import transformers

VOCAB = 97
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": VOCAB,
}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def text(batch: int, seq: int) -> dict[str, torch.Tensor]:
    """Token ids, and a mask that pads each row but the first by another length."""
    ids = torch.randint(3, VOCAB, (batch, seq), generator=torch.Generator().manual_seed(batch))
    mask = torch.ones(batch, seq, dtype=torch.long)
    for row in range(1, batch):
        mask[row, seq - min(row, seq - 1) :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def image(batch: int, side: int) -> dict[str, torch.Tensor]:
    """Random pixels."""
    generator = torch.Generator().manual_seed(batch)
    return {"pixel_values": torch.randn(batch, 3, side, side, generator=generator)}


def bert() -> Any:
    return transformers.BertModel(transformers.BertConfig(**SMALL))


def bert_classifier() -> Any:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL))


def vit() -> Any:
    config = transformers.ViTConfig(
        **{k: v for k, v in SMALL.items() if k != "vocab_size"}, image_size=32, patch_size=8
    )
    return transformers.ViTForImageClassification(config)


def resnet() -> Any:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", image_size=32
    )
    return transformers.ResNetForImageClassification(config)


def mobilenet() -> Any:
    config = transformers.MobileNetV2Config(image_size=32, depth_multiplier=0.25)
    return transformers.MobileNetV2ForImageClassification(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(
        n_embd=32, n_layer=1, n_head=4, vocab_size=VOCAB, n_positions=64, **IDS
    )
    return transformers.GPT2LMHeadModel(config)


def llama() -> Any:
    config = transformers.LlamaConfig(
        **SMALL, num_key_value_heads=2, max_position_embeddings=64, **IDS
    )
    return transformers.LlamaForCausalLM(config)


FAMILIES: dict[str, tuple[Callable[[], Any], Callable[..., dict[str, torch.Tensor]]]] = {
    "bert": (bert, text),
    "bert-classifier": (bert_classifier, text),
    "vit": (vit, image),
    "resnet": (resnet, image),
    "mobilenet": (mobilenet, image),
    "gpt2": (gpt2, text),
    "llama": (llama, text),
}


def build(family: str) -> Any:
    """The family's model with random weights that every call repeats."""
    torch.manual_seed(0)
    model = FAMILIES[family][0]()
    with torch.no_grad():  # zero biases and unit norms would hide a swapped constant
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.add_(torch.rand_like(tensor) * 0.1)
    return model.eval()


def inputs(family: str, batch: int, size: int) -> dict[str, torch.Tensor]:
    """Inputs of that batch; `size` is the sequence length of text."""
    maker = FAMILIES[family][1]
    return maker(batch, size if maker is text else 32)
