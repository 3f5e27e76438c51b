"""What is wrong is refused by name, changes nothing, and leaves one line in the log."""

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from control_serving import Raw, Service, adapter, ctl
from safetensors.torch import save_file

from graphopt.bundle import save_bundle

_GELU = "layer.0/gelu"


def _edits(*edits: dict[str, Any], **head: Any) -> str:
    return json.dumps({"delta": 1, **head, "edits": list(edits)})


def _add(id_: str, op: str, *args: Any) -> dict[str, Any]:
    return {"add_node": {"id": id_, "op": op, "args": list(args)}}


_DOCUMENTS = {
    "unknown op": (_edits(_add("x", "aten.sigmoyd.default", "$pooler")), "delta.unknown_op"),
    "op that is random": (_edits(_add("x", "aten.rand_like.default", "$pooler")), "delta.unknown_op"),
    "cycle": (
        _edits({"rewire": {"from": "$layer.0/up", "to": "$layer.0/norm", "users": [_GELU]}}),
        "delta.cycle",
    ),
    "type mismatch": (
        _edits(_add("x", "aten.mm.default", "$pooler", "$pooler")),
        "delta.type_mismatch",
    ),
    "missing node": (_edits({"remove_node": {"id": "layer.9/gelu"}}), "delta.unknown_node"),
    "missing constant": (
        _edits(_add("x", "aten.add.Tensor", "$pooler", {"const": "nope"})),
        "delta.unknown_constant",
    ),
    "node that is used": (_edits({"remove_node": {"id": _GELU}}), "delta.in_use"),
    "name that is taken": (_edits(_add(_GELU, "aten.relu.default", "$pooler")), "delta.duplicate_name"),
    "stale if_revision": (
        _edits({"bypass": {"node": _GELU}}, if_revision=7),
        "delta.precondition_failed",
    ),
    "changed interface": (
        _edits({"set_outputs": {"outputs": {"other": "$classifier"}}}),
        "delta.interface_change",
    ),
    "unknown model": (_edits({"bypass": {"node": _GELU}}, graph="other"), "model.unknown"),
    "unknown key": (_edits({"bypass": {"node": _GELU, "speed": 1}}), "document.invalid"),
    "NaN": ('{"delta": 1, "edits": [{"set_attr": {"value": NaN}}]}', "document.invalid"),
    "Infinity": ('{"delta": 1, "edits": [], "if_revision": Infinity}', "document.invalid"),
    "key twice": ('{"delta": 1, "edits": [], "edits": []}', "document.invalid"),
    "deep nesting": ('{"delta": 1, "edits": ' + "[" * 500 + "]" * 500 + "}", "limit.exceeded"),
    "hash that is nowhere": (
        _edits({"put_constant": {"name": "classifier.bias", "hash": "0" * 64}}),
        "document.invalid",
    ),
    "file that was not sent": (
        _edits({"attach_adapter": {"name": "a", "path": "/etc"}}),
        "document.invalid",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", _DOCUMENTS)
def test_a_bad_delta_is_refused_by_name_and_logged_once(service: Service, what: str) -> None:
    text, code = _DOCUMENTS[what]
    before = _state(service)
    with Raw(service.socket) as client:
        error = client.call("apply", params={"document": text, "format": "json"})["error"]
    assert error["code"] == code, error
    assert error["message"]
    assert error["where"] or error["remedy"]
    assert _state(service) == before
    assert _refusals(service) == [code]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: &a [x, x]\nb: &b [*a, *a, *a]\ndelta: 1\n", "anchor"),
        ("delta: 1\nedits:\n  - bypass: {node: no}\n  - bypass: {node: 12}\n", "must be a string"),
        ("delta: 1\nallow_interface_change: no\nedits: []\n", "write false"),
        ("delta: 1\nedits:\n  - attach_adapter: {name: a, path: p, scale: '1e-5'}\n", "write 1e-5"),
        ("delta: 1\nedits: [\n", ""),
        ("delta: 1\n---\ndelta: 1\n", ""),
        ("!!python/object:os.system {}\n", "tag"),
    ],
)
def test_yaml_says_where_it_is_wrong(service: Service, text: str, part: str) -> None:
    before = _state(service)
    with Raw(service.socket) as client:
        params = {"document": text, "source": "people.yaml"}
        error = client.call("apply", params=params)["error"]
    assert error["code"] == "document.invalid"
    assert error["where"].startswith("people.yaml:")
    assert part in json.dumps(error)
    assert _state(service) == before
    assert _refusals(service) == ["document.invalid"]


