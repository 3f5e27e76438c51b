"""Search the messages of `corpus.txt` for those nearest in meaning, by asking a running server.

    python examples/semantic_search.py "The soup was cold and the waiter was rude."

speaks the Open Inference Protocol with the standard library alone: a JSON head, then the tensors as
bytes. Run it, attach the adapter (`./graphoptctl apply examples/attach_adapter.yaml`), run it again.
"""

import argparse
import http.client
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from tokenizers import Tokenizer

if not __package__:  # run as a file: the folder above is then not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.corpus import Message, encode, load_tokenizer, model_folder, read_corpus

QUERY = "The soup was cold and the waiter was rude."
OUTPUT = "sentence_embedding"
BATCH = 16  # sentences of one request
TIMEOUT_S = 30
ATTEMPTS = 3  # searches begun again because the model changed in the middle
HEAD_LENGTH = "Inference-Header-Content-Length"


@dataclass(frozen=True, slots=True)
class Answer:
    """Vectors float32 [batch, width], and the revision and plan that computed them."""

    vectors: np.ndarray
    revision: str
    plan_id: str


class Server:
    """One connection to an Open Inference Protocol server.

    Args:
        url: `host:port`, with or without `http://`.
        model: name of the model there.

    Every method ends the program with one line when the server is absent or refuses.
    """

    def __init__(self, url: str, model: str) -> None:
        parts = urlsplit(url if "//" in url else f"//{url}")
        self.address = parts.netloc or url
        self._path = f"/v2/models/{model}/infer"
        try:
            self._connection = http.client.HTTPConnection(self.address, timeout=TIMEOUT_S)
        except http.client.InvalidURL as fault:
            raise SystemExit(f"--url: {fault}") from None

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def infer(self, inputs: Mapping[str, np.ndarray]) -> Answer:
        """Run the model on int64 tensors."""
        head = {
            "inputs": [
                {
                    "name": name,
                    "shape": list(tensor.shape),
                    "datatype": "INT64",
                    "parameters": {"binary_data_size": tensor.nbytes},
                }
                for name, tensor in inputs.items()
            ],
            "outputs": [{"name": OUTPUT, "parameters": {"binary_data": True}}],
        }
        text = json.dumps(head).encode()
        body = b"".join([text, *(tensor.astype("<i8").tobytes() for tensor in inputs.values())])
        headers = {"Content-Type": "application/octet-stream", HEAD_LENGTH: str(len(text))}
        try:
            self._connection.request("POST", self._path, body, headers)
            response = self._connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException) as fault:
            reason = fault.strerror if isinstance(fault, OSError) and fault.strerror else str(fault)
            raise SystemExit(
                f"no server answers at {self.address} ({reason or type(fault).__name__}): "
                "start one with `make serve`, or name it with --url"
            ) from None
        if response.status != http.client.OK:
            raise SystemExit(f"{self.address} answers {response.status}: {_reason(content)}")
        return _answer(content, int(response.headers[HEAD_LENGTH]))


def search(server: Server, tokenizer: Tokenizer, query: str, messages: Sequence[Message]) -> Answer:
    """The query's vector, then one for each message, all from one revision of the model."""
    sentences = [query, *(message.sentence for message in messages)]
    for _ in range(ATTEMPTS):
        answers = [
            server.infer(encode(tokenizer, sentences[start : start + BATCH]))
            for start in range(0, len(sentences), BATCH)
        ]
        if len({answer.revision for answer in answers}) == 1:
            vectors = np.concatenate([answer.vectors for answer in answers])
            return Answer(vectors, answers[0].revision, answers[-1].plan_id)
    raise SystemExit("the model changed during each search: try again in a moment")


def table(answer: Answer, messages: Sequence[Message], top: int) -> str:
    """The nearest messages, best first."""
    scores = answer.vectors[1:] @ answer.vectors[0]
    best = np.argsort(-scores, kind="stable")[:top]
    topics = max(len(message.topic) for message in messages)
    intents = max(len(message.intent) for message in messages)
    lines = [f"score  {'topic':{topics}}  {'intent':{intents}}  sentence"]
    for i in best:
        message = messages[i]
        lines.append(
            f"{scores[i]:5.3f}  {message.topic:{topics}}  {message.intent:{intents}}  {message.sentence}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Find the messages nearest in meaning.")
    parser.add_argument("query", nargs="?", default=QUERY, help=f"default: {QUERY!r}")
    parser.add_argument("--url", default="127.0.0.1:8080", help="default: %(default)s")
    parser.add_argument("--model", default="minilm", help="default: %(default)s")
    parser.add_argument("--top", type=int, default=5, help="rows to print (default: %(default)s)")
    options = parser.parse_args()
    tokenizer = load_tokenizer(model_folder() / "tokenizer.json")
    messages = read_corpus()
    with closing(Server(options.url, options.model)) as server:
        answer = search(server, tokenizer, options.query, messages)
    print(f"query: {options.query}\n")
    print(table(answer, messages, options.top))
    print(f"\nanswered by {options.model} revision {answer.revision}, plan {answer.plan_id}")


def _answer(content: bytes, head_bytes: int) -> Answer:
    head = json.loads(content[:head_bytes])
    offset = head_bytes
    for output in head["outputs"]:
        size_bytes = output["parameters"]["binary_data_size"]
        if output["name"] == OUTPUT:
            vectors = np.frombuffer(content[offset : offset + size_bytes], "<f4").reshape(
                output["shape"]
            )
            plan_id = head.get("parameters", {}).get("plan_id", "unknown")
            return Answer(vectors, str(head.get("model_version", "unknown")), str(plan_id))
        offset += size_bytes
    raise SystemExit(f"the model has no output {OUTPUT!r}")


def _reason(content: bytes) -> str:
    try:
        return str(json.loads(content)["error"])
    except (ValueError, KeyError, TypeError):
        return content[:200].decode(errors="replace").strip() or "no reason given"


if __name__ == "__main__":
    main()
