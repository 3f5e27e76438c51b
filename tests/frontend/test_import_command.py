"""`graphopt import`: real folders, real files, exit codes 0, 1 and 2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from frontend import zoo
from graphopt.bundle import load_bundle
from graphopt.frontend.cli import main
from graphopt.frontend.huggingface import from_folder, from_model
from graphopt.frontend.torch_export import from_torch

ROOT = Path(__file__).parents[2]
FACTORY = """
import torch
def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 2)), torch.randn(1, 4), "batch"
def broken():
    return 1 / 0
def wrong():
    return torch.nn.Linear(4, 2)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf") / "tiny"
    zoo.build("bert-classifier").save_pretrained(path)
    return path


def test_a_transformers_folder_becomes_a_bundle(folder, tmp_path, capsys):
    bundle = tmp_path / "tiny.bundle"
    assert main(["import", f"hf:{folder}", "-o", str(bundle)]) == 0
    graph = load_bundle(bundle)
    assert graph.name == "tiny"
    weight = zoo.build("bert-classifier").classifier.weight
    assert torch.equal(graph.constants["classifier.weight"].tensor, weight)
    captured = capsys.readouterr()
    assert "nodes" in captured.out
    assert "input_ids i64[batch, seq], attention_mask i64[batch, seq]" in captured.out
    assert "seq 1 to 512" in captured.out
    assert "writing" in captured.err


def test_a_task_picks_the_class_and_inputs_can_be_named(folder):
    graph = from_folder(
        folder, task="feature-extraction", inputs=("input_ids", "token_type_ids"), name="encoder"
    )
    assert [name for name, _ in graph.inputs] == ["input_ids", "token_type_ids"]
    assert [name for name, _ in graph.outputs] == ["last_hidden_state", "pooler_output"]


def refused(capsys, tmp_path, source, *options):
    assert main(["import", source, "-o", str(tmp_path / "out"), *options]) == 1
    assert not (tmp_path / "out").exists()
    return capsys.readouterr().err


def test_a_head_that_the_folder_does_not_hold_is_refused(folder, tmp_path, capsys):
    error = refused(capsys, tmp_path, f"hf:{folder}", "--task", "question-answering")
    assert "no weights for qa_outputs" in error
    assert "unknown task" in refused(capsys, tmp_path, f"hf:{folder}", "--task", "poetry")


def test_pickled_weights_are_refused_with_the_remedy(folder, tmp_path, capsys):
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_bytes((folder / "config.json").read_bytes())
    torch.save(zoo.build("bert-classifier").state_dict(), pickled / "pytorch_model.bin")
    error = refused(capsys, tmp_path, f"hf:{pickled}")
    assert "pytorch_model.bin" in error
    assert "safe_serialization=True" in error


def test_folders_that_are_no_models_are_refused(tmp_path, capsys):
    assert "no such folder" in refused(capsys, tmp_path, f"hf:{tmp_path / 'absent'}")
    assert "config.json" in refused(capsys, tmp_path, f"hf:{tmp_path}")


def test_a_truncated_weights_file_is_refused(folder, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((folder / "config.json").read_bytes())
    data = (folder / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert "transformers cannot load it" in refused(capsys, tmp_path, f"hf:{broken}")


def test_encoder_decoders_are_refused_with_the_way_around():
    config = transformers.T5Config(
        d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=50
    )
    with pytest.raises(Exception, match="encoder-decoder"):
        from_model(transformers.T5Model(config), "t5")


def test_a_factory_in_the_current_folder_is_called_by_a_real_process(tmp_path):
    (tmp_path / "mynet.py").write_text(FACTORY)
    command = [sys.executable, "-m", "graphopt.frontend.cli", "import", "mynet:net", "-o", "net"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    graph = load_bundle(tmp_path / "net")
    torch.manual_seed(0)
    assert graph == from_torch(
        torch.nn.Sequential(torch.nn.Linear(4, 2)), torch.randn(1, 4), "batch", "net"
    )


def test_factories_that_fail_are_refused_by_name(tmp_path, capsys, monkeypatch):
    (tmp_path / "othernet.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    error = refused(capsys, tmp_path, "othernet:broken")
    assert "ZeroDivisionError" in error
    assert "othernet.py:7" in error
    assert "returned Linear" in refused(capsys, tmp_path, "othernet:wrong")
    assert "AttributeError" in refused(capsys, tmp_path, "othernet:absent")
    assert "ModuleNotFoundError" in refused(capsys, tmp_path, "no_such_module:net")


def test_a_pt2_file_is_imported_with_a_warning(tmp_path, capsys):
    program = torch.export.export(torch.nn.Linear(4, 2), (torch.randn(2, 4),))
    torch.export.save(program, tmp_path / "line.pt2")
    assert main(["import", str(tmp_path / "line.pt2"), "-o", str(tmp_path / "line")]) == 0
    assert "can run code" in capsys.readouterr().err
    graph = load_bundle(tmp_path / "line")
    assert set(graph.constants) == {"weight", "bias"}
    assert graph.name == "line"


def test_a_damaged_or_absent_pt2_is_refused(tmp_path, capsys):
    (tmp_path / "bad.pt2").write_bytes(b"PK\x03\x04 not really")
    assert "torch cannot read it" in refused(capsys, tmp_path, str(tmp_path / "bad.pt2"))
    assert "no such file" in refused(capsys, tmp_path, str(tmp_path / "absent.pt2"))


def test_an_existing_bundle_is_replaced_only_on_request(tmp_path, capsys, monkeypatch):
    (tmp_path / "thirdnet.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    command = ["import", "thirdnet:net", "-o", str(tmp_path / "net")]
    assert [main(command), main(command), main([*command, "--replace"])] == [0, 1, 0]
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["import"], ["import", "model.onnx", "-o", "x"], ["import", "hf:x"], ["fly"]]
)
def test_wrong_usage_exits_with_two(arguments, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(arguments)
    assert leaving.value.code == 2
    assert "usage: graphopt" in capsys.readouterr().err


def test_help_does_not_wait_for_torch():
    code = "import sys, graphopt.frontend.cli; print('torch' in sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
