"""What an artifact promises: it loads elsewhere, serves several threads, and is refused when it is
not what this version wrote."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from regions_built import built, call, whole

from graphopt.analysis.facts import Facts, analyse
from graphopt.analysis.regions import Region, build_region
from graphopt.errors import RequestError
from graphopt.executor.backend import Backend, BuildError, Options, backends
from graphopt.graph import Graph, Ref, Symbol
from graphopt.types import parse_type
from helpers.graphs import Builder, feeds_of, reference, transformer

NAMES = ("openvino", "onnxruntime")
BATCH = Symbol("batch", 1, 64)


@pytest.fixture(params=NAMES)
def backend(request: pytest.FixtureRequest) -> Backend:
    return backends()[request.param]


@pytest.fixture(scope="module")
def facts() -> Facts:
    return analyse(transformer(2))


def constants(facts: Facts, region: Region) -> list[torch.Tensor]:
    return [facts.graph.constants[name].tensor for name in region.consts]


def small(b: Builder, output: Ref, inputs: dict[str, str]) -> Facts:
    typed = [(name, parse_type(text)) for name, text in inputs.items()]
    graph = Graph.build("small", b.nodes, typed, [("out", output)], b.constants, symbols=[BATCH])
    return analyse(graph)


def test_four_threads_get_their_own_answers_from_one_function(
    backend: Backend, facts: Facts, tmp_path: Path
) -> None:
    region = whole(facts)
    loaded = built(backend, facts, region, Options(threads=2), tmp_path / "a")
    rounds = []
    for seed in range(24):
        sizes = {"batch": 1 + seed % 3, "seq": 2 + seed % 5}
        rounds.append((feeds_of(facts.graph, sizes, seed), sizes))
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda item: call(loaded, region, *item), rounds))
    for (feeds, sizes), (given,) in zip(rounds, answers, strict=True):
        expected = reference(facts.graph, feeds)["logits"]
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)
        (again,) = call(loaded, region, feeds, sizes)
        assert torch.equal(given, again)
        assert given.data_ptr() != again.data_ptr()


def test_reads_of_any_strides_are_taken_and_left_as_they_were(
    backend: Backend, tmp_path: Path
) -> None:
    b = Builder()
    facts = small(b, b.linear("out", Ref("x"), 96, 64), {"x": "f32[batch, 96]"})
    region = whole(facts)
    for sizes, rows in ((None, 50), ((64,), 64), ((2,), 2)):  # bound, bound once, copied
        loaded = built(backend, facts, region, Options(sizes=sizes), tmp_path / f"{rows}")
        for x in (torch.randn(96, rows).t(), torch.randn(rows, 192)[:, ::2], torch.randn(rows, 96)):
            kept = x.clone()
            given = loaded.function(x, rows)
            expected = reference(facts.graph, {"x": x})["out"]
            torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)
            assert given.is_contiguous()
            assert torch.equal(x, kept)


def test_a_size_that_no_read_has_is_taken_from_the_symbols(
    backend: Backend, tmp_path: Path
) -> None:
    b = Builder()
    rows = b.node("rows", "sym_size.int", Ref("x"), 0)
    flat = b.node("flat", "view.default", Ref("x"), (-1,))
    out = b.node("out", "view.default", b.node("relu", "relu.default", flat), (rows, -1))
    facts = small(b, out, {"x": "f32[batch, 4]"})
    region = build_region(
        facts.graph, facts.type_of, (Ref("out"),), lambda id: id in ("relu", "out")
    )
    assert region.symbols == ("batch",)
    loaded = built(backend, facts, region, Options(), tmp_path / "a")
    for size in (1, 5, 3):
        x = torch.randn(size * 4)
        assert torch.equal(loaded.function(x, size), x.relu().view(size, 4))


def test_an_index_outside_its_table_is_refused_as_torch_refuses_it(
    backend: Backend, facts: Facts, tmp_path: Path
) -> None:
    region = whole(facts)
    loaded = built(backend, facts, region, Options(), tmp_path / "a")
    feeds = feeds_of(facts.graph, {"batch": 1, "seq": 3})
    for bad in (-1, 16, 1 << 40):
        feeds["input_ids"][0, 1] = bad
        with pytest.raises(RequestError, match=f"holds {bad}, outside 0 to 15"):
            call(loaded, region, feeds, {"batch": 1, "seq": 3})
    feeds["input_ids"][0, 1] = 15
    assert call(loaded, region, feeds, {"batch": 1, "seq": 3})[0].shape == (1, 3)


def test_what_cannot_be_exact_is_named_with_its_reason(backend: Backend) -> None:
    b = Builder()
    sine = b.node("sine", "sin.default", Ref("x"))
    wide = b.node("wide", "_to_copy.default", sine, dtype="f64")
    sorted_ = b.node("sorted", "msort.default", Ref("x"))
    pooled = b.node("pooled", "adaptive_avg_pool2d.default", Ref("image"), (3, 3))
    narrow = b.node("narrow", "_to_copy.default", wide, dtype="f32")
    out = b.node("out", "add.Tensor", b.node("sum", "sum.default", narrow), sorted_)
    out = b.node("all", "add.Tensor", out, b.node("mean", "mean.default", pooled))
    facts = small(b, out, {"x": "f32[batch, 4]", "image": "f32[batch, 2, 7, 7]"})
    region = whole(facts)
    reasons = backend.unsupported(facts, region)
    has_converter = backend.name == "openvino"
    assert set(reasons) - {"pooled"} == {"wide", "narrow", "sorted"}
    assert has_converter is ("pooled" not in reasons)
    assert reasons["sorted"].startswith("aten.msort.default has no rule")
    assert "f64" in reasons["wide"]
    assert has_converter or reasons["pooled"] == "windows of several sizes"


def test_a_region_that_is_unsupported_does_not_build_and_says_which_node(
    backend: Backend, tmp_path: Path
) -> None:
    b = Builder()
    facts = small(b, b.node("out", "msort.default", Ref("x")), {"x": "f32[batch, 4]"})
    with pytest.raises(BuildError, match=r"out: aten\.msort\.default has no rule"):
        backend.build(facts, whole(facts), Options(), tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_deciding_what_is_supported_loads_no_runtime(name: str) -> None:
    program = (
        "import sys\n"
        "from helpers.graphs import transformer\n"
        "from graphopt.analysis.facts import analyse\n"
        "from graphopt.executor.backend import backends\n"
        "facts = analyse(transformer(1))\n"
        "for region in facts.regions.values():\n"
        f"    assert backends()[{name!r}].unsupported(facts, region) == {{}}\n"
        "assert not {'openvino', 'onnxruntime', 'onnx'} & set(sys.modules)\n"
    )
    run(program)


def test_an_artifact_cut_short_is_refused(backend: Backend, facts: Facts, tmp_path: Path) -> None:
    region = whole(facts)
    built(backend, facts, region, Options(), tmp_path / "a")
    for path in sorted((tmp_path / "a").iterdir()):
        data = path.read_bytes()
        if not data:
            continue
        path.write_bytes(data[: len(data) // 2])
        with pytest.raises(BuildError, match="build it again"):
            backend.load(tmp_path / "a", constants(facts, region), Options())
        path.write_bytes(data)
    backend.load(tmp_path / "a", constants(facts, region), Options())


def test_an_artifact_of_another_version_is_refused_by_name(
    backend: Backend, facts: Facts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    region = whole(facts)
    with monkeypatch.context() as patch:
        patch.setattr(backend, "version", lambda: "1.0-elsewhere")
        built(backend, facts, region, Options(), tmp_path / "a")
    with pytest.raises(BuildError, match=f"built by {backend.name} 1.0-elsewhere, this is"):
        backend.load(tmp_path / "a", constants(facts, region), Options())


def test_an_artifact_loads_in_a_fresh_process_without_the_graph(
    backend: Backend, facts: Facts, tmp_path: Path
) -> None:
    region = whole(facts)
    loaded = built(backend, facts, region, Options(), tmp_path / "a")
    feeds = feeds_of(facts.graph, {"batch": 2, "seq": 5})
    torch.save(constants(facts, region), tmp_path / "constants.pt")
    torch.save([feeds[ref.id] for ref in region.reads], tmp_path / "reads.pt")
    order = json.dumps([{"batch": 2, "seq": 5}[name] for name in region.symbols])
    program = (
        "import pathlib, torch\n"
        "from graphopt.executor.backend import Options, backends\n"
        f"here = pathlib.Path({str(tmp_path)!r})\n"
        "constants, reads = torch.load(here / 'constants.pt'), torch.load(here / 'reads.pt')\n"
        f"loaded = backends()[{backend.name!r}].load(here / 'a', constants, Options())\n"
        f"torch.save(loaded.function(*reads, *{order}), here / 'out.pt')\n"
    )
    run(program)
    (given,) = call(loaded, region, feeds, {"batch": 2, "seq": 5})
    assert torch.equal(torch.load(tmp_path / "out.pt"), given)


def test_weights_stay_out_of_an_onnxruntime_artifact(tmp_path: Path) -> None:
    b = Builder()
    facts = small(b, b.linear("out", Ref("x"), 512, 512), {"x": "f32[batch, 512]"})
    built(backends()["onnxruntime"], facts, whole(facts), Options(), tmp_path / "a")
    assert sum(path.stat().st_size for path in (tmp_path / "a").iterdir()) < 10_000


def test_openvino_offers_both_forms_of_attention_and_both_agree(
    facts: Facts, tmp_path: Path
) -> None:
    backend, region = backends()["openvino"], whole(facts)
    first, second = backend.choices(facts, region, Options())
    assert first == Options()
    feeds, sizes = feeds_of(facts.graph, {"batch": 2, "seq": 6}), {"batch": 2, "seq": 6}
    (one,) = call(built(backend, facts, region, first, tmp_path / "1"), region, feeds, sizes)
    (two,) = call(built(backend, facts, region, second, tmp_path / "2"), region, feeds, sizes)
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def run(program: str) -> None:
    """In a process of its own, with this test's import path."""
    start = f"import sys; sys.path[:0] = {sys.path!r}\n"
    done = subprocess.run([sys.executable, "-c", start + program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
