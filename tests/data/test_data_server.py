"""Starting, handing over, draining and stopping, on real sockets."""

import asyncio
import http.client
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import uvloop
from data_serving import Gate, directory, identity, json_request, serving, unix_settings

from graphopt.errors import DocumentError
from graphoptd.data import DataServer, DataSettings
from graphoptd.data.sockets import ListenError

pytestmark = pytest.mark.usefixtures("begins")


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=30)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(30)
        self.sock.connect(self._path)


def live_over(path: Path) -> int:
    connection = UnixConnection(str(path))
    try:
        connection.request("GET", "/v2/health/live")
        return connection.getresponse().status
    finally:
        connection.close()


def start_fails(settings: DataSettings) -> ListenError:
    async def attempt() -> None:
        await DataServer(directory(), settings).start()

    with pytest.raises(ListenError) as caught:
        uvloop.run(attempt())
    return caught.value


def test_a_busy_port_is_one_clear_error() -> None:
    with serving(directory()) as running:
        error = start_fails(DataSettings(port=running.address[1]))
        assert str(error).startswith(f"127.0.0.1:{running.address[1]}: Address already in use")
        assert "choose another port" in str(error)


def test_an_address_of_another_host_is_refused() -> None:
    assert "192.0.2.1:0" in str(start_fails(DataSettings(host="192.0.2.1", port=0)))


def test_the_unix_socket_has_its_mode_and_goes_with_the_server(tmp_path: Path) -> None:
    path = tmp_path / "data.sock"
    with serving(directory(), unix_settings(tmp_path, socket_mode=0o600)) as running:
        assert running.server.addresses == [f"unix:{path}"]
        assert path.stat().st_mode & 0o777 == 0o600
        assert live_over(path) == 200
        assert "another process listens" in str(start_fails(unix_settings(tmp_path)))
    assert not path.exists()


def test_a_dead_predecessors_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "data.sock"
    dead = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    dead.bind(str(path))
    dead.close()
    with serving(directory(), unix_settings(tmp_path)):
        assert live_over(path) == 200


def test_a_file_in_the_way_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "data.sock").write_text("precious")
    assert "something else than a socket" in str(start_fails(unix_settings(tmp_path)))
    assert (tmp_path / "data.sock").read_text() == "precious"


def test_a_failed_start_leaves_nothing_open(tmp_path: Path) -> None:
    (tmp_path / "data.sock").write_text("")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start_fails(DataSettings(port=port, socket_path=tmp_path / "data.sock"))
    with socket.socket() as again:
        again.bind(("127.0.0.1", port))


def test_neither_port_nor_path_is_refused() -> None:
    assert "data.socket_path" in str(start_fails(DataSettings(port=None)))


def test_inherited_sockets_are_served_and_stay_open_for_their_giver() -> None:
    async def body() -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setblocking(False)
        loop = asyncio.get_running_loop()

        def live() -> int:
            connection = http.client.HTTPConnection(*listener.getsockname(), timeout=30)
            connection.request("GET", "/v2/health/live")
            status = connection.getresponse().status
            connection.close()
            return status

        for _ in range(2):  # the second server takes over where the first one stopped
            server = DataServer(directory(identity()), DataSettings())
            await server.start([socket.socket(fileno=os.dup(listener.fileno()))])
            assert await loop.run_in_executor(None, live) == 200
            await server.stop()
        listener.close()

    uvloop.run(body())


def test_a_stop_lets_running_requests_finish_and_takes_no_new_ones() -> None:
    gate = Gate()
    with serving(directory(gate)) as running, ThreadPoolExecutor(2) as pool:
        address = running.address
        answer = pool.submit(
            running.ask, "POST", "/v2/models/gate/infer", json_request([5.0], [1, 1])
        )
        assert gate.entered.acquire(timeout=30)
        stopping = asyncio.run_coroutine_threadsafe(running.server.stop(30), running.loop)
        while running.server.addresses:
            pass
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address, timeout=30)
        assert not stopping.done()
        gate.opened.set()
        assert answer.result(30).status == 200
        assert stopping.result(30).n_aborted == 0


def test_a_stop_cuts_what_is_not_done_at_its_deadline_and_says_how_many() -> None:
    gate = Gate()
    with serving(directory(gate)) as running, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(
            running.ask, "POST", "/v2/models/gate/infer", json_request([5.0], [1, 1])
        )
        assert gate.entered.acquire(timeout=30)
        assert running.call(running.server.stop(0.01)).n_aborted == 1
        with pytest.raises((ConnectionResetError, http.client.RemoteDisconnected)):
            answer.result(30)


def test_idle_connections_do_not_delay_a_stop() -> None:
    with serving(directory(identity())) as running:
        connection = http.client.HTTPConnection(*running.address, timeout=30)
        connection.request("GET", "/v2/health/live")
        assert connection.getresponse().read()
        assert running.call(running.server.stop(30)).n_aborted == 0
        connection.close()


@pytest.mark.parametrize("field", ["body_bytes_max", "queue_max", "header_deadline_s", "batch_max"])
def test_a_setting_out_of_range_is_refused_by_name(field: str) -> None:
    for value in (0, -1):
        with pytest.raises(DocumentError, match=field):
            DataSettings(**{field: value})
    with pytest.raises(DocumentError, match="port"):
        DataSettings(port=70_000)
