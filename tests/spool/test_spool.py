"""The spool: whole units, in order, once, with the rights of their owner."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from graphopt.delta import Delta
from graphopt.engine import Applied, EngineSettings, Host
from graphopt.errors import BusyError, DocumentError
from graphoptd.control.changes import apply_to
from graphoptd.logs import Ring, install
from graphoptd.settings import LogSettings, Settings, SpoolSettings
from graphoptd.spool import Spool
from helpers.graphs import transformer

ROOT = Path(__file__).parents[2]
ENVIRON = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'daemon'}:{ROOT / 'tests'}"}
NOBODY = 65534
WAIT_S = 20.0


class Kit:
    """A spool folder, a host, and somebody who renames things in."""

    def __init__(self, folder: Path, ring: Ring) -> None:
        self.path = folder / "spool"
        self.outside = folder / "outside"
        self.path.mkdir()
        self.outside.mkdir()
        self.ring = ring
        self.settings = Settings(spool=SpoolSettings(path=self.path, rescan_s=3_600))
        self.host = Host(EngineSettings(threads=1, intra_op=1, improve=False))
        self.model = self.host.load(transformer(1))
        for name in ("accepted", "rejected"):
            (self.path / name).mkdir()

    def spool(self, apply: Callable[[Delta], tuple[str, Applied]] | None = None) -> Spool:
        return Spool(lambda: self.settings, apply or partial(apply_to, self.host))

    def put(self, name: str, **head: object) -> Path:
        """A unit of one document that puts the constant `name` without its suffix."""
        edit = {"put_constant": {"name": name.partition(".")[0], "data": [1.0]}}
        return self.drop(name, json.dumps({"delta": 1, **head, "edits": [edit]}))

    def drop(self, name: str, text: str) -> Path:
        (self.outside / name).write_text(text)
        return (self.outside / name).rename(self.path / name)

    def folder(self, name: str, document: str, **tensors: torch.Tensor) -> Path:
        unit = self.outside / name
        unit.mkdir()
        (unit / "delta.yaml").write_text(document)
        if tensors:
            save_file(tensors, unit / "w.safetensors")
        return unit.rename(self.path / name)

    def listed(self, kind: str) -> list[str]:
        return sorted(os.listdir(self.path / kind))

    def events(self, name: str) -> list[dict]:
        lines = [json.loads(line) for _, line in self.ring.read(0, 100_000).lines]
        return [line for line in lines if line["event"] == name]


@pytest.fixture
def kit(tmp_path: Path) -> Iterator[Kit]:
    before = os.umask(0o022)
    silent = os.open(os.devnull, os.O_WRONLY)
    logs = install(LogSettings(), silent)
    made = Kit(tmp_path, logs.ring)
    yield made
    made.host.close()
    logs.close()
    os.close(silent)
    os.umask(before)


def test_documents_are_applied_in_order_of_names_and_moved(kit: Kit) -> None:
    for name in ("20-b.json", "10-c.yaml", "30-a.json"):
        kit.put(name)
    assert kit.spool().rescan() == 3
    order = [name for name in kit.model.graph.constants if name[:2].isdigit()]
    assert sorted(order) == ["10-c", "20-b", "30-a"]
    said = kit.events("spool.accepted")
    assert [Path(line["path"]).name for line in said] == ["10-c.yaml", "20-b.json", "30-a.json"]
    assert [line["revision"] for line in said] == [2, 3, 4]
    assert {line["peer_uid"] for line in said} == {os.getuid()}
    assert kit.listed("accepted") == ["10-c.yaml", "20-b.json", "30-a.json"]
    assert sorted(os.listdir(kit.path)) == ["accepted", "rejected"]


def test_a_folder_brings_its_files(kit: Kit) -> None:
    text = "delta: 1\nedits:\n  - load_weights: {path: w.safetensors, strict: false}\n"
    kit.folder("w.delta", text, **{"classifier.bias": torch.full((3,), 5.0)})
    shutil.copytree(kit.path / "w.delta", kit.outside / "again")
    kit.spool().rescan()
    assert kit.model.graph.constants["classifier.bias"].tensor.tolist() == [5.0] * 3
    assert kit.listed("accepted") == ["w.delta"]


def test_unfinished_and_foreign_names_are_left_alone(kit: Kit) -> None:
    names = [".a.yaml", "b.yaml.tmp", "c.txt", "d.yml~", "e.delta.tmp"]
    for name in names:
        kit.put(name)
    (kit.path / "f").mkdir()
    assert kit.spool().rescan() == 0
    assert sorted(os.listdir(kit.path)) == sorted([*names, "f", "accepted", "rejected"])
    assert kit.model.revision == 1


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("delta: 1\nedits: [{bypass: {node: nope}}]\n", "delta.unknown_node"),
        ("delta: 1\nedits: [", "document.invalid"),
        ("delta: 1\nedits: [{attach_adapter: {name: a, path: legal}}]\n", "document.invalid"),
        ("delta: 1\ngraph: other\nedits: []\n", "model.unknown"),
        ("delta: 1\nif_revision: 9\nedits: []\n", "delta.precondition_failed"),
    ],
)
def test_a_bad_document_is_moved_aside_with_the_reason(kit: Kit, text: str, code: str) -> None:
    kit.drop("bad.yaml", text)
    kit.put("good.json")
    assert kit.spool().rescan() == 2
    assert kit.listed("rejected") == ["bad.yaml", "bad.yaml.reason.txt"]
    (line,) = kit.events("spool.rejected")
    assert line["code"] == code
    reason = (kit.path / "rejected" / "bad.yaml.reason.txt").read_text()
    assert line["message"] in reason
    assert (kit.path / "rejected" / "bad.yaml").read_text() == text
    assert kit.listed("accepted") == ["good.json"]
    assert kit.model.revision == 2


@pytest.mark.parametrize("path", ["../outside/secret", "/etc/hostname", "link", "~/x", "hard.json"])
def test_files_of_a_unit_lie_in_its_folder(kit: Kit, path: str) -> None:
    secret = kit.outside / "secret"
    secret.mkdir()
    save_file({"classifier.bias": torch.zeros(3)}, secret / "w.safetensors")
    unit = kit.outside / "u.delta"
    unit.mkdir()
    (unit / "delta.yaml").write_text(f"delta: 1\nedits: [{{load_weights: {{path: '{path}'}}}}]\n")
    (unit / "link").symlink_to(secret)
    os.link(secret / "w.safetensors", unit / "hard.json")
    unit.rename(kit.path / "u.delta")
    kit.spool().rescan()
    assert kit.listed("rejected") == ["u.delta", "u.delta.reason.txt"]
    assert kit.model.revision == 1


def test_a_unit_that_is_a_link_or_holds_no_document_is_rejected(kit: Kit) -> None:
    (kit.outside / "real.yaml").write_text("delta: 1\nedits: []\n")
    (kit.path / "link.yaml").symlink_to(kit.outside / "real.yaml")
    (kit.path / "empty.delta").mkdir()
    os.mkfifo(kit.path / "pipe.yaml")
    assert kit.spool().rescan() == 3
    assert len([name for name in kit.listed("rejected") if "reason" not in name]) == 3
    assert kit.model.revision == 1


def test_what_others_may_write_does_not_act_for_its_owner(kit: Kit) -> None:
    path = kit.put("a.json")
    path.chmod(0o666)
    kit.spool().rescan()
    assert kit.events("spool.rejected")[0]["code"] == "auth.denied"
    assert kit.model.revision == 1


def test_the_owner_of_a_unit_needs_the_level_operate(kit: Kit) -> None:
    """As root with units of another user; else the own user's pass, as everywhere."""
    path = kit.put("a.json")
    unit = kit.folder("b.delta", "delta: 1\nedits: []\n")
    if os.getuid() != 0:
        assert kit.spool().rescan() == 2
        assert kit.listed("accepted") == ["a.json", "b.delta"]
        return
    os.chown(path, NOBODY, NOBODY)
    os.chown(unit, NOBODY, NOBODY)  # but not the document inside
    kit.spool().rescan()
    assert [line["code"] for line in kit.events("spool.rejected")] == ["auth.denied"] * 2
    assert [line["peer_uid"] for line in kit.events("control.denied")] == [NOBODY, NOBODY]
    assert kit.model.revision == 1
    levels = replace(kit.settings.control.levels, operate_users=(NOBODY,))
    kit.settings = replace(kit.settings, control=replace(kit.settings.control, levels=levels))
    os.chown(kit.put("c.json"), NOBODY, NOBODY)
    mixed = kit.folder("d.delta", "delta: 1\nedits: []\n")
    os.chown(mixed, NOBODY, NOBODY)
    kit.spool().rescan()
    assert kit.listed("accepted") == ["c.json"]
    assert "belongs to user 0" in (kit.path / "rejected" / "d.delta.reason.txt").read_text()


