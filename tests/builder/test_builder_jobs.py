"""What a builder answers to jobs, over a real link to a real process."""

from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from builder.conftest import ANSWER_S, Bench, MakeBench, chain
from graphopt.analysis.facts import analyse
from graphopt.builder.records import Answer
from graphopt.errors import BuilderError
from graphopt.executor.backend import Options
from graphopt.executor.build import weight_key
from graphopt.graph import Graph, Ref, Symbol
from graphopt.planner.layout import chain as chain_of
from graphopt.types import TensorType
from helpers.graphs import BATCH, Builder


def test_a_region_is_built_loaded_and_verified_and_its_artifact_stays(bench: Bench) -> None:
    job = bench.job(block="c")
    answer = bench.do(job)
    region = analyse(bench.graph).regions["c"]
    assert (answer.ok, answer.stage, answer.reason) == (True, "done", "")
    assert (answer.region_key, answer.weight_key) == (region.key, weight_key(bench.graph, region))
    assert answer.max_error <= answer.allowed
    assert answer.artifact_bytes == sum(path.stat().st_size for path in job.folder.iterdir())
    assert {path.name for path in job.folder.iterdir()} == {"0.npy", "1.npy"}


@pytest.mark.parametrize(
    ("backend", "stage", "reason"),
    [
        ("raises", "build", "conv: the layout is not possible"),
        ("exits", "build", "SystemExit: 3"),
        ("raises-on-load", "load", "ValueError: not my file"),
        ("wrong", "verify", "c: error 0.001 where"),
        ("missing", "unsupported", "the library is not there (install it)"),
        ("absent", "unsupported", "no backend 'absent'"),
    ],
)
def test_each_way_to_fail_has_its_stage_and_leaves_no_folder(
    bench: Bench, backend: str, stage: str, reason: str
) -> None:
    job = bench.job(backend, "c")
    answer = bench.do(job)
    assert (answer.ok, answer.stage) == (False, stage)
    assert answer.reason.startswith(reason)
    assert not job.folder.exists()


def test_a_region_the_backend_cannot_run_is_refused_by_node(bench: Bench) -> None:
    answer = bench.do(bench.job(blocks=("a", "a.gelu")))
    assert answer.stage == "unsupported"
    assert answer.unsupported == (("a.gelu", "aten.gelu.default is no linear"),)


@pytest.mark.parametrize("blocks", [("a", "b"), ("z",), ()])
def test_blocks_that_are_no_run_are_refused(bench: Bench, blocks: tuple[str, ...]) -> None:
    assert bench.do(bench.job(blocks=blocks)).stage == "unsupported"


def test_a_folder_with_something_in_it_is_left_alone(bench: Bench) -> None:
    job = bench.job()
    job.folder.mkdir()
    (job.folder / "mine").write_text("precious")
    assert bench.do(job).reason.endswith("the folder is not empty; name a fresh one")
    assert (job.folder / "mine").read_text() == "precious"


def test_a_revision_nobody_told_of_is_unknown(bench: Bench) -> None:
    assert bench.do(bench.job(revision=10_000)).stage == "unknown"
    assert bench.do(bench.job(model="nobody")).stage == "unknown"


def test_a_fused_step_is_verified_without_an_artifact(bench: Bench) -> None:
    blocks = ("a", "a.gelu")
    answer = bench.link.verify_fused("chain", bench.revision, blocks).result(ANSWER_S)
    assert (answer.ok, answer.artifact_bytes) == (True, None)
    answer = bench.link.verify_fused("chain", bench.revision, ("a.gelu",)).result(ANSWER_S)
    assert (answer.stage, answer.reason) == ("unsupported", "nothing in it that oneDNN fuses")


def test_the_planner_runs_in_the_builder(bench: Bench) -> None:
    facts = {
        "backends": ["numpy"], "threads": 1, "streams": 1, "buckets": [], "latency_s": None,
        "restless": [],
    }  # fmt: skip
    assert "plans" in bench.link.propose("chain", bench.revision, facts).result(ANSWER_S)
    with pytest.raises(BuilderError, match="chain: KeyError: 'backends'"):
        bench.link.propose("chain", bench.revision, {}).result(ANSWER_S)


