"""The npz reader: right values, mapped where possible, and a named error for every bad file."""

import io
import struct
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from npz_files import arrays, read_npz, save

from gemmascope_plugin.catalog.headers import read_headers
from gemmascope_plugin.errors import BadFileError, GemmaScopeError, MissingFileError
from gemmascope_plugin.loading import integrity
from gemmascope_plugin.loading.export import write_npz


def npy_bytes(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def archive(path, *members: tuple[str, bytes], method: int = zipfile.ZIP_STORED):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns about duplicate names
        with zipfile.ZipFile(path, "w", method) as file:
            for name, data in members:
                file.writestr(name, data)
    return path


def mapped(path) -> bool:
    """Whether the values of ``W_enc`` lie in a mapping of the file rather than in memory."""
    tensor = read_npz(path)["W_enc"]  # the mapping lives as long as the tensor
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, stop = (int(end, 16) for end in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < stop:
            return str(path) in line
    return False


@pytest.mark.parametrize("compress", [False, True])
def test_values_are_those_that_numpy_reads(tmp_path, compress: bool) -> None:
    path = save(tmp_path / "params.npz", compress=compress, **arrays())
    read = read_npz(path)
    assert list(read) == list(arrays())
    for name, value in arrays().items():
        assert read[name].dtype == torch.float32
        np.testing.assert_array_equal(read[name].numpy(), value)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_stored_members_are_mapped_and_compressed_ones_from_the_cache(tmp_path, own_home) -> None:
    assert mapped(save(tmp_path / "a.npz", **arrays()))
    compressed = save(tmp_path / "b.npz", compress=True, **arrays())
    assert not mapped(compressed)
    (copy,) = (own_home / "converted").iterdir()
    assert (
        integrity.open_npz(compressed, read_headers(compressed)).path == copy
        and copy.suffix == ".safetensors"
    )


def test_writing_to_a_mapped_tensor_does_not_reach_the_file(tmp_path) -> None:
    path = save(tmp_path / "params.npz", **arrays())
    before = path.read_bytes()
    read_npz(path)["W_enc"].zero_()
    assert path.read_bytes() == before


@pytest.mark.parametrize("compress", [False, True])
def test_written_files_are_aligned_whole_and_readable_by_numpy(tmp_path, compress) -> None:
    tensors = {name: torch.from_numpy(value) for name, value in arrays().items()}
    path = write_npz(tmp_path / "new" / "params.npz", tensors, compress=compress)
    assert [f.name for f in path.parent.iterdir()] == ["params.npz"]
    for name, value in np.load(path, allow_pickle=False).items():
        np.testing.assert_array_equal(value, arrays()[name])
    for name, tensor in read_npz(path).items():
        assert torch.equal(tensor, tensors[name])
        assert compress or tensor.data_ptr() % 64 == 0


def test_a_failed_write_leaves_nothing(tmp_path) -> None:
    with pytest.raises(BadFileError, match="no arrays to write"):
        write_npz(tmp_path / "params.npz", {})
    broken = {"a": torch.ones(2), "b": torch.ones(2, device="meta")}
    with pytest.raises(NotImplementedError):
        write_npz(tmp_path / "params.npz", broken)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("compress", [False, True])
def test_lower_case_keys_column_order_and_other_floats(tmp_path, compress) -> None:
    w = arrays()["W_enc"]
    path = save(
        tmp_path / "params.npz",
        compress=compress,
        w_enc=np.asfortranarray(w),
        half=w.astype(np.float16),
        double=w.astype(np.float64),
        none=np.empty((0, 3), np.float32),
        scalar=np.float32(2.5),
    )
    read = read_npz(path)
    assert read["W_enc"].is_contiguous()
    np.testing.assert_array_equal(read["W_enc"].numpy(), w)
    assert read["half"].dtype == torch.float16 and read["double"].dtype == torch.float64
    assert read["none"].shape == (0, 3) and read["scalar"].item() == 2.5


def bad(path) -> str:
    with pytest.raises(BadFileError) as error:
        read_npz(path)
    assert str(error.value).endswith("Try: fetch or write the file again")
    return str(error.value)


def test_no_file(tmp_path) -> None:
    with pytest.raises(MissingFileError, match=r"^no file '.*x\.npz'\. Try: check the folder$"):
        read_npz(tmp_path / "x.npz")


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, 0.999])
def test_truncated(tmp_path, compress: bool, keep: float) -> None:
    path = save(tmp_path / "params.npz", compress=compress, **arrays())
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    assert "it is truncated or not an npz archive (" in bad(path)


def test_not_an_archive_and_an_empty_one(tmp_path) -> None:
    (tmp_path / "a.npz").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "it is truncated or not an npz archive (File is not a zip file)" in bad(
        tmp_path / "a.npz"
    )
    assert "it holds no arrays" in bad(archive(tmp_path / "b.npz"))


