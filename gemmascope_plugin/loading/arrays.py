"""One array inside a file: where its bytes are, and how to see them as a tensor without reading them.

Mapping is copy on write: a tensor costs no memory until used, the pages are the operating system's
file cache, and writing to the tensor never reaches the file.  Files are replaced by renaming, which
leaves mappings of the old one whole; a program that cuts a file short in place while it is mapped
would end this process, as with any memory-mapped file.

Costs tens of microseconds per file.
"""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Shaped

from gemmascope_plugin.errors import BadFileError

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


def map_file(path: Path) -> mmap.mmap:
    """All bytes of a file, copy on write; closed when the last tensor on them is gone.

    Raises:
        BadFileError: The file cannot be opened or mapped.
    """
    try:
        with path.open("rb") as file:
            if sys.platform == "win32":
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            return mmap.mmap(file.fileno(), 0, _FLAGS, mmap.PROT_READ | mmap.PROT_WRITE)
    except (OSError, ValueError) as fault:
        raise BadFileError(f"cannot map {str(path)!r}: {fault}") from fault


def map_array(mapping: mmap.mmap, array: StoredArray) -> Shaped[torch.Tensor, "*_"]:
    """The values of an array, on the bytes of the file.

    Args:
        mapping: The file.
        array: One of its arrays, not compressed, lying within the file.

    Returns:
        A tensor on the file's bytes; in memory only if it was stored column by column.

    Raises:
        BadFileError: The file has become shorter since its headers were read.
    """
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

    def tensors(
        self, wanted: Callable[[str], bool] = lambda _: True
    ) -> dict[str, Shaped[torch.Tensor, "*_"]]:
        """All arrays whose names are wanted."""
        return {name: self.tensor(name) for name in self.arrays if wanted(name)}
