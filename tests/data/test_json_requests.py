"""Decoding: a law for well-formed requests, and no crash for any other."""

import contextlib
import json
import math
from typing import Any

import pytest
import torch
from data_serving import Running, binary_request, identity, json_request
from hypothesis import example, given, settings
from hypothesis import strategies as st

from graphopt.errors import GraphoptError, LimitError, RequestError
from graphoptd.data import jsontext
from graphoptd.data.budget import ByteBudget
from graphoptd.data.datatypes import DATATYPES
from graphoptd.data.decode import InferRequest, Interface, decode
from graphoptd.data.tensors import Body

INFER = "/v2/models/identity/infer"
JSON_TYPES = sorted(name for name, each in DATATYPES.items() if each.array_code)


def decoded(body: bytes, header_length: int | None = None, datatype: str = "FP32") -> InferRequest:
    interface = Interface.of(identity(datatype=datatype, n_threads=0).signature())
    length = None if header_length is None else str(header_length).encode()
    return decode(Body(body, length), interface, 1 << 18, None, ByteBudget(1 << 30).lease())


def values_of(datatype: str) -> st.SearchStrategy[Any]:
    kind = DATATYPES[datatype]
    if kind.kind == "bool":
        return st.booleans()
    if kind.kind == "int":
        info = torch.iinfo(kind.torch_dtype)
        return st.integers(info.min, info.max)
    return st.floats(allow_nan=False, allow_infinity=False, width=32) | st.integers(
        -(1 << 20), 1 << 20
    )


@st.composite
def matrices(draw: st.DrawFn) -> tuple[str, list[list[Any]]]:
    datatype = draw(st.sampled_from(JSON_TYPES))
    width = draw(st.integers(0, 5))
    row = st.lists(values_of(datatype), min_size=width, max_size=width)
    return datatype, draw(st.lists(row, min_size=1, max_size=5))


@given(
    matrices(),
    st.booleans(),
    st.sampled_from([None, 1, 2]),
    st.sampled_from([(",", ":"), (" ,\n", " : "), (", ", ": ")]),
)
@settings(max_examples=150, deadline=None)
def test_flat_and_nested_json_become_the_same_tensor(
    matrix: tuple[str, list[list[Any]]],
    nested: bool,
    indent: int | None,
    separators: tuple[str, str],
) -> None:
    datatype, rows = matrix
    data: list[Any] = rows if nested else [value for row in rows for value in row]
    tensor = {
        "name": "x",
        "data": data,
        "shape": [len(rows), len(rows[0])],
        "datatype": datatype,
    }
    text = json.dumps({"inputs": [tensor]}, indent=indent, separators=separators).encode()
    (got,) = decoded(text, datatype=datatype).inputs.values()
    expected = torch.tensor(rows, dtype=DATATYPES[datatype].torch_dtype).view(
        len(rows), len(rows[0])
    )
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)


@given(
    st.integers(1, 3), st.integers(0, 40), st.sampled_from(sorted(DATATYPES)), st.integers(0, 20)
)
@settings(max_examples=80, deadline=None)
def test_binary_tensors_are_bit_identical_and_aligned(
    rows: int, width: int, datatype: str, padding: int
) -> None:
    kind = DATATYPES[datatype]
    high = 2 if kind.kind == "bool" else 256
    content = torch.randint(0, high, (rows * width * kind.size_bytes,), dtype=torch.uint8)
    tensor = {
        "name": "x",
        "shape": [rows, width],
        "datatype": datatype,
        "parameters": {"binary_data_size": len(content)},
    }
    head = json.dumps(
        {"inputs": [tensor], "parameters": {"binary_data_output": True}, "note": "." * padding}
    ).encode()
    body = head + content.numpy().tobytes()
    (got,) = decoded(body, len(head), datatype).inputs.values()
    assert got.shape == (rows, width)
    if got.numel():
        assert got.data_ptr() % kind.size_bytes == 0
        assert torch.equal(got.reshape(-1).view(torch.uint8), content)


def test_the_kept_form_of_a_request_reads_the_new_bytes() -> None:
    interface = Interface.of(identity(n_threads=0).signature())
    lease = ByteBudget(1 << 30).lease()
    for value in (1.0, 2.0, 3.0):
        content, headers = binary_request(torch.full((2, 3), value))
        body = Body(content, headers["Inference-Header-Content-Length"].encode())
        request = decode(body, interface, 1 << 18, None, lease)
        assert torch.equal(request.inputs["x"], torch.full((2, 3), value))
    assert len(interface.forms) == 1
    with pytest.raises(RequestError, match="bytes"):
        decode(
            Body(content[:-4], headers["Inference-Header-Content-Length"].encode()),
            interface,
            1 << 18,
            None,
            lease,
        )


