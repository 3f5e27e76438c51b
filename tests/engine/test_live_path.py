"""The live path: what a delta does, and what it leaves alone."""

import dataclasses
import threading
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import graphopt
from graphopt.errors import (
    AdapterError,
    CycleError,
    DeltaError,
    DocumentError,
    DuplicateDeltaError,
    DuplicateNodeError,
    FactsError,
    GraphoptError,
    InterfaceChangeError,
    LimitError,
    NodeInUseError,
    PreconditionError,
    RequestError,
    StateError,
    TypeMismatchError,
    UnknownConstantError,
    UnknownNodeError,
    UnknownOpError,
)  # fmt: skip
from graphopt.executor.arrangement import Arrangement, Overlay
from graphopt.executor.plan import Plan
from graphopt.executor.runs import eager_run, run_of
from helpers.graphs import feeds_of, reference, same_outputs, transformer

SIZES = {"batch": 2, "seq": 5}
Events = list[tuple[str, Mapping[str, Any]]]


@pytest.fixture
def events() -> Events:
    return []


@pytest.fixture
def engine(events: Events, tmp_path: Path) -> Iterator[graphopt.Engine]:
    torch.set_num_threads(1)
    settings = graphopt.EngineSettings(
        intra_op=1, builder=False, events=lambda name, fields: events.append((name, fields))
    )
    with graphopt.Engine(transformer(), settings, state_dir=tmp_path / "state") as made:
        yield made


def edits(*items: Mapping[str, Any], **head: Any) -> dict[str, Any]:
    return {"delta": 1, "edits": list(items), **head}


def first_node(graph: graphopt.Graph, op: str) -> str:
    return next(node.id for node in graph.iter_nodes() if node.op == op)


def ask(engine: graphopt.Engine) -> Any:
    return engine.run(feeds_of(engine.graph, SIZES))


def test_the_request_after_a_delta_runs_the_new_revision(engine: graphopt.Engine) -> None:
    before = ask(engine)
    gelu = first_node(engine.graph, "aten.gelu.default")
    applied = engine.apply(
        edits({"insert_after": {"value": f"${gelu}", "id": "gate", "op": "aten.sigmoid.default"}})
    )
    after = ask(engine)
    assert (before.revision, applied.revision, after.revision) == (1, 2, 2)
    assert before.plan_id != after.plan_id
    assert not same_outputs(before.outputs, after.outputs)


def test_an_edit_of_one_block_keeps_the_steps_of_all_others(engine: graphopt.Engine) -> None:
    old = engine.model.slot.plan.steps
    gelu = first_node(engine.graph, "aten.gelu.default")
    applied = engine.apply(
        edits({"insert_after": {"value": f"${gelu}", "id": "gate", "op": "aten.sigmoid.default"}})
    )
    kept = {id(step) for step in old} & {id(step) for step in engine.model.slot.plan.steps}
    assert applied.blocks_replanned <= 2
    assert len(kept) == applied.blocks_reused


def test_taking_a_delta_back_restores_hash_and_bits(engine: graphopt.Engine) -> None:
    before, digest = ask(engine), engine.graph.hash
    gelu = first_node(engine.graph, "aten.gelu.default")
    engine.apply(
        edits({"insert_after": {"value": f"${gelu}", "id": "gate", "op": "aten.sigmoid.default"}})
    )
    engine.rollback(1)
    assert engine.graph.hash == digest
    assert engine.revision == 3
    assert same_outputs(ask(engine).outputs, before.outputs)


