"""Arrays out of an ``.npz`` file, without a second copy and without pickle.

1. The headers are read and checked first (``catalog/headers.py``); nothing has been allocated yet.
2. Stored members are mapped where they lie (``arrays.py``).
3. Compressed members are inflated once, in chunks of 4 MB, into a safetensors file in the cache folder
   (``convert_npz``), which is then mapped; it is found again by the archive's path, size, time of change
   and checksums, and an older conversion of the same path is deleted.

Archives written by ``numpy.savez`` place values at odd addresses, and a mapping of whole pages cannot
shift them.  What that costs, against a copy in memory as SAELens makes it, for 2304 x 16384 and 64
tokens (``tests/benchmarks/loading.py``): every encode 65 ms instead of 61 to 63 for the odd addresses,
the first one 1.5 ms more for touching the pages.  Advice to the kernel changes neither; populating the
mapping saves the 1.5 ms but puts 151 MB into resident memory at opening, and a copy, 55 ms, would pay
off after twenty encodes.  So it stays: opening and first encode together are four times faster.
Files written by ``write_npz`` are aligned to 64 bytes, those of safetensors to 8, and have no such cost.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from jaxtyping import Float

from gemmascope_plugin.catalog.headers import FORMAT_FAULTS, Member
from gemmascope_plugin.errors import BadFileError, shorten
from gemmascope_plugin.files.home import HOME_FIX, home
from gemmascope_plugin.files.whole import write_whole
from gemmascope_plugin.loading.arrays import NPZ_DTYPES, header_bytes, identity

CHUNK = 1 << 22


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
                raise _bad(path, member, fault) from fault
            except FORMAT_FAULTS as fault:
                raise _bad(path, member, fault) from fault


def _bad(path: Path, member: Member, fault: BaseException) -> BadFileError:
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


def write_npz(
    path: str | Path, tensors: dict[str, Float[torch.Tensor, "*_"]], *, compress: bool = False
) -> Path:
    """Writes tensors, as float32, into an ``.npz`` file whose stored values are aligned to 64 bytes."""
    path = Path(path)
    if not tensors:
        raise BadFileError(f"no arrays to write into {str(path)!r}")
    return write_whole(path, lambda file: _write(file, tensors, compress))


def _write(
    file: BinaryIO, tensors: Mapping[str, Float[torch.Tensor, "*_"]], compress: bool
) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        for name, tensor in tensors.items():
            entry = zipfile.ZipInfo(f"{shorten([name])}.npy")
            entry.compress_type = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
            entry.extra = _padding(archive, entry.filename)
            array = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
            with archive.open(entry, "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, array, version=(1, 0), allow_pickle=False)


def _padding(archive: zipfile.ZipFile, name: str) -> bytes:
    """An extra field that makes the member begin at a multiple of 64 bytes."""
    assert archive.fp is not None
    zip64, field_header = 20, 4
    start = archive.fp.tell() + 30 + len(name) + zip64 + field_header
    pad = -start % 64
    # 0xD935 is the id that Android's zipalign uses for the same purpose.
    return (0xD935).to_bytes(2, "little") + pad.to_bytes(2, "little") + bytes(pad)
