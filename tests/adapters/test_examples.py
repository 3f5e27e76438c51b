"""The example: an encoder equal to transformers', an adapter that peft loads, a client that asks."""

import json
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import examples
from adapters.families import quiet, sites_of
from examples.corpus import encode, load_tokenizer, read_corpus
from examples.minilm import BertSizes, SentenceEncoder
from examples.semantic_search import HEAD_LENGTH, Server, search, table
from examples.training_sentences import INTENTS, PHRASES, TOPICS
from graphopt.adapters import adapter_files, read_adapter

torch.set_num_threads(1)

EXAMPLES = Path(next(iter(examples.__path__)))
ADAPTER = EXAMPLES / "adapters" / "intent"


def bert(**sizes: int) -> transformers.BertModel:
    torch.manual_seed(1)
    return transformers.BertModel(transformers.BertConfig(**sizes), add_pooling_layer=False).eval()


def lean(reference: transformers.BertModel) -> SentenceEncoder:
    config = reference.config
    model = SentenceEncoder(
        BertSizes(**{name: getattr(config, name) for name in BertSizes.__dataclass_fields__})
    )
    model.load_state_dict(reference.state_dict())
    return model.eval()


SMALL = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
MINILM = {
    "vocab_size": 30,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 30, (3, 7))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] + [0] * 6])
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


def pooled(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weights = mask.unsqueeze(-1).float()
    return torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


@torch.no_grad()
def test_the_lean_encoder_has_the_names_and_answers_of_transformers_bert() -> None:
    reference = bert(**SMALL)
    model, inputs = lean(reference), batch()
    assert model.state_dict().keys() == reference.state_dict().keys()
    want = pooled(reference(**inputs).last_hidden_state, inputs["attention_mask"])
    torch.testing.assert_close(model(**inputs)["sentence_embedding"], want, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_the_lean_encoder_exports_with_free_batch_and_length() -> None:
    model, inputs = lean(bert(**SMALL)), batch()
    dims = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("seq", min=2, max=512)}
    with quiet():
        program = torch.export.export(model, (), inputs, dynamic_shapes=dict.fromkeys(inputs, dims))
    longer = {name: tensor.repeat(2, 3) for name, tensor in inputs.items()}
    want = model(**longer)["sentence_embedding"]
    torch.testing.assert_close(program.module()(**longer)["sentence_embedding"], want)


@torch.no_grad()
def test_the_committed_adapter_is_one_that_peft_loads_and_reads_as_we_do() -> None:
    reference, inputs = bert(**MINILM), batch()
    model = lean(reference)
    resolved = read_adapter(adapter_files(ADAPTER)).resolve(sites_of(model), model.state_dict())
    assert len(resolved.pairs) == 12
    assert not resolved.replaced
    for pair in resolved.pairs:
        model.get_submodule(pair.module).weight += pair.delta()
    with quiet():
        adapted = peft.PeftModel.from_pretrained(reference, ADAPTER).eval()
        hidden = adapted(**inputs).last_hidden_state
    want = pooled(hidden, inputs["attention_mask"])
    torch.testing.assert_close(model(**inputs)["sentence_embedding"], want, rtol=1e-4, atol=1e-5)
    assert (ADAPTER / "adapter_model.safetensors").stat().st_size < 1 << 20


def test_the_corpus_is_balanced_and_shares_nothing_with_the_training_sentences() -> None:
    messages = read_corpus()
    assert len(messages) == len({m.sentence for m in messages}) == 80
    for intent in INTENTS:
        assert sum(m.intent == intent for m in messages) == 20
    assert not {m.topic for m in messages} & TOPICS.keys()
    texts = [text for phrases in PHRASES.values() for text in phrases]
    phrases = {part.strip(" .?") for text in texts for part in text.split("{0}")}
    assert not [m for m in messages for part in phrases if len(part) > 12 and part in m.sentence]


def small_tokenizer(folder: Path) -> Tokenizer:
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "soup", "cold", "train", "late"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder / "tokenizer.json")


def test_sentences_are_padded_to_the_longest_of_the_batch(tmp_path: Path) -> None:
    inputs = encode(small_tokenizer(tmp_path), ["soup", "train late"])
    assert inputs["input_ids"].tolist() == [[2, 0], [4, 5]]
    assert inputs["attention_mask"].tolist() == [[1, 0], [1, 1]]
    assert {tensor.dtype for tensor in inputs.values()} == {np.dtype(np.int64)}


class Handler(BaseHTTPRequestHandler):
    """A server of the protocol: bags of words for embeddings, a new revision on demand."""

    protocol_version = "HTTP/1.1"
    revisions: Iterator[int]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path != "/v2/models/minilm/infer":
            return self.reply(404, json.dumps({"error": "no model named other"}).encode(), None)
        length = int(self.headers[HEAD_LENGTH])
        head, rest = json.loads(body[:length]), body[length:]
        tensors = {}
        for item in head["inputs"]:
            size = item["parameters"]["binary_data_size"]
            tensors[item["name"]] = np.frombuffer(rest[:size], "<i8").reshape(item["shape"])
            rest = rest[size:]
        assert not rest
        ids = tensors["input_ids"]
        vectors = np.stack(
            [np.bincount(row, minlength=8)[:8] for row in ids * tensors["attention_mask"]]
        )
        vectors[:, 0] = 0
        vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype("<f4")
        output = {
            "name": "sentence_embedding", "shape": list(vectors.shape), "datatype": "FP32",
            "parameters": {"binary_data_size": vectors.nbytes},
        }  # fmt: skip
        answer = {
            "model_name": "minilm", "model_version": str(next(self.revisions)),
            "parameters": {"plan_id": "p1"}, "outputs": [output],
        }  # fmt: skip
        text = json.dumps(answer).encode()
        return self.reply(200, text + vectors.tobytes(), len(text))

    def reply(self, status: int, body: bytes, head_bytes: int | None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if head_bytes is not None:
            self.send_header(HEAD_LENGTH, str(head_bytes))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Keep the test's output clean."""


@contextmanager
def serving(revisions: list[int]) -> Iterator[str]:
    Handler.revisions = iter(revisions)
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_the_client_finds_the_nearest_and_names_revision_and_plan(tmp_path: Path) -> None:
    messages = read_corpus()
    tokenizer = small_tokenizer(tmp_path)
    with serving([3] * 6) as url, closing(Server(url, "minilm")) as server:
        answer = search(server, tokenizer, "soup cold", messages)
    assert (answer.revision, answer.plan_id) == ("3", "p1")
    lines = table(answer, messages, 4).splitlines()
    assert len(lines) == 5
    assert "soup" in lines[1]


def test_a_search_is_begun_again_when_the_model_changes_meanwhile(tmp_path: Path) -> None:
    tokenizer = small_tokenizer(tmp_path)
    with serving([3, 3, 4, 4, 4, 4] + [4] * 6) as url, closing(Server(url, "minilm")) as server:
        answer = search(server, tokenizer, "late train", read_corpus())
    assert answer.revision == "4"


def test_an_absent_server_or_model_is_one_clear_line() -> None:
    inputs = {"input_ids": np.zeros((1, 2), np.int64)}
    unknown = pytest.raises(SystemExit, match="404: no model named other")
    with serving([]) as url, closing(Server(url, "other")) as server, unknown:
        server.infer(inputs)
    absent = pytest.raises(SystemExit, match=r"no server answers at .* start one with `make serve`")
    with closing(Server(url, "minilm")) as server, absent:
        server.infer(inputs)