def test_numbers_in_yaml_are_numbers(service: Service, tmp_path: Path) -> None:
    text = "delta: 1\nedits:\n  - set_attr: {node: layer.0/norm, name: eps, value: 1e-5}\n"
    (tmp_path / "n.yaml").write_text(text)
    assert ctl(service, "apply", str(tmp_path / "n.yaml")).code == 0
    bound = service.host.get("transformer").graph.nodes["layer.0/norm"].bound()
    assert bound["eps"] == 1e-5


@pytest.mark.parametrize("fault", ["rank", "modules", "truncated", "pickled", "dora", "junk"])
def test_a_bad_adapter_is_refused_by_name(service: Service, tmp_path: Path, fault: str) -> None:
    folder = tmp_path / "a"
    match fault:
        case "rank":
            adapter(folder, rank=3)
        case "modules":
            adapter(folder, modules=["layer.7/query"])
        case "dora":
            adapter(folder, use_dora=True)
        case _:
            adapter(folder)
    weights = folder / "adapter_model.safetensors"
    if fault == "truncated":
        weights.write_bytes(weights.read_bytes()[:-9])
    elif fault == "pickled":
        weights.rename(folder / "adapter_model.bin")
    elif fault == "junk":
        weights.write_bytes(b"\x80\x04" * 50)
    before = _state(service)
    ran = ctl(service, "attach", "a", str(folder), "--json")
    error = json.loads(ran.err)["error"]
    assert ran.code == 1
    assert error["code"] in ("delta.adapter_refused", "bundle.invalid")
    assert error["remedy"] or error["detail"]
    word = {
        "rank": "rank 2",
        "modules": "layer.7/query",
        "pickled": "safetensors",
        "dora": "use_dora",
    }
    assert word.get(fault, "adapter_model.safetensors") in json.dumps(error)
    assert _state(service) == before
    assert _refusals(service) == [error["code"]]


@pytest.mark.parametrize(
    "name", ["model.pt2", "pytorch_model.bin", "w.pkl", "w.PTH", "../w.safetensors", "a/b", ""]
)
def test_pickles_archives_and_paths_are_refused_whoever_sends_them(
    service: Service, tmp_path: Path, name: str
) -> None:
    (tmp_path / "f").write_bytes(b"PK\x03\x04")
    fd = os.open(tmp_path / "f", os.O_RDONLY)
    document = _edits({"load_weights": {"path": "w"}})
    files = [{"path": "w", "names": [name]}]
    with Raw(service.socket) as client:
        params = {"document": document, "format": "json", "files": files}
        error = client.call("apply", [fd], params=params)["error"]
        loading = client.call("load", [fd], params={"name": "m", "files": [name]})["error"]
    os.close(fd)
    assert error["code"] == loading["code"]
    assert error["code"] in ("bundle.invalid", "proto.invalid")
    if name.endswith(".pt2"):
        assert "graphopt import" in error["remedy"]
    refusal = service.lines("model.refused")
    assert [line["code"] for line in refusal] == [loading["code"]]


def test_a_file_under_a_harmless_name_is_still_no_tensor_file(
    service: Service, tmp_path: Path
) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"PK\x03\x04" + b"\0" * 200)
    ran = ctl(service, "load-weights", str(tmp_path / "w.safetensors"), "--json")
    error = json.loads(ran.err)["error"]
    assert ran.code == 1
    assert "w.safetensors" in json.dumps(error)


