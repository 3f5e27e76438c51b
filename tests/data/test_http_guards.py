"""Slow, greedy and broken clients over raw sockets: each is refused, and the server goes on."""

import contextlib
import json
import socket
import struct
from collections.abc import Iterator

import pytest
from data_serving import Gate, Running, directory, identity, json_request, read_all, serving
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("begins")
SHORT_S = 0.2
INFER = b"/v2/models/identity/infer"


@pytest.fixture(scope="module")
def strict() -> Iterator[Running]:
    """A server with short deadlines and small caps."""
    limits = {
        "header_deadline_s": SHORT_S,
        "body_deadline_s": SHORT_S,
        "keep_alive_s": SHORT_S,
        "write_deadline_s": SHORT_S,
        "linger_s": SHORT_S,
        "body_bytes_max": 64 << 10,
        "inflight_bytes_max": 128 << 10,
    }
    with serving(directory(identity()), **limits) as running:
        yield running


def post(body: bytes, *headers: bytes, path: bytes = INFER) -> bytes:
    lines = (
        b"POST " + path + b" HTTP/1.1",
        b"Host: x",
        b"Content-Length: %d" % len(body),
        *headers,
    )
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def good() -> bytes:
    return post(json.dumps(json_request([1.0], [1, 1])).encode())


def exchange(running: Running, *parts: bytes) -> bytes:
    """What the server sends until it closes the connection."""
    with running.connect() as connection:
        for part in parts:
            connection.sendall(part)
        return read_all(connection)


def check_alive(running: Running) -> None:
    assert running.ask("GET", "/v2/health/live").status == 200


def status_of(answer: bytes) -> int:
    assert answer.startswith(b"HTTP/1.1 "), answer[:200]
    return int(answer[9:12])


@pytest.mark.parametrize(
    "part",
    [
        b"P",
        b"POST " + INFER + b" HTTP/1.1\r\nHost: x\r\nX-Slow: ",
        post(b"{}").split(b"\r\n\r\n")[0] + b"\r\n\r\n{",
        b"POST " + INFER + b" HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
    ],
    ids=["one byte", "partial header", "partial body", "partial chunk"],
)
def test_a_client_that_stalls_gets_408_and_is_closed(strict: Running, part: bytes) -> None:
    answer = exchange(strict, part)
    assert status_of(answer) == 408
    assert b'"code": "deadline.exceeded"' in answer
    assert b"connection: close" in answer
    check_alive(strict)


def test_a_connection_that_never_speaks_is_closed_silently(strict: Running) -> None:
    assert exchange(strict) == b""


def test_an_idle_connection_is_closed_after_its_answer(strict: Running) -> None:
    answer = exchange(strict, good())
    assert status_of(answer) == 200
    assert answer.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize(
    "head",
    [
        b"GET /v2 HTTP/1.1\r\nX: " + b"a" * (20 << 10),
        b"GET /v2 HTTP/1.1\r\nX: " + b"a" * (17 << 10) + b"\r\n\r\n",
        b"GET /" + b"a" * (17 << 10) + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /v2 HTTP/1.1\r\n" + b"".join(b"X%d: 1\r\n" % i for i in range(3000)) + b"\r\n",
    ],
    ids=["one endless header", "one long header", "long path", "many headers"],
)
def test_headers_beyond_16_kib_are_431(strict: Running, head: bytes) -> None:
    assert status_of(exchange(strict, head)) == 431
    check_alive(strict)


def test_a_declared_body_beyond_the_cap_is_413_before_it_is_sent(strict: Running) -> None:
    head = b"POST " + INFER + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999\r\n\r\n"
    assert status_of(exchange(strict, head)) == 413


def test_a_client_that_asks_first_is_told_no_and_closed(strict: Running) -> None:
    head = (
        b"POST "
        + INFER
        + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 999999\r\nExpect: 100-continue\r\n\r\n"
    )
    answer = exchange(strict, head)
    assert status_of(answer) == 413
    assert b"connection: close" in answer
    assert b"100 Continue" not in answer


def test_a_client_that_asks_first_may_go_on(strict: Running) -> None:
    head, body = good().split(b"\r\n\r\n", 1)
    with strict.connect() as connection:
        connection.sendall(head + b"\r\nExpect: 100-continue\r\n\r\n")
        assert connection.recv(1 << 10).startswith(b"HTTP/1.1 100 Continue")
        connection.sendall(body)
        assert status_of(connection.recv(1 << 16)) == 200


