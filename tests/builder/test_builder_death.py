"""Builders that crash, hang, are killed or grow, and engines that die: nobody else is concerned."""

import os
import select
import signal
import subprocess
import sys
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

from builder.conftest import ANSWER_S, HERE, SETTINGS, Bench, MakeBench
from graphopt.engine.builder_link import BuilderLink
from graphopt.executor.backend import Options
from graphopt.graph import Graph, Ref, Symbol
from graphopt.types import TensorType
from helpers.graphs import BATCH, Builder


def gone(pidfd: int) -> bool:
    """Whether the process ends."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(ANSWER_S * 1e3))


def test_a_segfault_costs_its_candidate_alone_and_is_remembered_with_its_evidence(
    make_bench: MakeBench,
) -> None:
    bench = make_bench()
    bad_job = bench.job("segfault")
    bad, good = bench.link.build(bad_job), bench.link.build(bench.job(block="b"))
    assert (bad.result(ANSWER_S).stage, bad.result().reason) == ("crashed", "it ended with SIGSEGV")
    assert not bad_job.folder.exists()
    assert good.result(ANSWER_S).ok
    assert bench.link.status().restarts == 1
    event = bench.events.of("builder.quarantined")[0]
    assert (event["backend"], event["signal"]) == ("segfault", signal.SIGSEGV)
    assert event["last_words"].startswith("the compiler met an unreachable state\n")
    assert 'backends_under_test.py", line' in event["last_words"]
    twin = bench.job("segfault", "b")  # of the same structure
    assert (bench.do(twin).stage, bench.link.status().restarts) == ("quarantined", 1)
    bench.link.close()
    later = make_bench()
    assert [each.backend for each in later.link.quarantined()] == ["segfault"]
    assert later.do(later.job("segfault")).stage == "quarantined"
    other = later.job("numpy", options=Options(threads=2))
    assert later.do(other).ok


KEPT = tuple(f"relu{i}" for i in range(9))


def odd() -> Graph:
    """A call that `SegfaultOnTrial` cannot try, some that need no trial, and one that it can."""
    b = Builder()
    x = b.node("log", "log1p.default", Ref("x"))
    for name in KEPT:
        x = b.node(name, "relu.default", x)
    y = b.node("glu", "glu.default", x)
    inputs = [("x", TensorType("f32", (BATCH, 6)))]
    return Graph.build("odd", b.nodes, inputs, [("y", y)], {}, None, [Symbol("batch", 1, 64)])


def test_a_plan_whose_trial_segfaults_is_made_by_the_next_builder_without_that_call(
    make_bench: MakeBench,
) -> None:
    bench = make_bench()
    bench.link.revise("odd", 1, odd())
    facts = {
        "backends": ["segfault-on-trial"], "threads": 1, "streams": 1, "buckets": [],
        "latency_s": None, "restless": [],
    }  # fmt: skip
    proposal = bench.link.propose("odd", 1, facts).result(ANSWER_S)
    assert [region["blocks"] for region in proposal["plans"][0]["regions"]] == [[*KEPT, "glu"]]
    assert bench.link.status().restarts == 1
    event = bench.events.of("builder.quarantined")[0]
    assert event["region"].startswith("aten.log1p.default ")
    assert (event["backend"], event["signal"]) == ("openvino", signal.SIGSEGV)
    bench.link.close()
    later = make_bench()
    later.link.revise("odd", 1, odd())
    assert later.link.propose("odd", 1, facts).result(ANSWER_S) == proposal
    assert later.link.status().restarts == 0


def test_a_build_whose_trial_segfaults_is_answered_by_the_next_builder(
    make_bench: MakeBench,
) -> None:
    bench = make_bench()
    bench.link.revise("odd", 1, odd())
    blocks = ("log", *KEPT, "glu")
    answer = bench.do(bench.job("segfault-on-trial", model="odd", revision=1, blocks=blocks))
    assert answer.stage == "unsupported"
    ((node, reason),) = answer.unsupported
    assert node == "log"
    assert reason.endswith("it brought a builder down: it ended with SIGSEGV")
    assert bench.link.status().restarts == 1


def test_a_builder_killed_from_outside_gets_the_job_again_once(make_bench: MakeBench) -> None:
    bench = make_bench()
    job, gate = bench.gated("a")
    answer = bench.link.build(job)
    for _ in range(2):
        gate.reached()
        pid = bench.link.status().pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        bench.events.wait("builder.exited")
        gate.open()
        if len(bench.events.of("builder.exited")) == 1:
            assert not answer.done()
    assert (answer.result(ANSWER_S).stage, answer.result().reason) == (
        "crashed",
        "it ended with SIGKILL",
    )
    assert bench.link.quarantined()[0].signal == signal.SIGKILL


def test_what_others_may_have_loaded_is_not_built_again_in_its_place(make_bench: MakeBench) -> None:
    bench = make_bench()
    job, gate = bench.gated("a", "gated-proof")
    ran: Future[bool] = Future()
    answer = bench.link.build(job, ran)
    gate.reached()
    assert ran.result(ANSWER_S)
    assert not answer.done()
    pid = bench.link.status().pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert answer.result(ANSWER_S).stage == "cancelled"
    gate.open()
    assert not bench.link.quarantined()


def test_a_hang_is_ended_at_its_bound_and_banned(make_bench: MakeBench) -> None:
    bench = make_bench(replace(SETTINGS, job_s=0.3))
    answer = bench.do(bench.job("hang"))
    assert (answer.stage, answer.reason) == ("hung", "no result in 0.3 s")
    assert bench.link.quarantined()[0].reason == "no result in 0.3 s"


def test_a_builder_without_a_sign_of_life_is_ended(make_bench: MakeBench) -> None:
    bench = make_bench(replace(SETTINGS, silence_s=0.3))  # less than a heartbeat
    answer = bench.do(bench.job("hang"))
    assert (answer.stage, answer.reason) == ("hung", "no sign of life in 0.3 s")


def test_a_builder_that_has_grown_starts_afresh_between_jobs(make_bench: MakeBench) -> None:
    bench = make_bench(replace(SETTINGS, private_bytes_max=380 << 20))
    assert bench.do(bench.job("greedy")).ok
    assert bench.events.wait("builder.exited")["reason"] == "memory"
    assert bench.do(bench.job()).ok
    assert bench.link.status().restarts == 1


def test_a_builder_that_cannot_start_answers_its_jobs(
    make_bench: MakeBench, tmp_path: Path
) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('this torch is broken')")
    bench = make_bench(replace(SETTINGS, path=(str(tmp_path),)))
    answer = bench.do(bench.job())
    assert answer.stage == "off"
    assert "this torch is broken" in answer.reason
    assert len(bench.events.of("builder.exited")) == 5


def test_close_ends_the_builder_and_answers_every_job(make_bench: MakeBench) -> None:
    bench = make_bench()
    job, gate = bench.gated("a")
    answers = [bench.link.build(job), bench.link.build(bench.job())]
    gate.reached()
    pid = bench.link.status().pid
    assert pid is not None
    pidfd = os.pidfd_open(pid)
    bench.link.close()
    assert gone(pidfd)
    assert [each.result(ANSWER_S).stage for each in answers] == ["off", "off"]
    assert not (bench.folder / "scratch").exists()
    assert bench.do(bench.job()).stage == "off"
    assert bench.link.status().state == "off"


def test_a_link_that_was_never_asked_closes_without_having_started(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    link: BuilderLink = bench.link
    assert (link.status().state, link.status().pid) == ("off", None)
    link.close()
    assert not (tmp_path / "builder").exists()


def test_the_builder_dies_with_its_engine(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from builder.conftest import Bench\n"
        "bench = Bench(Path(sys.argv[1])); job, gate = bench.gated('a')\n"
        "bench.link.build(job); gate.reached()\n"
        "print(bench.link.status().pid, flush=True); sys.stdin.readline(); os.kill(os.getpid(), 9)"
    )
    roots = os.pathsep.join(map(str, (HERE.parents[1], HERE.parent)))
    engine = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": roots},
    )  # fmt: skip
    assert engine.stdout is not None
    pidfd = os.pidfd_open(int(engine.stdout.readline()))
    engine.communicate("now\n")
    assert engine.returncode == -signal.SIGKILL
    assert gone(pidfd)
