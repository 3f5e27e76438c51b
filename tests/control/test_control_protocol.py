"""The wire: envelopes, order, bounds, deadlines, descriptors, streams."""

import json
import os
import socket
import threading
from pathlib import Path

import pytest
import torch
from control_serving import Raw, Service, ctl, serving
from safetensors.torch import save_file

from graphoptd.control.connection import Deadlines
from graphoptd.control.server import CONNECTIONS_MAX
from graphoptd.control.wire import LINE_BYTES_MAX
from helpers.graphs import transformer


def test_a_bare_word_is_a_call_without_parameters(service: Service) -> None:
    with Raw(service.socket) as client:
        client.send(b"status\n")
        reply = client.reply()
        assert reply["ok"]
        assert reply["id"] is None
        assert reply["result"]["models"][0]["name"] == "transformer"
        client.send(b"  models \r\n\n")
        assert client.reply()["result"]["models"][0]["revision"] == 1


def test_hello_names_versions_capabilities_and_what_the_caller_may(service: Service) -> None:
    with Raw(service.socket) as client:
        found = client.call("hello", id="h")
    assert found["id"] == "h"
    assert found["result"]["api"] == [1, 1]
    assert {"descriptors", "more"} <= set(found["result"]["capabilities"])
    assert found["result"]["level"] == "admin"
    assert "load" in found["result"]["methods"]


def test_help_says_level_parameters_and_purpose_of_every_method(service: Service) -> None:
    with Raw(service.socket) as client:
        rows = {row["method"]: row for row in client.call("help")["result"]["methods"]}
    assert rows["rollback"]["level"] == "operate"
    assert rows["rollback"]["params"] == "revision, model"
    assert all(row["says"].endswith(".") for row in rows.values())


@pytest.mark.parametrize(
    ("line", "part"),
    [
        (b'{"method": "status", "method": "models"}', "twice"),
        (b'{"method": "status", "params": {"x": NaN}}', "not finite"),
        (b'{"method": "status", "params": {"x": Infinity}}', "not finite"),
        (b'{"method": "status", "params": {"x": 1e999}}', ""),
        (b'{"method": "status", "params": ' + b"[" * 5000 + b"]" * 5000 + b"}", "nest"),
        (b'{"method": "status", "speed": 9}', "unknown key"),
        (b'{"params": {}}', "missing"),
        (b'{"method": 3}', "must be a string"),
        (b'{"method": "status", "descriptors": -1}', "at least 0"),
        (b'{"method": "status", "id": [1]}', "must be a string"),
        (b"[1, 2]", "must be a mapping"),
        (b'{"method": "status"', ""),
        (b"\xff\xfe\x00", ""),
        (b"Status!", ""),
    ],
)
def test_a_malformed_line_is_refused_and_the_connection_goes_on(
    service: Service, line: bytes, part: str
) -> None:
    with Raw(service.socket) as client:
        client.send(line + b"\n")
        error = client.reply()["error"]
        assert error["code"] == "proto.invalid"
        assert part in error["message"] + str(error["detail"])
        assert error["retryable"] is False
        assert error["remedy"]
        assert client.call("hello")["ok"]


def test_an_unknown_method_or_parameter_names_the_nearest(service: Service) -> None:
    with Raw(service.socket) as client:
        error = client.call("rolback", id=5)
        assert error["id"] == 5
        assert "rollback" in error["error"]["remedy"]
        fault = client.call("rollback", params={"revison": 1})["error"]
        assert fault["code"] == "proto.invalid"
        reasons = {each["path"]: each["reason"] for each in fault["detail"]}
        assert "did you mean revision" in reasons["revison"]


def test_every_reply_about_a_model_carries_its_revision_errors_included(service: Service) -> None:
    with Raw(service.socket) as client:
        assert client.call("history")["revision"] == 1
        assert client.call("rollback", params={"revision": 9})["revision"] == 1
        assert client.call("rollback", params={"revision": 1})["revision"] == 2
        assert "revision" not in client.call("status")