def bad_deltas(graph: graphopt.Graph) -> dict[str, tuple[type[GraphoptError], dict[str, Any]]]:
    gelu = first_node(graph, "aten.gelu.default")
    linear = first_node(graph, "aten.linear.default")
    weight, bias = graph.nodes[linear].args[1].name, graph.nodes[linear].args[2].name
    last = list(graph.iter_nodes())[-1].id
    output, source = graph.outputs[0]
    return {
        "unknown op": (
            UnknownOpError,
            edits({"add_node": {"id": "x", "op": "aten.sigmod.default", "args": [f"${gelu}"]}}),
        ),
        "mutating op": (
            UnknownOpError,
            edits({"add_node": {"id": "x", "op": "aten.add_.Tensor", "args": [f"${gelu}", 1]}}),
        ),
        "random op": (
            UnknownOpError,
            edits({"add_node": {"id": "x", "op": "aten.bernoulli.default", "args": [f"${gelu}"]}}),
        ),
        "file op": (
            UnknownOpError,
            edits(
                {"add_node": {"id": "x", "op": "aten.from_file.default", "args": ["/etc/passwd"]}}
            ),
        ),
        "no op at all": (
            UnknownOpError,
            edits({"add_node": {"id": "x", "op": "aten.__class__.mro", "args": [f"${gelu}"]}}),
        ),
        "cycle": (CycleError, edits({"rewire": {"from": f"${linear}", "to": f"${last}"}})),
        "type mismatch": (
            TypeMismatchError,
            edits({"set_attr": {"node": linear, "name": "weight", "value": {"const": bias}}}),
        ),
        "missing node": (UnknownNodeError, edits({"remove_node": {"id": gelu + "x"}})),
        "missing output of a node": (
            UnknownNodeError,
            edits({"add_node": {"id": "x", "op": "aten.relu.default", "args": [f"${gelu}:3"]}}),
        ),
        "missing constant": (
            UnknownConstantError,
            edits(
                {"set_attr": {"node": linear, "name": "weight", "value": {"const": weight + "x"}}}
            ),
        ),
        "removing a used node": (NodeInUseError, edits({"remove_node": {"id": gelu}})),
        "dropping a used constant": (NodeInUseError, edits({"drop_constant": {"name": weight}})),
        "a name that is taken": (
            DuplicateNodeError,
            edits({"add_node": {"id": gelu, "op": "aten.relu.default", "args": [f"${linear}"]}}),
        ),
        "a stale revision": (
            PreconditionError,
            edits({"remove_node": {"id": gelu}}, if_revision=7),
        ),
        "another graph": (DeltaError, edits({"remove_node": {"id": gelu}}, graph="other")),
        "a changed output": (
            InterfaceChangeError,
            edits({"set_outputs": {"outputs": {output: f"${gelu}"}}}),
        ),
        "a renamed output": (
            InterfaceChangeError,
            edits({"set_outputs": {"outputs": {"renamed": f"${source.id}"}}}),
        ),
        "no output": (
            InterfaceChangeError,
            edits({"set_outputs": {"outputs": {}}}, allow_interface_change=True),
        ),
        "a new input": (
            InterfaceChangeError,
            edits({"add_input": {"name": "extra", "type": "f32[4]"}}),
        ),
        "too large a value": (
            LimitError,
            edits(
                {
                    "add_node": {
                        "id": "x",
                        "op": "aten.full.default",
                        "args": [[1_000_000, 1_000_000], 0.0],
                    }
                }
            ),
        ),
        "an unknown key": (DocumentError, edits({"remove_node": {"node": gelu}})),
        "an unknown edit": (DocumentError, edits({"remove_nod": {"id": gelu}})),
        "a missing file": (
            DocumentError,
            edits({"load_weights": {"path": "no/such/file.safetensors"}}),
        ),
        "an adapter that is not attached": (
            AdapterError,
            edits({"detach_adapter": {"name": "legal"}}),
        ),
        "a wrong format": (DocumentError, {"delta": 2, "edits": []}),
        "the second of two edits": (
            NodeInUseError,
            edits(
                {"set_attr": {"node": linear, "name": "bias", "value": None}},
                {"remove_node": {"id": gelu}},
            ),
        ),
    }


