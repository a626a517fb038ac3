"""Checkpoints from which training goes on as if it had never stopped, bit by bit.

A checkpoint is a folder ``step_N``:

1. ``NAME.safetensors`` per dictionary: weights, buffers, Adam's averages, firing counts, random states;
2. ``state.json``: the step, the place in the activations, schedules, counters, scales.

It is written under a temporary name and renamed when all of it is on the disk: a folder called ``step_N``
is whole. The last few are kept. No pickle; JSON keeps floats exactly.

Cost: three times the weights on disk, each; seconds per gigabyte.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gemmascope_plugin.catalog.json_file import read_json
from gemmascope_plugin.errors import BadFileError, GemmaScopeError

STATE = "state.json"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """All that training depends on, between two steps."""

    step: int
    """Steps done."""
    source: dict[str, Any]
    """Place in the activations."""
    numbers: dict[str, dict[str, Any]]
    """Plain values of every dictionary."""
    tensors: dict[str, dict[str, torch.Tensor]]
    """Tensors of every dictionary."""


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Writes a checkpoint and removes the oldest beyond ``keep``.

    Args:
        folder: Where checkpoints lie.
        checkpoint: What to write.
        keep: How many to keep, at least 1.

    Returns:
        The folder of the checkpoint.

    Raises:
        GemmaScopeError: The disk is full or the folder may not be written; names the path.
    """
    final = folder / f"step_{checkpoint.step}"
    temporary = folder / f".{final.name}.part"
    try:
        remove(temporary)
        temporary.mkdir(parents=True)
        for name, tensors in checkpoint.tensors.items():
            plain = {key: value.contiguous() for key, value in tensors.items()}
            save_file(plain, temporary / f"{name}.safetensors")
        content = {
            "step": checkpoint.step,
            "source": checkpoint.source,
            "numbers": checkpoint.numbers,
        }
        (temporary / STATE).write_text(json.dumps(content), encoding="utf-8")
        sync(temporary)
        remove(final)
        os.replace(temporary, final)
    except (OSError, SafetensorError) as fault:
        raise GemmaScopeError(
            f"cannot write the checkpoint {str(final)!r}: {fault}",
            fix="free space or mend the permissions, then resume=True",
        ) from fault
    for old in checkpoints(folder)[:-keep]:
        remove(old)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, oldest first."""
    found = {path: re.fullmatch(r"step_(\d+)", path.name) for path in folder.glob("step_*")}
    steps = {path: int(match[1]) for path, match in found.items() if match}
    return sorted(steps, key=lambda path: steps[path])


def load_checkpoint(path: Path, names: Iterable[str]) -> Checkpoint:
    """Reads a checkpoint.

    Args:
        path: Its folder.
        names: The dictionaries in it.

    Raises:
        BadFileError: A file is damaged or missing.
    """
    content = read_json(path / STATE)
    names = tuple(names)
    try:
        return Checkpoint(
            step=content["step"],
            source=content["source"],
            numbers={name: content["numbers"][name] for name in names},
            tensors={name: load_file(path / f"{name}.safetensors") for name in names},
        )
    except (OSError, KeyError, SafetensorError) as fault:
        raise BadFileError(
            f"cannot read the checkpoint {str(path)!r}: {fault!r}",
            fix="delete this folder and resume from the one before",
        ) from fault


def sync(folder: Path) -> None:
    """Makes sure that the files of a folder are on the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())


def remove(folder: Path) -> None:
    """Deletes a folder if it is there."""
    if folder.is_dir():
        shutil.rmtree(folder)
