"""Where this package keeps what outlives a run.

``home()`` is ``GEMMASCOPE_HOME`` if it is set, else ``gemmascope`` in the cache folder of the platform.
Nothing is created here; whoever writes makes the folder. No import of the package: tests run this file
before shape checks are built into it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

VARIABLE = "GEMMASCOPE_HOME"
HOME_FIX = f"free space, mend the permissions, or set {VARIABLE} to another folder"
"""What to do when nothing can be written there."""


def home() -> Path:
    """The folder; it need not exist."""
    if folder := os.environ.get(VARIABLE):
        return Path(folder).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "gemmascope"