def test_a_crash_between_applying_and_moving_is_harmless(kit: Kit) -> None:
    kit.put("a.json")
    kit.put("b.json")
    apply = partial(apply_to, kit.host)

    def dies(delta: Delta) -> tuple[str, Applied]:
        apply(delta)
        raise SystemExit

    with pytest.raises(SystemExit):
        kit.spool(dies).rescan()
    assert kit.model.revision == 2
    assert kit.listed("accepted") == []
    assert kit.spool().rescan() == 2
    assert kit.model.revision == 3  # a.json was answered as the first time
    assert kit.listed("accepted") == ["a.json", "b.json"]


def test_the_same_file_dropped_again_later_is_a_new_wish(kit: Kit) -> None:
    text = "delta: 1\nedits: [{set_attr: {node: layer.0/norm, name: eps, value: %s}}]\n"
    for number, value in enumerate(("1e-3", "1e-5", "1e-3"), 2):
        kit.drop("eps.yaml", text % value)
        kit.spool().rescan()
        assert kit.model.revision == number
    (kit.path / "accepted" / "eps.yaml").rename(kit.path / "eps.yaml")
    kit.spool().rescan()
    assert kit.model.revision == 5
    assert kit.listed("accepted") == ["eps.yaml", "eps.yaml~1", "eps.yaml~2"]


