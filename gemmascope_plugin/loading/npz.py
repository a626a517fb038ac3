"""Arrays out of an ``.npz`` file, without a second copy and without pickle.

1. The headers are read and checked first (``catalog/headers.py``); nothing has been allocated yet.
2. A stored member is memory-mapped, copy on write, at the offset of its values: it costs no memory
   until used, and writing to the tensor never reaches the file.
3. A compressed member is inflated once, in chunks, into an array of exactly the declared size.
4. Checksums are verified for both, chunk by chunk; a flipped bit is an error and not a weight.
5. Arrays in column order are copied into row order.

Costs one pass over the file.  Peak memory is the size of the compressed members plus 4 MB.
Archives written by ``numpy.savez`` place values at odd addresses, which the processors in use read
at nearly full speed; ``write_npz`` aligns them to 64 bytes.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from gemmascope_plugin.catalog.headers import FORMAT_FAULTS, Member, read_headers
from gemmascope_plugin.errors import BadFileError, shorten

CHUNK = 1 << 22


def read_npz(
    path: str | Path, keys: Collection[str] | None = None
) -> dict[str, Float[torch.Tensor, "*_"]]:
    """All arrays of an archive as tensors.

    Args:
        path: The file.
        keys: Names to read; all when None.

    Returns:
        Name to tensor in the file's own type, memory-mapped where stored.

    Raises:
        MissingFileError: There is no such file.
        BadFileError: The file is damaged, or is not an archive of plain float arrays.
    """
    path = Path(path)
    tensors: dict[str, Float[torch.Tensor, "*_"]] = {}
    for name, member in read_headers(path).items():
        if keys is None or name in keys:
            tensors[name] = torch.from_numpy(_read_member(path, member))
    return tensors


def _read_member(path: Path, member: Member) -> Float[np.ndarray, "*_"]:
    try:
        if member.nbytes == 0:
            flat = np.empty(0, member.descr)
        elif member.offset is None:
            flat = _inflate(path, member)
        else:
            flat = _map(path, member)
    except FORMAT_FAULTS as fault:
        raise BadFileError(
            f"cannot read array {member.name!r} of {str(path)!r}: {fault}",
            fix="fetch or write the file again",
        ) from fault
    if member.fortran and len(member.shape) > 1:
        return np.ascontiguousarray(flat.reshape(member.shape[::-1]).T)
    return flat.reshape(member.shape)


def _map(path: Path, member: Member) -> Float[np.ndarray, " n"]:
    assert member.offset is not None
    whole = np.memmap(
        path,
        dtype=np.uint8,
        mode="c",
        offset=member.offset,
        shape=(member.header_size + member.nbytes,),
    )
    crc = 0
    for start in range(0, len(whole), CHUNK):
        crc = zlib.crc32(whole[start : start + CHUNK].data, crc)
    if crc != member.crc:
        raise zipfile.BadZipFile(f"bad checksum for array {member.name!r}")
    return np.asarray(whole[member.header_size :]).view(member.descr)


def _inflate(path: Path, member: Member) -> Float[np.ndarray, " n"]:
    flat = np.empty(member.nbytes, np.uint8)
    with zipfile.ZipFile(path) as archive, archive.open(member.entry) as stream:
        stream.read(member.header_size)
        position = 0
        while position < len(flat):
            chunk = stream.read(min(CHUNK, len(flat) - position))
            if not chunk:
                raise EOFError(f"{position} of {len(flat)} bytes")
            flat[position : position + len(chunk)] = np.frombuffer(chunk, np.uint8)
            position += len(chunk)
        if stream.read(1):  # also makes zipfile compare the checksum
            raise zipfile.BadZipFile("longer than declared")
    return flat.view(member.descr)


def write_npz(
    path: str | Path, tensors: dict[str, Float[torch.Tensor, "*_"]], *, compress: bool = False
) -> Path:
    """Write tensors as an ``.npz`` file whose stored values are aligned to 64 bytes.

    The file appears whole under its name or not at all.

    Args:
        path: The file; its folder is made.
        tensors: Name to tensor; written as float32.
        compress: Deflate the members; such a file is smaller and cannot be memory-mapped.

    Returns:
        The path.

    Raises:
        BadFileError: There is nothing to write.
    """
    path = Path(path)
    if not tensors:
        raise BadFileError(f"no arrays to write into {str(path)!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    method = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    try:
        with zipfile.ZipFile(temporary, "w") as archive:
            for name, tensor in tensors.items():
                entry = zipfile.ZipInfo(f"{shorten([name])}.npy")
                entry.compress_type = method
                entry.extra = _padding(archive, entry.filename)
                array = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
                with archive.open(entry, "w", force_zip64=True) as stream:
                    np.lib.format.write_array(stream, array, version=(1, 0), allow_pickle=False)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _padding(archive: zipfile.ZipFile, name: str) -> bytes:
    """An extra field that makes the member begin at a multiple of 64 bytes."""
    assert archive.fp is not None
    zip64, field_header = 20, 4
    start = archive.fp.tell() + 30 + len(name) + zip64 + field_header
    pad = -start % 64
    # 0xD935 is the id that Android's zipalign uses for the same purpose.
    return (0xD935).to_bytes(2, "little") + pad.to_bytes(2, "little") + bytes(pad)
