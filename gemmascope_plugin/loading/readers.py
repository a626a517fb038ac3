"""A parameter file of any format, opened and compared with its spec.

1. The headers are read, by the ending of the name (``npz.py``, ``safetensors.py``).
2. Names and shapes are compared with the spec, before anything is converted or read.
3. A compressed archive is converted into the cache folder; everything else is used as it lies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from gemmascope_plugin.catalog import SaeSpec
from gemmascope_plugin.catalog.headers import read_headers
from gemmascope_plugin.loading.arrays import ArrayFile
from gemmascope_plugin.loading.npz import npz_arrays, open_npz
from gemmascope_plugin.loading.safetensors import safetensors_arrays
from gemmascope_plugin.loading.validate import Shape, check_arrays, renamed


def open_checked(
    path: Path, spec: SaeSpec, expected: Mapping[str, Shape] | None = None
) -> ArrayFile:
    """A file whose names and shapes are those of a spec; its values are not checked yet.

    Args:
        path: The ``.npz`` or ``.safetensors`` file.
        spec: What it should be.
        expected: Array name to shape; those of the spec when None.

    Returns:
        The file, its arrays under the names of this package.

    Raises:
        MissingFileError: There is no such file.
        BadFileError: The file is damaged, or is not this dictionary.
        WidthMismatchError: The file reads or writes tensors of another width.
    """
    if path.suffix == ".npz":
        members = read_headers(path)
        check_arrays(path, spec, renamed(npz_arrays(members)), expected)
        file = open_npz(path, members)
        return replace(file, arrays=renamed(file.arrays))
    arrays = renamed(safetensors_arrays(path))
    check_arrays(path, spec, arrays, expected)
    return ArrayFile(path=path, source=path, arrays=arrays)
