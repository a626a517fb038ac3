"""Is every value of a file sound?  One streaming pass.

1. Checksums, where the format has them.
2. Floats are finite.
3. Matrices are not all zero.
4. In files of crosscoders and CLTs no feature writes to a layer before its own.

The file is read through one buffer of 8 MB and not mapped, so that checking a file of many gigabytes
leaves no trace in this process' memory.  ``stamps.py`` sees to it that each file is read once.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from io import BufferedReader
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Shaped

from gemmascope_plugin.errors import BadFileError
from gemmascope_plugin.loading.arrays import FLOATS, ArrayFile, StoredArray
from gemmascope_plugin.loading.stamps import once

CHUNK = 1 << 23
_AGAIN = "fetch or write the file again"


def check_file(file: ArrayFile, *, force: bool = False) -> None:
    """Check all arrays of a file, once in its life.

    Args:
        file: The file.
        force: Check again although it has passed before.

    Raises:
        BadFileError: Names the array and what is wrong with it.
    """
    once(file.path, "values", lambda: _check_values(file), force=force)


def check_causal(file: ArrayFile, position: int, *, force: bool = False) -> None:
    """Check that no feature of a multi-layer file writes before its own layer.

    Args:
        file: The file of one layer; ``w_dec`` is ``[d_sae, n_out, d_out]``.
        position: Place of the layer among the output layers.
        force: Check again although it has passed before.

    Raises:
        BadFileError: Names the first feature that does.
    """
    once(file.path, f"causal {position}", lambda: _check_causal(file, position), force=force)


def _check_values(file: ArrayFile) -> None:
    buffer = np.empty(CHUNK, np.uint8)
    try:
        with file.path.open("rb") as stream:
            for array in file.arrays.values():
                _check_array(file.source, array, stream, buffer)
    except OSError as fault:
        raise BadFileError(f"cannot read {str(file.source)!r}: {fault}", fix=_AGAIN) from fault


def _check_array(
    path: Path, array: StoredArray, stream: BufferedReader, buffer: np.ndarray
) -> None:
    assert array.offset is not None, f"{array.name} is compressed"
    crc = 0
    if array.crc is not None:
        stream.seek(array.crc_start)
        crc = zlib.crc32(stream.read(array.offset - array.crc_start))
    stream.seek(array.offset)
    bad, nonzero = 0, False
    for chunk in _chunks(path, stream, array.nbytes, buffer):
        crc = zlib.crc32(chunk.data, crc) if array.crc is not None else 0
        values = torch.from_numpy(chunk).view(array.dtype)
        bad += _not_finite(values)
        nonzero = nonzero or bool(chunk.any())
    if array.crc is not None and crc != array.crc:
        raise BadFileError(
            f"cannot read array {array.name!r} of {str(path)!r}: bad checksum", fix=_AGAIN
        )
    if bad:
        raise BadFileError(
            f"{array.name} of {str(path)!r} has {bad} of {array.nbytes // array.dtype.itemsize} "
            "values that are NaN or infinite",
            fix=_AGAIN,
        )
    if len(array.shape) > 1 and array.nbytes and not nonzero:
        raise BadFileError(f"{array.name} of {str(path)!r} is all zero", fix=_AGAIN)


def _chunks(path: Path, stream: BufferedReader, n: int, buffer: np.ndarray) -> Iterable[np.ndarray]:
    while n > 0:
        view = buffer[: min(n, len(buffer))]
        if stream.readinto(view.data) != len(view):
            raise BadFileError(f"cannot read {str(path)!r}: it is truncated", fix=_AGAIN)
        n -= len(view)
        yield view


def _not_finite(values: Shaped[torch.Tensor, " n"]) -> int:
    """How many values are NaN or infinite."""
    if values.dtype not in FLOATS:
        return 0
    if values.dtype in (torch.float32, torch.float64):
        # A sum is finite only if all terms are, and takes a quarter of the time; it may overflow.
        with np.errstate(over="ignore", invalid="ignore"):
            if np.isfinite(values.numpy().sum()):
                return 0
    return values.numel() - int(torch.isfinite(values).sum())


def _check_causal(file: ArrayFile, position: int) -> None:
    decoder = file.tensor("W_dec")
    rows = max(1, CHUNK // max(1, decoder[0].nbytes))
    for start in range(0, len(decoder) if position else 0, rows):
        early = decoder[start : start + rows, :position]
        if bool(early.any()):
            feature = start + int(early.flatten(1).any(1).nonzero()[0, 0])
            raise BadFileError(
                f"feature {feature} of {str(file.source)!r} writes before its own layer, "
                f"which is at position {position}",
                exists="zeros in w_dec[:, :position], as Gemma Scope has them",
                fix=_AGAIN,
            )
