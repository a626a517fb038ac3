"""The bundled suite as one object: a trained model, its dictionaries, tasks and labels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import torch

from gemmascope_plugin.arguments import as_device, as_dtype
from gemmascope_plugin.catalog import SaeSpec, SpecList, find
from gemmascope_plugin.causes import Task
from gemmascope_plugin.causes.builtin import Split
from gemmascope_plugin.demo.corpus import Label, labels_from_json
from gemmascope_plugin.demo.tasks import TASK_NAMES, make_task
from gemmascope_plugin.errors import (
    InputError,
    MissingFileError,
    UnknownNameError,
    check_choice,
    nearest,
    number_of,
)
from gemmascope_plugin.loading import load, spec_of
from gemmascope_plugin.loading.sources import ASSETS
from gemmascope_plugin.models import load_model
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.protocol import HookedModel, describe
from gemmascope_plugin.splice.hooked_sae import check_sae
from gemmascope_plugin.types import SAE, Backend

MODEL = "gemma-2-tiny"
MODEL_FOLDER, SUITE_FILE, LABELS_FILE = "model", "suite.json", "labels.json"
"""In ``ASSETS``."""
SOURCE = f"{MODEL}, the model that ships with this package"
"""Where its weights come from, in words for pages and results."""
_SUITES: dict[str, dict[str, Any]] = {
    "transcoder": {"site": "transcoder", "affine": False},
    "skip-transcoder": {"site": "transcoder", "affine": True},
    "matryoshka": {"site": "res", "variant": "matryoshka"},
}
"""Words of ``TinySuite.load`` that are not sites, as arguments of ``find``."""


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


class _Tasks(dict[str, Task]):
    """Tasks by name; a name that does not exist says which do."""

    def __missing__(self, name: object) -> Task:
        check_choice("task", name, self)
        raise AssertionError(f"{name!r} is a task")


@dataclass(frozen=True)
class TinySuite:
    """``gemma-2-tiny``: a small Gemma 2 trained on a grammar whose concepts are known.

    It is real (trained weights, real circuits, real features) and it is small: what holds here need
    not hold on a Gemma of billions of parameters.
    """

    backend: Backend = "hooked"
    device: str | torch.device = "cpu"
    dtype: str | torch.dtype = "float32"

    @cached_property
    def model(self) -> HookedModel:
        """The trained model, frozen."""
        model: Any = load_model(ASSETS / MODEL_FOLDER, backend=self.backend, **self._place())
        # its folder is called "model"
        model.cfg.model_name, model.gemmascope_source = MODEL, SOURCE
        return model

    @property
    def specs(self) -> SpecList:
        """All dictionaries of the suite."""
        return find(model=MODEL)

    @cached_property
    def tasks(self) -> dict[str, Task]:
        """Name to held-out task; :meth:`task` makes others."""
        return _Tasks({name: make_task(name) for name in TASK_NAMES})

    @gate()
    def task(self, name: str, *, split: Split = "held_out", n: int = 64, seed: int = 0) -> Task:
        """A task with other prompts than those in :attr:`tasks`.

        Args:
            name: Task name.
            split: ``held_out`` prompts never occur in the corpus, ``train`` ones may.
            n: Number of prompts.
            seed: Seed of the draw.

        Raises:
            UnknownNameError: An unknown task.
        """
        return make_task(name, split=split, n=n, seed=seed)

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """Recipes, seeds and measured figures of model and dictionaries."""
        return read_json(ASSETS / SUITE_FILE)

    @cached_property
    def labels(self) -> dict[str, dict[int, Label]]:
        """``release/sae_id`` to feature to label."""
        rows = read_json(ASSETS / LABELS_FILE)
        return {key: labels_from_json(value) for key, value in rows.items()}

    def load(self, site: str, layer: int) -> Any:
        """The dictionary at a site and layer.

        Args:
            site: ``res``, ``att``, ``mlp`` or ``transcoder``; ``matryoshka`` for the residual
                dictionary with levels, ``skip-transcoder`` for the transcoder with an affine skip.
            layer: Layer index.

        Raises:
            UnknownNameError: No such site or layer.
        """
        filters = _SUITES.get(site, {"site": site, "kind": "sae", "variant": "plain"})
        return load(find(model=MODEL, layer=layer, **filters).one(), **self._place())

    def _place(self) -> dict[str, Any]:
        return {"device": self.device, "dtype": self.dtype}

    def labels_of(self, sae: SAE | SaeSpec) -> dict[int, Label]:
        """Feature to label for a dictionary of this suite, or its spec.

        Raises:
            InputError: It is not a dictionary.
            UnknownNameError: The dictionary is not one of this suite.
        """
        if not isinstance(sae, SaeSpec):
            check_sae(sae)
        spec = sae if isinstance(sae, SaeSpec) else spec_of(sae)
        key = "a dictionary without a spec" if spec is None else f"{spec.release}/{spec.sae_id}"
        if key not in self.labels:
            raise UnknownNameError(
                f"No labels for {key}",
                exists=f"labels of {len(self.labels)} dictionaries",
                nearest=nearest(key, self.labels),
            )
        return self.labels[key]

    def meanings(self, saes: Sequence[SAE]) -> dict[str, dict[int, str]]:
        """Output hook of each dictionary to feature to concept, as ``discover(..., labels=)`` takes them.

        Args:
            saes: Dictionaries of this suite.

        Raises:
            UnknownNameError: A dictionary is not one of this suite.
        """
        texts = {}
        for sae in saes:
            labels = self.labels_of(sae)
            metadata = sae.cfg.metadata
            hook = metadata.hook_name_out or metadata.hook_name
            texts[hook] = {feature: label.concept for feature, label in labels.items()}
        return texts

    def feature(self, sae: SAE | SaeSpec, concept: str) -> int:
        """The feature whose label is ``concept``, the best one if there are several.

        Raises:
            UnknownNameError: No feature of the dictionary carries that label.
        """
        if not isinstance(concept, str):
            raise InputError(
                f"{describe(concept)} is not a concept", fix="suite.feature(sae, concept)"
            )
        labels = self.labels_of(sae)
        features = [i for i, label in labels.items() if label.concept == concept]
        if not features:
            concepts = sorted({label.concept for label in labels.values()})
            raise UnknownNameError(
                f"No feature is labelled {concept!r}",
                exists=f"{len(concepts)} concepts",
                nearest=nearest(concept, concepts),
                fix="suite.labels_of(sae)",
            )
        return max(features, key=lambda i: labels[i].f1)

    def __repr__(self) -> str:
        tasks = ", ".join(TASK_NAMES)
        return f"TinySuite({MODEL!r}, {number_of(len(self.specs), 'dictionary')}, tasks: {tasks})"


def tiny(
    *,
    backend: Backend = "hooked",
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
) -> TinySuite:
    """The bundled trained suite; needs no network.

    Args:
        backend: ``hooked`` for ``HookedTransformer``, ``bridge`` for ``TransformerBridge``.
        device: Where model and dictionaries go: the CPU, which is quicker for a model as small as this;
            ``"auto"`` for a GPU if there is one.
        dtype: Type of model and dictionaries, or its name.

    Raises:
        UnknownNameError: An unknown backend, device or type.
        MissingFileError: The package was installed without its data.

    Example:
        >>> suite = gs.tiny()
        >>> suite
        TinySuite('gemma-2-tiny', 24 dictionaries, tasks: ioi, agreement, years, induction,
          two_hop)
        >>> suite.task("agreement")
        Task('agreement', 64 prompts, logit difference, first 'yesterday the teachers near the
          car')
    """
    if not (ASSETS / SUITE_FILE).exists():
        raise MissingFileError(
            "The bundled suite is not installed",
            fix="reinstall the package, or python -m gemmascope_plugin.demo.build",
        )
    check_choice("backend", backend, get_args(Backend))
    return TinySuite(backend, as_device(device), as_dtype(dtype))
