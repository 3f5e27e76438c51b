"""Ten networks that everyone measures on, the same for every system: module, inputs, dynamic dims.

Weights are random, of a fixed seed, so nothing is fetched; batch-norm statistics look like those
after training. Each module takes tensors and returns one tensor: heads and pooling layers that a
caller would not read are left out, so no system is measured on work that another one drops.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import transformers as hf
from torch import Tensor, nn

import graphopt
from examples.minilm import BertSizes, SentenceEncoder

SEED = 0
TRACED_BATCH = 2  # torch.export takes a dim of size 1 for a constant
IMAGE = 224  # pixels a side
Inputs = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Network:
    """One network in eval mode without gradients.

    Attributes:
        module: takes the tensors of `inputs` in order and returns one float32 tensor.
        inputs: the same inputs for the same batch, always.
        dynamic: names of the dims that vary, by input and axis: `torch.export` and ONNX take it.
    """

    name: str
    module: nn.Module
    inputs: Callable[[int], Inputs]
    dynamic: Mapping[str, Mapping[int, str]]

    def graph(self) -> graphopt.Graph:
        """The network as a graph that shares the module's weights."""
        dynamic = {name: dict(dims) for name, dims in self.dynamic.items()}
        return graphopt.from_torch(
            self.module, self.inputs(TRACED_BATCH), dynamic, self.name, share_memory=True
        )

    def sizes(self, batch: int) -> dict[str, int]:
        """The dynamic dims of `inputs(batch)` by name."""
        inputs = self.inputs(batch)
        return {
            dim: inputs[name].shape[axis]
            for name, dims in self.dynamic.items()
            for axis, dim in dims.items()
        }


def build(name: str) -> Network:
    """The network `name` of `NETWORKS`, from the seed."""
    hf.logging.set_verbosity_error()
    torch.manual_seed(SEED)
    network = NETWORKS[name]()
    for key, buffer in network.module.named_buffers():  # as after training
        if key.endswith("running_mean"):
            buffer.normal_(0, 0.2)
        elif key.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    network.module.eval().requires_grad_(False)
    return network


def layer_weights(graph: graphopt.Graph) -> list[list[str]]:
    """The weight matrices of each numbered encoder layer: constants whose names share `layer.N.`."""
    layers: dict[int, list[str]] = {}
    for name in sorted(graph.constants):
        number = name.partition("layer.")[2].partition(".")[0]
        if number.isdigit() and graph.constants[name].tensor.dim() > 1:
            layers.setdefault(int(number), []).append(name)
    if not layers:
        raise ValueError(f"{graph.name} has no layers: take minilm, bert-mini or bert-base")
    return [layers[number] for number in sorted(layers)]


class Text(nn.Module):
    """A transformers model of token ids, one of its results."""

    def __init__(self, model: nn.Module, result: str) -> None:
        super().__init__()
        self.model = model
        self.result = result

    def forward(self, input_ids: Tensor) -> Tensor:
        """Ids int64 [batch, seq] to float32."""
        result: Tensor = self.model(input_ids=input_ids)[self.result]
        return result


class MaskedText(Text):
    """A transformers model of token ids and a mask, one of its results."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
        """Both int64 [batch, seq], to float32."""
        result: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask)[self.result]
        return result


class Image(nn.Module):
    """A transformers classifier of images, its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """float32 [batch, 3, 224, 224] to float32 [batch, 1000]."""
        logits: Tensor = self.model(pixel_values=pixel_values)["logits"]
        return logits


class Sentence(nn.Module):
    """The example's sentence encoder, its one result."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """All int64 [batch, seq], to float32 [batch, width]."""
        vector: Tensor = self.model(input_ids, attention_mask, token_type_ids)["sentence_embedding"]
        return vector


def _mlp() -> Network:
    layers = [layer for _ in range(8) for layer in (nn.Linear(256, 256), nn.ReLU())]

    def inputs(batch: int) -> Inputs:
        return {"input": torch.randn(batch, 256, generator=_generator())}

    return Network("mlp", nn.Sequential(*layers), inputs, {"input": {0: "batch"}})


def _bert_mini() -> Network:
    size = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024}
    config = hf.BertConfig(num_hidden_layers=4, **size)
    model = hf.BertModel(config, add_pooling_layer=False)
    return _text("bert-mini", Text(model, "last_hidden_state"), 64, config.vocab_size)


def _bert_base() -> Network:
    config = hf.BertConfig()
    model = MaskedText(hf.BertForSequenceClassification(config), "logits")
    return _text("bert-base", model, 128, config.vocab_size, ("attention_mask",))


def _minilm() -> Network:
    sizes = BertSizes(30_522, 384, 6, 12, 1536, 512, 2, 1e-12)  # all-MiniLM-L6-v2
    model = Sentence(SentenceEncoder(sizes))
    return _text("minilm", model, 64, sizes.vocab_size, ("attention_mask", "token_type_ids"))


def _resnet_18() -> Network:
    size = {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"}
    config = hf.ResNetConfig(num_labels=1000, **size)
    return _image("resnet-18", hf.ResNetForImageClassification(config))


def _resnet_50() -> Network:
    config = hf.ResNetConfig(num_labels=1000)
    return _image("resnet-50", hf.ResNetForImageClassification(config))


def _mobilenet_v2() -> Network:
    config = hf.MobileNetV2Config(num_labels=1000)
    return _image("mobilenet-v2", hf.MobileNetV2ForImageClassification(config))


def _vit_tiny() -> Network:
    size = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
    config = hf.ViTConfig(num_hidden_layers=12, num_labels=1000, **size)
    return _image("vit-tiny", hf.ViTForImageClassification(config))


def _gpt2_small() -> Network:
    config = hf.GPT2Config(use_cache=False)
    return _text("gpt2-small", Text(hf.GPT2LMHeadModel(config), "logits"), 64, config.vocab_size)


def _llama_mini() -> Network:
    size = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 688}
    config = hf.LlamaConfig(num_hidden_layers=6, use_cache=False, vocab_size=8_000, **size)
    return _text("llama-mini", Text(hf.LlamaForCausalLM(config), "logits"), 64, config.vocab_size)


def _text(
    name: str, module: nn.Module, tokens: int, vocabulary: int, others: tuple[str, ...] = ()
) -> Network:
    def inputs(batch: int) -> Inputs:
        ids = torch.randint(0, vocabulary, (batch, tokens), generator=_generator())
        lengths = torch.tensor([tokens - 3 * i % (tokens // 2) for i in range(batch)])
        mask = (torch.arange(tokens) < lengths[:, None]).long()  # the first row is full
        more = {"attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
        return {"input_ids": ids, **{other: more[other] for other in others}}

    dims = {0: "batch", 1: "seq"}
    return Network(name, module, inputs, dict.fromkeys(("input_ids", *others), dims))


def _image(name: str, model: nn.Module) -> Network:
    def inputs(batch: int) -> Inputs:
        return {"pixel_values": torch.randn(batch, 3, IMAGE, IMAGE, generator=_generator())}

    return Network(name, Image(model), inputs, {"pixel_values": {0: "batch"}})


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(SEED + 1)


NETWORKS: dict[str, Callable[[], Network]] = {
    "mlp": _mlp, "bert-mini": _bert_mini, "bert-base": _bert_base, "minilm": _minilm,
    "resnet-18": _resnet_18, "resnet-50": _resnet_50, "mobilenet-v2": _mobilenet_v2,
    "vit-tiny": _vit_tiny, "gpt2-small": _gpt2_small, "llama-mini": _llama_mini,
}  # fmt: skip
