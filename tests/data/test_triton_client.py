"""The unmodified tritonclient against a real server."""

import uuid
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import tritonclient.http as client
import tritonclient.utils.shared_memory as shm
from data_serving import Running, directory, every_type, identity, serving, simple
from tritonclient.utils import InferenceServerException

TYPES = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
}


@pytest.fixture(scope="module")
def controlled() -> Iterator[Running]:
    models = directory(identity(), simple(), *every_type())
    models.shelf["spare"] = lambda: identity("spare")
    with serving(models, repository_control=True, shared_memory=True) as running:
        yield running


@pytest.fixture
def triton(controlled: Running) -> Iterator[client.InferenceServerClient]:
    with client.InferenceServerClient(controlled.host, concurrency=4) as connected:
        yield connected


def as_input(name: str, array: np.ndarray, datatype: str, binary: bool) -> client.InferInput:
    tensor = client.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array, binary_data=binary)
    return tensor


def simple_inputs(binary: bool = True) -> tuple[np.ndarray, np.ndarray, list[client.InferInput]]:
    left = np.arange(16, dtype=np.int32).reshape(1, 16)
    right = np.full((1, 16), 3, dtype=np.int32)
    return (
        left,
        right,
        [as_input("INPUT0", left, "INT32", binary), as_input("INPUT1", right, "INT32", binary)],
    )


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
@pytest.mark.parametrize("request_coding", [None, "gzip", "deflate"])
@pytest.mark.parametrize("response_coding", [None, "gzip", "deflate"])
def test_infer_in_every_encoding(
    triton: client.InferenceServerClient,
    binary_in: bool,
    binary_out: bool,
    request_coding: str | None,
    response_coding: str | None,
) -> None:
    left, right, inputs = simple_inputs(binary_in)
    outputs = [
        client.InferRequestedOutput(name, binary_data=binary_out) for name in ("OUTPUT1", "OUTPUT0")
    ]
    result = triton.infer(
        "simple",
        inputs,
        outputs=outputs,
        request_id="seven",
        request_compression_algorithm=request_coding,
        response_compression_algorithm=response_coding,
    )
    np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), left + right)
    np.testing.assert_array_equal(result.as_numpy("OUTPUT1"), left - right)
    answer = result.get_response()
    assert answer["id"] == "seven"
    assert answer["model_version"] == "3"
    assert answer["parameters"] == {"plan_id": "plan-3"}
    assert [output["name"] for output in answer["outputs"]] == ["OUTPUT1", "OUTPUT0"]


def test_no_outputs_named_means_all_as_binary(triton: client.InferenceServerClient) -> None:
    left, right, inputs = simple_inputs()
    for _ in range(2):  # the second time from the kept form of the request
        result = triton.infer("simple", inputs)
        np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), left + right)
        assert all("data" not in output for output in result.get_response()["outputs"])


@pytest.mark.parametrize("datatype", sorted(TYPES))
@pytest.mark.parametrize("binary", [True, False])
def test_every_type_survives_the_way(
    triton: client.InferenceServerClient, datatype: str, binary: bool
) -> None:
    kind = TYPES[datatype]
    if datatype == "BOOL":
        array = np.array([[True, False, True]])
    elif np.issubdtype(kind, np.integer):
        array = np.array([[np.iinfo(kind).min, 0, np.iinfo(kind).max]], dtype=kind)
    else:
        array = np.array([[np.finfo(kind).min, -0.1, np.finfo(kind).tiny]], dtype=kind)
    name = f"identity_{datatype.lower()}"
    if datatype == "FP16" and not binary:
        with pytest.raises(InferenceServerException, match="no JSON form"):
            triton.infer(name, [as_input("x", array, datatype, False)])
        output = client.InferRequestedOutput("y", binary_data=False)
        with pytest.raises(InferenceServerException, match="no JSON form"):
            triton.infer(name, [as_input("x", array, datatype, True)], outputs=[output])
        return
    output = client.InferRequestedOutput("y", binary_data=binary)
    result = triton.infer(name, [as_input("x", array, datatype, binary)], outputs=[output])
    np.testing.assert_array_equal(result.as_numpy("y"), array)
    assert result.as_numpy("y").dtype == kind


def test_async_infer(triton: client.InferenceServerClient) -> None:
    rows = [np.full((1, 8), i, dtype=np.float32) for i in range(32)]
    pending = [triton.async_infer("identity", [as_input("x", row, "FP32", True)]) for row in rows]
    for row, request in zip(rows, pending, strict=True):
        np.testing.assert_array_equal(request.get_result().as_numpy("y"), row)


