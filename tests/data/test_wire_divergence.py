"""The cases where known servers disagree, and what ours answers."""

import gzip
import json
import zlib

import pytest
from data_serving import Running, directory, identity, json_request, serving

INFER = "/v2/models/identity/infer"


@pytest.mark.parametrize(
    "text",
    [
        b"{",
        b"",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"inputs": [}',
        b'{"a": 1, "a": 2}',
        b'{"inputs": NaN}',
        b'{"inputs": -Infinity}',
        b'{"a": 1e999}',
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a": ' + b"[" * 65 + b"]" * 65 + b"}",
        b'{"inputs": 1}{"inputs": 1}',
    ],
)
def test_malformed_json_is_400(server: Running, text: bytes) -> None:
    reply = server.ask("POST", INFER, text)
    assert reply.status == 400
    assert reply.error


def test_empty_inputs_are_400(server: Running) -> None:
    assert server.ask("POST", INFER, {"inputs": []}).status == 400


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"data": [1.0]}, "inputs[0].data: 1 elements"),
        ({"data": [1.0, "two"]}, "inputs[0].data"),
        ({"data": [1.0, None]}, "inputs[0].data"),
        ({"data": [1.0, True]}, "inputs[0].data"),
        ({"data": [[1.0], [2.0]]}, "inputs[0].data: the nesting"),
        ({"data": {}}, "inputs[0].data"),
        ({"data": [1.0, 1e39]}, "inputs[0].data: a number beyond FP32"),
        ({"datatype": "FP64"}, "inputs[0].datatype"),
        ({"datatype": 1}, "inputs[0].datatype"),
        ({"shape": [2]}, "inputs[0].shape"),
        ({"shape": [1, -2]}, "inputs[0].shape"),
        ({"shape": [1, 2.0]}, "inputs[0].shape"),
        ({"shape": [0, 2], "data": []}, "inputs[0].shape: an empty batch"),
        ({"name": "y"}, "inputs[0].name: no input 'y'"),
        ({"name": 3}, "inputs[0].name"),
        ({"parameters": {"binary_data_size": 8}}, "inputs[0]: the tensor in several forms"),
        ({"parameters": []}, "inputs[0].parameters"),
        (
            {"parameters": {"shared_memory_region": "r"}},
            "inputs[0].parameters: shared memory is off",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_400_and_named(
    server: Running, change: dict[str, object], where: str
) -> None:
    request = json_request([1.0, 2.0], [1, 2])
    request["inputs"][0].update(change)
    reply = server.ask("POST", INFER, request)
    assert reply.status == 400
    assert reply.error.startswith(where)
    assert reply.error.endswith(")"), "the error names no remedy"


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"id": 7}, "id"),
        ({"id": "\ud800"}, "id"),
        ({"outputs": [{"name": "z"}]}, "outputs[0].name: no output 'z'"),
        ({"outputs": [{"name": "y"}, {"name": "y"}]}, "outputs[1].name"),
        ({"outputs": {}}, "outputs"),
        (
            {"outputs": [{"name": "y", "parameters": {"classification": 3}}]},
            "outputs[0].parameters",
        ),
        (
            {"outputs": [{"name": "y", "parameters": {"binary_data": 1}}]},
            "outputs[0].parameters.binary_data",
        ),
        ({"parameters": {"timeout": -1}}, "parameters.timeout"),
        ({"parameters": {"timeout": "1"}}, "parameters.timeout"),
        ({"parameters": {"binary_data_output": "yes"}}, "parameters.binary_data_output"),
        ({"parameters": {"data": [1, 2]}}, "body: `data` outside"),
    ],
)
def test_a_request_that_does_not_fit_is_400_and_named(
    server: Running, change: dict[str, object], where: str
) -> None:
    reply = server.ask("POST", INFER, json_request([1.0, 2.0], [1, 2], **change))
    assert reply.status == 400
    assert reply.error.startswith(where)


