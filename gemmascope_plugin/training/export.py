"""Writes a dictionary in Gemma Scope's layout: ``layer_L/width_W/average_l0_N/params.npz``."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from gemmascope_plugin.errors import BadFileError

KEYS = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")


def folder_name(layer: int, width: str, l0: float) -> str:
    """``layer_3/width_16k/average_l0_71``."""
    return f"layer_{layer}/width_{width}/average_l0_{round(l0)}"


def write_npz(params: dict[str, torch.Tensor], folder: Path) -> Path:
    """Writes ``params.npz`` (stored, float32) under a temporary name and renames it.

    Raises:
        BadFileError: A parameter is missing or not finite.
    """
    missing = [key for key in KEYS if key not in params]
    if missing:
        raise BadFileError(f"Parameters {', '.join(missing)} are missing", exists=", ".join(params))
    broken = [key for key in KEYS if not torch.isfinite(params[key]).all()]
    if broken:
        raise BadFileError(f"Parameters {', '.join(broken)} hold values that are not finite")
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "params.npz.part"
    with temporary.open("wb") as file:
        np.savez(file, **{key: params[key].float().numpy() for key in KEYS})
    target = folder / "params.npz"
    os.replace(temporary, target)
    return target