@pytest.mark.parametrize("what", sorted(bad_deltas(transformer())))
def test_a_bad_delta_changes_nothing_and_says_where(
    engine: graphopt.Engine, events: Events, what: str
) -> None:
    assert engine.settle(60)
    before, digest, plan = ask(engine), engine.graph.hash, engine.model.slot.plan
    kind, delta = bad_deltas(engine.graph)[what]
    events.clear()
    with pytest.raises(kind) as caught:
        engine.apply(delta)
    assert caught.value.where or caught.value.detail
    assert (engine.revision, engine.graph.hash) == (1, digest)
    assert engine.model.slot.plan is plan
    assert same_outputs(ask(engine).outputs, before.outputs)
    is_document = issubclass(kind, DocumentError)  # never reached the model
    assert [name for name, _ in events] == ([] if is_document else ["delta.rejected"])


def test_an_interface_may_change_when_the_delta_says_so(engine: graphopt.Engine) -> None:
    gelu = first_node(engine.graph, "aten.gelu.default")
    output = engine.graph.outputs[0][0]
    both = {output: str(engine.graph.outputs[0][1]), "gelu": f"${gelu}"}
    engine.apply(edits({"set_outputs": {"outputs": both}}, allow_interface_change=True))
    assert set(ask(engine).outputs) == {output, "gelu"}


def test_verify_mode_refuses_a_delta_when_a_fact_is_wrong() -> None:
    settings = graphopt.EngineSettings(intra_op=1, verify=True, builder=False)
    with graphopt.Engine(transformer(), settings) as engine:
        gelu = first_node(engine.graph, "aten.gelu.default")
        eps = {"node": first_node(engine.graph, "aten.layer_norm.default"), "name": "eps"}
        engine.apply(edits({"set_attr": {**eps, "value": 1e-3}}))
        facts = engine.model.facts
        wrong = facts.live.set(gelu, False)
        engine.model.facts = dataclasses.replace(facts, live=wrong)
        with pytest.raises(FactsError, match="live"):
            engine.apply(edits({"set_attr": {**eps, "value": 1e-2}}))
        assert engine.revision == 2


def test_the_same_id_answers_as_the_first_time(engine: graphopt.Engine) -> None:
    linear = first_node(engine.graph, "aten.layer_norm.default")
    delta = edits({"set_attr": {"node": linear, "name": "eps", "value": 1e-3}}, id="once")
    first = engine.apply(delta)
    again = engine.apply(delta)
    assert again.revision == first.revision == engine.revision == 2
    other = edits({"set_attr": {"node": linear, "name": "eps", "value": 1e-2}}, id="once")
    with pytest.raises(DuplicateDeltaError):
        engine.apply(other)
    assert engine.revision == 2


def test_dry_run_tells_what_apply_does_and_does_nothing(engine: graphopt.Engine) -> None:
    weight = first_constant(engine.graph)
    delta = graphopt.Delta(
        [graphopt.PutConstant(weight, engine.graph.constants[weight].tensor + 1)]
    )
    assert engine.settle()  # the background publishes plans too
    plan = engine.model.slot.plan
    told = engine.dry_run(delta)
    assert engine.model.slot.plan is plan
    assert told.staged_bytes == engine.graph.constants[weight].tensor.nbytes
    applied = engine.apply(delta)
    assert (told.inferred_nodes, len(told.blocks)) == (
        applied.inferred_nodes,
        applied.blocks_replanned,
    )


def test_new_weights_of_the_same_shape_infer_no_type(engine: graphopt.Engine) -> None:
    weight = first_constant(engine.graph)
    applied = engine.apply(
        graphopt.Delta([graphopt.PutConstant(weight, engine.graph.constants[weight].tensor * 2)])
    )
    assert applied.inferred_nodes == 0


