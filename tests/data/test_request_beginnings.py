"""Where a request begins: where it is read, or in a task in which it can meet others."""

import json
from collections.abc import Iterator

import pytest
from data_serving import Running, directory, failing, identity, json_request, serving
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
def running() -> Iterator[Running]:
    with serving(directory(identity(), failing())) as running:
        yield running


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of requests that began in a task."""
    begun: list[str] = []
    start = HttpToolsProtocol._start_asgi_task

    def counting(self: HttpToolsProtocol, cycle: object, app: object) -> None:
        begun.append(cycle.scope["path"])  # type: ignore[attr-defined]
        start(self, cycle, app)  # type: ignore[arg-type]

    monkeypatch.setattr(HttpToolsProtocol, "_start_asgi_task", counting)
    return begun


def infer(model: str, x: float = 1.0) -> bytes:
    body = json.dumps(json_request([x], [1, 1])).encode()
    head = f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


def test_a_connection_alone_needs_no_tasks_after_its_first_request(
    running: Running, tasks: list[str]
) -> None:
    with running.connect() as connection:
        for request, status in ((LIVE, b"200"), (infer("identity"), b"200"), (LIVE, b"200")):
            connection.sendall(request)
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 " + status)
    assert tasks == ["/v2/health/live"]


def test_requests_that_take_turns_with_others_have_tasks(
    running: Running, tasks: list[str]
) -> None:
    with running.connect() as one, running.connect() as other:
        for connection in (one, other, one, other):
            connection.sendall(infer("identity"))
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
    assert len(tasks) == 4


def test_a_body_in_pieces_has_a_task_that_waits_for_it(running: Running, tasks: list[str]) -> None:
    with running.connect() as connection:
        connection.sendall(LIVE)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
        head, body = infer("identity").split(b"\r\n\r\n")
        connection.sendall(head + b"\r\n\r\n")
        while len(tasks) < 2:
            pass  # until the server has read the headers alone
        connection.sendall(body)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
    assert tasks == ["/v2/health/live", "/v2/models/identity/infer"]


def test_what_fails_after_its_beginning_is_answered_and_the_connection_goes_on(
    running: Running, tasks: list[str]
) -> None:
    with running.connect() as connection:
        for request, status in (
            (LIVE, b"200"),
            (infer("failing", 13.0), b"500"),
            (infer("nobody"), b"404"),
            (infer("identity"), b"200"),
        ):
            connection.sendall(request)
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 " + status)
    assert len(tasks) == 1


def test_all_that_is_under_way_is_counted_wherever_it_began(running: Running) -> None:
    under_way = running.server._guard.under_way
    seen: list[int] = []
    find = running.server.plane._directory.find

    def counting(name: str) -> object:
        seen.append(len(under_way))
        return find(name)

    running.server.plane._directory.find = counting  # type: ignore[method-assign, assignment]
    with running.connect() as connection:
        for _ in range(2):
            connection.sendall(infer("identity"))
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
    assert set(seen) == {1}

    async def count() -> int:
        return len(under_way)

    assert running.call(count()) == 0
