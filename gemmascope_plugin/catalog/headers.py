"""What an ``.npz`` file says it holds, read from its headers only, trusting nothing.

1. The zip's central directory lists the members; names that leave the folder, duplicates,
   encryption and compression other than deflate are refused.
2. Each member starts with an ``.npy`` header (magic, version, length, a Python dict literal).  It
   is parsed with ``ast.literal_eval``; nothing is ever unpickled, and object arrays are refused.
3. Declared shape x item size + header must equal the member's size in the directory, and that size
   must be reachable from the compressed size (deflate expands at most 1032 times), so that no
   reader can be made to allocate more than the file can hold.
4. For stored members the offset of the raw data is worked out from the local header, so that it
   can be memory-mapped.

Costs a few kB of reading per member whatever its size; imports neither numpy nor torch.
"""

from __future__ import annotations

import ast
import math
import re
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from gemmascope_plugin.errors import BadFileError, MissingFileError, shorten

MAGIC = b"\x93NUMPY"
MAX_HEADER = 1 << 12
MAX_DEFLATE_RATIO = 1032
ITEM_SIZES = {"<f2": 2, "<f4": 4, "<f8": 8}
"""Array types that are read; Gemma Scope itself is all ``<f4``."""

FORMAT_FAULTS = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    NotImplementedError,
    OverflowError,
    RuntimeError,
    SyntaxError,
    ValueError,
    MemoryError,
)
"""What the standard library raises on damaged archives and headers."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """One array of an archive, as its headers declare it."""

    name: str
    """Array name, without ``.npy``; ``w_enc``, as some files have it, reads ``W_enc``."""
    entry: str
    """Name inside the archive."""
    shape: tuple[int, ...]
    descr: str
    """Numpy type string, e.g. ``<f4``."""
    fortran: bool
    """Whether the values lie column by column."""
    header_size: int
    """Bytes of the ``.npy`` header before the values."""
    offset: int | None
    """Where the member's bytes begin in the file; None when they are compressed."""
    crc: int
    """Checksum of the member's bytes, header included."""

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return math.prod(self.shape) * ITEM_SIZES[self.descr]


def read_headers(path: Path) -> dict[str, Member]:
    """Headers of all arrays in an ``.npz`` file."""
    if not path.is_file():
        raise MissingFileError(f"no file {str(path)!r}", fix="check the folder")
    members: dict[str, Member] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                member = _read_member(path, archive, info)
                if member.name in members:
                    raise _bad(path, f"two arrays named {member.name!r}")
                members[member.name] = member
    except FORMAT_FAULTS as fault:
        raise _bad(path, f"it is truncated or not an npz archive ({fault})") from fault
    if not members:
        raise _bad(path, "it holds no arrays")
    return members


def _bad(path: Path, why: str) -> BadFileError:
    return BadFileError(f"cannot read {str(path)!r}: {why}", fix="fetch or write the file again")


def _read_member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Member:
    _check_entry(path, info)
    with archive.open(info) as stream:
        head = stream.read(12 + MAX_HEADER)
    shape, descr, fortran, header_size = _parse_npy_header(path, info.filename, head)
    offset = _data_offset(path, info) if info.compress_type == zipfile.ZIP_STORED else None
    if offset is not None and offset + info.file_size > path.stat().st_size:
        raise _bad(path, f"member {info.filename!r} runs past the end of the file")
    member = Member(
        name=re.sub("^w_", "W_", info.filename.removesuffix(".npy")),
        entry=info.filename,
        shape=shape,
        descr=descr,
        fortran=fortran,
        header_size=header_size,
        offset=offset,
        crc=info.CRC,
    )
    if member.nbytes + header_size != info.file_size:
        raise _bad(
            path,
            f"member {info.filename!r} declares shape {shape}, {member.nbytes} bytes, and has "
            f"{info.file_size - header_size}",
        )
    return member


def _check_entry(path: Path, info: zipfile.ZipInfo) -> None:
    name = info.filename
    # ``orig_filename`` keeps what zipfile has cut at a null byte or rewritten.
    if name != info.orig_filename or any(c in name for c in "/\\:\0") or name.startswith("."):
        raise _bad(path, f"member name {shorten([repr(info.orig_filename)])} is not an array name")
    if not name.endswith(".npy"):
        raise _bad(path, f"member {name!r} is not an array")
    if info.flag_bits & 0x1:
        raise _bad(path, f"member {name!r} is encrypted")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise _bad(path, f"member {name!r} has compression {info.compress_type}")
    stored = info.compress_type == zipfile.ZIP_STORED
    if stored and info.file_size != info.compress_size:
        raise _bad(path, f"member {name!r} is stored with two different sizes")
    if info.file_size > MAX_DEFLATE_RATIO * info.compress_size + 64:
        raise _bad(
            path,
            f"member {name!r} claims {info.file_size} bytes out of {info.compress_size} compressed",
        )


def _parse_npy_header(
    path: Path, entry: str, head: bytes
) -> tuple[tuple[int, ...], str, bool, int]:
    if not head.startswith(MAGIC):
        raise _bad(path, f"member {entry!r} does not begin like an array")
    start, layout = (10, "<H") if head[6:7] == b"\x01" else (12, "<I")
    (length,) = struct.unpack(layout, head[8:start])
    if head[6:7] not in (b"\x01", b"\x02", b"\x03") or length > MAX_HEADER:
        raise _bad(path, f"member {entry!r} has an unknown array header")
    try:
        header = ast.literal_eval(head[start : start + length].decode("latin1").strip())
    except TypeError as fault:  # a literal with a list as a key
        raise _bad(path, f"member {entry!r} has an unknown array header") from fault
    if not isinstance(header, dict) or set(header) != {"descr", "fortran_order", "shape"}:
        raise _bad(path, f"member {entry!r} has an unknown array header")
    shape, descr, fortran = header["shape"], header["descr"], header["fortran_order"]
    if not isinstance(descr, str) or descr not in ITEM_SIZES:
        raise _bad(path, f"array {entry!r} has type {descr!r}; only {shorten(ITEM_SIZES)} are read")
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
        raise _bad(path, f"array {entry!r} has shape {shape!r}")
    if not isinstance(fortran, bool):
        raise _bad(path, f"array {entry!r} has order {fortran!r}")
    return shape, descr, fortran, start + length


def _data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    with path.open("rb") as file:
        file.seek(info.header_offset)
        fixed = struct.unpack("<4s5H3I2H", file.read(30))
    if fixed[0] != b"PK\x03\x04":
        raise _bad(path, f"member {info.filename!r} has no local header")
    name_length, extra_length = fixed[-2:]
    return info.header_offset + 30 + name_length + extra_length