def test_object_arrays_and_integers_are_refused_without_unpickling(tmp_path) -> None:
    objects = npy_bytes(np.array([{}, None], object))
    assert "array 'W_enc.npy' has type '|O'; only <f2, <f4, <f8 are read" in bad(
        archive(tmp_path / "a.npz", ("W_enc.npy", objects))
    )
    integers = npy_bytes(np.arange(3, dtype=np.int64))
    assert "array 'W_enc.npy' has type '<i8'" in bad(
        archive(tmp_path / "b.npz", ("W_enc.npy", integers))
    )


def header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_huge_declared_shape_allocates_nothing(tmp_path, method) -> None:
    huge = header("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000)}")
    path = archive(tmp_path / "a.npz", ("W_enc.npy", huge + bytes(16)), method=method)
    assert "declares shape (1000000, 1000000), 4000000000000 bytes, and has 16" in bad(path)


def test_a_member_that_claims_more_than_deflate_can_hold(tmp_path) -> None:
    huge = header("{'descr': '<f4', 'fortran_order': False, 'shape': (250000000,)}")
    path = archive(tmp_path / "a.npz", ("W_enc.npy", huge), method=zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    central = data.rindex(b"PK\x01\x02")
    data[central + 24 : central + 28] = struct.pack("<I", len(huge) + 1_000_000_000)
    path.write_bytes(data)
    assert f"claims {len(huge) + 1_000_000_000} bytes out of " in bad(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 4)}", "has shape (-1, 4)"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': [4]}", "has shape [4]"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (True,)}", "has shape (True,)"),
        ("{'descr': '<f4', 'fortran_order': 'no', 'shape': (4,)}", "has order 'no'"),
        ("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (4,)}", "has type [('a'"),
        ("{'descr': '<f4', 'shape': (4,)}", "has an unknown array header"),
        ("{[]: 1}", "has an unknown array header"),
        ("__import__('os').getcwd()", "it is truncated or not an npz archive (malformed"),
    ],
)
def test_strange_headers(tmp_path, text: str, message: str) -> None:
    path = archive(tmp_path / "a.npz", ("W_enc.npy", header(text) + bytes(16)))
    assert message in bad(path)


def test_strange_members(tmp_path) -> None:
    good = npy_bytes(np.ones(4, np.float32))
    for name in ("../W_enc.npy", "/W_enc.npy", "a/W_enc.npy", "..\\W_enc.npy", "C:W.npy", ".npy"):
        assert "is not an array name" in bad(archive(tmp_path / "a.npz", (name, good)))
    assert "member 'evil.py' is not an array" in bad(archive(tmp_path / "b.npz", ("evil.py", b"")))
    twice = archive(tmp_path / "c.npz", ("W_enc.npy", good), ("W_enc.npy", good))
    assert "two arrays named 'W_enc'" in bad(twice)
    both = archive(tmp_path / "d.npz", ("W_enc.npy", good), ("w_enc.npy", good))
    assert "two arrays named 'W_enc'" in bad(both)
    lzma = archive(tmp_path / "e.npz", ("W_enc.npy", good), method=zipfile.ZIP_LZMA)
    assert "has compression 14" in bad(lzma)
    assert "does not begin like an array" in bad(archive(tmp_path / "f.npz", ("a.npy", b"hello")))


def test_an_encrypted_member(tmp_path) -> None:
    path = archive(tmp_path / "a.npz", ("W_enc.npy", npy_bytes(np.ones(4, np.float32))))
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    assert "member 'W_enc.npy' is encrypted" in bad(path)


@pytest.mark.parametrize("compress", [False, True])
def test_a_flipped_bit_in_the_values_is_found(tmp_path, compress: bool) -> None:
    big = {"W_enc": np.linspace(0, 1, 40_000, dtype=np.float32).reshape(200, 200)}
    path = save(tmp_path / "params.npz", compress=compress, **big)
    data = bytearray(path.read_bytes())
    data[len(data) - 20_000] ^= 1
    path.write_bytes(data)
    assert "cannot read array 'W_enc' of" in bad(path)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    compress=st.booleans(),
    cut=st.none() | st.floats(0, 1),
    flips=st.lists(st.tuples(st.floats(0, 0.9999999), st.integers(0, 7)), max_size=4),
)
def test_damage_is_an_error_or_does_no_harm(tmp_path, compress, cut, flips) -> None:
    path = save(tmp_path / "params.npz", compress=compress, **arrays())
    data = bytearray(path.read_bytes())
    for where, bit in flips:
        data[int(where * len(data))] ^= 1 << bit
    path.write_bytes(data if cut is None else data[: int(cut * len(data))])
    try:
        read = read_npz(path)
    except GemmaScopeError:
        return
    for name, tensor in read.items():
        if name in arrays():
            np.testing.assert_array_equal(tensor.numpy(), arrays()[name])


def test_the_offset_of_a_stored_member_points_at_its_bytes(tmp_path) -> None:
    path = save(tmp_path / "params.npz", **arrays())
    for name, member in read_headers(path).items():
        start = member.offset + member.header_size
        raw = path.read_bytes()[start : start + member.nbytes]
        assert raw == arrays()[name].tobytes()
