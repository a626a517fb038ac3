"""One result in one file: arrays and what is said about them, back exactly, or known to be damaged.

A safetensors file; in its header, as JSON under ``gemmascope``: format, version, whatever the result
says, and ``digest``, a SHA-256 of all of that and of all arrays.

1. Written under a temporary name and renamed. What could not be read again is not written.
2. Read with suspicion: the file, its header, format, version and digest are checked here. The digest
   finds damage, not intent: types, lengths and ranges are for the reader of each format. No pickle.

Cost: reading, writing and hashing once.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from gemmascope_plugin.errors import BadFileError, GemmaScopeError, MissingFileError
from gemmascope_plugin.files.json_file import MAX_DEPTH, Record, bad_file, check_plain, parse_json
from gemmascope_plugin.files.whole import write_whole

KEY = "gemmascope"
MAX_HEADER = 100_000_000
"""Bytes of a header that safetensors reads."""
_FLOAT = "$float"

Arrays = dict[str, np.ndarray]


def write_bundle(
    path: str | Path, content: Mapping[str, Any], arrays: Mapping[str, np.ndarray], *, kind: str
) -> Path:
    """Writes a result of a kind; an older file is replaced.

    ``content`` is what is said about the arrays, in plain values, ``format`` and ``version`` first.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        name = f"{kind.split()[-1]}.safetensors"
        raise GemmaScopeError(f"{str(path)!r} is a folder", fix=f"{str(path / name)!r}")
    check_plain(content, f"the {kind}")
    # as it will be read: tuples are lists
    content = json.loads(json.dumps(content, allow_nan=False))
    plain = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    header = json.dumps({**content, "digest": digest(content, plain)}, allow_nan=False)
    if len(header) > MAX_HEADER // 2:
        raise GemmaScopeError(
            f"What the {kind} says of itself takes {len(header)} bytes as JSON",
            exists=f"room for {MAX_HEADER // 2}",
            fix="metadata without large entries",
        )
    data = save(plain, {KEY: header})
    return write_whole(path, lambda file: file.write(data))


def read_bundle(path: str | Path, *, kind: str, format: str, version: int) -> tuple[Record, Arrays]:
    """What is said about the arrays, and the arrays, of a file of this kind, format and version."""
    path, fix = Path(path).expanduser(), f"save the {kind} again"
    if not path.is_file():
        raise MissingFileError(
            f"There is no {kind} at {str(path)!r}",
            fix=f"a file that {kind.split()[-1]}.save(path) wrote",
        )
    try:
        with safe_open(path, framework="numpy") as file:
            header = (file.metadata() or {}).get(KEY)
            if header is None:
                raise bad_file(path, f"it is not a {format}", fix)
            names = list(file.keys())
            arrays = {name: np.asarray(file.get_tensor(name)) for name in names}
    except (OSError, SafetensorError, TypeError, ValueError, KeyError, MemoryError) as fault:
        raise bad_file(path, str(fault), fix) from fault
    content = parse_json(header, path, fix=fix)
    if not isinstance(content, dict) or content.get("format") != format:
        raise bad_file(path, f"it is not a {format}", fix)
    if type(content.get("version")) is not int or content["version"] != version:
        raise BadFileError(
            f"{str(path)!r} is of version {content.get('version')!r}",
            exists=f"version {version}",
            fix=f"the gemmascope_plugin that wrote it, or {fix}",
        )
    if content.pop("digest", None) != digest(content, arrays):
        raise bad_file(path, "it is not as it was written", fix)
    return Record(content, path, fix), arrays


def digest(content: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """Checksum of all that a file holds, apart from the checksum itself."""
    checksum = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for name in sorted(arrays):
        array = arrays[name]
        checksum.update(f"\0{name} {array.dtype} {array.shape}\0".encode())
        checksum.update(np.ascontiguousarray(array).data)
    return checksum.hexdigest()


def as_json(value: object, where: str = "metadata") -> Any:
    """Metadata as what JSON can hold; ``nan`` and infinities as text, which every reader takes."""
    if where.count("[") > MAX_DEPTH:
        raise GemmaScopeError(f"{where[:80]}... is nested more than {MAX_DEPTH} deep")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or key == _FLOAT:
                raise GemmaScopeError(f"{where} has the key {key!r}, which is not plain text")
        return {key: as_json(each, f"{where}[{key!r}]") for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return [as_json(each, f"{where}[{i}]") for i, each in enumerate(value)]
    plain = value.item() if isinstance(value, np.generic) else value
    if isinstance(plain, float) and not math.isfinite(plain):
        return {_FLOAT: str(plain)}
    if plain is None or isinstance(plain, (str, bool, int, float)):
        return plain
    raise GemmaScopeError(
        f"{where} is {type(value).__name__}, which cannot be saved",
        exists="text, numbers, booleans, None, and tuples, lists and dicts of them",
    )


def from_json_value(value: object) -> Any:
    """The inverse of :func:`as_json`; sequences are tuples."""
    if isinstance(value, dict):
        if _FLOAT in value:
            if len(value) > 1 or value[_FLOAT] not in ("nan", "inf", "-inf"):
                raise ValueError(f"{value[_FLOAT]!r} stands for a number")
            return float(value[_FLOAT])
        return {key: from_json_value(each) for key, each in value.items()}
    return tuple(map(from_json_value, value)) if isinstance(value, list) else value


def plain_values(value: Any) -> Any:
    """What any reader of JSON takes: tuples are lists, numbers that are not finite None."""
    if isinstance(value, Mapping):
        return {str(key): plain_values(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(each) for each in value]
    plain = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(plain, float) and not math.isfinite(plain) else plain