def test_what_is_no_regular_file_with_one_name_is_refused(service: Service, tmp_path: Path) -> None:
    plain = tmp_path / "w.safetensors"
    save_file({"t": torch.ones(2)}, plain)
    os.link(plain, tmp_path / "second")
    reader, writer = os.pipe()
    linked, folder = os.open(plain, os.O_RDONLY), os.open(tmp_path, os.O_RDONLY)
    os.unlink(tmp_path / "second")
    only_write = os.open(plain, os.O_WRONLY)
    os.link(plain, tmp_path / "second")
    files = [{"path": "w", "names": ["w.safetensors"]}]
    params = {"document": _edits({"load_weights": {"path": "w"}}), "format": "json", "files": files}
    words = {reader: "not a regular file", folder: "not a regular file", linked: "2 names"}
    with Raw(service.socket) as client:
        for fd, word in words.items():
            assert word in client.call("apply", [fd], params=params)["error"]["message"]
        os.unlink(tmp_path / "second")
        error = client.call("apply", [only_write], params=params)["error"]
        assert "cannot be copied" in error["message"]
    for fd in (reader, writer, linked, folder, only_write):
        os.close(fd)


def test_files_that_change_while_they_are_applied_change_nothing(
    service: Service, tmp_path: Path
) -> None:
    """The service works on copies: a client that truncates or rewrites its file cannot hurt it."""
    path = tmp_path / "b.safetensors"
    stop = threading.Event()
    save_file({"classifier.bias": torch.full((3,), 7.0)}, path)
    good = path.read_bytes()

    def disturb() -> None:
        while not stop.is_set():
            path.write_bytes(good[:40])
            path.write_bytes(good)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        codes = {ctl(service, "load-weights", str(path), "--no-strict").code for _ in range(40)}
    finally:
        stop.set()
        thread.join()
    assert codes <= {0, 1}
    bias = service.host.get("transformer").graph.constants["classifier.bias"].tensor
    assert bias.tolist() == [7.0] * 3 or codes == {1}


def test_a_bundle_is_loaded_forked_and_refused_when_damaged(
    service: Service, tmp_path: Path
) -> None:
    graph = service.host.get("transformer").graph
    save_bundle(graph, tmp_path / "b")
    loaded = ctl(service, "load", "second", str(tmp_path / "b"))
    assert loaded.code == 0, loaded.err
    assert service.host.get("second").graph.constants == graph.constants
    shutil.rmtree(tmp_path / "b")  # nothing is mapped
    assert ctl(service, "bypass", "second", _GELU).code == 0
    assert (
        "model.exists"
        in ctl(service, "load", "second", _fresh(service, tmp_path, "c"), "--json").err
    )
    damaged = Path(_fresh(service, tmp_path, "d"))
    shard = next(damaged.glob("constants-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    ran = ctl(service, "load", "third", str(damaged))
    assert ran.code == 1
    assert shard.name in ran.err
    outside = Path(_fresh(service, tmp_path, "e"))
    manifest = (outside / "manifest.json").read_text()
    (outside / "manifest.json").write_text(manifest.replace("graph.txt", "../graph.txt"))
    assert ctl(service, "load", "third", str(outside)).code == 1
    linked = Path(_fresh(service, tmp_path, "f"))
    (linked / "graph.txt").rename(tmp_path / "elsewhere.txt")
    (linked / "graph.txt").symlink_to(tmp_path / "elsewhere.txt")
    assert "symbolic link" in ctl(service, "load", "third", str(linked)).err
    assert sorted(service.host.models()) == ["second", "transformer"]
    assert len(service.lines("model.refused")) == 3  # the link was refused by the client itself


def test_a_refused_rollback_or_fork_is_logged_once(service: Service) -> None:
    assert ctl(service, "rollback", "9").code == 4
    assert ctl(service, "rollback", "nobody", "1").code == 1
    assert ctl(service, "fork", "transformer").code == 1
    assert _refusals(service) == ["delta.precondition_failed", "model.unknown"]
    (line,) = service.lines("model.refused")
    assert (line["graph"], line["code"]) == ("transformer", "model.exists")


def _fresh(service: Service, tmp_path: Path, name: str) -> str:
    save_bundle(service.host.get("transformer").graph, tmp_path / name)
    return str(tmp_path / name)


def _state(service: Service) -> tuple[int, str]:
    model = service.host.get("transformer")
    return model.revision, model.graph.hash


def _refusals(service: Service) -> list[str]:
    """Codes of the lines that the engine and the control plane logged about refused deltas."""
    engine = [f["code"] for name, f, _ in service.engine_events if name == "delta.rejected"]
    return engine + [line["code"] for line in service.lines("delta.rejected")]
