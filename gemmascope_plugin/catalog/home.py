"""The folder for what this package keeps between runs, outside any project.

``GEMMASCOPE_HOME`` if it is set, else ``gemmascope`` in the cache folder of the platform.  Nothing is
created here; whoever writes makes the folder.
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
    if given := os.environ.get(VARIABLE):
        return Path(given).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "gemmascope"