def test_an_endless_chunked_body_is_413_while_it_streams(strict: Running) -> None:
    with strict.connect() as connection:
        connection.sendall(
            b"POST " + INFER + b" HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        chunk = b"4000\r\n" + bytes(0x4000) + b"\r\n"
        for _ in range(5):
            connection.sendall(chunk)
        assert status_of(connection.recv(1 << 16)) == 413
    check_alive(strict)


def test_chunk_framing_without_a_body_is_refused(strict: Running) -> None:
    with strict.connect() as connection:
        connection.sendall(
            b"POST " + INFER + b" HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1;"
        )
        try:
            for _ in range(40):
                connection.sendall(b"x" * (64 << 10))
            answer = connection.recv(1 << 16)
        except (BrokenPipeError, ConnectionResetError):
            answer = b"HTTP/1.1 400"
        assert status_of(answer) == 400
    check_alive(strict)


def test_a_thousandfold_bomb_is_413(strict: Running) -> None:
    import gzip

    bomb = gzip.compress(bytes(8 << 20))
    assert len(bomb) < 16 << 10
    for _ in range(3):
        answer = strict.ask("POST", INFER.decode(), bomb, {"Content-Encoding": "gzip"})
        assert answer.status == 413
        assert "expands beyond" in answer.error
    assert strict.server.plane.budget.used_bytes == 0


def test_a_body_beyond_the_byte_budget_is_503_with_retry_after(strict: Running) -> None:
    strict.server.plane.budget.take(100 << 10)
    try:
        answer = strict.ask("POST", INFER.decode(), bytes(40 << 10))
        assert answer.status == 503
        assert answer.headers["retry-after"] == "1"
    finally:
        strict.server.plane.budget.give(100 << 10)
    assert strict.ask("POST", INFER.decode(), bytes(40 << 10)).status == 400


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /v2 HTTP/9.9\r\n\r\n",
        b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /v2 HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v2 HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /v2 HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    ],
)
def test_malformed_http_is_refused_and_closed(strict: Running, request_bytes: bytes) -> None:
    answer = exchange(strict, request_bytes)
    assert 400 <= status_of(answer) < 500
    check_alive(strict)


def test_a_wish_to_upgrade_is_ignored(strict: Running) -> None:
    head, body = good().split(b"\r\n\r\n", 1)
    upgrade = b"\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n\r\n"
    answer = exchange(strict, head + upgrade + body, good())
    assert answer.count(b"HTTP/1.1 200") == 2
    assert answer.count(b'"model_name":"identity"') == 2


def test_pipelined_requests_are_answered_in_order(strict: Running) -> None:
    bodies = [json.dumps(json_request([float(i)], [1, 1], id=str(i))).encode() for i in range(20)]
    answer = exchange(strict, b"".join(post(body) for body in bodies))
    assert answer.count(b"HTTP/1.1 200") == 20
    places = [answer.index(b'"id":"%d"' % i) for i in range(20)]
    assert places == sorted(places)


def test_http_1_0_is_answered_and_closed(strict: Running) -> None:
    answer = exchange(strict, b"GET /v2/health/live HTTP/1.0\r\n\r\n")
    assert status_of(answer) == 200


def test_too_many_connections_of_one_peer_are_503() -> None:
    with serving(directory(identity()), connections_per_peer_max=3, linger_s=SHORT_S) as running:
        held = [running.connect() for _ in range(3)]
        for connection in held:
            connection.sendall(good())
            assert status_of(connection.recv(1 << 16)) == 200
        answer = exchange(running)
        assert status_of(answer) == 503
        assert b"retry-after: 1" in answer
        held[0].sendall(good())
        assert status_of(held[0].recv(1 << 16)) == 200
        for connection in held:
            connection.close()


def test_a_client_that_never_reads_its_answer_is_cut() -> None:
    with serving(directory(identity()), write_deadline_s=SHORT_S) as running:
        n_floats = 4 << 20
        head = json.dumps(
            {
                "inputs": [
                    {
                        "name": "x",
                        "shape": [1, n_floats],
                        "datatype": "FP32",
                        "parameters": {"binary_data_size": n_floats * 4},
                    }
                ],
                "parameters": {"binary_data_output": True},
            }
        ).encode()
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(running.address)
            length = b"Inference-Header-Content-Length: %d" % len(head)
            connection.sendall(post(head + bytes(n_floats * 4), length))

            async def cut() -> None:
                await running.server._guard.emptied.wait()

            running.call(cut())
            connection.settimeout(30)
            received = 0
            with contextlib.suppress(ConnectionResetError):
                while part := connection.recv(1 << 20):
                    received += len(part)
            assert received < n_floats * 4
        check_alive(running)


def test_a_client_that_leaves_takes_its_queued_work_along() -> None:
    gate = Gate()
    with serving(directory(gate), batch_max=1) as running:
        request = post(
            json.dumps(json_request([7.0], [1, 1])).encode(), path=b"/v2/models/gate/infer"
        )
        first, second, third = (running.connect() for _ in range(3))
        first.sendall(request)
        assert gate.entered.acquire(timeout=30)
        second.sendall(request)  # handed over ahead
        third.sendall(request)  # waits in the queue
        batcher = running.server.plane.lanes.get("gate").batcher

        def when(n_queued: int) -> None:
            while batcher.n_queued != n_queued:
                pass

        when(1)
        third.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        third.close()
        when(0)
        gate.opened.set()
        for connection in (first, second):
            assert status_of(connection.recv(1 << 16)) == 200
            connection.close()
        assert len(gate.batch_rows) == 2


@given(st.binary(max_size=300))
@settings(max_examples=60, deadline=None)
def test_no_bytes_after_a_request_line_kill_the_server(strict: Running, noise: bytes) -> None:
    with strict.connect() as connection:
        connection.sendall(b"POST " + INFER + b" HTTP/1.1\r\n" + noise + b"\r\n\r\n" + noise)
        connection.shutdown(socket.SHUT_WR)
        answer = read_all(connection)
    assert answer == b"" or 400 <= status_of(answer) < 500
    check_alive(strict)
