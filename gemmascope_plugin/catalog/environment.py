"""Where this package keeps what outlives a run, and whether the hub may be asked.

``home()`` is ``GEMMASCOPE_HOME`` if it is set, else ``gemmascope`` in the cache folder of the platform.
Nothing is created here; whoever writes makes the folder.  ``is_offline`` is the one rule for all that
could reach the network.
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


_TRUE = {"1", "ON", "YES", "TRUE"}


def asked_to_stay_offline() -> bool:
    """Whether ``HF_HUB_OFFLINE`` says so now; imports nothing."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in _TRUE


def is_offline(offline: bool | None = None) -> bool:
    """Whether the network may not be used: the argument, else ``HF_HUB_OFFLINE``.

    huggingface_hub reads the variable once, when it is imported; either reading counts.
    """
    if offline is not None:
        return offline
    from huggingface_hub import constants

    return asked_to_stay_offline() or bool(constants.HF_HUB_OFFLINE)
