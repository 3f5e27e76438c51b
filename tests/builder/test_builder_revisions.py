"""A model goes on by deltas, and what waits for an older revision is moved on or cancelled."""

from builder.conftest import ANSWER_S, Bench
from graphopt.analysis.facts import analyse
from graphopt.executor.build import weight_key


def test_a_delta_travels_with_its_own_constants_only(bench: Bench) -> None:
    assert bench.do(bench.job(block="b")).ok
    digest = bench.put("a.weight", 7)
    answer = bench.do(bench.job(block="a"))
    assert (answer.ok, answer.revision) == (True, bench.revision)
    assert answer.weight_key == weight_key(bench.graph, analyse(bench.graph).regions["a"])
    assert bench.constants.asked[-1] == {digest}


def test_a_file_that_vanished_costs_a_second_sending_and_no_job(bench: Bench) -> None:
    assert bench.do(bench.job()).ok
    bench.constants.loses_next = True
    bench.put("c.weight", 8)
    assert bench.do(bench.job(block="c")).ok
    every = {constant.digest for constant in bench.graph.constants.values()}
    assert bench.constants.asked[-1] == every


def test_a_gap_in_the_revisions_costs_a_text_and_no_job(bench: Bench) -> None:
    bench.revision += 5
    bench.link.revise("chain", bench.revision, bench.graph)
    answer = bench.do(bench.job())
    assert (answer.ok, answer.revision) == (True, bench.revision)


def test_a_newer_revision_cancels_what_it_made_useless_and_moves_on_the_rest(bench: Bench) -> None:
    job, gate = bench.gated("b")
    running = bench.link.build(job)
    gate.reached()
    old = bench.revision
    useless, good = bench.job(block="a"), bench.job(block="c")
    answers = [bench.link.build(each) for each in (useless, good)]
    proposal = bench.link.propose("chain", old, {})
    bench.put("a.weight", 9)
    assert answers[0].result(ANSWER_S).stage == "cancelled"  # while another one is at work
    assert "made it useless" in str(proposal.exception(ANSWER_S))
    assert not useless.folder.exists()
    gate.open()
    assert (running.result(ANSWER_S).ok, running.result().revision) == (True, old)
    assert (answers[1].result(ANSWER_S).ok, answers[1].result().revision) == (True, old + 1)


def test_a_job_for_a_region_that_is_gone_by_then_is_cancelled_on_arrival(bench: Bench) -> None:
    assert bench.do(bench.job()).ok
    late = bench.job(block="b")
    bench.put("b.weight", 10)
    assert bench.do(late).stage == "cancelled"


def test_a_job_that_is_taken_back_leaves_nothing(bench: Bench) -> None:
    job, gate = bench.gated("b")
    running = bench.link.build(job)
    gate.reached()
    queued_job = bench.job()
    queued = bench.link.build(queued_job)
    assert queued.cancel()
    assert running.cancel()
    gate.open()
    assert bench.do(bench.job()).ok
    assert not queued_job.folder.exists()
    assert not job.folder.exists()
    assert bench.link.status().queued == 0


def test_a_full_queue_answers_busy_and_what_waits_is_done(bench: Bench) -> None:
    job, gate = bench.gated("b")
    running = bench.link.build(job)
    gate.reached()
    room = bench.link.settings.queue_max - 1
    waiting = [bench.link.build(bench.job()) for _ in range(room)]
    assert bench.do(bench.job()).stage == "busy"
    assert bench.link.status().queued == room + 1
    assert bench.link.status().state in ("building", "starved")
    gate.open()
    assert running.result(ANSWER_S).ok
    assert all(each.result(ANSWER_S).ok for each in waiting)
