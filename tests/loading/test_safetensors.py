"""The safetensors reader: equal to the library's on good files, a named error on every bad one."""

import json
import struct

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from npz_files import arrays

from gemmascope_plugin.errors import BadFileError, GemmaScopeError, MissingFileError
from gemmascope_plugin.loading.arrays import ArrayFile, safetensors_arrays
from gemmascope_plugin.loading.export import write_safetensors

FAST = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def read(path) -> dict[str, torch.Tensor]:
    arrays = safetensors_arrays(path)
    return ArrayFile(path=path, source=path, arrays=arrays).tensors()


def raw(path, header: object, data: bytes = b"", length: int | None = None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def bad(path) -> str:
    with pytest.raises(BadFileError) as error:
        safetensors_arrays(path)
    assert str(path) in str(error.value)
    return str(error.value)


def entry(shape=(2,), offsets=(0, 8), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_values_are_those_that_the_library_writes_and_reads(tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = {
        "a": torch.randn(3, 4),
        "half": torch.randn(5).bfloat16(),
        "index": torch.arange(7),
        "none": torch.empty(0, 3),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
    }
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"who": "them"})
    with (tmp_path / "ours.safetensors").open("wb") as file:
        write_safetensors(file, tensors)
    for name, value in tensors.items():
        for path in (tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors"):
            assert torch.equal(read(path)[name], value) and read(path)[name].dtype == value.dtype
        assert torch.equal(load_file(tmp_path / "ours.safetensors")[name], value)


def test_writing_to_a_tensor_does_not_reach_the_file(tmp_path) -> None:
    path = raw(tmp_path / "x.safetensors", {"a": entry()}, bytes(8))
    read(path)["a"].fill_(3)
    assert read(path)["a"].eq(0).all()


def test_no_file(tmp_path) -> None:
    with pytest.raises(MissingFileError, match="no file"):
        safetensors_arrays(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({}, "it holds no arrays"),
        ([1], "its header is not a table"),
        (b"{", "it is truncated or not a safetensors file"),
        (b"[" * 200_000, "it is truncated or not a safetensors file"),
        (b"\xff\xfe", "it is truncated or not a safetensors file"),
        (b'{"a": 1, "a": 2}', "a name appears twice"),
        ({"a": 3}, "array 'a' has an unknown header"),
        ({"a": {**entry(), "more": 1}}, "array 'a' has an unknown header"),
        ({"a": entry(dtype="U8")}, "has type 'U8'"),
        ({"a": entry(dtype=["F32"])}, "has type ['F32']"),
        ({"a": entry(shape=(-1,))}, "has shape [-1]"),
        ({"a": entry(shape=(True, 2))}, "has shape [True, 2]"),
        ({"a": entry(shape=(1,) * 9)}, "has shape"),
        ({"a": entry(shape=(10**30,))}, "has shape"),
        ({"a": entry(shape=(1 << 47, 1 << 47))}, "declares shape"),
        ({"a": entry(offsets=(0, 8, 9))}, "at [0, 8, 9]"),
        ({"a": entry(offsets=(8, 0))}, "declares shape (2,), 8 bytes, and has -8"),
        ({"a": entry(offsets=(1, 9))}, "array 'a' begins at"),
        ({"a": entry(), "b": entry()}, "array 'b' begins at"),
        ({"../a": entry()}, "is not an array name"),
        ({"a\0": entry()}, "is not an array name"),
        ({".": entry()}, "is not an array name"),
    ],
)
def test_strange_headers(tmp_path, header, message: str) -> None:
    assert message in bad(raw(tmp_path / "x.safetensors", header, bytes(8)))


def test_lengths_that_lie(tmp_path) -> None:
    path = tmp_path / "x.safetensors"
    assert "claims 9223372036854775807 bytes" in bad(raw(path, {}, length=(1 << 63) - 1))
    assert "its arrays end at byte" in bad(raw(path, {"a": entry()}, bytes(9)))
    assert "its arrays end at byte" in bad(raw(path, {"a": entry()}, bytes(7)))
    path.write_bytes(b"abc")
    assert "in a file of 3" in bad(path)


@FAST
@given(
    cut=st.none() | st.floats(0, 1),
    flips=st.lists(st.tuples(st.floats(0, 0.9999999), st.integers(0, 7)), max_size=4),
)
def test_damage_is_an_error_or_leaves_whole_arrays(tmp_path, cut, flips) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        write_safetensors(file, {n: torch.from_numpy(v) for n, v in arrays().items()})
    data = bytearray(path.read_bytes())
    for where, bit in flips:
        data[int(where * len(data))] ^= 1 << bit
    path.write_bytes(data if cut is None else data[: int(cut * len(data))])
    try:
        tensors = read(path)
    except GemmaScopeError:
        return
    size = path.stat().st_size
    assert sum(t.numel() * t.element_size() for t in tensors.values()) <= size


@FAST
@given(st.binary(max_size=300))
def test_any_bytes(tmp_path, data: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(GemmaScopeError):
        safetensors_arrays(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4) | st.just("F32"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
FIELD = st.fixed_dictionaries({"dtype": JSON, "shape": JSON, "data_offsets": JSON})


@FAST
@given(
    header=st.dictionaries(st.text(max_size=4), JSON | FIELD, max_size=3), size=st.integers(0, 64)
)
def test_any_header(tmp_path, header, size: int) -> None:
    path = raw(tmp_path / "x.safetensors", header, bytes(size))
    try:
        tensors = read(path)
    except GemmaScopeError:
        return
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == size


def test_numbers_survive_any_offset(tmp_path) -> None:
    """Values at odd addresses, as a header of odd length makes them."""
    values = np.arange(6, dtype=np.float32)
    for pad in range(4):
        text = json.dumps({"a": entry((6,), (0, 24))}).encode() + b" " * pad
        path = raw(tmp_path / "x.safetensors", text, values.tobytes())
        np.testing.assert_array_equal(read(path)["a"].numpy(), values)
