"""The folder of a run: what was asked for, how it went, where it can go on, what came out.

    config.json         specs, versions, model, where the activations come from
    metrics.jsonl       a row per dictionary and logged step
    checkpoints/step_N  from which training goes on (``checkpoint.py``)
    final/              SAELens' format
    export/             Gemma Scope's layout

With several dictionaries ``final/`` and ``export/`` hold a folder for each. A run goes on only with the
specs, versions and model that it began with: anything else is an error that names the keys. While it goes
on the folder is locked (``.lock``): a second run in it is refused.

Costs nothing beyond the files.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gemmascope_plugin.errors import BadFileError, GemmaScopeError, MissingFileError
from gemmascope_plugin.files.json_file import read_json
from gemmascope_plugin.files.lock import LOCK, folder_lock
from gemmascope_plugin.files.whole import write_text_whole
from gemmascope_plugin.training.checkpoint import checkpoints
from gemmascope_plugin.training.train_spec import TrainSpec

CONFIG = "config.json"
FORMAT = 1
_PACKAGES = ("gemmascope_plugin", "sae-lens", "transformer-lens", "torch")


def run_config(specs: Mapping[str, TrainSpec], model: str, corpus: str) -> dict[str, Any]:
    """Everything that the numbers of a run depend on, apart from the text and the weights.

    Args:
        specs: Name to spec.
        model: Name of the model.
        corpus: What kind of corpus it is.
    """
    return {
        "format": FORMAT,
        "specs": {name: spec.to_dict() for name, spec in specs.items()},
        "model": model,
        "corpus": corpus,
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # used from a source tree that was never installed
            found[name] = "source"
    return found


def run_lock(path: str | Path | None, *, resume: bool) -> AbstractContextManager[None]:
    """Keeps other runs out of a folder.

    Args:
        path: The folder; None for none.
        resume: Whether a run in it goes on.

    Raises:
        MissingFileError: There is no run to go on with.
        FolderInUseError: Another process trains into it; says which. Raised on entry.
    """
    if path is None:
        return nullcontext()
    if resume and not (Path(path) / CONFIG).is_file():
        raise MissingFileError(
            f"There is no run to go on with in {str(path)!r}: no {CONFIG}",
            fix="resume=False begins one",
        )
    return folder_lock(path, "a training run")


class RunFolder:
    """The files of a run; to be used under ``run_lock``.

    Args:
        path: The folder.
        config: From ``run_config``.
        resume: Whether a run in it goes on.

    Raises:
        GemmaScopeError: There is a run already, or the one that is there is another one.
        BadFileError: Its config is damaged.
    """

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
        """Writes the config, once nothing is left that could refuse the run.

        Raises:
            GemmaScopeError: The folder cannot be written.
        """
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

    def result(self, what: str, name: str) -> Path:
        """Folder of a finished dictionary.

        Args:
            what: ``final`` or ``export``.
            name: The dictionary's.
        """
        return self.path / what / name if self.several else self.path / what


def _differences(old: Any, new: Any, key: str = "") -> list[str]:
    """``key: old, now new`` for everything that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(set(old) | set(new))
        inner = [_differences(old.get(n), new.get(n), f"{key}.{n}" if key else n) for n in names]
        return [line for lines in inner for line in lines]
    return [] if old == new else [f"{key} was {_shown(old)} and is {_shown(new)}"]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def unique_names(specs: Sequence[TrainSpec]) -> dict[str, TrainSpec]:
    """A name for every spec, numbered where two would have the same."""
    names: dict[str, TrainSpec] = {}
    for spec in specs:
        taken = sum(name == spec.name or name.startswith(f"{spec.name}-") for name in names)
        names[spec.name if not taken else f"{spec.name}-{taken + 1}"] = spec
    return names
