"""Whether the hub may be asked. One rule for all that could reach the network."""

from __future__ import annotations

import os

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