def test_a_line_longer_than_the_bound_ends_the_connection_with_a_reason(service: Service) -> None:
    with Raw(service.socket) as client:
        client.send(b"x" * (LINE_BYTES_MAX + 2))
        assert client.reply()["error"]["code"] == "proto.invalid"
        assert client.line() == b""


def test_half_a_line_and_silence_have_deadlines(tmp_path: Path) -> None:
    with serving(tmp_path, deadlines=Deadlines(idle_s=0.05, line_s=0.05)) as service:
        with Raw(service.socket) as slow:
            slow.send(b'{"method": "st')
            assert slow.reply()["error"]["code"] == "deadline.exceeded"
            assert slow.line() == b""
        with Raw(service.socket) as idle:
            assert idle.line() == b""


def test_replies_come_in_the_order_of_calls(service: Service) -> None:
    calls = [("explain", "e"), ("status", "s"), ("nodes", "n"), ("nope", "x"), ("hello", "h")] * 5
    with Raw(service.socket) as client:
        lines = [json.dumps({"method": m, "id": f"{i}{idx}"}) for idx, (m, i) in enumerate(calls)]
        client.send("".join(f"{line}\n" for line in lines).encode())
        ids = [client.reply()["id"] for _ in calls]
    assert ids == [f"{i}{idx}" for idx, (_, i) in enumerate(calls)]


def test_a_client_that_does_not_read_holds_up_nobody_else(tmp_path: Path) -> None:
    with (
        serving(tmp_path, transformer(40)) as service,
        Raw(service.socket) as deaf,
        Raw(service.socket) as other,
    ):
        deaf.send(b'{"method": "nodes", "more": true}\n' * 200)  # 40 MB of answers
        for _ in range(20):
            assert other.call("status")["ok"]


def test_a_client_that_never_reads_is_cut_off(tmp_path: Path) -> None:
    deadlines = Deadlines(write_s=0.05)
    with (
        serving(tmp_path, transformer(40), deadlines=deadlines) as service,
        Raw(service.socket) as deaf,
    ):
        deaf.send(b'{"method": "nodes", "more": true}\n' * 50)
        with Raw(service.socket) as other:  # once the server has closed it, it counts no more
            while service.server._tasks and len(service.server._tasks) > 1:
                assert other.call("hello")["ok"]


def test_a_long_answer_comes_in_parts_and_only_to_those_who_asked(tmp_path: Path) -> None:
    with serving(tmp_path, transformer(120)) as service, Raw(service.socket) as client:
        refused = client.call("nodes")["error"]
        assert refused["code"] == "limit.exceeded"
        assert "more: true" in refused["remedy"]
        client.send(b'{"method": "nodes", "more": true, "id": 1}\n')
        rows, parts = [], 0
        while True:
            line = client.line()
            assert len(line) < LINE_BYTES_MAX
            reply = json.loads(line)
            rows += reply["result"]["nodes"]
            parts += 1
            if not reply.get("continues"):
                break
        graph = service.host.get("transformer").graph
        assert parts > 1
        assert [row["id"] for row in rows] == [node.id for node in graph.iter_nodes()]
        assert ctl(service, "show").out.count("\n") > len(graph)


def test_one_connection_too_many_is_told_that_the_service_is_busy(service: Service) -> None:
    clients = [Raw(service.socket) for _ in range(CONNECTIONS_MAX)]
    try:
        assert clients[-1].call("hello")["ok"]  # all before it have been accepted
        with Raw(service.socket) as late:
            error = late.reply()["error"]
        assert error["code"] == "busy"
        assert error["retryable"] is True
        assert ctl(service, "status").code == 7
        assert service.lines("limit.reached")[0]["limit"] == "control.connections"
    finally:
        for client in clients:
            client.socket.close()