def test_two_inputs_must_agree_in_their_rows_and_all_be_there(server: Running) -> None:
    def tensor(name: str, rows: int) -> dict[str, object]:
        return {"name": name, "shape": [rows, 16], "datatype": "INT32", "data": [1] * (rows * 16)}

    for inputs, text in (
        ([tensor("INPUT0", 1), tensor("INPUT1", 2)], "differ in their first dim"),
        ([tensor("INPUT0", 1)], "missing INPUT1"),
        ([tensor("INPUT0", 1), tensor("INPUT0", 1)], "twice"),
    ):
        reply = server.ask("POST", "/v2/models/simple/infer", {"inputs": inputs})
        assert reply.status == 400
        assert text in reply.error


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
@pytest.mark.parametrize("damage", ["not compressed", "cut short", "bytes after the end", "empty"])
def test_a_body_that_is_not_what_its_coding_says_is_400(
    server: Running, coding: str, damage: str
) -> None:
    plain = json.dumps(json_request([1.0], [1, 1])).encode()
    packed = gzip.compress(plain) if coding == "gzip" else zlib.compress(plain)
    body = {
        "not compressed": plain,
        "cut short": packed[:-3],
        "bytes after the end": packed + b"x",
        "empty": b"",
    }[damage]
    reply = server.ask("POST", INFER, body, {"Content-Encoding": coding})
    assert reply.status == 400
    assert coding in reply.error


@pytest.mark.parametrize("coding", ["br", "zstd", "gzip, deflate"])
def test_an_unknown_coding_is_415_and_the_known_ones_are_told(server: Running, coding: str) -> None:
    reply = server.ask("POST", INFER, b"{}", {"Content-Encoding": coding})
    assert reply.status == 415
    assert reply.headers["accept-encoding"] == "gzip, deflate, identity"


def test_the_index_answers_an_empty_body(server: Running) -> None:
    reply = server.ask("POST", "/v2/repository/index")
    assert reply.status == 200
    assert {"name": "identity", "version": "1", "state": "READY"} in reply.json


def test_loading_an_unknown_model_is_404_and_unloading_one_200() -> None:
    with serving(directory(identity()), repository_control=True) as running:
        assert running.ask("POST", "/v2/repository/models/absent/load", b"{}").status == 404
        reply = running.ask("POST", "/v2/repository/models/absent/unload")
        assert (reply.status, reply.body) == (200, b"")


def test_ready_of_an_unknown_model_is_400(server: Running) -> None:
    assert server.ask("GET", "/v2/models/absent/ready").status == 400
    assert server.ask("GET", "/v2/models/identity/versions/9/ready").status == 400


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v2/models/absent"),
        ("GET", "/v2/models/absent/config"),
        ("GET", "/v2/models/absent/stats"),
        ("POST", "/v2/models/absent/infer"),
        ("GET", "/v2/models/identity/versions/9"),
        ("POST", "/v2/models/identity/versions/9/infer"),
        ("GET", "/v2/models/identity/versions/x/stats"),
        ("GET", "/v2/logging"),
        ("GET", "/v2/models//infer"),
        ("GET", "/v2/models/identity/versions//infer"),
        ("GET", "/v2/models/identity/"),
        ("GET", "/v2/models/%ff/infer"),
        ("GET", "/metrics"),
        ("GET", "/"),
    ],
)
def test_what_is_not_there_is_404(server: Running, method: str, path: str) -> None:
    reply = server.ask(method, path, b"{}" if method == "POST" else None)
    assert reply.status == 404
    assert reply.error


def test_a_version_that_is_not_current_is_404_and_the_current_one_is_named() -> None:
    model = identity()
    with serving(directory(model)) as running:
        request = json_request([1.0], [1, 1])
        assert running.ask("POST", "/v2/models/identity/versions/1/infer", request).status == 200
        model.set_revision(2)
        reply = running.ask("POST", "/v2/models/identity/versions/1/infer", request)
        assert reply.status == 404
        assert "the current one is 2" in reply.error
        assert running.ask("GET", "/v2/models/identity").json["versions"] == ["2"]
        answer = running.ask("POST", "/v2/models/identity/versions/2/infer", request).json
        assert answer["model_version"] == "2"
        assert answer["parameters"] == {"plan_id": "plan-2"}


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", INFER, "POST"),
        ("POST", "/v2/health/live", "GET, HEAD"),
        ("DELETE", "/v2/models/identity", "GET, HEAD"),
        ("GET", "/v2/repository/index", "POST"),
        ("PUT", "/v2/repository/models/identity/load", "POST"),
        ("OPTIONS", INFER, "POST"),
    ],
)
def test_a_wrong_method_is_405_with_allow(
    server: Running, method: str, path: str, allow: str
) -> None:
    reply = server.ask(method, path)
    assert reply.status == 405
    assert reply.headers["allow"] == allow


