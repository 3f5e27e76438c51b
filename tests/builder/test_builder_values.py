"""What the builder derives: facts from a text and deltas, and the values that cross into regions."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.analysis.facts import analyse
from graphopt.builder.boundaries import Boundaries
from graphopt.builder.models import VERSIONS_KEPT, ModelTable, UnknownRevisionError
from graphopt.constants import tensor_digest
from graphopt.delta import Delta, PutConstant, SetAttr, apply_fully
from graphopt.delta_document import encode_delta
from graphopt.engine.builder_files import ScratchConstants, write_inputs, write_text
from graphopt.engine.builder_quarantine import Quarantine
from graphopt.errors import LimitError
from graphopt.executor.runs import eager_run
from graphopt.graph import Graph
from graphopt.safetensors_file import read_tensors
from helpers.graphs import feeds_of, transformer

torch.set_num_threads(1)
SIZES = {"batch": 2, "seq": 5}


class Hurry:
    """No pauses while a text is written."""

    def wait(self, timeout: float | None = None) -> bool:
        return True


class Told:
    """A table that was told of a transformer, and what it was told from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.scratch = ScratchConstants(folder / "scratch")
        self.table = ModelTable()
        self.graph = transformer(3)
        self.revision = 1
        text = folder / "graph.txt"
        write_text(self.graph, text, Hurry())  # type: ignore[arg-type]
        self.table.load("m", 1, str(text), self.files(self.graph))

    def files(self, graph: Graph) -> list[str]:
        constants = {c.digest: c for c in graph.constants.values()}
        return [str(path) for path in self.scratch.files("m", constants)]

    def put(self, name: str, seed: int) -> None:
        shape = self.graph.constants[name].tensor.shape
        value = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        self.apply(Delta([PutConstant(name, value)]))

    def apply(self, delta: Delta) -> None:
        applied = apply_fully(self.graph, delta)
        self.graph, since = applied.graph, self.revision
        self.revision += 1
        document = encode_delta(applied.expansion)
        self.table.revise("m", since, self.revision, document, self.files(applied.graph))


@pytest.fixture
def told(tmp_path: Path) -> Told:
    return Told(tmp_path)


@pytest.fixture(scope="module")
def unedited(tmp_path_factory: pytest.TempPathFactory) -> Told:
    return Told(tmp_path_factory.mktemp("told"))


def sample_of(told: Told, at: Boundaries, block: str, file: Path) -> tuple[object, ...]:
    version = told.table.current("m")
    assert version is not None
    reads = eager_run(version.facts, (block,)).reads
    samples, is_made_up = at.samples(version, block, reads, [file], {})
    assert not is_made_up
    return samples[0].reads


def blocks_of(graph: Graph) -> list[str]:
    facts = analyse(graph)
    return sorted(
        facts.blocks.blocks, key=lambda b: graph.order_key(facts.blocks.blocks[b].nodes[0])
    )


def test_facts_by_text_and_deltas_are_those_of_the_engine(told: Told) -> None:
    told.put("layer.1/up.weight", 1)
    told.apply(Delta([SetAttr("layer.2/norm", "eps", 1e-3)]))
    version = told.table.current("m")
    assert version is not None
    assert version.facts.graph == told.graph
    assert version.facts.regions == analyse(told.graph).regions


def test_revisions_beyond_the_last_few_are_let_go_with_their_constants(told: Told) -> None:
    for seed in range(VERSIONS_KEPT + 1):
        told.put("classifier.weight", seed)
    assert told.table.at("m", 1) is None
    assert told.table.at("m", told.revision) is not None
    with pytest.raises(UnknownRevisionError, match="starts from revision 1, here is 6"):
        told.table.revise("m", 1, 2, {}, [])


def test_a_text_whose_constants_are_gone_is_unknown_and_so_is_the_model_then(told: Told) -> None:
    with pytest.raises(UnknownRevisionError, match="gone"):
        told.table.load("m", 2, str(told.folder / "graph.txt"), ["gone.safetensors"])
    assert told.table.current("m") is None


def test_the_values_of_a_second_region_are_computed_from_the_first_one_on(told: Told) -> None:
    file = write_inputs(feeds_of(told.graph, SIZES), told.folder)
    at, blocks = Boundaries(), blocks_of(told.graph)
    sample_of(told, at, blocks[-2], file)
    n_run = at.steps_run
    sample_of(told, at, blocks[-1], file)
    assert at.steps_run == n_run + 1
    sample_of(told, at, blocks[-2], file)
    assert at.steps_run == n_run + 1


