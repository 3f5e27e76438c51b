"""A safetensors file is read as it is, or refused by name."""

import json
import os
import struct
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.errors import BundleError, LimitError
from graphopt.limits import SAFETENSORS_HEADER_BYTES_MAX, SAFETENSORS_TENSORS_MAX
from graphopt.safetensors_file import DTYPES, read_header, read_tensors, write_tensors

PEER_DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64,
]  # fmt: skip


def raw_file(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@st.composite
def tensor_tables(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    names = draw(st.lists(st.text(min_size=1, max_size=8), max_size=6, unique=True))
    table = {}
    for name in names:
        if name == "__metadata__":
            continue
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        dtype = draw(st.sampled_from(PEER_DTYPES))
        table[name] = torch.randint(0, 2, shape).to(dtype)
    return table


@settings(max_examples=60, deadline=None)
@given(table=tensor_tables(), mapped=st.booleans())
def test_files_equal_the_reference_writers_byte_for_byte_and_read_back(
    table: dict[str, torch.Tensor], mapped: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    ours = tmp_path_factory.mktemp("t") / "ours.safetensors"
    size_bytes = write_tensors(ours, table, {"format": "pt"})
    assert ours.read_bytes() == safetensors.torch.save(table, {"format": "pt"})
    assert size_bytes == ours.stat().st_size
    back = read_tensors(ours, mapped=mapped)
    assert back.keys() == table.keys()
    for name, tensor in table.items():
        assert back[name].dtype == tensor.dtype
        assert back[name].shape == tensor.shape
        assert torch.equal(
            back[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
        )
    assert read_header(ours).metadata == {"format": "pt"}


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_read_but_never_anything_else(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = safetensors.torch.save({"a": torch.ones(2, 2), "b": torch.ones(3, dtype=torch.bool)})
    kind = data.draw(st.sampled_from(["cut", "flip", "noise"]))
    if kind == "cut":
        content = whole[: data.draw(st.integers(0, len(whole) - 1))]
    elif kind == "flip":
        place = data.draw(st.integers(0, len(whole) - 1))
        content = whole[:place] + bytes([data.draw(st.integers(0, 255))]) + whole[place + 1 :]
    else:
        content = data.draw(st.binary(max_size=200))
    path = tmp_path_factory.mktemp("d") / "x.safetensors"
    path.write_bytes(content)
    refused = None
    tensors: dict[str, torch.Tensor] = {}
    try:
        tensors = read_tensors(path)
    except (BundleError, LimitError) as error:
        refused = error
    if refused is None:
        assert kind == "flip"
        assert sum(t.nbytes for t in tensors.values()) == 19
    else:
        assert str(path) in str(refused)
        assert refused.remedy


def test_tensors_of_wide_dtypes_come_first_so_that_all_are_aligned(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(
        path, {"a": torch.ones(3, dtype=torch.uint8), "z": torch.ones(1, dtype=torch.float64)}
    )
    assert list(read_header(path).tensors) == ["z", "a"]


def test_writing_does_not_depend_on_the_order_of_the_mapping(tmp_path: Path) -> None:
    a, b = torch.arange(3), torch.arange(4.0).reshape(2, 2).t()
    write_tensors(tmp_path / "1", {"a": a, "b": b}, {"x": "1", "y": "2"})
    write_tensors(tmp_path / "2", {"b": b, "a": a}, {"y": "2", "x": "1"})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert torch.equal(read_tensors(tmp_path / "1")["b"], b)


def test_a_descriptor_is_read_by_position_and_left_open(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"w": torch.arange(5.0)})
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.lseek(descriptor, 3, os.SEEK_SET)
        assert torch.equal(read_tensors(descriptor)["w"], torch.arange(5.0))
        assert os.lseek(descriptor, 0, os.SEEK_CUR) == 3
        path.unlink()
        assert list(read_header(descriptor).tensors) == ["w"]
    finally:
        os.close(descriptor)


def test_a_descriptor_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        write_tensors(file.fileno(), {"w": torch.arange(5.0)})
    assert torch.equal(safetensors.torch.load_file(path)["w"], torch.arange(5.0))


def test_mapped_tensors_warn_nobody_and_never_change_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"w": torch.zeros(1000)})
    before = path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensor = read_tensors(path)["w"]
    tensor.fill_(1.0)
    assert path.read_bytes() == before
    assert tensor.sum() == 1000  # and the mapping outlives the call


def test_unaligned_data_is_read(tmp_path: Path) -> None:
    numbers = torch.tensor([1.5, -2.0])
    header = {"pad": entry("U8", [1], 0, 1), "w": entry("F32", [2], 1, 9)}
    path = raw_file(tmp_path / "x", header, b"\0" + numbers.numpy().tobytes())
    assert torch.equal(read_tensors(path)["w"], numbers)
    assert torch.equal(read_tensors(path, mapped=False)["w"], numbers)


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        ({"w": entry("F32", [2], 0, 8)}, b"1234567", "cut off"),
        ({"w": entry("F32", [2], 0, 8)}, b"123456789", "belong to no tensor"),
        ({"a": entry("U8", [4], 0, 4), "w": entry("U8", [4], 3, 7)}, b"1234567", "overlaps"),
        ({"a": entry("U8", [4], 0, 4), "w": entry("U8", [4], 5, 9)}, b"123456789", "gap"),
        ({"w": entry("F32", [2], 0, 4)}, b"1234", "needs 8 bytes"),
        ({"w": entry("F32", [2], 8, 0)}, b"12345678", "needs 8 bytes"),
        ({"w": entry("F32", [-2, -1], 0, 8)}, b"12345678", "sizes"),
        ({"w": entry("F32", [True, 2], 0, 8)}, b"12345678", "sizes"),
        ({"w": entry("F32", [2.0], 0, 8)}, b"12345678", "sizes"),
        ({"w": entry("F32", [2**62, 2**62, 0], 0, 0)}, b"", "larger than any memory"),
        ({"w": entry("F32", [2**70], 0, 0)}, b"", "sizes"),
        ({"w": entry("F32", [1] * 65, 0, 4)}, b"1234", "at most 64"),
        ({"w": entry("F4", [2], 0, 1)}, b"1", "dtype 'F4'"),
        ({"w": entry(["F32"], [2], 0, 8)}, b"12345678", "dtype"),  # type: ignore[arg-type]
        ({"w": {**entry("U8", [1], 0, 1), "more": 1}}, b"1", "exactly"),
        ({"w": 3}, b"", "exactly"),
        ({"w": entry("BOOL", [2], 0, 2)}, b"\x01\x02", "other than 0 and 1"),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
        (b'{"w":{},"w":{}}', b"", "twice"),
        (b'{"w":NaN}', b"", "NaN"),
        (b'{"w":' + b"[" * 100_000, b"", "nested"),
        (b"[]", b"", "begin with"),
        (b"{\xff}", b"", "JSON"),
        (b'{"w":' + b"1" * 5000 + b"}", b"", "JSON"),
    ],
)
def test_a_lying_header_is_refused_by_name(
    header: object, data: bytes, words: str, tmp_path: Path
) -> None:
    path = raw_file(tmp_path / "x.safetensors", header, data)
    with pytest.raises(BundleError, match=words) as caught:
        read_tensors(path)
    assert caught.value.where == str(path)
    assert caught.value.remedy
    if isinstance(header, dict) and "w" in header:
        assert "'w'" in str(caught.value) or "no tensor" in str(caught.value)


def test_header_bloat_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(struct.pack("<Q", SAFETENSORS_HEADER_BYTES_MAX + 1) + b"{}")
    with pytest.raises(LimitError, match="header claims"):
        read_header(path)
    path.write_bytes(struct.pack("<Q", 2**64 - 1) + b"{}")
    with pytest.raises(LimitError, match="header claims"):
        read_header(path)
    many = {str(i): entry("U8", [0], 0, 0) for i in range(SAFETENSORS_TENSORS_MAX + 1)}
    with pytest.raises(LimitError, match="tensors"):
        read_header(raw_file(path, many))


def test_links_folders_and_pipes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"w": torch.ones(1)})
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(BundleError, match="symbolic link"):
        read_header(tmp_path / "link")
    with pytest.raises(BundleError, match="not a regular file"):
        read_header(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BundleError, match="not a regular file"):
        read_header(tmp_path / "pipe")
    with pytest.raises(BundleError, match="No such file"):
        read_header(tmp_path / "absent")
    read_header(path, one_link=True)
    os.link(path, tmp_path / "second")
    read_header(path)
    with pytest.raises(BundleError, match="2 names"):
        read_header(path, one_link=True)


def test_an_unknown_tensor_name_is_answered_with_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"encoder.weight": torch.ones(1)})
    with pytest.raises(BundleError, match=r"did you mean encoder\.weight"):
        read_tensors(path, ["encoder.weigth"])


def test_what_the_format_cannot_hold_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="complex128"):
        write_tensors(tmp_path / "x", {"w": torch.ones(1, dtype=torch.complex128)})
    with pytest.raises(BundleError, match="reserved"):
        write_tensors(tmp_path / "x", {"__metadata__": torch.ones(1)})
    with pytest.raises(BundleError, match="cannot be written"):
        write_tensors(tmp_path / "absent" / "x", {"w": torch.ones(1)})
    assert list(tmp_path.iterdir()) == []


def test_every_dtype_name_has_its_own_torch_dtype() -> None:
    assert len(set(DTYPES.values())) == len(DTYPES)
