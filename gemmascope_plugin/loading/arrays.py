"""Arrays inside a file: where their bytes are, and how to see them as tensors without reading them.

Mapping is copy on write: a tensor costs no memory until used, the pages are the operating system's
file cache, and writing to the tensor never reaches the file.  Files are replaced by renaming, which
leaves mappings of the old one whole; a program that cuts a file short in place while it is mapped
would end this process, as with any memory-mapped file.

What a ``.safetensors`` file says it holds is read from its header only, trusting nothing.  Layout: 8
bytes with the length of the header, the header as JSON, the values without gaps.

1. The length must fit into the file, so that nothing is allocated beyond the file's own size.
2. Each entry has a known type, a plain shape, and offsets that match both; the entries, ordered by
   offset, cover the rest of the file exactly: no gap, no overlap, no tail.
3. Names appear once and hold no path.

The headers of an ``.npz`` file are ``catalog/headers.py``'s.  Stored members are mapped where they
lie; compressed ones are inflated once, in chunks of 4 MB, into a safetensors file in the cache folder
(``convert_npz``), which is then mapped; it is found again by the archive's path, size, time of change
and checksums, and an older conversion of the same path is deleted.

Archives written by ``numpy.savez`` place values at odd addresses, and a mapping of whole pages cannot
shift them.  What that costs, against a copy in memory as SAELens makes it, for 2304 x 16384 and 64
tokens (``tests/benchmarks/loading.py``): every encode 65 ms instead of 61 to 63 for the odd addresses,
the first one 1.5 ms more for touching the pages.  Advice to the kernel changes neither; populating the
mapping saves the 1.5 ms but puts 151 MB into resident memory at opening, and a copy, 55 ms, would pay
off after twenty encodes.  So it stays: opening and first encode together are four times faster. Files
written by ``write_npz`` are aligned to 64 bytes, those of safetensors to 8, and have no such cost.

``integrity.py`` checks values.  Costs a few kB of reading, and tens of microseconds per file for
mapping.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import struct
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from jaxtyping import Shaped

from gemmascope_plugin.catalog.headers import FORMAT_FAULTS, Member
from gemmascope_plugin.errors import BadFileError, MissingFileError, shorten
from gemmascope_plugin.files.home import HOME_FIX, home
from gemmascope_plugin.files.whole import write_whole

_NORESERVE = 0x4000 if sys.platform == "linux" else 0
_FLAGS = getattr(mmap, "MAP_PRIVATE", 0) | _NORESERVE
"""Nobody is expected to write, so a file larger than the memory must be mapped without a reserve."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, kw_only=True)
class StoredArray:
    """One array of a file, as the headers declare it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int | None
    """First byte of the values in the file; None when they are compressed."""
    fortran: bool = False
    """Whether the values lie column by column."""
    crc: int | None = None
    """Checksum of the bytes from ``crc_start`` to the end of the values; None where there is none."""
    crc_start: int = 0

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def identity(path: Path) -> list[int | str]:
    """What tells a file from every other and from itself after a change."""
    real = os.path.realpath(path)
    stat = os.stat(real)
    return [real, stat.st_size, stat.st_mtime_ns, stat.st_ino]


def map_file(path: Path) -> mmap.mmap:
    """All bytes of a file, copy on write; closed when the last tensor on them is gone."""
    try:
        with path.open("rb") as file:
            if sys.platform == "win32":
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            return mmap.mmap(file.fileno(), 0, _FLAGS, mmap.PROT_READ | mmap.PROT_WRITE)
    except (OSError, ValueError) as fault:
        raise BadFileError(f"cannot map {str(path)!r}: {fault}") from fault


def map_array(mapping: mmap.mmap, array: StoredArray) -> Shaped[torch.Tensor, "*_"]:
    """An array on the bytes of its file; in memory only if it was stored column by column."""
    assert array.offset is not None, f"{array.name} is compressed"
    if array.offset + array.nbytes > len(mapping):
        raise BadFileError(f"array {array.name!r} runs past the end of its file")
    if array.nbytes == 0:
        return torch.empty(array.shape, dtype=array.dtype)
    flat = torch.frombuffer(
        mapping, dtype=array.dtype, count=math.prod(array.shape), offset=array.offset
    )
    if array.fortran and len(array.shape) > 1:
        axes = tuple(range(len(array.shape)))[::-1]
        return flat.reshape(array.shape[::-1]).permute(axes).contiguous()
    return flat.reshape(array.shape)


@dataclass(frozen=True, kw_only=True)
class ArrayFile:
    """A file whose arrays can be mapped."""

    path: Path
    """Where the values lie; a copy in the cache folder if the file itself is compressed."""
    source: Path
    """The file that the user knows."""
    arrays: dict[str, StoredArray]

    @cached_property
    def _mapping(self) -> mmap.mmap:
        return map_file(self.path)

    def tensor(self, name: str) -> Shaped[torch.Tensor, "*_"]:
        """One array, memory-mapped, under the name that this package gives it."""
        return map_array(self._mapping, self.arrays[name])

    def tensors(self) -> dict[str, Shaped[torch.Tensor, "*_"]]:
        """All arrays, memory-mapped."""
        return {name: self.tensor(name) for name in self.arrays}


NPZ_DTYPES = {"<f2": torch.float16, "<f4": torch.float32, "<f8": torch.float64}


def npz_arrays(members: Mapping[str, Member]) -> dict[str, StoredArray]:
    """The arrays of an ``.npz`` file; the ``offset`` of compressed ones is None."""
    return {name: _stored(member) for name, member in members.items()}


def _stored(member: Member) -> StoredArray:
    start = member.offset
    return StoredArray(
        name=member.name,
        dtype=NPZ_DTYPES[member.descr],
        shape=member.shape,
        offset=None if start is None else start + member.header_size,
        fortran=member.fortran,
        crc=None if start is None else member.crc,
        crc_start=start or 0,
    )


CHUNK = 1 << 22
"""Bytes of a compressed array that are inflated at a time."""
MAX_HEADER = 1 << 24
MAX_RANK = 8
MAX_SIZE = 1 << 48
DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I32": torch.int32,
    "I64": torch.int64,
}
"""Types that are read; Gemma Scope itself is all ``F32``."""
_CODES = {dtype: code for code, dtype in DTYPES.items()}


def safetensors_arrays(path: Path) -> dict[str, StoredArray]:
    """Headers of all arrays in a ``.safetensors`` file, in order; refuses one that is not whole."""
    if not path.is_file():
        raise MissingFileError(f"no file {str(path)!r}", fix="check the folder")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise _bad(path, f"its header claims {length} bytes in a file of {size}")
            entries = json.loads(file.read(length), object_pairs_hook=_unique)
    except (OSError, ValueError, RecursionError) as fault:
        raise _bad(path, f"it is truncated or not a safetensors file ({fault})") from fault
    if not isinstance(entries, dict):
        raise _bad(path, "its header is not a table of arrays")
    entries.pop("__metadata__", None)
    arrays = {name: _entry(path, name, entry, 8 + length) for name, entry in entries.items()}
    _check_cover(path, sorted(arrays.values(), key=_start), 8 + length, size)
    return arrays


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name appears twice")
    return table


def _entry(path: Path, name: str, entry: object, start: int) -> StoredArray:
    if not name or any(c in name for c in "/\\\0") or name.startswith("."):
        raise _bad(path, f"{shorten([repr(name[:60])])} is not an array name")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _bad(path, f"array {name!r} has an unknown header")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise _bad(path, f"array {name!r} has type {code!r}; only {shorten(DTYPES)} are read")
    if not _plain(shape, MAX_RANK) or not _plain(offsets, 2) or len(offsets) != 2:
        raise _bad(path, f"array {name!r} has shape {shape!r} at {offsets!r}")
    array = StoredArray(
        name=name, dtype=DTYPES[code], shape=tuple(shape), offset=start + offsets[0]
    )
    if offsets[1] - offsets[0] != array.nbytes:
        raise _bad(
            path,
            f"array {name!r} declares shape {array.shape}, {array.nbytes} bytes, and has "
            f"{offsets[1] - offsets[0]}",
        )
    return array


def _plain(numbers: object, most: int) -> bool:
    """Whether this is a list of at most ``most`` sizes."""
    return (
        isinstance(numbers, list)
        and len(numbers) <= most
        and all(type(n) is int and 0 <= n <= MAX_SIZE for n in numbers)
    )


def _start(array: StoredArray) -> tuple[int, int]:
    return array.offset or 0, array.nbytes


def _check_cover(path: Path, arrays: Sequence[StoredArray], start: int, size: int) -> None:
    if not arrays:
        raise _bad(path, "it holds no arrays")
    for array in arrays:
        if array.offset != start:
            raise _bad(path, f"array {array.name!r} begins at {array.offset}, not at {start}")
        start += array.nbytes
    if start != size:
        raise _bad(path, f"its arrays end at byte {start}, the file at {size}")


def _bad(path: Path, why: str) -> BadFileError:
    return BadFileError(f"cannot read {str(path)!r}: {why}", fix="fetch or write the file again")


def header_bytes(arrays: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> bytes:
    """The beginning of a file of these arrays, padded so that values begin at a multiple of 64 bytes."""
    table: dict[str, Any] = {}
    position = 0
    for name, (dtype, shape) in arrays.items():
        end = position + math.prod(shape) * dtype.itemsize
        table[name] = {
            "dtype": _CODES[dtype],
            "shape": list(shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(table).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return struct.pack("<Q", len(text)) + text


def convert_npz(path: Path, members: Mapping[str, Member]) -> Path:
    """The safetensors file in the cache folder that holds the same arrays, written if need be."""
    file = identity(path)
    prefix = hashlib.sha256(str(file[0]).encode(errors="surrogateescape")).hexdigest()[:16]
    content = json.dumps([*file[1:3], [(m.name, m.shape, m.crc) for m in members.values()]])
    target = (
        home()
        / "converted"
        / (f"{prefix}-{hashlib.sha256(content.encode()).hexdigest()[:16]}.safetensors")
    )
    if not target.is_file():
        write_whole(target, lambda file: _convert(path, members, file), fix=HOME_FIX)
        for old in target.parent.glob(f"{prefix}-*.safetensors"):
            if old != target:
                old.unlink(missing_ok=True)
    return target


def _convert(path: Path, members: Mapping[str, Member], file: BinaryIO) -> None:
    file.write(header_bytes({n: (NPZ_DTYPES[m.descr], m.shape) for n, m in members.items()}))
    with zipfile.ZipFile(path) as archive:
        for member in members.values():
            try:
                if member.fortran and len(member.shape) > 1:
                    file.write(_rows(archive, member))
                else:
                    _inflate(archive, member, file)
            except OSError as fault:
                # Of the two files only the one written to can be full or forbidden by now.
                if fault.errno is not None:
                    raise
                raise _bad_array(path, member, fault) from fault
            except FORMAT_FAULTS as fault:
                raise _bad_array(path, member, fault) from fault


def _bad_array(path: Path, member: Member, fault: BaseException) -> BadFileError:
    return BadFileError(
        f"cannot read array {member.name!r} of {str(path)!r}: {fault}",
        fix="fetch or write the file again",
    )


def _inflate(archive: zipfile.ZipFile, member: Member, file: BinaryIO) -> None:
    with archive.open(member.entry) as stream:
        stream.read(member.header_size)
        n_left = member.nbytes
        while n_left:
            chunk = stream.read(min(CHUNK, n_left))
            if not chunk:
                raise EOFError(f"{n_left} of {member.nbytes} bytes are missing")
            file.write(chunk)
            n_left -= len(chunk)
        if stream.read(1):  # also makes zipfile compare the checksum
            raise zipfile.BadZipFile("longer than declared")


def _rows(archive: zipfile.ZipFile, member: Member) -> bytes:
    """The values of a member that is stored column by column, row by row."""
    with archive.open(member.entry) as stream:
        stream.read(member.header_size)
        flat = np.frombuffer(stream.read(member.nbytes), member.descr)
        if len(flat) * flat.itemsize != member.nbytes or stream.read(1):
            raise zipfile.BadZipFile("not as long as declared")
    return np.ascontiguousarray(flat.reshape(member.shape[::-1]).T).tobytes()