def test_readers_see_whole_revisions_while_deltas_fly(engine: graphopt.Engine) -> None:
    feeds = feeds_of(engine.graph, SIZES)
    norm = first_node(engine.graph, "aten.layer_norm.default")
    expected: dict[float, dict[str, torch.Tensor]] = {}
    scales = [1e-5, 1e-1, 1.0]
    for eps in scales:
        engine.apply(edits({"set_attr": {"node": norm, "name": "eps", "value": eps}}))
        expected[eps] = engine.run(feeds).outputs
    eps_of = {engine.revision: scales[-1]}
    stop, wrong, seen = threading.Event(), [], set()

    def client() -> None:
        torch.set_num_threads(1)
        while not stop.is_set():
            result = engine.run(feeds)
            seen.add(result.revision)
            if not same_outputs(result.outputs, expected[eps_of[result.revision]]):
                wrong.append(result.revision)

    threads = [threading.Thread(target=client) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(200):
        eps_of[engine.revision + 1] = scales[i % 3]
        engine.apply(edits({"set_attr": {"node": norm, "name": "eps", "value": scales[i % 3]}}))
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert seen


def test_old_plans_go_when_nobody_runs_them(engine: graphopt.Engine) -> None:
    norm = first_node(engine.graph, "aten.layer_norm.default")
    plans = weakref.WeakSet([engine.model.slot.plan])
    for i in range(20):
        engine.apply(edits({"set_attr": {"node": norm, "name": "eps", "value": (i + 1) / 100}}))
        plans.add(engine.model.slot.plan)
    assert engine.settle(60)
    assert len(plans) <= 2  # the current one and the last good one


def test_a_request_that_does_not_fit_is_refused_by_name(engine: graphopt.Engine) -> None:
    feeds = feeds_of(engine.graph, SIZES)
    name = engine.graph.inputs[0][0]
    for wrong, what in (
        ({}, "missing"),
        ({**feeds, "extra": torch.zeros(1)}, "no input"),
        ({**feeds, name: feeds[name].float()}, "takes"),
        ({**feeds, name: feeds[name][0]}, "takes"),
    ):
        with pytest.raises(RequestError, match=what):
            engine.run(wrong)


def first_constant(graph: graphopt.Graph) -> str:
    return next(name for name, constant in sorted(graph.constants.items()) if constant.is_param)


# -- state


def reopened(tmp_path: Path) -> graphopt.Engine:
    return graphopt.Engine(
        None, graphopt.EngineSettings(intra_op=1, builder=False), state_dir=tmp_path / "state"
    )


def test_what_was_acknowledged_is_live_again_after_a_restart(
    engine: graphopt.Engine, tmp_path: Path
) -> None:
    weight = first_constant(engine.graph)
    gelu = first_node(engine.graph, "aten.gelu.default")
    engine.apply(
        graphopt.Delta(
            [graphopt.PutConstant(weight, engine.graph.constants[weight].tensor + 1)], id="w"
        )
    )
    engine.apply(
        edits(
            {
                "insert_after": {
                    "value": f"${gelu}",
                    "id": "gate",
                    "op": "aten.clamp.default",
                    "args": [f"${gelu}", "-inf", 1.5],
                }
            }
        )
    )
    before, digest, lines = ask(engine), engine.graph.hash, engine.history()
    engine.close()
    with reopened(tmp_path) as again:
        assert (again.revision, again.graph.hash) == (3, digest)
        assert same_outputs(ask(again).outputs, before.outputs)
        assert [line.revision for line in again.history()] == [line.revision for line in lines]
        repeated = graphopt.Delta(
            [graphopt.PutConstant(weight, again.graph.constants[weight].tensor)], id="w"
        )
        assert again.apply(repeated).revision == 2
        again.rollback(1)
        assert again.graph == transformer()


def test_a_revision_no_longer_in_memory_is_replayed_from_the_journal(
    engine: graphopt.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graphopt.engine.past.REVISIONS_KEPT_MAX", 3)
    weight, digest = first_constant(engine.graph), engine.graph.hash
    before = ask(engine)
    for i in range(6):
        tensor = engine.graph.constants[weight].tensor + i
        engine.apply(graphopt.Delta([graphopt.PutConstant(weight, tensor)]))
    engine.rollback(1)
    assert engine.graph.hash == digest
    assert same_outputs(ask(engine).outputs, before.outputs)
    with pytest.raises(PreconditionError, match="kept are"):
        engine.rollback(99)


def test_a_second_process_is_kept_out(engine: graphopt.Engine, tmp_path: Path) -> None:
    with pytest.raises(StateError):
        reopened(tmp_path)


def test_a_snapshot_keeps_recovery_short_and_changes_nothing(
    engine: graphopt.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graphopt.engine.ledger.SNAPSHOT_DUE_ROWS", 10)
    weight = first_constant(engine.graph)
    for i in range(35):
        engine.apply(
            graphopt.Delta(
                [graphopt.PutConstant(weight, engine.graph.constants[weight].tensor + i)]
            )
        )
        assert engine.settle(60)
    digest, before = engine.graph.hash, ask(engine)
    engine.rollback(engine.revision - 3)  # names a constant whose blob only an older row held
    engine.rollback(engine.revision - 1)
    assert engine.host.folder is not None
    assert engine.host.folder.journal.status().rows_since_base["transformer"] < 15
    engine.close()
    with reopened(tmp_path) as again:
        assert again.graph.hash == digest
        assert same_outputs(ask(again).outputs, before.outputs)


def test_a_fork_shares_constants_and_steps_and_goes_its_own_way(
    engine: graphopt.Engine, tmp_path: Path
) -> None:
    host = engine.host
    fork = host.fork("transformer", "tenant")
    name = first_constant(engine.graph)
    assert fork.graph.constants[name].tensor is engine.graph.constants[name].tensor
    shared = {id(step.function) for step in fork.slot.plan.steps} & {
        id(step.function) for step in engine.model.slot.plan.steps
    }
    assert len(shared) > 1
    before = ask(engine)
    fork.apply(graphopt.Delta([graphopt.PutConstant(name, fork.graph.constants[name].tensor + 1)]))
    assert same_outputs(ask(engine).outputs, before.outputs)
    changed = fork.run(feeds_of(fork.graph, SIZES))
    assert not same_outputs(changed.outputs, before.outputs)
    engine.close()
    again = graphopt.Host(graphopt.EngineSettings(intra_op=1, builder=False), tmp_path / "state")
    try:
        assert set(again.models()) == {"transformer", "tenant"}
        assert same_outputs(
            again.get("tenant").run(feeds_of(fork.graph, SIZES)).outputs, changed.outputs
        )
    finally:
        again.close()


def test_a_call_runs_with_the_engines_threads_and_gives_the_callers_count_back(
    engine: graphopt.Engine,
):
    torch.set_num_threads(2)
    seen: list[int] = []
    original = engine.model.answer
    engine.model.answer = lambda inputs: (seen.append(torch.get_num_threads()), original(inputs))[1]  # type: ignore[method-assign]
    try:
        ids = torch.ones(2, 8, dtype=torch.int64)
        engine(ids, ids)
        assert seen == [1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_a_trial_that_ends_while_a_delta_is_applied_holds_nothing_up(engine: graphopt.Engine):
    engine.settle(60)
    model, slot = engine.model, engine.model.slot
    block = next(each for each in model.facts.regions if each.startswith("layer.0"))
    run = run_of(model.facts, block)
    stand_in = dataclasses.replace(eager_run(model.facts, run), tier="runtime", digest=1)
    candidate = Arrangement.of(model.arrangement.base, [Overlay(stand_in, ())])
    model.introduce(candidate)
    publish = slot.publish

    def publish_late(plan: Plan, expected: Plan | None = None) -> bool:
        """The candidate wins its trial after the delta was planned, before it is published."""
        slot.publish = publish  # type: ignore[method-assign]
        assert publish(candidate.plan, expected=expected)
        return publish(plan, expected=expected)

    slot.publish = publish_late  # type: ignore[method-assign]
    name = "classifier.bias"
    bias = engine.graph.constants[name].tensor + 1
    applied = engine.apply(graphopt.Delta([graphopt.PutConstant(name, bias)]))
    assert slot.plan.revision == applied.revision == 2
    assert slot.plan.tiers()["runtime"] == 1, "the delta starts from what the trial left"
    assert model.known() == (model.arrangement,)
    feeds = feeds_of(engine.graph, {"batch": 2, "seq": 5}, 1)
    for name, value in reference(engine.graph, feeds).items():
        torch.testing.assert_close(engine.run(feeds).outputs[name], value)
