"""Files that appear whole or not at all.

A file is written under a temporary name of its own in the same folder, flushed to disk, and renamed:
readers and parallel writers see the old file or the new one, never a part.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from gemmascope_plugin.catalog.home import VARIABLE
from gemmascope_plugin.errors import GemmaScopeError


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> Path:
    """Write a file that appears under its name only when complete.

    Args:
        path: The file; its folder is made.
        write: Puts the content into the open temporary file.

    Returns:
        The path.

    Raises:
        GemmaScopeError: The disk is full, the folder may not be written, or the like; names the path.
    """
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's files are private; caches may be shared
        os.replace(temporary, path)
        temporary = None
    except OSError as fault:
        raise GemmaScopeError(
            f"cannot write {str(path)!r}: {fault.strerror or fault}",
            fix=f"free space, mend the permissions, or set {VARIABLE} to another folder",
        ) from fault
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
    return path