def test_candidates_are_verified_on_real_requests_that_fit_their_shape(bench: Bench) -> None:
    assert bench.do(bench.job()).is_made_up
    requests = [{"x": torch.randn(rows, 6)} for rows in (3, 4)]
    bench.link.set_requests("chain", requests)
    assert _told(bench.do(bench.job())) == (False, 2)
    assert _told(bench.do(bench.job(options=Options(sizes=(4,))))) == (False, 1)
    assert _told(bench.do(bench.job(options=Options(sizes=(5,))))) == (True, 1)
    assert _told(bench.do(bench.job(samples=()))) == (True, 1)


def test_openvino_builds_a_whole_model_here(bench: Bench) -> None:
    blocks = ("a", "a.gelu", "b", "b.gelu", "c")
    answer = bench.do(bench.job("openvino", blocks=blocks))
    assert (answer.ok, answer.reason) == (True, "")
    assert answer.artifact_bytes > 0


def test_an_answer_says_which_ops_the_runtimes_own_converter_wrote(make_bench: MakeBench) -> None:
    bench = make_bench()
    b = Builder()
    x = b.node("first", "glu.default", b.linear("up", Ref("x"), 6, 12))
    x = b.node("second", "glu.default", b.linear("again", x, 6, 12))
    inputs = [("x", TensorType("f32", (BATCH, 6)))]
    y = b.node("y", "logsumexp.default", x, (-1,))
    symbols = [Symbol("batch", 1, 64)]
    graph = Graph.build("gated", b.nodes, inputs, [("y", y)], b.constants, None, symbols)
    bench.link.revise("gated", 1, graph)
    answer = bench.do(
        bench.job("openvino", model="gated", revision=1, blocks=chain_of(analyse(graph)))
    )
    assert (answer.ok, answer.reason) == (True, "")
    assert answer.converted == (("aten.glu.default", 2), ("aten.logsumexp.default", 1))


def test_constants_are_mapped_and_the_process_gives_way(bench: Bench) -> None:
    job = bench.job("telling")
    assert bench.do(job).ok
    scheduler, has_dynamo, *files = (job.folder / "told").read_text().splitlines()
    assert has_dynamo == "False"
    assert bench.link.status().policy in ("idle", "autogroup", "nice")
    assert (scheduler == "5") == (bench.link.status().policy != "nice")  # SCHED_IDLE
    assert len(files) == 2
    assert all(Path(file).parent == bench.folder / "scratch" for file in files)


def test_a_model_that_is_forgotten_is_unknown_until_it_comes_back(bench: Bench) -> None:
    bench.link.revise("other", 1, chain())
    assert bench.do(bench.job(model="other", revision=1)).ok
    bench.link.forget("other")
    assert bench.do(bench.job(model="other", revision=1)).stage == "unknown"
    bench.link.revise("other", 1, chain())
    assert bench.do(bench.job(model="other", revision=1)).ok


def _told(answer: Answer) -> tuple[bool, int]:
    assert answer.ok, answer
    return answer.is_made_up, answer.n_samples


@pytest.mark.parametrize(
    ("backend", "runs"),
    [("numpy", True), ("wrong", True), ("raises", False), ("raises-on-load", False)],
)
def test_who_waits_for_an_artifact_to_run_is_told_either_way(
    make_bench: MakeBench, backend: str, runs: bool
) -> None:
    bench, ran = make_bench(), Future[bool]()
    answer = bench.link.build(bench.job(backend), ran)
    assert ran.result(ANSWER_S) == runs
    assert answer.result(ANSWER_S).ok == (backend == "numpy")


def test_a_job_without_a_builder_tells_that_it_will_not_run(make_bench: MakeBench) -> None:
    bench, ran = make_bench(), Future[bool]()
    bench.link.close()
    assert bench.link.build(bench.job(), ran).result(ANSWER_S).stage == "off"
    assert ran.result(ANSWER_S) is False
