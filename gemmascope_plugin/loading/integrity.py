"""A parameter file, opened, compared with its spec, and read through once in its life.

``open_checked``, from the headers alone:

1. They are read by the ending of the name (``catalog/headers.py``, ``arrays.py``).
2. Names: those of the format; a ``scaling_factor`` of ones may be there too.  Gemma Scope 2 writes
   ``w_enc`` and ``affine_skip_connection``; here they are ``W_enc`` and ``A``.
3. Shapes against the spec, before anything is converted or read.
4. A compressed archive is converted into the cache folder (``arrays.py``); everything else is used as it
   lies.

``check_file``, one streaming pass over the values, through one buffer of 8 MB and not mapped, so that a
file of many gigabytes leaves no trace in this process' memory:

1. Checksums, where the format has them.
2. Floats are finite.
3. Matrices are not all zero.
4. ``check_causal``: in files of crosscoders and CLTs no feature writes to a layer before its own.

A stamp remembers that a check has passed:

1. It names the file's real path, size, time of change (ns) and inode.  One stamp per file and check
   lies in ``home()/verified``.
2. When any of these differ, the check runs again.  ``force`` runs it in any case.
3. Only success is remembered, and only if the file did not change meanwhile and is older than two
   seconds: within the resolution of file times a younger one could still be rewritten unseen.
4. A stamp that cannot be written costs the next process a second check, and nothing else.

Costs one ``stat`` and one small read when the stamp is good.
"""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from io import BufferedReader
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Shaped

from gemmascope_plugin.catalog import SaeSpec
from gemmascope_plugin.catalog.headers import Member, read_headers
from gemmascope_plugin.errors import BadFileError, GemmaScopeError, WidthMismatchError, shorten
from gemmascope_plugin.files.home import home
from gemmascope_plugin.files.whole import write_whole
from gemmascope_plugin.loading.arrays import (
    FLOATS,
    ArrayFile,
    StoredArray,
    convert_npz,
    identity,
    npz_arrays,
    safetensors_arrays,
)

Shape = tuple[int, ...]

OPTIONAL = ("scaling_factor",)
RENAMED = {"w_enc": "W_enc", "w_dec": "W_dec", "affine_skip_connection": "A"}
"""Names in files to names here."""
CHUNK = 1 << 23
_AGAIN = "fetch or write the file again"


def check_file(file: ArrayFile, *, force: bool = False) -> None:
    """Checks all arrays of a file, once in its life; ``force`` checks again."""
    once(file.path, "values", lambda: _check_values(file), force=force)


def check_causal(file: ArrayFile, position: int, *, force: bool = False) -> None:
    """Checks that no feature of a layer's file writes to an output before ``position``, its own."""
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


VERSION = 1
"""Raise it when the checks become stricter: older stamps then count for nothing."""
RACY_NS = 2_000_000_000


def once(path: Path, check: str, run: Callable[[], None], *, force: bool = False) -> None:
    """Runs a check of a file, which raises if it is bad, unless it has passed before."""
    before = identity(path)
    stamp = _stamp_file(before, check)
    if not force and _read(stamp) == _content(before):
        return
    run()
    settled = time.time_ns() - int(before[2]) > RACY_NS
    if settled and identity(path) == before:
        _write(stamp, before)


def _stamp_file(file: list[int | str], check: str) -> Path:
    name = hashlib.sha256(f"{file[0]}\0{check}".encode(errors="surrogateescape")).hexdigest()
    return home() / "verified" / name[:32]


def _content(file: list[int | str]) -> str:
    return json.dumps([VERSION, *file])


def _read(stamp: Path) -> str | None:
    try:
        return stamp.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _write(stamp: Path, file: list[int | str]) -> None:
    try:
        write_whole(stamp, lambda handle: handle.write(_content(file).encode()))
    except GemmaScopeError:
        # Home folders that may not be written are common; see point 4 above.
        return


