"""Every op that backends translate, against eager torch, with fixed and with dynamic sizes."""

from pathlib import Path

import op_cases
import pytest
import torch
from regions_built import built, call, differences, outputs_of, references, whole

from graphopt.analysis.facts import Facts, analyse
from graphopt.constants import constant_of
from graphopt.executor.backend import Backend, Options, backends
from graphopt.graph import Graph, Symbol
from graphopt.nodes import make_node
from graphopt.types import TensorType, parse_type

NAMES = ("openvino", "onnxruntime")


def graph_of_cases(cases: dict[str, tuple[object, ...]]) -> Graph:
    nodes, shown = [], []
    for id, (op, *args) in cases.items():
        keywords = args.pop() if args and isinstance(args[-1], dict) else {}
        values = {name: references(value) for name, value in keywords.items()}
        nodes.append(make_node(id, f"aten.{op}", [references(arg) for arg in args], values))
        if nodes[-1].spec.returns == 1 and op != "sym_size.int":
            shown.append(id)
    inputs = []
    for name, text in op_cases.INPUTS.items():
        type_ = parse_type(text)
        assert isinstance(type_, TensorType)
        inputs.append((name, type_))
    constants = {n: constant_of(t, is_param=True) for n, t in op_cases.constants().items()}
    symbols = [Symbol("batch", 1, 64)]
    return Graph.build("ops", nodes, inputs, outputs_of(shown), constants, symbols=symbols)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=list(op_cases.GROUPS))
def facts(request: pytest.FixtureRequest) -> Facts:
    return analyse(graph_of_cases(op_cases.GROUPS[request.param]))


@pytest.mark.parametrize("name", NAMES)
def test_every_op_answers_as_eager_torch_whatever_the_batch(
    name: str, facts: Facts, tmp_path: Path
) -> None:
    backend: Backend = backends()[name]
    region = whole(facts)
    assert backend.unsupported(facts, region) == {}
    loaded = built(backend, facts, region, Options(), tmp_path / "any")
    for batch in (1, 3, 2):
        feeds = op_cases.feeds(batch, seed=batch)
        given = call(loaded, region, feeds, {"batch": batch})
        assert differences(facts.graph, region, given, feeds) == []


@pytest.mark.parametrize("name", NAMES)
def test_every_op_answers_as_eager_torch_at_a_fixed_size(
    name: str, facts: Facts, tmp_path: Path
) -> None:
    backend: Backend = backends()[name]
    region, batch = whole(facts), 2
    loaded = built(backend, facts, region, Options(sizes=(batch,)), tmp_path / "fixed")
    feeds = op_cases.feeds(batch, seed=5)
    kept = {key: value.clone() for key, value in feeds.items()}
    given = call(loaded, region, feeds, {"batch": batch})
    assert differences(facts.graph, region, given, feeds) == []
    assert all(torch.equal(value, kept[key]) for key, value in feeds.items())
