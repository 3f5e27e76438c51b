"""Train a LoRA adapter that makes the search go by intent instead of by topic.

The task: messages to a help desk are complaints, praise, questions or notices. The base model puts
messages on one topic close together, whatever their intent. The adapter, rank 4 on query and value
of every layer, learns to put messages of one intent close together, whatever the topic.

    python -m examples.train_adapter

writes `examples/adapters/intent/` in PEFT's format and prints what it gained on `corpus.txt`, whose
topics and wordings it has not seen. Plain torch: peft is not needed to train, nor to serve.
"""

import json
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from examples.corpus import encode, load_tokenizer, model_folder, read_corpus
from examples.minilm import SentenceEncoder, load
from examples.training_sentences import draw_batch
from graphopt.safetensors_file import write_tensors

FOLDER = Path(__file__).parent / "adapters" / "intent"
TARGETS = ("query", "value")
RANK = 4
ALPHA = 16
STEPS = 36
TOPICS_PER_BATCH = 4
SENTENCES_EACH = 3  # of each intent and topic: 48 sentences a batch
LEARNING_RATE = 3e-3
TEMPERATURE = 0.1  # of the contrastive loss; cosines divided by it are the logits
SEED = 7


class LoraLinear(nn.Module):
    """A frozen linear layer and its low-rank correction, initialised as PEFT does."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.empty(RANK, base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, RANK))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return self.base(x) + (x @ self.a.t() @ self.b.t()) * (ALPHA / RANK)


def add_lora(model: SentenceEncoder) -> dict[str, LoraLinear]:
    """Put a `LoraLinear` in the place of every target, and return them by module path."""
    found = {
        f"encoder.layer.{number}.attention.self.{name}": (layer.attention.self, name)
        for number, layer in enumerate(model.encoder.layer)
        for name in TARGETS
    }
    added = {}
    for path, (parent, name) in found.items():
        added[path] = LoraLinear(getattr(parent, name))
        setattr(parent, name, added[path])
    return added


def embed(model: SentenceEncoder, tokenizer: Tokenizer, sentences: Sequence[str]) -> Tensor:
    """Unit vectors [sentences, width]."""
    inputs = {name: torch.from_numpy(ids) for name, ids in encode(tokenizer, sentences).items()}
    return model(**inputs)["sentence_embedding"]


def contrastive_loss(vectors: Tensor, intents: Tensor) -> Tensor:
    """Supervised contrastive loss (Khosla et al. 2020, eq. 2): same intent near, others far."""
    itself = torch.eye(len(intents), dtype=torch.bool)
    logits = (vectors @ vectors.t() / TEMPERATURE).masked_fill(itself, -torch.inf)
    chance = logits.log_softmax(1).masked_fill(itself, 0.0)
    same = (intents[:, None] == intents[None, :]) & ~itself
    return -((chance * same).sum(1) / same.sum(1)).mean()


@torch.no_grad()
def measure(model: SentenceEncoder, tokenizer: Tokenizer) -> tuple[float, float]:
    """On the corpus: how often intent beats topic, and how many of the 5 nearest share the intent.

    The first figure counts triples of a message, one of the same intent on another topic and one of
    the same topic with another intent: the share in which the first is nearer.
    """
    messages = read_corpus()
    vectors = embed(model, tokenizer, [message.sentence for message in messages])
    cosines = (vectors @ vectors.t()).fill_diagonal_(-1.0)
    won = total = 0
    for i, message in enumerate(messages):
        alike = [
            j
            for j, m in enumerate(messages)
            if m.intent == message.intent and m.topic != message.topic
        ]
        near = [
            j
            for j, m in enumerate(messages)
            if m.intent != message.intent and m.topic == message.topic
        ]
        better = cosines[i, alike][:, None] > cosines[i, near][None, :]
        won += int(better.sum())
        total += better.numel()
    nearest = cosines.topk(5).indices.tolist()
    shared = sum(
        messages[j].intent == messages[i].intent for i, row in enumerate(nearest) for j in row
    )
    return won / total, shared / (5 * len(messages))


def train(model: SentenceEncoder, tokenizer: Tokenizer, layers: dict[str, LoraLinear]) -> None:
    """A few dozen steps of AdamW on the factors; everything else stays as it is."""
    chance = random.Random(SEED)
    parameters = [p for layer in layers.values() for p in (layer.a, layer.b)]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS)
    for step in range(1, STEPS + 1):
        batch = draw_batch(chance, TOPICS_PER_BATCH, SENTENCES_EACH)
        vectors = embed(model, tokenizer, [item.sentence for item in batch])
        loss = contrastive_loss(vectors, torch.tensor([item.intent for item in batch]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step == 1 or step % 6 == 0:
            print(f"step {step:3d}  loss {loss.item():.3f}", flush=True)


def save(folder: Path, layers: dict[str, LoraLinear]) -> int:
    """Write the adapter as PEFT would, and return the size of its tensors in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": "sentence-transformers/all-MiniLM-L6-v2",
        "inference_mode": True,
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "target_modules": list(TARGETS),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {}
    for path, layer in layers.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = layer.a.detach()
        tensors[f"base_model.model.{path}.lora_B.weight"] = layer.b.detach()
    return write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})


def main() -> None:
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    tokenizer = load_tokenizer(model_folder() / "tokenizer.json")
    model = load()
    before = measure(model, tokenizer)
    layers = add_lora(model)
    started = time.monotonic()
    train(model, tokenizer, layers)
    seconds = time.monotonic() - started
    after = measure(model, tokenizer)
    size_bytes = save(FOLDER, layers)
    print(
        f"\ntrained {STEPS} steps in {seconds:.0f} s, wrote {FOLDER.name}/ ({size_bytes / 1e3:.0f} kB)"
    )
    print("on corpus.txt, unseen topics and wordings        before   after")
    print(f"  intent is nearer than topic                    {before[0]:6.1%}  {after[0]:6.1%}")
    print(f"  same intent among the five nearest             {before[1]:6.1%}  {after[1]:6.1%}")


if __name__ == "__main__":
    main()