def open_npz(path: Path, members: Mapping[str, Member]) -> ArrayFile:
    """An archive whose arrays can be mapped: itself, or its conversion if it is compressed."""
    if all(member.offset is not None for member in members.values()):
        return ArrayFile(path=path, source=path, arrays=npz_arrays(members))
    converted = convert_npz(path, members)
    return ArrayFile(path=converted, source=path, arrays=safetensors_arrays(converted))


def renamed(arrays: Mapping[str, StoredArray]) -> dict[str, StoredArray]:
    """The same arrays under the names that this package gives them."""
    return {
        RENAMED.get(name, name): replace(array, name=RENAMED.get(name, name))
        for name, array in arrays.items()
    }


def expected_shapes(spec: SaeSpec) -> dict[str, Shape]:
    """Array name to shape, as each parameter file of this spec must have them."""
    n_layers = len(spec.layers) if spec.kind in ("crosscoder", "clt") else 0
    d_sae = spec.d_sae // max(1, n_layers)
    shapes: dict[str, Shape] = {
        "W_enc": (spec.d_in, d_sae),
        "W_dec": (d_sae, n_layers, spec.d_out) if n_layers else (d_sae, spec.d_out),
        "b_enc": (d_sae,),
        "b_dec": (spec.d_out,),
        "threshold": (d_sae,),
    }
    return {**shapes, "A": (spec.d_in, spec.d_out)} if spec.affine else shapes


def check_arrays(
    path: Path,
    spec: SaeSpec,
    arrays: Mapping[str, StoredArray],
    expected: Mapping[str, Shape] | None = None,
) -> None:
    """Compares headers, under this package's names, with ``expected`` or with the spec's shapes."""
    expected = expected_shapes(spec) if expected is None else expected
    shapes = {name: array.shape for name, array in arrays.items()}
    _check_names(path, shapes, expected)
    for name in expected:
        if len(shapes[name]) != len(expected[name]):
            raise _wrong_shape(path, spec, name, shapes[name], expected[name])
    for label, actual, needed in (
        ("d_in", shapes["W_enc"][0], spec.d_in),
        ("d_out", shapes["W_dec"][-1], spec.d_out),
    ):
        if actual != needed:
            raise WidthMismatchError(
                f"{str(path)!r} has {label} {actual}, but {spec.release} {spec.sae_id} at "
                f"{spec.hook_in!r} of {spec.model} has {label} {needed}",
                fix="the file of another model or site lies here; check the folder and the spec",
            )
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise _wrong_shape(path, spec, name, shapes[name], shape)
        if arrays[name].dtype not in FLOATS:
            raise BadFileError(
                f"{name} of {str(path)!r} has type {arrays[name].dtype}, not a type of floats"
            )


def _check_names(path: Path, shapes: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
    missing = [name for name in expected if name not in shapes]
    unknown = [name for name in shapes if name not in expected and name not in OPTIONAL]
    if missing or unknown:
        raise BadFileError(
            f"{str(path)!r} has wrong arrays: "
            + "; ".join(
                f"{word} {shorten(names)}"
                for word, names in (("missing", missing), ("unknown", unknown))
                if names
            ),
            exists=shorten(shapes),
            fix=f"a file with {shorten(expected)}",
        )


def _wrong_shape(
    path: Path, spec: SaeSpec, name: str, actual: Shape, expected: Shape
) -> BadFileError:
    return BadFileError(
        f"{name} of {str(path)!r} has shape {list(actual)}, but {spec.release} {spec.sae_id} needs "
        f"{list(expected)}",
        fix="the file of another width lies here; check the folder and the spec",
    )


def open_checked(
    path: Path, spec: SaeSpec, expected: Mapping[str, Shape] | None = None
) -> ArrayFile:
    """A file whose names and shapes are those of a spec; its values are not checked yet."""
    if path.suffix == ".npz":
        members = read_headers(path)
        check_arrays(path, spec, renamed(npz_arrays(members)), expected)
        file = open_npz(path, members)
        return replace(file, arrays=renamed(file.arrays))
    arrays = renamed(safetensors_arrays(path))
    check_arrays(path, spec, arrays, expected)
    return ArrayFile(path=path, source=path, arrays=arrays)
