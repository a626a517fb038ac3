"""Verify each file once, and remember it.

1. A stamp says that a check passed on a file: its real path, size, time of change (ns) and inode.
   One stamp per file and check lies in ``home()/verified``.
2. When any of these differ, the check runs again.  ``force`` runs it in any case.
3. Only success is remembered, and only if the file did not change meanwhile and is older than two
   seconds: within the resolution of file times a younger one could still be rewritten unseen.
4. A stamp that cannot be written costs the next process a second check, and nothing else.

Costs one ``stat`` and one small read when the stamp is good.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from gemmascope_plugin.catalog.home import home
from gemmascope_plugin.errors import GemmaScopeError
from gemmascope_plugin.files.whole import write_whole

VERSION = 1
"""Raise it when the checks become stricter: older stamps then count for nothing."""
RACY_NS = 2_000_000_000


def identity(path: Path) -> list[int | str]:
    """What tells a file from every other and from itself after a change."""
    real = os.path.realpath(path)
    stat = os.stat(real)
    return [real, stat.st_size, stat.st_mtime_ns, stat.st_ino]


def once(path: Path, check: str, run: Callable[[], None], *, force: bool = False) -> None:
    """Run a check of a file unless it has passed before.

    Args:
        path: The file.
        check: Name of the check, with its parameters.
        run: Raises when the file is bad.
        force: Run it although it has passed before.

    Raises:
        BadFileError: Whatever ``run`` raises.
    """
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
