"""Checkpoints from which training goes on as if it had never stopped, bit by bit.

A checkpoint is a folder ``step_N``:

1. ``NAME.safetensors`` per dictionary: weights, buffers, Adam's averages, firing counts, random states;
2. ``state.json``: the step, the place in the activations, schedules, counters, scales.

It is written under a temporary name and renamed when all of it is on the disk: a folder called ``step_N``
is whole. ``state.json`` has the checksums of the others and one of itself, so that a checkpoint that was
damaged later is found out. The last few are kept. No pickle; JSON keeps floats exactly.

Cost: three times the weights on disk, each; seconds per gigabyte.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gemmascope_plugin.errors import GemmaScopeError
from gemmascope_plugin.files.json_file import Record, bad_file, read_json
from gemmascope_plugin.files.whole import discard, sha256_of, whole_folder

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
    fix = "free space or mend the permissions, then resume=True"
    with whole_folder(final, "a checkpoint", fix=fix) as part:
        sums = {}
        for name, tensors in checkpoint.tensors.items():
            file = part / f"{name}.safetensors"
            plain = {key: value.contiguous() for key, value in tensors.items()}
            try:
                save_file(plain, file)
            except SafetensorError as fault:
                raise GemmaScopeError(f"cannot write {str(final)!r}: {fault}", fix=fix) from fault
            sums[name] = sha256_of(file)
        content = {
            "step": checkpoint.step,
            "source": checkpoint.source,
            "numbers": checkpoint.numbers,
            "sha256": sums,
        }
        content["digest"] = _digest(content)
        (part / STATE).write_text(json.dumps(content, allow_nan=False), encoding="utf-8")
    for old in checkpoints(folder)[:-keep]:
        try:
            discard(old)
        except OSError as fault:
            raise GemmaScopeError(f"cannot delete {str(old)!r}: {fault}", fix=fix) from fault
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
    fix = "delete this folder and resume from the one before"
    state = Record(read_json(path / STATE, fix=fix), path / STATE, fix)
    names = tuple(names)
    if state.get("digest", str) != _digest(state.content):
        state.bad("it is not as it was written")
    sums, numbers = state.dict_of("sha256", str), state.dict_of("numbers", dict)
    if path.name != f"step_{state.size('step')}" or {*names} != {*sums} or {*names} != {*numbers}:
        state.bad("it is the state of another checkpoint")
    return Checkpoint(
        step=state.size("step"),
        source=state.get("source", dict),
        numbers={name: numbers[name] for name in names},
        tensors={name: _tensors(path / f"{name}.safetensors", sums[name], fix) for name in names},
    )


def _tensors(path: Path, checksum: str, fix: str) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise bad_file(path, "it is not there, or not a plain file", fix)
    try:
        if sha256_of(path) != checksum:
            raise bad_file(path, f"it is not the file that {STATE} was written with", fix)
        return load_file(path)
    except (OSError, SafetensorError) as fault:
        raise bad_file(path, str(fault), fix) from fault


def _digest(content: Mapping[str, Any]) -> str:
    """Checksum of everything but itself."""
    rest = {name: value for name, value in content.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
