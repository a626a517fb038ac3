"""The folder of a run: what was asked for, how it went, where it can go on, what came out.

    config.json         specs, versions, model, where the activations come from
    metrics.jsonl       a row per dictionary and logged step
    checkpoints/step_N  from which training goes on (see below)
    final/              SAELens' format
    export/             Gemma Scope's layout

With several dictionaries ``final/`` and ``export/`` hold a folder for each. A run goes on only with the
specs, versions and model that it began with: anything else is an error that names the keys. While it goes
on the folder is locked (``.lock``): a second run in it is refused.

A checkpoint, from which training goes on as if it had never stopped, bit by bit, has
``NAME.safetensors`` per dictionary (weights, buffers, Adam's averages, firing counts, random states) and
``state.json`` (the step, the place in the activations, schedules, counters, scales). It is written under
a temporary name and renamed when all of it is on the disk: a folder called ``step_N`` is whole.
``state.json`` has the checksums of the others and one of itself, so that a checkpoint that was damaged
later is found out. The last few are kept. No pickle; JSON keeps floats exactly.

Cost: per checkpoint, three times the weights on disk; seconds per gigabyte.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gemmascope_plugin.errors import BadFileError, GemmaScopeError, MissingFileError
from gemmascope_plugin.files.json_file import Record, bad_file, read_json
from gemmascope_plugin.files.lock import LOCK, folder_lock
from gemmascope_plugin.files.whole import discard, sha256_of, whole_folder, write_text_whole
from gemmascope_plugin.training.train_spec import TrainSpec

CONFIG = "config.json"
FORMAT = 1
_PACKAGES = ("gemmascope_plugin", "sae-lens", "transformer-lens", "torch")


def run_config(specs: Mapping[str, TrainSpec], model: str, corpus: str) -> dict[str, Any]:
    """Everything that the numbers of a run depend on, apart from the text and the weights."""
    return {
        "format": FORMAT,
        "specs": {name: spec.to_dict() for name, spec in specs.items()},
        "model": model,
        "corpus": corpus,
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # used from a source tree that was never installed
            versions[name] = "source"
    return versions


def run_lock(path: str | Path | None, *, resume: bool) -> AbstractContextManager[None]:
    """Keeps other runs out of a folder, in which there must be one if it is to go on."""
    if path is None:
        return nullcontext()
    if resume and not (Path(path) / CONFIG).is_file():
        raise MissingFileError(
            f"There is no run to go on with in {str(path)!r}: no {CONFIG}",
            fix="resume=False begins one",
        )
    return folder_lock(path, "a training run")


class RunFolder:
    """The files of a run; to be used under ``run_lock``."""

    def __init__(self, path: str | Path, config: dict[str, Any], *, resume: bool) -> None:
        self.path = Path(path)
        self._config = config
        self.several = len(config["specs"]) > 1
        if not resume:
            if self.path.is_dir() and any(p.name != LOCK for p in self.path.iterdir()):
                raise GemmaScopeError(
                    f"{str(self.path)!r} is not empty",
                    fix="resume=True to go on with the run in it, or another folder",
                )
            return
        old = read_json(self.path / CONFIG, fix="put the file back as it was, or begin another run")
        differences = _differences(old, json.loads(json.dumps(config)))
        if differences:
            raise BadFileError(
                f"The run in {str(self.path)!r} is another one: " + "; ".join(differences),
                fix="the spec, model and versions of that run, or another folder",
            )

    def begin(self) -> None:
        """Writes the config, once nothing is left that could refuse the run."""
        write_text_whole(self.path / CONFIG, json.dumps(self._config, indent=1) + "\n")

    @property
    def metrics(self) -> Path:
        """The file of rows."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints lie."""
        return self.path / "checkpoints"

    @property
    def last_checkpoint(self) -> Path | None:
        """The newest whole checkpoint; None if there is none."""
        return next(iter(checkpoints(self.checkpoints)[::-1]), None)

    def result(self, kind: str, name: str) -> Path:
        """Folder of a finished dictionary, ``final`` or ``export``."""
        return self.path / kind / name if self.several else self.path / kind


def _differences(old: object, new: object, key: str = "") -> list[str]:
    """``key: old, now new`` for everything that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(set(old) | set(new))
        inner = [_differences(old.get(n), new.get(n), f"{key}.{n}" if key else n) for n in names]
        return [line for lines in inner for line in lines]
    return [] if old == new else [f"{key} was {_shown(old)} and is {_shown(new)}"]


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def unique_names(specs: Sequence[TrainSpec]) -> dict[str, TrainSpec]:
    """A name for every spec, numbered where two would have the same."""
    names: dict[str, TrainSpec] = {}
    for spec in specs:
        taken = sum(name == spec.name or name.startswith(f"{spec.name}-") for name in names)
        names[spec.name if not taken else f"{spec.name}-{taken + 1}"] = spec
    return names


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
    """Writes a checkpoint and removes the oldest beyond ``keep``."""
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
    matches = {path: re.fullmatch(r"step_(\d+)", path.name) for path in folder.glob("step_*")}
    steps = {path: int(match[1]) for path, match in matches.items() if match}
    return sorted(steps, key=lambda path: steps[path])


def load_checkpoint(path: Path, names: Iterable[str]) -> Checkpoint:
    """Reads a checkpoint."""
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