def test_descriptors_must_be_as_many_as_the_call_says(service: Service, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("{}")
    fd = os.open(tmp_path / "f", os.O_RDONLY)
    before = _open_files()
    with Raw(service.socket) as client:
        client.send(b'{"method": "apply", "descriptors": 2, "id": 1}\n', [fd])
        assert "2 descriptors are declared" in client.reply()["error"]["message"]
        assert client.line() == b""
    with Raw(service.socket) as client:
        client.send(b'{"method": "hello"}\n', [fd])
        assert "no call declares" in client.reply()["error"]["message"]
        assert client.line() == b""
    with Raw(service.socket) as client:
        client.send(b"rubbish?\n", [fd, fd])
        assert client.reply()["error"]["code"] == "proto.invalid"
        assert "no call declares" in client.reply()["error"]["message"]
        assert client.line() == b""
    with Raw(service.socket) as client:  # a method that takes none
        assert client.call("hello", [fd, fd])["ok"]
        assert client.call("hello")["ok"]
    assert _settles(before)
    os.close(fd)


def test_no_call_leaves_a_file_open_behind(service: Service, tmp_path: Path) -> None:
    save_file({"classifier.bias": torch.ones(3)}, tmp_path / "b.safetensors")
    documents = {
        "good": '{"delta": 1, "edits": [{"load_weights": {"path": "b.safetensors", "strict": false}}]}',
        "bad": '{"delta": 1, "edits": [{"swap_head": {"node": "no", "path": "b.safetensors"}}]}',
        "broken": '{"delta": 2, "edits": [{"swap_head": {"node": "no", "path": "b.safetensors"}}]}',
    }
    for name, text in documents.items():
        (tmp_path / f"{name}.json").write_text(text)
        ctl(service, "apply", str(tmp_path / f"{name}.json"))
    before = _open_files()
    for name in documents:
        codes = [ctl(service, "apply", str(tmp_path / f"{name}.json")).code for _ in range(3)]
        assert codes == [0 if name == "good" else 1] * 3
    assert _settles(before)


def test_more_files_than_one_message_carries_arrive(service: Service, tmp_path: Path) -> None:
    edits = []
    for idx in range(300):
        save_file({"t": torch.full((2,), float(idx))}, tmp_path / f"{idx}.safetensors")
        edits.append(
            {"put_constant": {"name": f"c{idx}", "path": f"{idx}.safetensors", "tensor": "t"}}
        )
    (tmp_path / "many.json").write_text(json.dumps({"delta": 1, "edits": edits}))
    ran = ctl(service, "apply", str(tmp_path / "many.json"))
    assert ran.code == 0, ran.err
    constants = service.host.get("transformer").graph.constants
    assert [constants[f"c{idx}"].tensor[0].item() for idx in range(300)] == list(range(300))


def test_a_document_longer_than_a_line_goes_as_a_file(service: Service, tmp_path: Path) -> None:
    data = [0.5] * 4000
    edits = [{"put_constant": {"name": f"c{idx}", "data": data}} for idx in range(100)]
    path = tmp_path / "long.json"
    path.write_text(json.dumps({"delta": 1, "edits": edits}))
    assert path.stat().st_size > LINE_BYTES_MAX
    assert ctl(service, "apply", str(path)).code == 0
    assert "c99" in service.host.get("transformer").graph.constants


def test_of_two_writers_with_the_same_if_revision_one_wins(service: Service) -> None:
    document = json.dumps(
        {"delta": 1, "if_revision": 1, "edits": [{"bypass": {"node": "layer.0/gelu"}}]}
    )
    replies = []

    def write() -> None:
        with Raw(service.socket) as client:
            replies.append(client.call("apply", params={"document": document, "format": "json"}))

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    won = [reply for reply in replies if reply["ok"]]
    lost = [reply["error"]["code"] for reply in replies if not reply["ok"]]
    assert len(won) == 1
    assert won[0]["result"]["revision"] == 2
    assert lost == ["delta.precondition_failed"]


def test_the_same_delta_id_is_answered_as_the_first_time(service: Service) -> None:
    text = {"delta": 1, "id": "once", "edits": [{"bypass": {"node": "layer.0/gelu"}}]}
    params = {"document": json.dumps(text), "format": "json"}
    with Raw(service.socket) as client:
        first, again = (client.call("apply", params=params) for _ in range(2))
        assert first["result"]["revision"] == again["result"]["revision"] == 2
        other = {**text, "edits": [{"bypass": {"node": "pooler/tanh"}}]}
        error = client.call("apply", params={"document": json.dumps(other), "format": "json"})
        assert error["error"]["code"] == "delta.duplicate_id"
    assert [line["code"] for line in service.lines("delta.rejected")] == ["delta.duplicate_id"]


def test_followed_logs_bring_new_lines_until_the_client_speaks(service: Service) -> None:
    with Raw(service.socket) as follower, Raw(service.socket) as other:
        params = {"follow": True, "count": 1}
        follower.send(
            json.dumps({"method": "logs", "more": True, "params": params}).encode() + b"\n"
        )
        first = follower.reply()
        assert first["continues"]
        assert json.loads(first["result"]["lines"][0][1])["event"] == "daemon.listening"
        other.call("apply", params={"document": "delta: 2\nedits: []\n"})
        news = follower.reply()
        assert json.loads(news["result"]["lines"][0][1])["event"] == "delta.rejected"
        follower.send(b"hello\n")
        assert "continues" not in follower.reply()
        assert follower.reply()["result"]["service"] == "graphoptd"


def test_followed_logs_need_more(service: Service) -> None:
    with Raw(service.socket) as client:
        assert client.call("logs", params={"follow": True})["error"]["code"] == "proto.invalid"


def test_log_reading_goes_on_where_it_stopped(service: Service) -> None:
    with Raw(service.socket) as client:
        start = client.call("logs")["result"]
        client.call("apply", params={"document": "delta: 2\nedits: []\n"})
        params = {"after": start["last"], "epoch": start["epoch"]}
        found = client.call("logs", params=params)["result"]
        assert [json.loads(line)["event"] for _, line in found["lines"]] == ["delta.rejected"]
        assert found["missed"] == 0


def test_top_sends_a_snapshot_at_each_interval(service: Service) -> None:
    with Raw(service.socket) as client:
        params = {"interval_s": 0.1, "count": 3}
        client.send(json.dumps({"method": "top", "more": True, "params": params}).encode() + b"\n")
        replies = [client.reply() for _ in range(3)]
    assert [reply.get("continues", False) for reply in replies] == [True, True, False]
    assert replies[0]["result"]["statistics"] == {"requests": 7}


def test_streams_end_when_the_service_stops(tmp_path: Path) -> None:
    with serving(tmp_path) as service:
        follower = Raw(service.socket)
        follower.send(b'{"method": "logs", "more": true, "params": {"follow": true}}\n')
        assert follower.reply()["continues"]
    assert "continues" not in follower.reply()
    assert follower.line() == b""
    follower.socket.close()


def test_an_inherited_socket_is_used_and_its_file_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "systemd.sock"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    with serving(tmp_path, inherited=[listener]) as service:
        assert service.server.address == str(path)
        assert ctl(path, "status").code == 0
    assert path.exists()
    assert not (tmp_path / "c.sock").exists()


def test_a_dead_predecessors_socket_is_replaced_a_live_ones_is_not(tmp_path: Path) -> None:
    dead = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    dead.bind(str(tmp_path / "c.sock"))
    dead.close()
    with serving(tmp_path) as service:
        assert oct(service.socket.stat().st_mode)[-3:] == "660"
        with pytest.raises(Exception, match="another process listens there"), serving(tmp_path):
            pass
        assert ctl(service, "status").code == 0
    assert not (tmp_path / "c.sock").exists()
    (tmp_path / "c.sock").write_text("mine")
    with pytest.raises(Exception, match="no socket is there"), serving(tmp_path):
        pass


def test_changes_carry_who_wished_for_them_to_the_engines_events(service: Service) -> None:
    assert ctl(service, "bypass", "layer.0/gelu").code == 0
    name, _, who = service.engine_events[-1]
    assert name == "delta.applied"
    assert who == {"source": "control", "peer_uid": os.getuid()}


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def _settles(expected: int) -> bool:
    """Whether the count comes back: the server closes its end a moment after the client."""
    return any(_open_files() <= expected for _ in range(100_000))
