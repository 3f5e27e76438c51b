"""Layers of YAML: strict, in order, whole or not at all."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cost_models.coefficients import (
    DEFAULTS,
    layer_paths,
    read_document,
    read_layers,
    spec_of,
    write_document,
)
from cost_models.host_model import HostModel
from graphopt.costs.op_work import CLASSES
from graphopt.documents import FaultsError, load_yaml
from graphopt.errors import DocumentError

NAMES = [
    "weights.alpha",
    "roofline.sharpness",
    "host.threads_2.peak",
    "host.threads_16.bandwidth.far",
    "backends.openvino.threads_1.call_s",
    *(f"backends.eager.threads_4.{name}.compute" for name in CLASSES),
]


def write(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cost: 1\nwieghts: {alpha: 1}", "bad.yaml:2:1 wieghts: unknown key"),
        ("cost: 1\nweights: {alpha: -1}", "bad.yaml:2:18 weights.alpha: must be at least 0"),
        ("cost: 1\nweights: {alpha: yes}", "bad.yaml:2:18 weights.alpha: must be a number"),
        ("cost: 2", "bad.yaml:1:7 cost: must be at least 1 and at most 1"),
        ("weights: {alpha: 1}", "the key 'cost' is missing"),
        ("cost: 1\nhost: {threads_0: {peak: 1e9}}", "host.threads_0: unknown key"),
        (
            "cost: 1\nbackends: {eager: {threads_1: {linaer: {compute: 1}}}}",
            "bad.yaml:2:32 backends.eager.threads_1.linaer: unknown key (did you mean linear",
        ),
        ("cost: 1\nhost: {threads_1: {peak: 3}}", "host.threads_1.peak: must be at least"),
        ("", "the file is empty"),
    ],
)
def test_a_fault_is_told_with_file_line_and_path(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path, "bad.yaml", text)
    with pytest.raises(FaultsError) as caught:
        read_layers([path])
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


def test_all_faults_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "bad.yaml", "cost: 1\nweights: {alpha: -1, beta: x, gamma: 1}")
    with pytest.raises(FaultsError) as caught:
        read_layers([path])
    assert len(caught.value.lines) == 3


def test_the_packaged_defaults_are_a_layer() -> None:
    assert read_layers([DEFAULTS]).get("roofline", "sharpness") == 4.0


def test_a_later_layer_wins_and_leaves_the_rest(tmp_path: Path) -> None:
    host = write(tmp_path, "host.yaml", "cost: 1\nweights: {alpha: 1.0, beta: 1.0}")
    folder = tmp_path / "cost"
    write(folder, "20-b.yaml", "cost: 1\nweights: {alpha: 3.0}")
    write(folder, "10-a.yaml", "cost: 1\nweights: {alpha: 2.0, beta: 2.0}")
    write(folder, "notes.txt", "not a layer")
    found = read_layers(layer_paths(host, folder))
    assert found.get("weights", "alpha") == 3.0
    assert found.get("weights", "beta") == 2.0
    assert found.origins["weights.alpha"].endswith("20-b.yaml")
    assert found.origins["weights.beta"].endswith("10-a.yaml")
    assert found.origins["roofline.sharpness"] == str(DEFAULTS)


def test_each_coefficient_in_force_has_unit_range_and_origin() -> None:
    for each in HostModel().effective():
        assert each.unit
        assert each.low <= each.value <= each.high
        assert Path(each.origin).is_file()


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES), st.floats(0, 1), max_size=len(NAMES)))
def test_a_document_that_is_written_is_read_back_to_the_last_digit(
    shares: dict[str, float],
) -> None:
    values = {}
    for name, share in shares.items():
        spec = spec_of(tuple(name.split(".")))
        assert spec is not None
        values[name] = min(spec.high, spec.low + share * (spec.high - spec.low))
    assert read_document(load_yaml(write_document(values, "why"), source="x")) == values


def test_a_reload_with_a_fault_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "cost"
    write(folder, "a.yaml", "cost: 1\nweights: {alpha: 2.0}")
    model = HostModel(operator=folder)
    before = model.coefficients
    write(folder, "a.yaml", "cost: 1\nweights: {alpha: 5.0}")
    write(folder, "b.yaml", "cost: 1\nweights: {alpha: many}")
    with pytest.raises(DocumentError):
        model.reload()
    assert model.coefficients is before
    (folder / "b.yaml").unlink()
    assert model.reload() == ["weights.alpha"]
    assert model.coefficients.get("weights", "alpha") == 5.0
    assert model.reload() == []


def test_a_missing_folder_and_a_missing_calibration_are_no_fault(tmp_path: Path) -> None:
    model = HostModel(tmp_path / "none.yaml", tmp_path / "none")
    assert {each.origin for each in model.effective()} == {str(DEFAULTS)}


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").mkdir()
    with pytest.raises(DocumentError) as caught:
        HostModel(operator=tmp_path)
    assert str(tmp_path / "a.yaml") in str(caught.value)
