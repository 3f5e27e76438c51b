"""The artifact cache: whole entries within a bound, whatever happens to the folder."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphopt.engine.artifact_entry import META, Verified, name_of
from graphopt.engine.artifacts import BYTES_MAX, ArtifactCache, default_bytes_max
from graphopt.engine.fingerprint import host_fingerprint
from graphopt.engine.measured import (
    FILE,
    GRAPHS_MAX,
    CostKey,
    KnownPlan,
    Measured,
)
from graphopt.errors import LimitError, StateError

HOST = "x86_64 test 01234567"
VERIFIED = Verified(1e-6, 4e-6, 2)


def key_of(name: str) -> tuple[str, ...]:
    return (f"region-{name}", "weights", "openvino", "2026.4", '{"threads":1}')


class Cache:
    """A cache with what it dropped."""

    def __init__(self, folder: Path, host: str = HOST, **more: object) -> None:
        self.dropped: list[tuple[str, str]] = []
        self.cache = ArtifactCache(
            folder, host, on_drop=lambda *about: self.dropped.append(about), **more
        )

    def put(self, name: str, size: int = 100, n_files: int = 1) -> Path:
        built = self.cache.new_folder()
        built.mkdir()
        (built / "inner").mkdir()
        for i in range(n_files):
            (built / "inner" / f"{i}.bin").write_bytes(os.urandom(size // n_files))
        return self.cache.put(key_of(name), built, VERIFIED).folder


def stored_bytes(folder: Path) -> int:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != META]
    return sum(path.stat().st_size for path in files)


def test_what_was_put_is_found_by_the_next_process(tmp_path: Path) -> None:
    first = Cache(tmp_path)
    first.put("a", n_files=3)
    first.cache.note_latencies(key_of("a"), {(1, 128): 0.25, (): 0.5})
    again = Cache(tmp_path)
    found = again.cache.find(key_of("a"))
    assert found is not None
    assert found == first.cache.find(key_of("a"))
    assert (found.key, found.host, found.verified) == (key_of("a"), HOST, VERIFIED)
    assert found.latencies_s == {(1, 128): 0.25, (): 0.5}
    assert sorted(path.name for path in (found.folder / "inner").iterdir()) == [
        "0.bin", "1.bin", "2.bin",
    ]  # fmt: skip
    assert again.cache.find(key_of("b")) is None
    assert again.dropped == []


def test_every_part_of_the_key_tells_artifacts_apart() -> None:
    plain = key_of("a")
    others = [(*plain[:i], plain[i] + "x", *plain[i + 1 :]) for i in range(len(plain))]
    assert len({name_of(key) for key in (plain, *others)}) == 1 + len(plain)
    assert name_of(("ab", "c")) != name_of(("a", "bc"))


def test_an_entry_of_another_host_is_dropped_with_its_host_named(tmp_path: Path) -> None:
    Cache(tmp_path).put("a")
    elsewhere = Cache(tmp_path, "aarch64 other 76543210")
    assert elsewhere.cache.find(key_of("a")) is None
    assert [reason for _, reason in elsewhere.dropped] == [f"built on another host: {HOST}"]


def damage_byte(folder: Path) -> None:
    path = folder / "inner" / "0.bin"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def damage_length(folder: Path) -> None:
    with (folder / "inner" / "0.bin").open("ab") as file:
        file.write(b"x")


def damage_schema(folder: Path) -> None:
    document = json.loads((folder / META).read_text())
    (folder / META).write_text(json.dumps({**document, "schema": 99}))


def damage_name(folder: Path) -> None:
    folder.rename(folder.with_name("0" * 64))


def link_away(folder: Path) -> None:
    (folder / "inner" / "0.bin").unlink()
    (folder / "inner" / "0.bin").symlink_to("/etc/hostname")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_byte, "is not what was written"),
        (damage_length, "another size"),
        (damage_schema, "schema is 99"),
        (damage_name, "not its key's"),
        (link_away, "neither a file nor a folder"),
        (lambda folder: (folder / "more.bin").write_bytes(b"1"), "not its own"),
        (lambda folder: (folder / "inner" / "0.bin").unlink(), "missing"),
        (lambda folder: (folder / META).unlink(), "cannot be read"),
        (lambda folder: (folder / META).write_text("{"), "not valid JSON"),
        (lambda folder: (folder / META).write_text('{"schema": 1}'), "malformed"),
    ],
)
def test_a_damaged_entry_is_dropped_with_its_reason(
    tmp_path: Path, damage: object, reason: str
) -> None:
    folder = Cache(tmp_path).put("a")
    damage(folder)  # type: ignore[operator]
    again = Cache(tmp_path)
    assert again.cache.find(key_of("a")) is None
    assert [said for _, said in again.dropped if reason in said]
    assert stored_bytes(tmp_path) == 0
    again.put("a")
    assert again.cache.find(key_of("a")) is not None


def test_the_least_recently_used_goes_first_also_after_a_restart(tmp_path: Path) -> None:
    first = Cache(tmp_path, bytes_max=300)
    for i, name in enumerate("abc"):
        os.utime(first.put(name), (i, i))
    first.cache.find(key_of("a"))
    again = Cache(tmp_path, bytes_max=300)
    again.put("d")
    assert [again.cache.find(key_of(name)) is not None for name in "abcd"] == [
        True, False, True, True,
    ]  # fmt: skip
    assert again.dropped == [(name_of(key_of("b")), "least recently used, and the cache is full")]


def test_what_a_restart_would_serve_goes_last(tmp_path: Path) -> None:
    wanted = name_of(key_of("a"))
    cache = Cache(tmp_path, bytes_max=300, is_wanted=lambda name: name == wanted)
    for name in "abcd":
        cache.put(name)
    assert cache.cache.find(key_of("a")) is not None
    assert cache.cache.find(key_of("b")) is None


def test_a_pinned_entry_is_never_removed_for_room(tmp_path: Path) -> None:
    cache = Cache(tmp_path, bytes_max=300)
    for name in "ab":
        cache.put(name)
        cache.cache.pin(key_of(name))
    cache.cache.pin(key_of("a"))
    with pytest.raises(LimitError, match="more room"):
        cache.put("c", 200)
    assert list((tmp_path / "artifacts").glob("tmp-*")) == []
    cache.cache.unpin(key_of("a"))
    with pytest.raises(LimitError):
        cache.put("c", 200)  # pinned once more than it was given up
    cache.cache.unpin(key_of("a"))
    cache.put("c", 200)
    assert [cache.cache.find(key_of(name)) is not None for name in "abc"] == [False, True, True]
    with pytest.raises(ValueError, match="not pinned"):
        cache.cache.unpin(key_of("a"))


def test_a_pinned_entry_that_is_built_again_stays_what_it_was(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    content = (cache.put("a") / "inner" / "0.bin").read_bytes()
    cache.cache.pin(key_of("a"))
    assert (cache.put("a") / "inner" / "0.bin").read_bytes() == content
    cache.cache.unpin(key_of("a"))
    assert (cache.put("a") / "inner" / "0.bin").read_bytes() != content


def test_an_artifact_with_anything_but_plain_files_is_not_taken_in(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    built = cache.cache.new_folder()
    built.mkdir()
    (built / "weights.bin").symlink_to("/etc/hostname")
    with pytest.raises(StateError, match="neither a file nor a folder"):
        cache.cache.put(key_of("a"), built, VERIFIED)
    assert not built.exists()
    assert len(cache.cache) == 0


def test_what_an_interrupted_build_left_is_removed(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    built = cache.cache.new_folder()
    built.mkdir()
    (built / "half.bin").write_bytes(b"1")
    Cache(tmp_path)
    assert not built.exists()


def test_the_whole_folder_may_go_while_the_cache_is_open(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.put("a")
    cache.cache.pin(key_of("a"))
    shutil.rmtree(tmp_path / "artifacts")
    cache.cache.note_latencies(key_of("a"), {(): 1.0})
    assert cache.cache.find(key_of("a")) is None
    cache.put("a")
    assert cache.cache.find(key_of("a")) is not None


def test_by_default_a_tenth_of_a_small_disk_is_used_and_4_gib_of_a_large_one(
    tmp_path: Path,
) -> None:
    disk = os.statvfs(tmp_path)
    wanted = min(BYTES_MAX, int(0.1 * disk.f_blocks * disk.f_frsize))
    assert default_bytes_max(tmp_path) == wanted == ArtifactCache(tmp_path, HOST).bytes_max


@settings(
    deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["put", "find", "pin", "unpin", "drop", "reopen", "delete"]),
            st.sampled_from("abcdef"),
            st.integers(1, 250),
        ),
        max_size=16,
    )
)
def test_the_bound_holds_and_pinned_entries_stay_whatever_is_done(
    tmp_path_factory: pytest.TempPathFactory, actions: list[tuple[str, str, int]]
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    cache = Cache(folder, bytes_max=500)
    pinned: list[str] = []
    for action, name, size in actions:
        if action == "put":
            try:
                cache.put(name, size)
            except LimitError:
                assert pinned
        elif action == "find":
            cache.cache.find(key_of(name))
        elif action == "pin" and cache.cache.find(key_of(name)) is not None:
            cache.cache.pin(key_of(name))
            pinned.append(name)
        elif action == "unpin" and name in pinned:
            cache.cache.unpin(key_of(name))
            pinned.remove(name)
        elif action == "drop" and name not in pinned:
            cache.cache.drop(key_of(name), "unwanted")
        elif action == "reopen":
            cache, pinned = Cache(folder, bytes_max=500), []
        elif action == "delete" and not pinned:
            paths = [path for path in folder.rglob("*") if path.is_file()]
            if paths:
                random.Random(size).choice(paths).unlink()
        assert stored_bytes(folder) <= 500
        assert cache.cache.size_bytes <= 500
        assert all(cache.cache.find(key_of(kept)) is not None for kept in pinned)


@settings(deadline=None, max_examples=10)
@given(st.randoms(use_true_random=False))
def test_whatever_is_deleted_or_cut_off_opening_works_and_what_is_found_is_whole(
    tmp_path_factory: pytest.TempPathFactory, draw: random.Random
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    cache, contents = Cache(folder), {}
    for name in "abc":
        contents[name] = (cache.put(name) / "inner" / "0.bin").read_bytes()
    measured(folder).save()
    for path in [path for path in sorted(folder.rglob("*")) if path.exists()]:
        if draw.random() < 0.25 and path.exists():
            if path.is_dir():
                shutil.rmtree(path)
            elif draw.random() < 0.5:
                path.unlink()
            else:
                path.write_bytes(path.read_bytes()[: draw.randrange(1 + path.stat().st_size)])
    again = Cache(folder)
    measured(folder)
    for name, content in contents.items():
        found = again.cache.find(key_of(name))
        assert found is None or (found.folder / "inner" / "0.bin").read_bytes() == content
        again.put(name)


# -- what was measured


def measured(folder: Path, host: str = HOST, now_s: float = 100.0) -> Measured:
    return Measured(folder, host, lambda: now_s, lambda reason: None)


def cost_key(region: str = "r", host: str = HOST) -> CostKey:
    return CostKey(region, (1, 128), "openvino", "2026.4", "{}", host)


PLAN = KnownPlan("openvino layers", ((("a", "b"), key_of("x")), (("a", "b"), key_of("y"))))


def test_measurements_and_plans_are_there_after_a_restart(tmp_path: Path) -> None:
    first = measured(tmp_path / "not" / "there")
    first.note_cost(cost_key(), 0.5, 20)
    first.remember("bert", "hash", PLAN)
    first.prove("openvino layers", ["s1", "s2"])
    assert first.save()
    again = measured(tmp_path / "not" / "there", now_s=160.0)
    found = again.cost(cost_key())
    assert found is not None
    assert (found.median_s, found.runs, found.wall_s) == (0.5, 20, 100.0)
    assert again.cost(cost_key(), age_max_s=59.0) is None
    assert again.cost(cost_key("other")) is None
    assert again.recall("bert", "hash") == PLAN
    assert again.recall("a fork of it", "hash") == PLAN
    assert again.recall("bert", "another") is None
    assert again.wanted() == {key_of("x"), key_of("y")}
    assert again.proven("openvino layers") == {"s1", "s2"}
    again.disprove("openvino layers")
    again.forget("bert", "openvino layers")
    assert (again.proven("openvino layers"), again.wanted()) == (frozenset(), frozenset())


def test_what_another_host_measured_is_not_known_here(tmp_path: Path) -> None:
    first = measured(tmp_path)
    first.note_cost(cost_key(), 0.5, 20)
    assert first.save()
    said: list[str] = []
    elsewhere = Measured(tmp_path, "another", lambda: 0.0, said.append)
    assert elsewhere.cost(cost_key(host="another")) is None
    assert "another host" in said[0]


def test_a_record_that_cannot_be_read_says_so_and_is_replaced(tmp_path: Path) -> None:
    for text in ("", "[]", "{", '{"schema": 7}', '{"schema": 1, "host": 3}'):
        (tmp_path / FILE).write_text(text)
        said: list[str] = []
        record = Measured(tmp_path, HOST, lambda: 0.0, said.append)
        assert len(said) == 1
        record.note_cost(cost_key(), 1.0, 1)
        assert record.save()
        assert measured(tmp_path).cost(cost_key()) is not None


def test_only_the_youngest_graphs_of_a_model_are_remembered(tmp_path: Path) -> None:
    record = measured(tmp_path)
    for i in range(GRAPHS_MAX + 2):
        record.remember("bert", f"graph {i}", PLAN)
    assert record.recall("bert", "graph 1") is None
    assert record.recall("bert", f"graph {GRAPHS_MAX + 1}") == PLAN


def test_the_latest_plan_of_a_model_is_known_whatever_its_graph(tmp_path: Path) -> None:
    record = measured(tmp_path)
    other = KnownPlan("openvino whole", PLAN.steps)
    assert record.latest("bert") is None
    record.remember("bert", "graph 1", other)
    record.remember("bert", "graph 2", PLAN)
    record.remember("other", "graph 3", other)
    assert record.latest("bert") == PLAN
    record.forget("bert", PLAN.label)
    assert record.latest("bert") == other
    record.forget("bert", other.label)
    assert record.latest("bert") is None
    assert record.recall("bert", "graph 3") == other
    record.forget("other", "")  # nobody knows which way it was
    assert record.latest("other") is None


def test_a_cost_that_is_no_time_is_refused(tmp_path: Path) -> None:
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="a cost of"):
            measured(tmp_path).note_cost(cost_key(), wrong, 1)


def test_the_fingerprint_is_of_the_processor_and_not_of_its_mood() -> None:
    text = "model name : AMD EPYC\ncpu MHz : 2000\nflags : fpu avx2 avx512f ibpb\n"
    plain = host_fingerprint(cpuinfo=text)
    assert host_fingerprint(cpuinfo=text.replace("2000", "3500").replace("ibpb", "ibrs")) == plain
    assert host_fingerprint(cpuinfo=text.replace("avx512f", "")) != plain
    assert host_fingerprint(cpuinfo=text.replace("EPYC", "EPYC 2")) != plain
    assert host_fingerprint(["H100"], cpuinfo=text) != plain
    assert host_fingerprint() == host_fingerprint()