def test_a_form_encoded_flood_is_413_and_the_server_stays_up() -> None:
    with serving(directory(identity())) as running:
        reply = running.ask(
            "POST", INFER, bytes(70 << 20), {"Content-Type": "application/x-www-form-urlencoded"}
        )
        assert reply.status == 413
        assert "67108864" in reply.error
        assert running.ask("GET", "/v2/health/live").json == {"live": True, "ready": True}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"[" * 100_000, 400),
        (b'{"ready": ' + b"[" * 1000 + b"]" * 1000 + b"}", 400),
        (b'{"ready": 1}', 400),
        (b"[1]", 400),
        (b'"' + b"x" * (512 << 10) + b'"', 413),
    ],
)
def test_a_hostile_index_body_is_refused(server: Running, body: bytes, status: int) -> None:
    assert server.ask("POST", "/v2/repository/index", body).status == status


def test_load_and_unload_are_403_unless_control_is_on(server: Running) -> None:
    for verb in ("load", "unload"):
        reply = server.ask("POST", f"/v2/repository/models/identity/{verb}", b"{}")
        assert reply.status == 403
        assert "data.repository_control" in reply.error


def test_load_refuses_overrides_web_pages_and_paths() -> None:
    models = directory()
    models.shelf["identity"] = identity
    with serving(models, repository_control=True) as running:
        load = "/v2/repository/models/identity/load"
        for parameters in (
            {"config": "{}"},
            {"file:1/model.onnx": "aGk="},
            {"bundle": "../etc"},
            {"bundle": "/etc/passwd"},
            {"bundle": ".hidden"},
            {"bundle": 3},
            [],
        ):
            assert running.ask("POST", load, {"parameters": parameters}).status == 400
        assert running.ask("POST", load, b"{}", {"Origin": "http://evil.example"}).status == 403
        oversized = {"parameters": {"config": "{}", "file:1/m": "A" * (300 << 10)}}
        assert running.ask("POST", load, oversized).status == 413
        assert running.ask("POST", "/v2/repository/models/..%2F..%2Fetc/load", b"{}").status == 400
        assert models.live == {}
        assert running.ask("POST", load, {"parameters": {"bundle": "identity"}}).status == 200
        assert list(models.live) == ["identity"]


def test_health_has_the_bodies_that_kserve_needs() -> None:
    models = directory(identity())
    with serving(models) as running:
        for path in ("/v2/health/live", "/v2/health/ready"):
            reply = running.ask("GET", path)
            assert (reply.status, reply.json) == (200, {"live": True, "ready": True})
        models.is_ready = False
        assert running.ask("GET", "/v2/health/live").status == 200
        reply = running.ask("GET", "/v2/health/ready")
        assert reply.status == 400
        assert reply.json["ready"] is False


def test_server_metadata_is_at_both_spellings(server: Running) -> None:
    assert server.ask("GET", "/v2").json == server.ask("GET", "/v2/").json
    assert server.ask("HEAD", "/v2").body == b""


def test_an_answer_is_compressed_only_on_a_single_explicit_wish(server: Running) -> None:
    request = json_request([1.0] * 64, [1, 64])
    for wish, coding in (
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("gzip, deflate", None),
        ("*", None),
        ("", None),
    ):
        reply = server.ask("POST", INFER, request, {"Accept-Encoding": wish})
        assert reply.status == 200
        assert reply.headers.get("content-encoding") == coding
        body = {"gzip": gzip.decompress, "deflate": zlib.decompress, None: bytes}[coding](
            reply.body
        )
        assert json.loads(body)["outputs"][0]["data"] == [1.0] * 64


def test_a_failing_model_is_500_without_its_secrets_and_is_reported_once(server: Running) -> None:
    server.server.take_failures()
    for _ in range(3):
        reply = server.ask("POST", "/v2/models/failing/infer", json_request([13.0], [1, 1]))
        assert reply.status == 500
        assert "secret" not in reply.error
    (failure,) = server.server.take_failures()
    assert (failure.model, failure.code, failure.count) == ("failing", "internal", 3)
    assert "a secret from inside the model" in failure.text
    assert server.server.take_failures() == []


def test_a_model_that_is_unloaded_meanwhile_is_404(server: Running) -> None:
    models = directory(identity())
    with serving(models) as running:
        assert running.ask("POST", INFER, json_request([1.0], [1, 1])).status == 200
        models.unload("identity")
        reply = running.ask("POST", INFER, json_request([1.0], [1, 1]))
        assert reply.status == 404
        assert "no model 'identity'" in reply.error
