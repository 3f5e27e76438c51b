"""The unmodified kserve InferenceRESTClient against a real server, over TCP and over a Unix socket.

kserve brings some seventy packages, so this folder is not part of the default suite: `make conformance`.
"""

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from kserve import InferenceRESTClient, InferInput, InferOutput, InferRequest, RESTConfig
from kserve.protocol.infer_type import RequestedOutput

sys.path.insert(0, str(Path(__file__).parent.parent / "data"))
from data_serving import Running, directory, identity, serving, simple

from graphoptd.data import DataSettings

Ask = Callable[[InferenceRESTClient, str], Awaitable[object]]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    settings = DataSettings(port=0, socket_path=tmp_path_factory.mktemp("data") / "data.sock")
    with serving(directory(identity(), simple()), settings) as started:
        yield started


@pytest.fixture(params=["tcp", "unix"])
def ask(running: Running, request: pytest.FixtureRequest) -> Callable[[Ask], object]:
    """Runs one exchange over the transport under test."""

    def run(exchange: Ask) -> object:
        async def main() -> object:
            transport = None
            url = running.url
            if request.param == "unix":
                path = running.server.settings.socket_path
                transport = httpx.AsyncHTTPTransport(uds=str(path))
                url = "http://localhost"
            config = RESTConfig(protocol="v2", transport=transport, retries=0)
            async with InferenceRESTClient(config) as client:
                return await exchange(client, url)

        return asyncio.run(main())

    return run


def simple_request(
    binary_in: bool, binary_out: bool | None
) -> tuple[np.ndarray, np.ndarray, InferRequest]:
    left = np.arange(16, dtype=np.int32).reshape(1, 16)
    right = np.full((1, 16), 3, dtype=np.int32)
    inputs = []
    for name, array in (("INPUT0", left), ("INPUT1", right)):
        tensor = InferInput(name, [1, 16], "INT32")
        tensor.set_data_from_numpy(array, binary_data=binary_in)
        inputs.append(tensor)
    outputs = None
    if binary_out is not None:
        outputs = [
            RequestedOutput(name, parameters={"binary_data": binary_out})
            for name in ("OUTPUT0", "OUTPUT1")
        ]
    request = InferRequest("simple", inputs, request_id="seven", request_outputs=outputs)
    return left, right, request


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False, None])
def test_infer(ask: Callable[[Ask], object], binary_in: bool, binary_out: bool | None) -> None:
    left, right, request = simple_request(binary_in, binary_out)
    answer = ask(lambda client, url: client.infer(url, request, model_name="simple"))
    by_name: dict[str, InferOutput] = {output.name: output for output in answer.outputs}
    np.testing.assert_array_equal(by_name["OUTPUT0"].as_numpy().reshape(1, 16), left + right)
    np.testing.assert_array_equal(by_name["OUTPUT1"].as_numpy().reshape(1, 16), left - right)
    assert answer.id == "seven"
    # kserve's parser drops `model_version`; the plan names the revision here too.
    assert answer.parameters["plan_id"] == "plan-3"


def test_a_plain_document_is_answered(ask: Callable[[Ask], object]) -> None:
    tensor = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [[1.5, -2.0]]}
    answer = ask(lambda client, url: client.infer(url, {"inputs": [tensor]}, model_name="identity"))
    assert answer.outputs[0].as_numpy().tolist() == [[1.5, -2.0]]


def test_health(ask: Callable[[Ask], object]) -> None:
    assert ask(lambda client, url: client.is_server_live(url)) is True
    assert ask(lambda client, url: client.is_server_ready(url)) is True
    assert ask(lambda client, url: client.is_model_ready(url, "simple")) is True
    assert ask(lambda client, url: client.is_model_ready(url, "absent")) is False


def test_an_error_arrives_with_its_text(ask: Callable[[Ask], object]) -> None:
    _, _, request = simple_request(True, None)
    with pytest.raises(httpx.HTTPStatusError, match="did you mean simple") as caught:
        ask(lambda client, url: client.infer(url, request, model_name="simpel"))
    assert caught.value.response.status_code == 404


def test_a_client_that_takes_any_coding_gets_none(ask: Callable[[Ask], object]) -> None:
    _, _, request = simple_request(True, True)
    headers: dict[str, str] = {}
    ask(
        lambda client, url: client.infer(
            url, request, model_name="simple", response_headers=headers
        )
    )
    assert "content-encoding" not in headers