def test_an_id_of_its_own_makes_a_delta_apply_once_for_good(kit: Kit) -> None:
    for _ in range(2):
        kit.put("a.json", id="only-once")
        kit.spool().rescan()
    assert kit.model.revision == 2
    assert len(kit.listed("accepted")) == 2


def test_a_unit_that_has_to_wait_holds_up_those_behind_it(kit: Kit) -> None:
    kit.put("a.json")
    kit.put("b.json")
    is_busy = [True]
    apply = partial(apply_to, kit.host)

    def busy(delta: Delta) -> tuple[str, Applied]:
        if is_busy.pop() if is_busy else False:
            raise BusyError("a queue is full")
        return apply(delta)

    spool = kit.spool(busy)
    assert spool.rescan() == 0
    assert kit.model.revision == 1
    assert spool.rescan() == 2
    assert [line["revision"] for line in kit.events("spool.accepted")] == [2, 3]


def test_history_is_bounded(kit: Kit) -> None:
    kit.settings = replace(kit.settings, spool=replace(kit.settings.spool, kept_max=2))
    for number in range(5):
        kit.put(f"{number}.json")
        kit.drop(f"{number}-bad.yaml", "no delta")
    kit.spool().rescan()
    assert kit.listed("accepted") == ["3.json", "4.json"]
    names = ["3-bad.yaml", "3-bad.yaml.reason.txt", "4-bad.yaml", "4-bad.yaml.reason.txt"]
    assert kit.listed("rejected") == names


def test_a_unit_replaced_while_it_is_applied_has_its_own_turn(kit: Kit) -> None:
    kit.put("a.json")
    apply = partial(apply_to, kit.host)
    again = [True]

    def replaces(delta: Delta) -> tuple[str, Applied]:
        done = apply(delta)
        if again.pop() if again else False:
            edit = {"put_constant": {"name": "second", "data": [2.0]}}
            kit.drop("a.json", json.dumps({"delta": 1, "edits": [edit]}))
        return done

    spool = kit.spool(replaces)
    spool.rescan()
    assert "second" not in kit.model.graph.constants
    spool.rescan()
    assert "second" in kit.model.graph.constants
    assert kit.listed("accepted") == ["a.json"]


@pytest.mark.parametrize("hinted", [True, False])
def test_a_running_spool_takes_what_is_renamed_in(kit: Kit, hinted: bool) -> None:
    """By notification where the rescan would take an hour, and by the rescan where there is none."""
    rescan_s = 3_600 if hinted else 0.1
    kit.settings = replace(kit.settings, spool=replace(kit.settings.spool, rescan_s=rescan_s))
    came = threading.Semaphore(0)
    apply = partial(apply_to, kit.host)

    def counted(delta: Delta) -> tuple[str, Applied]:
        done = apply(delta)
        came.release()
        return done

    kit.put("before.json")
    spool = kit.spool(counted)
    assert spool.start() == ""
    try:
        assert came.acquire(timeout=WAIT_S)
        if not hinted:
            spool._observer.unschedule_all()
        for number in range(20):
            kit.put(f"{number:02}.json")
        for _ in range(20):
            assert came.acquire(timeout=WAIT_S)
    finally:
        spool.stop()
    assert kit.model.revision == 22


def test_a_missing_folder_is_said_at_the_start(kit: Kit) -> None:
    shutil.rmtree(kit.path)
    with pytest.raises(DocumentError, match="make the spool folder"):
        kit.spool().start()


def test_every_unit_is_applied_once_whenever_the_process_is_killed(tmp_path: Path) -> None:
    spool, count = tmp_path / "spool", 40
    spool.mkdir()
    for number in range(count):
        edit = {"put_constant": {"name": f"c{number}", "data": [float(number)]}}
        path = tmp_path / f"{number:03}.json"
        path.write_text(json.dumps({"delta": 1, "edits": [edit]}))
        path.rename(spool / path.name)
    arguments = [sys.executable, str(Path(__file__).with_name("spool_child.py"))]
    kills = [3, 11]  # after so many answers: somewhere between applying and moving
    last: list[str] = []
    while not (last and last[0] == "done"):
        process = subprocess.Popen(
            [*arguments, str(tmp_path / "state"), str(spool)],
            env=ENVIRON, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        wait_for = kills.pop(0) if kills else 1_000_000
        for seen, line in enumerate(process.stdout, 1):
            last = line.split()
            if seen == wait_for:
                process.kill()
                break
        process.stdout.close()
        assert process.wait(WAIT_S) in (0, -9)
    assert last == ["done", str(count + 1), str(count)]
    assert len(os.listdir(spool / "accepted")) == count
    assert os.listdir(spool / "rejected") == []