def test_kept_forms_are_bounded() -> None:
    interface = Interface.of(identity(n_threads=0).signature())
    lease = ByteBudget(1 << 30).lease()
    for width in range(1, 200):
        content, headers = binary_request(torch.zeros(1, width))
        decode(
            Body(content, headers["Inference-Header-Content-Length"].encode()),
            interface,
            1 << 18,
            None,
            lease,
        )
    assert len(interface.forms) <= 64


def test_long_arrays_are_read_in_pieces_to_the_same_numbers() -> None:
    numbers = [i * 0.5 for i in range(100_000)]
    text = json.dumps(json_request(numbers, [100, 1000])).encode()
    assert len(text) > 8 * jsontext.PIECE_BYTES
    (got,) = decoded(text).inputs.values()
    assert torch.equal(got, torch.tensor(numbers).view(100, 1000))
    nested = [numbers[i : i + 1000] for i in range(0, 100_000, 1000)]
    (same,) = decoded(json.dumps(json_request(nested, [100, 1000])).encode()).inputs.values()
    assert torch.equal(same, got)


@pytest.mark.parametrize(
    "data",
    [
        "[1,]",
        "[,1]",
        "[1,,2]",
        "[1 2]",
        "[01, 2]",
        "[1., 2]",
        "[.5, 2]",
        "[+1, 2]",
        "[1e, 2]",
        "[NaN, 2]",
        "[-Infinity, 2]",
        "[1, 2]]",
        "[[1, 2]",
        "[1, [2]]",
        "[[1, 2], []]",
        "[1[, 2]]",
        "[[1], 2]",
        "[[[1, 2]]]",
        "[[1][2]]",
        "[nul, 2]",
        "[null, 2]",
        "[true, 2]",
        "[t, 2]",
        "[1e400, 2]",
        "[1, 2],[3]",
        '[1, "2"]',
        '["1", "2"]',
        "[1, {}]",
        "[1, 2, 3]",
        "[]",
        "1",
        "-Infinity",
    ],
)
def test_data_that_is_not_two_strict_numbers_is_refused(data: str) -> None:
    text = f'{{"inputs": [{{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": {data}}}]}}'
    with pytest.raises(RequestError):
        decoded(text.encode())


@pytest.mark.parametrize(
    ("data", "fits"),
    [("[[], []]", True), ("[]", True), ("[[1], []]", False), ("[[]]", False), ("[1]", False)],
)
def test_a_tensor_without_elements_has_no_numbers(data: str, fits: bool) -> None:
    text = f'{{"inputs": [{{"name": "x", "shape": [2, 0], "datatype": "FP32", "data": {data}}}]}}'
    if fits:
        assert decoded(text.encode()).inputs["x"].shape == (2, 0)
        return
    with pytest.raises(RequestError):
        decoded(text.encode())


@pytest.mark.parametrize("at", [65_530, 65_535, 65_536, 65_540])
def test_a_missing_comma_at_the_edge_of_a_piece_is_seen(at: int) -> None:
    for damage in (",,", " ", ",x,"):
        half = ("1," * (at // 2))[:-1]
        data = f"[{half}{damage}{half}]"
        n = data.count("1")
        text = f'{{"inputs": [{{"name": "x", "shape": [1, {n}], "datatype": "FP32", "data": {data}}}]}}'
        with pytest.raises(RequestError):
            decoded(text.encode())


def test_a_key_written_with_escapes_is_the_same_key() -> None:
    text = json.dumps(json_request([1.0, 2.0], [1, 2])).replace('"data"', '"d\\u0061ta"')
    (got,) = decoded(text.encode()).inputs.values()
    assert got.tolist() == [[1.0, 2.0]]


def test_text_that_looks_like_data_stays_text() -> None:
    request = json_request([1.0], [1, 1], id='"data":[9]', note='\\"data": [1,2]')
    got = decoded(json.dumps(request).encode())
    assert got.id == '"data":[9]'
    assert got.inputs["x"].tolist() == [[1.0]]


def test_an_integer_type_takes_no_fractions_and_no_overflow() -> None:
    for datatype, value in (
        ("INT8", 128),
        ("UINT8", -1),
        ("INT32", 1.5),
        ("INT64", 1 << 63),
        ("BOOL", 1),
    ):
        request = json_request([value], [1, 1])
        request["inputs"][0]["datatype"] = datatype
        with pytest.raises(RequestError, match=r"inputs\[0\]\.data"):
            decoded(json.dumps(request).encode(), datatype=datatype)


def test_a_bool_byte_above_one_is_refused() -> None:
    tensor = {
        "name": "x",
        "shape": [1, 2],
        "datatype": "BOOL",
        "parameters": {"binary_data_size": 2},
    }
    head = json.dumps({"inputs": [tensor]}).encode()
    with pytest.raises(RequestError, match="above 1"):
        decoded(head + b"\x01\x02", len(head), "BOOL")


def test_too_many_tensors_and_too_large_an_envelope_are_limits() -> None:
    tensor = '{"data": [1]},'
    with pytest.raises(LimitError, match="1024 tensors"):
        decoded(f'{{"inputs": [{tensor * 1025}]}}'.encode())
    with pytest.raises(LimitError, match="262144 bytes"):
        decoded(json.dumps({"inputs": ["x" * 300_000]}).encode())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    "inputs",
                    "outputs",
                    "name",
                    "shape",
                    "datatype",
                    "data",
                    "parameters",
                    "id",
                    "binary_data_size",
                    "timeout",
                    "x",
                    "y",
                ]
            )
            | st.text(max_size=4),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


