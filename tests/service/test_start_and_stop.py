import json
import signal
import socket
from pathlib import Path

import pytest

from service.harness import Daemon, Zygote, apply, infer_body, running

SIGNALS = [signal.SIGTERM, signal.SIGINT]


def test_ready_means_that_every_model_answers_and_can_be_changed(
    folder: Path, model_argv: list[str]
) -> None:
    with running(folder, model_argv, None) as daemon:
        daemon.until("READY=1")
        assert daemon.get("/v2/health/ready")[0] == 200
        assert daemon.infer() == {"a": [0, 0], "b": [0, 0], "revision": 1}
        with daemon.control() as client:
            assert apply(client, 7) == 2
        assert daemon.infer() == {"a": [7, 7], "b": [7, 7], "revision": 2}
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == -signal.SIGTERM


def test_the_log_tells_the_whole_story(folder: Path, model_argv: list[str], zygote: Zygote) -> None:
    with running(folder, model_argv, zygote) as daemon:
        daemon.until("READY=1")
        with daemon.control() as client:
            apply(client, 1)
        daemon.signal(signal.SIGTERM)
        daemon.wait()
        story = [
            "daemon.starting", "daemon.recovered", "model.loaded", "daemon.listening", "daemon.ready",
            "delta.applied", "daemon.stopping", "daemon.stopped",
        ]  # fmt: skip
        daemon.log.text()
        assert [name for name in story if daemon.log.events(name)] == story
        (applied,) = daemon.log.events("delta.applied")
        assert (applied["delta_id"], applied["revision"], applied["source"]) == ("d1", 2, "control")
        assert daemon.log.events("daemon.stopped")[0]["clean"] is True


def begin_request(daemon: Daemon) -> tuple[socket.socket, bytes]:
    """A request the service has begun to read, and the rest of its body."""
    body = json.dumps(infer_body(1.0)).encode()
    connected = daemon.connect()
    head = (
        "POST /v2/models/pair/infer HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    connected.sendall(head.encode())
    assert connected.recv(1024).startswith(b"HTTP/1.1 100")  # the service waits for the body
    return connected, body


@pytest.mark.parametrize("number", SIGNALS)
def test_a_request_in_flight_is_answered_before_the_signal_is_died_of(
    folder: Path, model_argv: list[str], zygote: Zygote, number: signal.Signals
) -> None:
    with running(folder, model_argv, zygote) as daemon:
        daemon.until("READY=1")
        connected, body = begin_request(daemon)
        with connected:
            daemon.signal(number)
            daemon.until("STOPPING=1")
            connected.sendall(body)
            assert connected.recv(1024).startswith(b"HTTP/1.1 200")
        assert daemon.wait() == -number
        daemon.log.text()
        assert daemon.log.events("daemon.stopped")[0]["clean"] is True


def test_while_it_drains_nobody_new_is_let_in(
    folder: Path, model_argv: list[str], zygote: Zygote
) -> None:
    with running(folder, model_argv, zygote) as daemon:
        daemon.until("READY=1")
        connected, body = begin_request(daemon)
        with connected:
            daemon.signal(signal.SIGTERM)
            daemon.until("STOPPING=1")
            with pytest.raises(OSError):  # noqa: PT011 - refused, or the file is gone
                daemon.connect()
            connected.sendall(body)
            assert connected.recv(1024).startswith(b"HTTP/1.1 200")


def test_a_second_signal_cuts_off_what_is_left_and_says_so(
    folder: Path, model_argv: list[str], zygote: Zygote
) -> None:
    with running(folder, model_argv, zygote) as daemon:
        daemon.until("READY=1")
        connected, _ = begin_request(daemon)
        with connected:
            daemon.signal(signal.SIGTERM)
            daemon.until("STOPPING=1")
            daemon.signal(signal.SIGTERM)
            assert daemon.wait() == -signal.SIGTERM
        daemon.log.text()
        (stopped,) = daemon.log.events("daemon.stopped")
        assert (stopped["clean"], stopped["requests_cancelled"]) == (False, 1)


def test_a_signal_while_it_starts_ends_it_like_any_other(
    folder: Path, model_argv: list[str], zygote: Zygote
) -> None:
    with running(folder, model_argv, zygote) as daemon:
        daemon.until("STATUS=recovering")
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == -signal.SIGTERM
        daemon.log.text()
        assert daemon.log.events("daemon.stopped")[0]["clean"] is True
    assert not list((folder / "run").glob("*.sock"))


def test_sockets_are_gone_after_a_stop_and_replaced_after_a_kill(
    folder: Path, model_argv: list[str], zygote: Zygote
) -> None:
    with running(folder, model_argv, zygote) as daemon:
        daemon.until("READY=1")
        daemon.signal(signal.SIGKILL)
        assert daemon.wait() == -signal.SIGKILL
    with running(folder, model_argv, zygote) as daemon:
        daemon.until("READY=1")
        assert daemon.infer()["revision"] == 1
        daemon.signal(signal.SIGTERM)
        daemon.wait()
    assert not list((folder / "run").glob("*.sock"))


def test_what_was_acknowledged_is_there_after_a_restart(
    folder: Path, model_argv: list[str], zygote: Zygote
) -> None:
    with running(folder, model_argv, zygote) as daemon, daemon.until("READY=1").control() as client:
        assert [apply(client, n) for n in (1, 2, 3)] == [2, 3, 4]
    with running(folder, model_argv, zygote) as daemon:
        daemon.until("READY=1")
        assert daemon.infer() == {"a": [3, 3], "b": [3, 3], "revision": 4}


def test_a_model_that_was_unloaded_does_not_come_back_by_itself(
    folder: Path, model_argv: list[str], zygote: Zygote
) -> None:
    with running(folder, model_argv, zygote) as daemon, daemon.until("READY=1").control() as client:
        client.ask("unload", {"model": "pair"})
        assert daemon.get("/v2/models/pair")[0] == 404
    with running(folder, model_argv, zygote) as daemon:
        daemon.until("READY=1")
        assert daemon.get("/v2/models/pair")[0] == 404


def test_watchdog_pings_follow_proofs(folder: Path, model_argv: list[str], zygote: Zygote) -> None:
    with running(folder, model_argv, zygote, WATCHDOG_USEC="1000000") as daemon:
        daemon.until("READY=1").until("WATCHDOG=1").until("STATUS=serving pair revision 1")
        with daemon.control() as client:
            apply(client, 1)
        daemon.until("STATUS=serving pair revision 2")


def test_a_text_for_people_follows_the_line_that_says_ready(
    folder: Path, model_argv: list[str], zygote: Zygote
) -> None:
    with running(folder, [*model_argv, "--when-ready", "try this"], zygote) as daemon:
        daemon.until("READY=1")
        daemon.signal(signal.SIGTERM)
        daemon.wait()
        ready, _ = daemon.log.text().split("try this\n")
        assert "daemon.ready" in ready.splitlines()[-1]
