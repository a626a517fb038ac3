"""Changes files of results, with digests that fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from gemmascope_plugin.files.bundle import KEY, Arrays, digest


def read(path: Path) -> tuple[dict[str, Any], Arrays]:
    """Header and arrays of a bundle."""
    with safe_open(path, framework="numpy") as file:
        content = json.loads(file.metadata()[KEY])
        return content, {name: file.get_tensor(name) for name in list(file.keys())}


def write(path: Path, content: dict[str, Any], arrays: Arrays) -> Path:
    """Writes a bundle whose digest fits, whatever it holds."""
    plain = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    content = {name: value for name, value in content.items() if name != "digest"}
    content["digest"] = digest(json.loads(json.dumps(content)), plain)
    save_file(plain, path, {KEY: json.dumps(content)})
    return path


def rewrite(path: Path, arrays: Arrays | None = None, **changes: Any) -> Path:
    """Changes arrays (None takes one out) and entries of the header."""
    content, new = read(path)
    new |= arrays or {}
    return write(path, content | changes, {n: a for n, a in new.items() if a is not None})