@given(JSON)
@settings(max_examples=300, deadline=None)
def test_any_document_is_decoded_or_refused_with_a_typed_error(document: Any) -> None:
    with contextlib.suppress(GraphoptError):
        decoded(json.dumps(document).encode())


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_any_damage_to_a_good_request_is_decoded_strictly_or_refused(data: st.DataObject) -> None:
    text = bytearray(json.dumps(json_request([1.5, -2.0], [1, 2], id="a")).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text) - 1))
        piece = data.draw(
            st.sampled_from(
                [b"", b"[", b"]", b",", b'"', b"{", b"}", b"0", b"e", b" ", b"\\", b"-"]
            )
        )
        text[at : at + data.draw(st.integers(0, 2))] = piece
    try:
        decoded(bytes(text))
    except GraphoptError:
        return
    # What we accept, a strict parser of the standard library accepts too.
    json.loads(bytes(text).decode(), parse_constant=lambda literal: pytest.fail(literal))


@given(st.binary(max_size=200), st.integers(0, 220))
@settings(max_examples=100, deadline=None)
@example(b"", 0)
@example(b"{}", 2)
def test_any_bytes_with_any_header_length_are_refused_over_http_without_a_5xx(
    server: Running, content: bytes, length: int
) -> None:
    headers = {"Inference-Header-Content-Length": str(length)}
    assert server.ask("POST", INFER, content, headers).status == 400


@pytest.mark.parametrize("length", ["-1", "x", "1e2", "99999999999999", "1 2"])
def test_a_header_length_that_is_none_is_400(server: Running, length: str) -> None:
    reply = server.ask("POST", INFER, b"{}", {"Inference-Header-Content-Length": length})
    assert reply.status == 400
    assert reply.error.startswith("Inference-Header-Content-Length")


def test_a_raw_request_is_one_tensor_and_its_answer_binary(server: Running) -> None:
    body = torch.arange(32, dtype=torch.int32).numpy().tobytes()
    headers = {"Inference-Header-Content-Length": "0"}
    two_free = server.ask("POST", "/v2/models/identity_int32/infer", body, headers)
    assert two_free.status == 400
    assert "several dims are variable" in two_free.error
    two_inputs = server.ask("POST", "/v2/models/simple/infer", body, headers)
    assert two_inputs.status == 400


def test_a_raw_request_takes_its_rows_from_its_length() -> None:
    from data_serving import Model, directory, serving, tensors

    from graphoptd.data import Signature

    signature = Signature(
        tensors(("x", "INT32", [-1, 16]), batch=True),
        tensors(("y", "INT32", [-1, 16]), batch=True),
        1,
    )
    model = Model("rows", signature, lambda inputs: {"y": inputs["x"]})
    with serving(directory(model)) as running:
        body = torch.arange(32, dtype=torch.int32).numpy().tobytes()
        headers = {"Inference-Header-Content-Length": "0"}
        reply = running.ask("POST", "/v2/models/rows/infer", body, headers)
        assert reply.status == 200
        n_json = int(reply.headers["inference-header-content-length"])
        assert json.loads(reply.body[:n_json])["outputs"][0]["shape"] == [2, 16]
        assert reply.body[n_json:] == body
        assert running.ask("POST", "/v2/models/rows/infer", body[:-4], headers).status == 400
        assert running.ask("POST", "/v2/models/rows/infer", b"", headers).status == 400


def test_an_answer_json_cannot_express_is_400_and_names_the_way_out(server: Running) -> None:
    x = torch.tensor([[1.0, math.nan]])
    body, headers = binary_request(x, binary_data_output=False)
    reply = server.ask("POST", INFER, body, headers)
    assert reply.status == 400
    assert "nan at element 1" in reply.error
    assert "binary_data" in reply.error


def test_large_json_answers_are_whole(server: Running) -> None:
    n = 50_000
    request = json_request([0.1] * n, [1, n])
    reply = server.ask("POST", INFER, request)
    assert reply.json["outputs"][0]["data"] == [0.1] * n


def test_large_binary_answers_are_whole(server: Running) -> None:
    x = torch.rand(8, 100_000)
    body, headers = binary_request(x)
    for wish in ("identity", "gzip"):
        reply = server.ask("POST", INFER, body, {**headers, "Accept-Encoding": wish})
        content = reply.body
        if wish == "gzip":
            import gzip

            content = gzip.decompress(content)
        assert content[int(reply.headers["inference-header-content-length"]) :] == body[-x.nbytes :]