def test_health_metadata_and_config(triton: client.InferenceServerClient) -> None:
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.is_model_ready("simple")
    assert triton.is_model_ready("simple", "3")
    assert not triton.is_model_ready("simple", "4")
    assert not triton.is_model_ready("absent")
    assert "system_shared_memory" in triton.get_server_metadata()["extensions"]
    metadata = triton.get_model_metadata("simple")
    assert metadata["versions"] == ["3"]
    assert metadata["inputs"][0] == {"name": "INPUT0", "datatype": "INT32", "shape": [-1, 16]}
    config = triton.get_model_config("simple", "3")
    assert config["max_batch_size"] == 32
    assert config["input"][0] == {"name": "INPUT0", "data_type": "TYPE_INT32", "dims": [16]}


def test_repository_control(triton: client.InferenceServerClient) -> None:
    def states() -> dict[str, str]:
        return {row["name"]: row["state"] for row in triton.get_model_repository_index()}

    assert states()["spare"] == "UNAVAILABLE"
    triton.load_model("spare")
    assert states()["spare"] == "READY"
    assert triton.is_model_ready("spare")
    triton.unload_model("spare")
    assert states()["spare"] == "UNAVAILABLE"
    with pytest.raises(InferenceServerException, match="no bundle"):
        triton.load_model("absent")
    with pytest.raises(InferenceServerException, match=r"parameters\.config"):
        triton.load_model("spare", config="{}")


def test_statistics_count_what_was_served() -> None:
    with (
        serving(directory(identity(), simple())) as running,
        client.InferenceServerClient(running.host) as triton,
    ):
        for rows in (1, 1, 3):
            triton.infer("identity", [as_input("x", np.zeros((rows, 4), np.float32), "FP32", True)])
        with pytest.raises(InferenceServerException):
            triton.infer("identity", [as_input("x", np.zeros((1, 4, 1), np.float32), "FP32", True)])
        (counted,) = triton.get_inference_statistics("identity")["model_stats"]
        assert counted["version"] == "1"
        assert counted["inference_count"] == 5
        assert counted["execution_count"] == 3
        assert counted["inference_stats"]["success"]["count"] == 3
        assert counted["inference_stats"]["fail"]["count"] == 1
        sizes = {row["batch_size"]: row["compute_infer"]["count"] for row in counted["batch_stats"]}
        assert sizes == {1: 2, 3: 1}
        everything = triton.get_inference_statistics()["model_stats"]
        assert [row["name"] for row in everything] == ["identity", "simple"]


def test_errors_arrive_as_the_clients_exceptions(triton: client.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match="did you mean simple") as caught:
        triton.infer("simpel", simple_inputs()[2])
    assert caught.value.status() == "404"
    wrong = as_input("INPUT0", np.zeros((1, 15), np.int32), "INT32", True)
    with pytest.raises(InferenceServerException, match=r"takes \[-1, 16\]"):
        triton.infer("simple", [wrong])


def test_shared_memory_carries_inputs_and_outputs(triton: client.InferenceServerClient) -> None:
    name = f"graphopt-test-{uuid.uuid4().hex}"
    left, right, inputs = simple_inputs()
    region = shm.create_shared_memory_region("both", f"/{name}", 256)
    try:
        shm.set_shared_memory_region(region, [left, right])
        triton.register_system_shared_memory("both", f"/{name}", 256)
        assert triton.get_system_shared_memory_status() == [
            {"name": "both", "key": f"/{name}", "offset": 0, "byte_size": 256}
        ]
        inputs[0].set_shared_memory("both", 64)
        inputs[1].set_shared_memory("both", 64, offset=64)
        outputs = [client.InferRequestedOutput("OUTPUT0"), client.InferRequestedOutput("OUTPUT1")]
        outputs[0].set_shared_memory("both", 64, offset=128)
        result = triton.infer("simple", inputs, outputs=outputs)
        written = shm.get_contents_as_numpy(region, np.int32, [1, 16], offset=128)
        np.testing.assert_array_equal(written, left + right)
        np.testing.assert_array_equal(result.as_numpy("OUTPUT1"), left - right)
        triton.unregister_system_shared_memory("both")
        assert triton.get_system_shared_memory_status() == []
        with pytest.raises(InferenceServerException, match="no such region"):
            triton.infer("simple", inputs, outputs=outputs)
    finally:
        shm.destroy_shared_memory_region(region)


def test_bfloat16_goes_as_binary(controlled: Running) -> None:
    from data_serving import binary_request

    x = torch.tensor([[1.5, -2.25, 3e38]], dtype=torch.bfloat16)
    body, headers = binary_request(x, "BF16")
    reply = controlled.ask("POST", "/v2/models/identity_bf16/infer", body, headers)
    assert reply.status == 200
    n_json = int(reply.headers["inference-header-content-length"])
    assert reply.body[n_json:] == body[-6:]
