from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.store import DELTA, FORK, LOAD, SNAPSHOT, UNLOAD, Entry, StateFolder

from .conftest import Opener, memory_folder
from .story import Engine, Op, recovered, script, states_of

NAMES = st.sampled_from("abc")


@st.composite
def histories(draw: st.DrawFn) -> list[Op]:
    """Operations that an engine could do, in any order that makes sense."""
    loaded: set[str] = set()
    ops: list[Op] = []
    for step in range(draw(st.integers(1, 40))):
        model = draw(NAMES)
        if model not in loaded:
            source = draw(NAMES)
            ops.append(
                Op(FORK, model, source) if source in loaded else Op(LOAD, model, f"base-{step}")
            )
            loaded.add(model)
            continue
        kind = draw(
            st.sampled_from([DELTA] * 6 + [SNAPSHOT, SNAPSHOT, UNLOAD, "compact", "checkpoint"])
        )
        weight = draw(st.sampled_from(["light", "heavy"]))
        ops.append(Op(kind, model, f"{weight}-{step}", draw(st.integers(0, 3))))
        if kind == UNLOAD:
            loaded.discard(model)
    return ops


@settings(max_examples=60, deadline=None)
@given(histories(), st.booleans())
def test_recovery_is_the_same_before_and_after_compaction_and_restart(
    ops: list[Op], reopen: bool
) -> None:
    with memory_folder() as parent:
        folder = StateFolder.open(parent / "s", wall_ns=lambda: 0)
        engine = Engine(folder)
        for op in ops:
            engine.apply(op)
        before = recovered(folder)
        assert before == engine.models
        folder.compact()
        if reopen:
            folder.close()
            folder = StateFolder.open(parent / "s", wall_ns=lambda: 0)
        assert recovered(folder) == before
        expected_ids = {
            (model, f"id-{tag}")
            for model, (revision, _) in engine.models.items()
            for tags in [engine.history[model][revision]]
            for tag in tags[len(engine.history[model][0]) :]
        }
        for model, delta_id in expected_ids:
            assert folder.journal.find_delta(model, delta_id)
        referenced = {d for row in folder.journal.records() for d in row.blobs}
        assert {p.name for p in (folder.path / "blobs").iterdir()} == referenced
        folder.close()


@settings(max_examples=30, deadline=None)
@given(histories(), st.integers(0, 10))
def test_reach_keeps_older_revisions_within_replay(ops: list[Op], back: int) -> None:
    with (
        memory_folder() as parent,
        StateFolder.open(parent, wall_ns=lambda: 0) as folder,
    ):
        engine = Engine(folder)
        for op in ops:
            if op.kind != "compact":
                engine.apply(op)
        oldest = {model: max(0, revision - back) for model, (revision, _) in engine.models.items()}
        folder.compact(oldest)
        rows = list(folder.journal.records())
        for model, revision in oldest.items():
            bases = [
                r
                for r in rows
                if r.model == model and r.kind in (LOAD, FORK, SNAPSHOT) and r.revision <= revision
            ]
            base = max(bases, key=lambda r: r.revision)
            between = {r.revision for r in rows if r.model == model and r.kind == DELTA}
            assert between >= set(range(base.revision + 1, engine.models[model][0] + 1))
        assert recovered(folder) == engine.models


def test_what_is_dropped_is_what_the_snapshot_supersedes(open_state: Opener) -> None:
    folder = open_state()
    engine = Engine(folder)
    for op in [
        Op(LOAD, "a", "x"),
        *(Op(DELTA, "a", f"t{i}") for i in range(5)),
        Op(SNAPSHOT, "a", lag=2),
    ]:
        engine.apply(op)
    folder.compact()
    kept = [(r.kind, r.revision) for r in folder.journal.records()]
    assert kept == [("delta", 4), ("delta", 5), ("snapshot", 3)]


def test_an_increment_of_another_kind_survives_until_a_snapshot_holds_it(
    open_state: Opener,
) -> None:
    folder = open_state()
    digest = folder.blobs.put(b"graph")
    folder.journal.append([Entry(LOAD, "m", 0, "{}", (digest,)), Entry("rollback", "m", 1, "{}")])
    folder.compact()
    assert [r.kind for r in folder.journal.records()] == ["load", "rollback"]
    folder.journal.append([Entry(SNAPSHOT, "m", 1, "{}", (digest,)), Entry("pin", "m", 1, "{}")])
    folder.compact()
    assert [r.kind for r in folder.journal.records()] == ["snapshot", "pin"]


def test_a_compaction_with_nothing_to_drop_writes_nothing(open_state: Opener) -> None:
    folder = open_state()
    engine = Engine(folder)
    for op in script(2)[:4]:
        engine.apply(op)
    head = folder.journal.status().head
    folder.compact()
    assert folder.journal.status().head == head
    assert len(list(folder.journal.records())) == 4


def test_the_script_of_the_crash_tests_recovers_at_every_step(open_state: Opener) -> None:
    folder = open_state()
    engine = Engine(folder)
    ops = script(20)
    for op, expected in zip(ops, list(states_of(ops))[1:], strict=True):
        engine.apply(op)
        assert recovered(folder) == expected