def test_an_edit_spares_what_lies_before_it_and_not_what_follows(told: Told) -> None:
    file = write_inputs(feeds_of(told.graph, SIZES), told.folder)
    at, blocks = Boundaries(), blocks_of(told.graph)
    edited = next(b for b in blocks if "layer.2/up" in analyse(told.graph).regions[b].order)
    before = sample_of(told, at, edited, file)
    last = sample_of(told, at, blocks[-1], file)
    n_run = at.steps_run
    told.put("layer.2/up.weight", 5)
    assert all(map(_equal, before, sample_of(told, at, edited, file)))
    assert at.steps_run == n_run
    assert not all(map(_equal, last, sample_of(told, at, blocks[-1], file)))
    assert at.steps_run == n_run + len(blocks) - 1 - blocks.index(edited)


def test_what_was_looked_up_ahead_is_there_for_the_next_edit(told: Told) -> None:
    file = write_inputs(feeds_of(told.graph, SIZES), told.folder)
    at, blocks = Boundaries(), blocks_of(told.graph)
    version = told.table.current("m")
    assert version is not None
    at.look_ahead(version, {blocks[4], blocks[2], "gone"}, [file, told.folder / "no"], lambda: True)
    n_run = at.steps_run
    told.put("layer.2/up.weight", 5)
    fresh = sample_of(told, Boundaries(0), blocks[4], file)
    assert all(map(_equal, fresh, sample_of(told, at, blocks[4], file)))
    assert at.steps_run == n_run
    sample_of(told, at, blocks[5], file)
    assert at.steps_run == n_run + 1


def test_a_request_that_fails_is_passed_over_when_looking_ahead(told: Told) -> None:
    feeds = feeds_of(told.graph, SIZES)
    bad = write_inputs({**feeds, "input_ids": feeds["input_ids"] + 10_000}, told.folder)
    good = write_inputs(feeds, told.folder)
    at, blocks = Boundaries(), blocks_of(told.graph)
    version = told.table.current("m")
    assert version is not None
    at.look_ahead(version, set(blocks[1:]), [bad, good], lambda: True)
    n_run = at.steps_run
    sample_of(told, at, blocks[-1], good)
    assert at.steps_run == n_run


def test_looking_ahead_ends_as_soon_as_there_is_something_to_do(told: Told) -> None:
    file = write_inputs(feeds_of(told.graph, SIZES), told.folder)
    at, blocks = Boundaries(), blocks_of(told.graph)
    version, left = told.table.current("m"), [True, False]
    assert version is not None
    at.look_ahead(version, set(blocks[1:]), [file], lambda: left.pop(0))
    assert left == []
    n_run = at.steps_run
    sample_of(told, at, blocks[1], file)
    assert at.steps_run == n_run
    sample_of(told, at, blocks[2], file)
    assert at.steps_run == n_run + 1


@settings(max_examples=25, deadline=None)
@given(order=st.lists(st.integers(0, 8), min_size=1, max_size=12), size=st.sampled_from([0, 3_000]))
def test_cached_values_are_those_of_a_run_from_the_start(
    unedited: Told, order: list[int], size: int
) -> None:
    told = unedited
    file = write_inputs(feeds_of(told.graph, SIZES), told.folder)
    blocks, at = blocks_of(told.graph), Boundaries(size or 1 << 20)
    for place in order:
        block = blocks[place % len(blocks)]
        fresh = sample_of(told, Boundaries(0), block, file)
        assert all(map(_equal, fresh, sample_of(told, at, block, file)))


def test_scratch_holds_each_content_once_and_lets_go_of_what_nobody_uses(tmp_path: Path) -> None:
    graph = transformer(1)
    every = {c.digest: c for c in graph.constants.values()}
    size = sum(c.tensor.nbytes for c in every.values())
    scratch = ScratchConstants(tmp_path / "scratch", 2 * size)
    [first] = scratch.files("m", every)
    assert scratch.files("m", every) == [first]
    assert all(tensor_digest(t) == digest for digest, t in read_tensors(first).items())
    other = {c.digest: c for c in transformer(1, hidden=10).constants.values()}
    other = {digest: c for digest, c in other.items() if digest not in every}
    scratch.retain(every)
    with pytest.raises(LimitError, match="state folder"):
        scratch.files("m", other)
    scratch.retain(())
    assert scratch.files("m", other) != [first]
    assert not first.exists()
    scratch.close()
    assert not (tmp_path / "scratch").exists()


def test_a_damaged_quarantine_file_bans_nobody(tmp_path: Path) -> None:
    (tmp_path / "quarantine.json").write_text('[{"region": 1}]')
    assert Quarantine(tmp_path).entries() == ()


def _equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    return a == b
