"""Adapters on live graphs: peft's own outputs are the oracle, and taking one off leaves no trace."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import graphopt
from adapters.families import build, quiet, save_adapter
from graphopt.errors import AdapterError, GraphoptError
from graphopt.macros import AttachAdapter, DetachAdapter

IDS = torch.tensor([[3, 5, 7, 9, 2], [4, 4, 8, 1, 6]])
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
FEEDS: dict[str, dict[str, torch.Tensor]] = {
    "bert_classifier": {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)},
    "gpt2": {"input_ids": IDS},
    "llama": {"input_ids": IDS},
    "vit": {"pixel_values": PIXELS},
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert, all linear": (
        "bert_classifier",
        {"target_modules": "all-linear", "task_type": "SEQ_CLS"},
    ),
    "bert, saved head and biases": (
        "bert_classifier",
        {
            "target_modules": ["query", "value"],
            "modules_to_save": ["classifier"],
            "bias": "lora_only",
        },
    ),
    "bert, rank patterns and rslora": (
        "bert_classifier",
        {
            "target_modules": ["query", "dense"],
            "rank_pattern": {"query": 2},
            "alpha_pattern": {"dense": 3},
            "use_rslora": True,
        },
    ),
    "bert, embeddings": ("bert_classifier", {"target_modules": ["word_embeddings", "query"]}),
    "gpt2, transposed": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "llama, one layer": (
        "llama",
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    ),
    "vit, expression": ("vit", {"target_modules": r".*\.(q_proj|v_proj|query|value)"}),
}


@pytest.fixture(scope="module")
def imported() -> Callable[[str], tuple[torch.nn.Module, graphopt.Graph]]:
    known: dict[str, tuple[torch.nn.Module, graphopt.Graph]] = {}

    def get(family: str) -> tuple[torch.nn.Module, graphopt.Graph]:
        if family not in known:
            model = build(family)
            if hasattr(model.config, "use_cache"):
                model.config.use_cache = False
            known[family] = (
                model,
                graphopt.from_torch(model, FEEDS[family], dynamic_shapes="batch", name="model"),
            )
        return known[family]

    return get


@pytest.fixture
def open_engine() -> Iterator[Callable[[graphopt.Graph], graphopt.Engine]]:
    torch.set_num_threads(1)
    opened: list[graphopt.Engine] = []

    def make(graph: graphopt.Graph) -> graphopt.Engine:
        opened.append(graphopt.Engine(graph, graphopt.EngineSettings(intra_op=1, builder=False)))
        return opened[-1]

    yield make
    for engine in opened:
        engine.close()


def lora(**settings: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**({"r": 4, "lora_alpha": 8} | settings))


def peft_logits(
    model: torch.nn.Module, folder: Path, feeds: dict[str, torch.Tensor]
) -> torch.Tensor:
    with quiet(), torch.inference_mode():
        wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder)
        return wrapped.eval()(**feeds).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("case", CONFIGS)
def test_an_attached_adapter_answers_as_peft_does(
    case: str, imported: Any, open_engine: Any, tmp_path: Path
) -> None:
    family, settings = CONFIGS[case]
    model, graph = imported(family)
    save_adapter(model, lora(**settings), tmp_path / "adapter")
    engine = open_engine(graph)
    before = engine.run(FEEDS[family]).outputs["logits"]
    engine.apply(graphopt.Delta([AttachAdapter("legal", tmp_path / "adapter")]))
    wanted = peft_logits(model, tmp_path / "adapter", FEEDS[family])
    unfolded = engine.run(FEEDS[family]).outputs["logits"]
    torch.testing.assert_close(unfolded, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, wanted, rtol=1e-3, atol=1e-3)
    assert engine.settle(60)
    torch.testing.assert_close(
        engine.run(FEEDS[family]).outputs["logits"], wanted, rtol=1e-4, atol=1e-4
    )
    engine.apply(graphopt.Delta([DetachAdapter("legal")]))
    assert engine.graph.hash == graph.hash


def test_adapters_come_and_go_in_any_order(imported: Any, open_engine: Any, tmp_path: Path) -> None:
    model, graph = imported("bert_classifier")
    feeds = FEEDS["bert_classifier"]
    names = ("a", "b", "c")
    for seed, name in enumerate(names):
        save_adapter(model, lora(target_modules=["query", "value"]), tmp_path / name, seed=seed)
    engine = open_engine(graph)
    assert engine.settle(60)
    before = engine.run(feeds).outputs["logits"]
    attach = {name: graphopt.Delta([AttachAdapter(name, tmp_path / name)]) for name in names}
    detach = {name: graphopt.Delta([DetachAdapter(name)]) for name in names}
    engine.apply(attach["b"])
    only_b = engine.graph.hash
    engine.apply(attach["a"])
    engine.apply(attach["c"])
    all_three = engine.run(feeds).outputs["logits"]
    engine.apply(detach["a"])
    engine.apply(detach["c"])
    assert engine.graph.hash == only_b
    engine.apply(attach["a"])
    engine.apply(attach["c"])
    again = engine.run(feeds).outputs["logits"]
    torch.testing.assert_close(again, all_three, rtol=1e-5, atol=1e-5)
    for name in ("b", "c", "a"):
        engine.apply(detach[name])
    assert engine.graph.hash == graph.hash
    assert engine.settle(60)
    assert torch.equal(engine.run(feeds).outputs["logits"], before)


def test_the_scale_of_a_delta_multiplies_the_adapters_own(
    imported: Any, open_engine: Any, tmp_path: Path
) -> None:
    model, graph = imported("bert_classifier")
    save_adapter(model, lora(target_modules=["query"]), tmp_path / "plain")
    save_adapter(model, lora(target_modules=["query"], lora_alpha=24), tmp_path / "thrice")
    engine = open_engine(graph)
    engine.apply(graphopt.Delta([AttachAdapter("x", tmp_path / "plain", scale=3.0)]))
    wanted = peft_logits(model, tmp_path / "thrice", FEEDS["bert_classifier"])
    torch.testing.assert_close(
        engine.run(FEEDS["bert_classifier"]).outputs["logits"], wanted, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    "what",
    [
        "absent modules",
        "attached twice",
        "two saved heads",
        "bad name",
        "missing file",
        "truncated",
    ],
)
def test_an_adapter_that_cannot_be_attached_leaves_the_model_alone(
    what: str, imported: Any, open_engine: Any, tmp_path: Path
) -> None:
    model, graph = imported("bert_classifier")
    engine = open_engine(graph)
    folder, name = tmp_path / "adapter", "second"
    settings: dict[str, Any] = {"target_modules": ["query"]}
    if what == "absent modules":
        save_adapter(build("llama"), lora(target_modules=["q_proj"]), folder)
    elif what == "two saved heads":
        settings["modules_to_save"] = ["classifier"]
        save_adapter(model, lora(**settings), folder)
        engine.apply(graphopt.Delta([AttachAdapter("first", folder)]))
    else:
        save_adapter(model, lora(**settings), folder)
    if what == "attached twice":
        engine.apply(graphopt.Delta([AttachAdapter("second", folder)]))
    elif what == "bad name":
        name = "a/b"
    elif what == "missing file":
        (folder / "adapter_config.json").unlink()
    elif what == "truncated":
        weights = folder / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    digest, revision = engine.graph.hash, engine.revision
    with pytest.raises(GraphoptError) as caught:
        engine.apply(graphopt.Delta([AttachAdapter(name, folder)]))
    assert isinstance(caught.value, AdapterError)
    assert caught.value.where
    assert (engine.graph.hash, engine.revision) == (digest, revision)


def test_detaching_what_is_not_attached_names_what_is(
    imported: Any, open_engine: Any, tmp_path: Path
) -> None:
    model, graph = imported("bert_classifier")
    save_adapter(model, lora(target_modules=["query"]), tmp_path / "adapter")
    engine = open_engine(graph)
    engine.apply(graphopt.Delta([AttachAdapter("legal", tmp_path / "adapter")]))
    with pytest.raises(AdapterError, match="did you mean legal"):
        engine.apply(graphopt.Delta([DetachAdapter("legl")]))
