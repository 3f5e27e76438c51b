"""The tier of torch's own compiler: right in every shape, its weights shared, loaded without the compiler.

One region is compiled for all tests, which takes some ten seconds.
"""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from regions_built import built, call, whole

from graphopt.analysis.facts import Facts, analyse
from graphopt.executor.backend import BackendMissingError, BuildError, Loaded, Options
from graphopt.executor.backends.inductor import PACKAGE, InductorBackend
from helpers.graphs import feeds_of, reference, transformer

SHAPES = [{"batch": batch, "seq": seq} for batch, seq in ((1, 1), (2, 5), (3, 4), (1, 7))]
RUNNERS = 2


@pytest.fixture(scope="module")
def facts() -> Facts:
    return analyse(transformer(2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inductor") / "artifact"


@pytest.fixture(scope="module")
def loaded(facts: Facts, folder: Path) -> Loaded:
    return built(InductorBackend(), facts, whole(facts), Options(2, RUNNERS), folder)


@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_one_artifact_answers_every_shape(
    facts: Facts, loaded: Loaded, sizes: dict[str, int]
) -> None:
    feeds = feeds_of(facts.graph, sizes)
    before = {name: tensor.clone() for name, tensor in feeds.items()}
    (given,) = call(loaded, whole(facts), feeds, sizes)
    expected = reference(facts.graph, feeds)["logits"]
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)
    assert given.is_contiguous()
    assert all(torch.equal(feeds[name], before[name]) for name in feeds)


def test_threads_get_their_own_answers(facts: Facts, loaded: Loaded) -> None:
    rounds = [(feeds_of(facts.graph, sizes, seed), sizes) for seed in range(6) for sizes in SHAPES]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda item: call(loaded, whole(facts), *item), rounds))
    for (feeds, _), (given,) in zip(rounds, answers, strict=True):
        expected = reference(facts.graph, feeds)["logits"]
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)


def test_it_loads_in_a_fresh_process_without_the_compiler(
    facts: Facts, loaded: Loaded, folder: Path, tmp_path: Path
) -> None:
    region, sizes = whole(facts), SHAPES[1]
    feeds = feeds_of(facts.graph, sizes)
    constants = [facts.graph.constants[name].tensor for name in region.consts]
    torch.save((constants, [feeds[ref.id] for ref in region.reads]), tmp_path / "given.pt")
    order = [sizes[name] for name in region.symbols]
    program = (
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "import pathlib, torch\n"
        "from graphopt.executor.backend import Options\n"
        "from graphopt.executor.backends.inductor import InductorBackend\n"
        f"constants, reads = torch.load({str(tmp_path / 'given.pt')!r})\n"
        f"folder = pathlib.Path({str(folder)!r})\n"
        "loaded = InductorBackend().load(folder, constants, Options(2))\n"
        f"torch.save(loaded.function(*reads, *{order}), {str(tmp_path / 'out.pt')!r})\n"
        "assert 'torch._inductor' not in sys.modules, 'loading compiles nothing'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    (given,) = call(loaded, region, feeds, sizes)
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), given, rtol=0, atol=0)


def test_weights_stay_out_of_the_artifact_and_come_with_the_load(
    facts: Facts, loaded: Loaded, folder: Path
) -> None:
    region, feeds = whole(facts), feeds_of(facts.graph, SHAPES[1])
    zeros = [torch.zeros_like(facts.graph.constants[name].tensor) for name in region.consts]
    empty = InductorBackend().load(folder, zeros, Options(2))
    (given,), (right,) = (call(each, region, feeds, SHAPES[1]) for each in (empty, loaded))
    assert not torch.equal(right[0], right[1])
    assert torch.equal(given[0], given[1]), "without weights no input matters"
    assert loaded.resident_bytes == 0


def test_a_damaged_package_is_refused(facts: Facts, folder: Path, tmp_path: Path) -> None:
    region, damaged = whole(facts), tmp_path / "damaged"
    damaged.mkdir()
    for path in folder.iterdir():
        data = path.read_bytes()
        (damaged / path.name).write_bytes(data[: len(data) // 2] if path.name == PACKAGE else data)
    constants = [facts.graph.constants[name].tensor for name in region.consts]
    with pytest.raises(BuildError):
        InductorBackend().load(damaged, constants, Options())


def test_without_a_compiler_the_tier_is_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BackendMissingError, match="install one of"):
        InductorBackend().version()
