"""Bundles: what is saved loads as the same graph, and nothing damaged or unsafe loads at all."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from text_graphs import run, small_model

from graphopt import bundle
from graphopt.bundle import load_bundle, read_manifest, save_bundle
from graphopt.constants import constant_of
from graphopt.errors import BundleError, GraphoptError, LimitError
from graphopt.graph import Const, Constant, Graph, Ref
from graphopt.nodes import make_node
from graphopt.safetensors_file import read_header, read_tensors, write_tensors
from graphopt.text import parse_graph, print_graph
from graphopt.types import DTYPES, TensorType

DATA = "constants-00001-of-00001.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_bundle(small_model()[1], tmp_path / "small")
    return tmp_path / "small"


def edit_manifest(folder: Path, edit: Callable[[dict], None]) -> None:
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


def edit_graph(folder: Path, edit: Callable[[str], str]) -> None:
    """Changes graph.txt and makes the manifest agree with it."""
    text = edit((folder / "graph.txt").read_text()).encode()
    (folder / "graph.txt").write_bytes(text)
    entry = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    edit_manifest(folder, lambda document: document["files"].update({"graph.txt": entry}))


def refusal(source: object, **options: bool) -> GraphoptError:
    with pytest.raises((BundleError, LimitError)) as caught:
        load_bundle(source, **options)
    return caught.value


def test_a_saved_graph_loads_equal_and_computes_what_the_module_does(folder):
    model, graph = small_model()
    loaded = load_bundle(folder)
    assert loaded == graph
    assert print_graph(loaded) == print_graph(graph)
    ids = torch.arange(12).reshape(2, 6)
    assert torch.equal(run(loaded, {"ids": ids})[0], model(ids))


def test_two_saves_are_the_same_bytes(folder, tmp_path):
    save_bundle(small_model()[1], tmp_path / "again")
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_the_manifest_tells_the_truth_of_every_file(folder):
    manifest = read_manifest(folder)
    assert {"manifest.json", *manifest.files} == {path.name for path in folder.iterdir()}
    for name, entry in manifest.files.items():
        content = (folder / name).read_bytes()
        assert (entry.size_bytes, entry.sha256) == (
            len(content),
            hashlib.sha256(content).hexdigest(),
        )
    assert manifest.torch_version == torch.__version__
    assert set(manifest.ops) == {node.op for node in load_bundle(folder).nodes.values()}


def test_equal_contents_are_stored_once(tmp_path):
    same = torch.ones(8)
    bound = {name: constant_of(same.clone()) for name in ("a", "b", "c")}
    save_bundle(Graph.build("g", [], [], [], bound), tmp_path / "g")
    assert len(read_header(tmp_path / "g" / DATA).tensors) == 1
    assert load_bundle(tmp_path / "g").constants == Graph.build("g", [], [], [], bound).constants


def test_every_dtype_and_the_empty_and_scalar_shapes_survive(tmp_path):
    bound = {}
    for short, long in DTYPES.items():
        for shape in ((), (3, 2), (0, 4)):
            data = torch.arange(6).remainder(2).to(getattr(torch, long))
            count = int(torch.tensor(shape).prod()) if shape else 1
            bound[f"{short}{len(shape)}{count}"] = constant_of(data[:count].reshape(shape))
    graph = Graph.build("g", [], [], [], bound)
    save_bundle(graph, tmp_path / "g")
    loaded = load_bundle(tmp_path / "g")
    assert loaded == graph
    for name, constant in bound.items():
        assert torch.equal(loaded.constants[name].tensor, constant.tensor)


def test_a_graph_without_constants_and_one_with_every_kind_of_name_survive(tmp_path):
    node = make_node("#1", "aten.relu.default", [Ref("é")])
    symbolic = make_node("n", "sym.add", [1, 2])
    inputs = [("é", TensorType("f32", (2,)))]
    graph = Graph.build("a b\n", [node, symbolic], inputs, [('"y"', Ref("#1"))], {})
    save_bundle(graph, tmp_path / "g")
    assert load_bundle(tmp_path / "g") == graph
    assert not list((tmp_path / "g").glob("*.safetensors"))


def test_many_constants_are_split_over_files(tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "SHARD_TENSORS", 3)
    monkeypatch.setattr(bundle, "SHARD_BYTES", 100)
    bound = {
        f"w{i}": constant_of(torch.full((size,), float(i)))
        for i, size in enumerate([1, 1, 1, 1, 30, 2, 2])
    }
    graph = Graph.build("g", [], [], [], bound)
    save_bundle(graph, tmp_path / "g")
    names = sorted(path.name for path in (tmp_path / "g").glob("*.safetensors"))
    assert names == [f"constants-{i:05d}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert load_bundle(tmp_path / "g") == graph


def test_open_descriptors_serve_as_well_and_stay_open(folder):
    with ExitStack() as stack:
        files = {p.name: stack.enter_context(p.open("rb")) for p in folder.iterdir()}
        parts = {name: file.fileno() for name, file in files.items()}
        for options in ({}, {"mapped": False}, {"verify": False}):
            assert load_bundle(parts, **options) == small_model()[1]
        assert all(os.fstat(descriptor) for descriptor in parts.values())
        del parts[DATA]
        assert refusal(parts).where == DATA


def test_writing_to_a_loaded_constant_never_reaches_the_file(folder):
    before = (folder / DATA).read_bytes()
    load_bundle(folder).constants["scale"].tensor.fill_(9.0)
    assert (folder / DATA).read_bytes() == before


def test_copied_constants_outlive_a_truncated_file(folder):
    loaded = load_bundle(folder, mapped=False)
    os.truncate(folder / DATA, 0)
    assert loaded.constants["scale"].tensor.item() == 0.5


# -- refusals


def test_a_missing_bundle_and_a_file_in_its_place_are_refused(tmp_path):
    assert "no such bundle" in str(refusal(tmp_path / "absent"))
    (tmp_path / "file").write_text("x")
    assert "not a folder" in str(refusal(tmp_path / "file"))


@pytest.mark.parametrize("name", ["manifest.json", "graph.txt", DATA])
def test_a_missing_a_truncated_and_a_linked_file_are_refused_by_name(folder, name):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    assert str(folder / name) in refusal(folder).where
    (folder / name).unlink()
    assert str(folder / name) in refusal(folder).where
    (folder.parent / "elsewhere").write_bytes(content)
    (folder / name).symlink_to(folder.parent / "elsewhere")
    assert "symbolic link" in str(refusal(folder))
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert "not a regular file" in str(refusal(folder))


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "sub/graph.txt", "constants-1.safetensors", "graph.txt\n"]
)
def test_a_path_outside_the_bundle_is_refused(folder, name):
    entry = {"bytes": 1, "sha256": ""}
    edit_manifest(folder, lambda document: document["files"].update({name: entry}))
    assert "not a file of a bundle" in str(refusal(folder))


def test_a_newer_format_is_refused_with_the_version_that_reads_it(folder):
    edit_manifest(folder, lambda document: document.update(format=2, graphopt="7.1"))
    fault = refusal(folder)
    assert "format 2 is newer" in fault.message
    assert "7.1" in fault.remedy


@pytest.mark.parametrize(
    "change",
    [
        {"format": None}, {"format": 0}, {"format": "1"}, {"format": True}, {"files": []},
        {"files": {}}, {"ops": ["x"]},
        {"ops": {"aten.relu.default": 1}}, {"torch": 2}, {"graph": None}, {"files": {"graph.txt": 7}},
        {"files": {"graph.txt": {"bytes": "1", "sha256": ""}}}, {"graph": "another"}, {"ops": {}},
    ],
)  # fmt: skip
def test_a_malformed_manifest_is_refused(folder, change):
    edit_manifest(folder, lambda document: document.update(change))
    assert refusal(folder).where.startswith(str(folder))


def test_json_that_is_more_than_json_is_refused(folder):
    for text in ('{"format": 1, "format": 1}', '{"format": NaN}', "[" * 100_000, "\xff", ""):
        (folder / "manifest.json").write_text(text, encoding="latin-1")
        assert refusal(folder).where == str(folder / "manifest.json")


def test_an_op_whose_schema_changed_is_refused_by_name_with_both_schemas(folder):
    def edit(document: dict) -> None:
        document["torch"] = "2.9.0"
        document["ops"]["aten.linear.default"] = "aten::linear(Tensor input) -> Tensor"

    edit_manifest(folder, edit)
    fault = refusal(folder)
    assert [path for path, _ in fault.detail] == ["aten.linear.default"]
    assert "aten::linear(Tensor input) -> Tensor" in str(fault)
    assert "2.9.0" in fault.remedy


def test_an_op_that_torch_has_no_more_is_refused_by_name(folder):
    edit_manifest(folder, lambda document: document["ops"].update({"aten.gone.default": "x"}))
    assert refusal(folder).detail[0][0] == "aten.gone.default"


def test_a_changed_byte_of_a_constant_is_refused_by_the_name_of_the_constant(folder):
    header = read_header(folder / DATA)
    constants = load_bundle(folder, mapped=False).constants
    for name, constant in constants.items():
        content = bytearray((folder / DATA).read_bytes())
        entry = header.tensors[constant.digest]
        content[header.data_offset + entry.begin] ^= 1
        (folder / DATA).write_bytes(content)
        assert f"constant {name} " in str(refusal(folder))
        assert load_bundle(folder, verify=False).constants[name].digest == constant.digest
        content[header.data_offset + entry.begin] ^= 1
        (folder / DATA).write_bytes(content)


def test_a_changed_graph_text_is_refused_unless_the_manifest_vouches_for_it(folder):
    path = folder / "graph.txt"
    path.write_text(path.read_text().replace("[4, 4]", "[5, 3]"))
    assert "SHA-256" in str(refusal(folder))


def test_a_constant_that_no_file_holds_is_refused_by_name(folder):
    tensors = read_tensors(folder / DATA, mapped=False)
    del tensors[load_bundle(folder).constants["scale"].digest]
    write_tensors(folder / DATA, tensors)
    size = (folder / DATA).stat().st_size
    edit_manifest(folder, lambda document: document["files"][DATA].update(bytes=size))
    assert "no data for the constant scale" in str(refusal(folder))


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ("aten.mul.Tensor($query, @scale)", "aten.mul.Tensor($query, @scale, 3)", "line 17"),
        ("aten.mul.Tensor($query, @scale)", "aten.mul.Tensor($gone, @scale)", "line 17"),
        ("aten.mul.Tensor($query, @scale)", "aten.mul_.Tensor($query, @scale)", "line 17"),
        ("format 1", "format 2", "line 1"),
        ("f32[]", "f32[1]", "line 12"),
    ],
)
def test_a_graph_text_with_a_fault_is_refused_with_file_and_line(folder, old, new, where):
    edit_graph(folder, lambda text: text.replace(old, new))
    assert refusal(folder).where.startswith(f"{folder / 'graph.txt'}: {where}")


def test_an_op_without_a_recorded_schema_is_refused_by_name(folder):
    edit_graph(folder, lambda text: text.replace("aten.add.Tensor", "aten.sub.Tensor"))
    assert "no schema of aten.sub.Tensor" in str(refusal(folder))


def test_text_that_is_not_utf8_is_refused(folder):
    edit_manifest(folder, lambda document: document["files"]["graph.txt"].update(bytes=1))
    (folder / "graph.txt").write_bytes(b"\xff")
    assert "not UTF-8" in str(refusal(folder, verify=False))


# -- saving


def test_an_existing_bundle_is_replaced_only_on_request_and_in_one_step(folder):
    other = Graph.build("other", [], [], [], {"w": constant_of(torch.ones(3))})
    loaded = load_bundle(folder)
    with pytest.raises(BundleError, match="exists already"):
        save_bundle(other, folder)
    save_bundle(other, folder, replace=True)
    assert load_bundle(folder) == other
    assert [path.name for path in folder.parent.iterdir()] == ["small"]
    assert torch.equal(loaded.constants["scale"].tensor, torch.tensor(0.5))  # still mapped


def test_nothing_but_a_bundle_is_replaced(tmp_path, folder):
    (tmp_path / "home").mkdir()
    (tmp_path / "link").symlink_to(folder)
    for name in ("home", "link"):
        with pytest.raises(BundleError, match="is not a bundle"):
            save_bundle(small_model()[1], tmp_path / name, replace=True)


def test_a_failed_save_leaves_nothing_behind(tmp_path):
    _, graph = small_model()
    without_data = parse_graph(print_graph(graph))
    with pytest.raises(BundleError, match="has no data"):
        save_bundle(without_data, tmp_path / "g")
    with pytest.raises(BundleError, match="No such file"):
        save_bundle(graph, tmp_path / "absent" / "g")
    assert list(tmp_path.iterdir()) == []


def test_a_false_digest_is_caught_when_the_bundle_is_loaded(tmp_path):
    wrong = Constant("0" * 64, TensorType("f32", (2,)), True, torch.ones(2))
    node = make_node("y", "aten.neg.default", [Const("w")])
    save_bundle(Graph.build("g", [node], [], [("y", Ref("y"))], {"w": wrong}), tmp_path / "g")
    assert "constant w " in str(refusal(tmp_path / "g"))


def test_a_bundle_may_be_moved_and_copied(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("people may add notes")
    assert load_bundle(tmp_path / "copy") == small_model()[1]
