"""An adapter that cannot be reproduced exactly is refused, naming place and remedy."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from adapters.families import build, save_adapter, sites_of
from graphopt.adapters import LinearSite, LoraAdapter, adapter_files, read_adapter
from graphopt.adapters.config import HONOURED, IGNORED, REFUSED, parse_config
from graphopt.errors import AdapterError
from graphopt.safetensors_file import read_tensors, write_tensors

torch.set_num_threads(1)

BASE: dict[str, Any] = {"peft_type": "LORA", "target_modules": ["query", "value"]}
Q0 = "encoder.layer.0.attention.self.query"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build("bert")


@pytest.fixture
def folder(model: nn.Module, tmp_path: Path) -> Path:
    save_adapter(model, peft.LoraConfig(target_modules=["query", "value"], r=2), tmp_path / "tone")
    return tmp_path / "tone"


def edit_config(folder: Path, **fields: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = read_tensors(path, mapped=False)
    change(tensors)
    write_tensors(path, tensors)


def read(folder: Path) -> LoraAdapter:
    return read_adapter(adapter_files(folder), label="tone")


def resolve(folder: Path, model: nn.Module) -> Any:
    return read(folder).resolve(sites_of(model), model.state_dict())


def refusal(action: Callable[[], object]) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        action()
    assert caught.value.where
    assert caught.value.remedy
    return caught.value


def test_every_field_of_the_installed_peft_is_in_exactly_one_list() -> None:
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)} - {"init_lora_weights"}
    listed = [*HONOURED, *IGNORED, *REFUSED]
    assert fields <= set(listed)
    assert len(listed) == len(set(listed))


def test_a_config_that_peft_writes_by_default_is_accepted() -> None:
    defaults = peft.LoraConfig(target_modules=["query"]).to_dict()
    settings = parse_config({**defaults, "target_modules": ["query"]}, "x")
    assert (settings.r, settings.lora_alpha, settings.bias) == (8, 8.0, "none")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("lora_bias", True),
        ("trainable_token_indices", [1, 2]),
        ("target_parameters", ["experts.up"]),
        ("megatron_config", {"tp": 2}),
        ("alora_invocation_tokens", [1]),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {"x": 1}),
        ("use_bdlora", {"nblocks": 2}),
        ("use_qalora", True),
        ("monteclora_config", {"num_samples": 8}),
        ("ensure_weight_tying", True),
        ("a_field_of_tomorrow", "on"),
    ],
)
def test_a_field_that_changes_answers_is_refused_by_name(field: str, value: object) -> None:
    error = refusal(lambda: parse_config({**BASE, field: value}, "x"))
    assert [place for place, _ in error.detail] == [field]
    assert field in str(error)
    parse_config({**BASE, field: None}, "x")


@pytest.mark.parametrize("init", [True, False, None, "Gaussian", "eva", "orthogonal", "mica"])
def test_an_initialiser_whose_outcome_is_in_the_factors_is_accepted(init: object) -> None:
    assert parse_config({**BASE, "init_lora_weights": init}, "x").r == 8


@pytest.mark.parametrize(
    "init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", 1, "x"]
)
def test_an_initialiser_that_changes_base_weights_is_refused_by_name(init: object) -> None:
    error = refusal(lambda: parse_config({**BASE, "init_lora_weights": init}, "x"))
    assert "init_lora_weights" in str(error)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"target_modules": None}, "target_modules: missing"),
        ({"target_modules": [1]}, "target_modules"),
        ({"r": 0}, "rank 0"),
        ({"r": True}, "rank True"),
        ({"r": 2.0}, "rank 2.0"),
        ({"lora_alpha": "8"}, "lora_alpha"),
        ({"lora_alpha": True}, "lora_alpha"),
        ({"use_rslora": 1}, "use_rslora"),
        ({"bias": "some"}, "bias"),
        ({"rank_pattern": ["query"]}, "rank_pattern"),
        ({"rank_pattern": {"query": -1}}, "rank -1"),
        ({"layers_to_transform": ["1"]}, "layers_to_transform"),
        ({"layers_pattern": "layer"}, "layers_pattern"),
        ({"target_modules": ".*query", "layers_to_transform": [1]}, "layers_to_transform"),
        ({"modules_to_save": "pooler"}, "modules_to_save"),
    ],
)
def test_a_field_of_the_wrong_kind_is_refused(fields: Mapping[str, object], words: str) -> None:
    assert words in str(refusal(lambda: parse_config({**BASE, **fields}, "x")))


def test_a_hostile_expression_is_refused_and_does_not_hang(folder: Path) -> None:
    edit_config(folder, target_modules="(" * 40 + "a*" + ")*" * 40 + "b")
    error = refusal(lambda: read(folder).resolve({Q0: site(Q0)}, {}))
    assert "target_modules" in str(error) or "no place" in str(error)
    for bad in ("(", "(?i)query", r"(a)\1", "(?>a+)b", "a" * 5000):
        edit_config(folder, target_modules=bad)
        assert refusal(lambda: read(folder)).where == "tone/adapter_config.json: target_modules"


def site(name: str) -> LinearSite:
    return LinearSite(name, f"{name}.weight", f"{name}.bias", 16, 16)


def test_pickled_weights_are_refused_with_the_conversion(model: nn.Module, folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04")
    error = refusal(lambda: read(folder))
    assert error.where == "tone/adapter_model.bin"
    assert "safetensors" in error.remedy


def test_a_missing_file_or_folder_is_named(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    assert refusal(lambda: read(folder)).where == "tone/adapter_model.safetensors"
    (folder / "adapter_config.json").unlink()
    assert refusal(lambda: read(folder)).where == "tone/adapter_config.json"
    assert refusal(lambda: adapter_files(folder / "absent")).message == "not a folder"


def test_truncated_weights_and_links_are_refused(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-3])
    assert "cut off" in str(refusal(lambda: read(folder)))
    (folder / "kept").write_bytes(whole)
    weights.unlink()
    weights.symlink_to(folder / "kept")
    assert "symbolic link" in str(refusal(lambda: read(folder)))


@pytest.mark.parametrize(
    "text", [b"{", b"[]", b'{"r": 1, "r": 2}', b'{"r": NaN}', b"\xff", b"[" * 9999]
)
def test_a_config_that_is_not_strict_json_is_refused(text: bytes, folder: Path) -> None:
    (folder / "adapter_config.json").write_bytes(text)
    assert refusal(lambda: read(folder)).where == "tone/adapter_config.json"


def test_descriptors_are_enough(model: nn.Module, folder: Path) -> None:
    opened = {name: os.open(path, os.O_RDONLY) for name, path in adapter_files(folder).items()}
    try:
        adapter = read_adapter(opened)
    finally:
        for descriptor in opened.values():
            os.close(descriptor)
    assert len(adapter.resolve(sites_of(model), model.state_dict()).pairs) == 6


WRAPPED = f"base_model.model.{Q0}.lora_"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{WRAPPED}A.weight"), "lora_A is missing"),
        (lambda t: t.pop(f"{WRAPPED}B.weight"), "lora_B is missing"),
        (lambda t: t.update({f"{WRAPPED}magnitude_vector": torch.ones(16)}), "DoRA"),
        (lambda t: t.update({f"{WRAPPED}B.bias": torch.ones(16)}), "lora_bias"),
        (lambda t: t.update({f"{WRAPPED}C.weight": torch.ones(16)}), "no LoRA tensor"),
        (lambda t: t[f"{WRAPPED}A.weight"].fill_(float("nan")), "NaN"),
        (lambda t: t.update({f"{WRAPPED}A.weight": torch.ones(2, 16).int()}), "floating"),
        (lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(2, 16)}), "second A"),
    ],
)
def test_a_tensor_without_meaning_is_refused_by_name(
    change: Callable[[dict[str, torch.Tensor]], object], words: str, folder: Path
) -> None:
    edit_tensors(folder, change)
    error = refusal(lambda: read(folder))
    assert words in str(error)
    assert all(Q0 in place for place, _ in error.detail)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: t.update({"base_model.model.embeddings.LayerNorm.weight": torch.ones(16)}),
            "left over",
        ),
        (lambda t: t.update({f"base_model.model.{Q0}.bias": torch.ones(16)}), "left over"),
        (lambda t: t.update({"base_model.model.head.weight": torch.ones(16)}), "head.weight"),
        (lambda t: t.update({f"{WRAPPED}A.weight": torch.ones(3, 16)}), "has shape [3, 16]"),
        (lambda t: t.update({f"{WRAPPED}B.weight": torch.ones(8, 2)}), "need [16, 2]"),
        (
            lambda t: [t.pop(f"{WRAPPED}A.weight"), t.pop(f"{WRAPPED}B.weight")],
            "targets it, the file has no tensors",
        ),
    ],
)
def test_every_tensor_and_target_must_meet_its_counterpart(
    change: Callable[[dict[str, torch.Tensor]], object], words: str, model: nn.Module, folder: Path
) -> None:
    edit_tensors(folder, change)
    error = refusal(lambda: resolve(folder, model))
    assert words in str(error)
    assert len(error.detail) == 1


def test_tensors_outside_the_configs_targets_are_refused(model: nn.Module, folder: Path) -> None:
    edit_config(folder, target_modules=["value"])
    error = refusal(lambda: resolve(folder, model))
    assert {place for place, _ in error.detail} == {
        f"encoder.layer.{i}.attention.self.query" for i in range(3)
    }


def test_a_missing_saved_module_is_named(model: nn.Module, tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["query"], modules_to_save=["pooler"])
    save_adapter(model, config, tmp_path)
    edit_tensors(tmp_path, lambda t: t.pop("base_model.model.pooler.dense.bias"))
    error = refusal(lambda: resolve(tmp_path, model))
    assert [place for place, _ in error.detail] == ["pooler.dense.bias"]


def test_an_adapter_for_another_model_lists_the_absent_modules(
    model: nn.Module, folder: Path
) -> None:
    sites = {name: s for name, s in sites_of(model).items() if ".layer.2." not in name}
    error = refusal(lambda: read(folder).resolve(sites, model.state_dict()))
    assert [place for place, _ in error.detail] == [
        "encoder.layer.2.attention.self.query",
        "encoder.layer.2.attention.self.value",
    ]


def test_a_layer_of_an_unsupported_kind_is_named_as_such(model: nn.Module, folder: Path) -> None:
    sites = {name: s for name, s in sites_of(model).items() if name != Q0}
    error = refusal(lambda: read(folder).resolve(sites, model.state_dict()))
    assert error.detail == ((Q0, "is there, but it is not a layer that an adapter can change"),)


def renamed(
    model: nn.Module, rename: Callable[[str], str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    sites = {
        rename(name): dataclasses.replace(
            s, module=rename(name), weight=rename(s.weight), bias=rename(s.bias) if s.bias else None
        )
        for name, s in sites_of(model).items()
    }
    return sites, {rename(name): tensor for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("prefix", ["bert.", "0.auto_model.", "model.encoder_stack.", "_orig_mod."])
def test_an_adapter_of_the_bare_encoder_fits_a_wrapped_one(
    prefix: str, model: nn.Module, folder: Path
) -> None:
    resolved = read(folder).resolve(*renamed(model, lambda name: prefix + name))
    assert {pair.module for pair in resolved.pairs} == {
        f"{prefix}encoder.layer.{i}.attention.self.{leaf}"
        for i in range(3)
        for leaf in ("query", "value")
    }


def test_an_adapter_of_a_wrapper_fits_the_bare_encoder(model: nn.Module, tmp_path: Path) -> None:
    wrapper = build("bert_classifier")
    save_adapter(wrapper, peft.LoraConfig(target_modules=["query"], bias="lora_only"), tmp_path)
    resolved = resolve(tmp_path, model)
    assert [pair.module for pair in resolved.pairs] == [
        f"encoder.layer.{i}.attention.self.query" for i in range(3)
    ]
    assert len(resolved.replaced) == 3
    sites, constants = renamed(model, lambda name: f"0.auto_model.{name}")
    assert read(tmp_path).resolve(sites, constants).placement.strip == "bert"


def test_two_encoders_make_a_bare_adapter_ambiguous_and_both_are_listed(
    model: nn.Module, folder: Path
) -> None:
    sites, constants = renamed(model, lambda name: f"query_model.{name}")
    others, more = renamed(model, lambda name: f"doc_model.{name}")
    error = refusal(lambda: read(folder).resolve({**sites, **others}, {**constants, **more}))
    assert {place for place, _ in error.detail} == {f"query_model.{Q0}", f"doc_model.{Q0}"}
    edit_config(folder, target_modules=r"encoder\..*(query|value)")
    plain = {**sites_of(model), **sites, **others}
    resolved = read(folder).resolve(plain, {**model.state_dict(), **constants, **more})
    assert Q0 in {pair.module for pair in resolved.pairs}  # the names as they are always win


def test_a_layer_is_never_moved_onto_another(model: nn.Module, tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["query"], layers_to_transform=[2])
    save_adapter(model, config, tmp_path)
    sites = {name: s for name, s in sites_of(model).items() if ".layer.2." not in name}
    error = refusal(lambda: read(tmp_path).resolve(sites, model.state_dict()))
    assert [place for place, _ in error.detail] == ["encoder.layer.2.attention.self.query"]
