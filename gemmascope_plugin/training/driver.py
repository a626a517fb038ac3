"""Trains dictionaries on a model's activations: ``train()`` one, ``train_many()`` several at once.

1. The activations of all sites come from one source: the model, or a folder of stored activations.
2. Every dictionary has its own SAELens trainer (``learner.py``); all see the same tokens at every step.
   What is trained together is, bit by bit, what is trained alone.
3. With ``run_dir`` everything goes into a folder (``run_folder.py``), checkpoints included, which is
   locked meanwhile; ``resume=True`` goes on from the newest one, bit by bit on the same machine.
4. At the end scales are folded, the result is measured on raw activations, saved by SAELens and exported
   in Gemma Scope's layout (``run.py``, ``loading/export.py``).

Cost: per step, ``batch / tokens per row`` rows of text through the model and one step of every trainer;
per checkpoint, three times the weights on disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from gemmascope_plugin.arguments import as_device
from gemmascope_plugin.errors import GemmaScopeError, ModelError
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.protocol import HookedModel, check_model, device_of
from gemmascope_plugin.training.architectures import architecture
from gemmascope_plugin.training.buckets import ForwardReader, Reader, ShuffledActivations
from gemmascope_plugin.training.presets import check_spec, whole_spec
from gemmascope_plugin.training.run import Run
from gemmascope_plugin.training.run_folder import (
    RunFolder,
    run_config,
    run_lock,
    unique_names,
)
from gemmascope_plugin.training.run_metrics import Journal
from gemmascope_plugin.training.store import ActivationStore, StoreReader
from gemmascope_plugin.training.text_batches import Corpus, TokenStream
from gemmascope_plugin.training.train_spec import TrainSpec

SHARED = ("model", "context", "rows", "bucket", "exclude", "steps", "batch_size", "seed")
"""Fields that dictionaries trained together must agree on."""


def _check_optional_model(model: object, call: str) -> None:
    """None is for stored activations."""
    if model is not None:
        check_model(model, call)


@gate(model=_check_optional_model, spec=check_spec)
def train(
    model: HookedModel | None,
    spec: TrainSpec | Mapping[str, Any],
    corpus: Corpus | ActivationStore,
    *,
    preset: str | None = None,
    run_dir: str | Path | None = None,
    resume: bool = False,
    checkpoint_every: int = 1000,
    keep: int = 2,
    log_every: int = 10,
    progress: bool = True,
    wandb: str | None = None,
    device: str | torch.device | None = None,
) -> Any:
    """Trains one dictionary.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``; None with stored activations.
        spec: What to train; or some of its fields, the others being those of ``preset``.
        corpus: Texts, conversations, rows of token ids in any form, an iterable of batches of ids, or an
            ``ActivationStore``. Texts are cut to ``context`` tokens, or to the model's own context where
            that is shorter. To resume with a mere iterator, give one that begins where the first one
            began.
        preset: ``quick`` (the default), ``gemma-scope`` or ``gemma-scope-2``; not beside a whole spec.
        run_dir: Folder for config, metrics, checkpoints and results; None for none of them.
        resume: Go on with the run in ``run_dir``.
        checkpoint_every: Steps between checkpoints; there is one at the end in any case.
        keep: How many checkpoints to keep.
        log_every: Steps between rows of metrics.
        progress: Whether to show a bar.
        wandb: Project to log to as well; needs wandb installed.
        device: Where the dictionary is trained, ``"auto"`` for a GPU if there is one; the model's by
            default.

    Returns:
        SAELens' inference object, frozen, reading raw activations; ``cfg.metadata`` has its hooks, its
        measured ``l0`` and ``fvu``.

    Raises:
        TrainingStoppedError: Out of memory, or numbers that are not finite.
        BadFileError: ``run_dir`` holds a run with another spec, model or versions, or damaged files.
        FolderInUseError: Another process trains into ``run_dir``.
        InputError: Something that is not a model or a spec, or not in this order.
        GemmaScopeError: The spec, the corpus or the folder cannot be used; the text says why.

    Example:
        >>> suite = gs.tiny()
        >>> tokens = suite.task("agreement", n=64).bind(suite.model).clean
        >>> spec = gs.TrainSpec(d_sae=64, layer=1, target_l0=8, steps=20, batch_size=64, rows=8)
        >>> sae = gs.train(suite.model, spec, tokens, progress=False)
        >>> sae.cfg.architecture(), tuple(sae.W_dec.shape)
        ('jumprelu', (64, 128))
    """
    options: dict[str, Any] = {"preset": preset, "run_dir": run_dir, "resume": resume}
    options |= {"checkpoint_every": checkpoint_every, "keep": keep, "log_every": log_every}
    options |= {"progress": progress, "wandb": wandb, "device": device}
    return next(iter(train_many(model, [spec], corpus, **options).values()))


@gate(model=_check_optional_model)
def train_many(
    model: HookedModel | None,
    specs: Sequence[TrainSpec | Mapping[str, Any]],
    corpus: Corpus | ActivationStore,
    *,
    preset: str | None = None,
    run_dir: str | Path | None = None,
    resume: bool = False,
    checkpoint_every: int = 1000,
    keep: int = 2,
    log_every: int = 10,
    progress: bool = True,
    wandb: str | None = None,
    device: str | torch.device | None = None,
) -> dict[str, Any]:
    """Trains several dictionaries on the same tokens, with one forward pass of the model.

    Args:
        model: As in ``train``, and so are the others.
        specs: What to train; they agree on everything in ``SHARED``.
        corpus: Text or stored activations.
        preset: For specs that are not whole.
        run_dir: Folder of the run.
        resume: Go on with the run in ``run_dir``.
        checkpoint_every: Steps between checkpoints.
        keep: How many checkpoints to keep.
        log_every: Steps between rows of metrics.
        progress: Whether to show a bar.
        wandb: Project to log to.
        device: Where the dictionaries are trained.

    Returns:
        Name to dictionary, ``res_1`` and the like, in the order of ``specs``.

    Raises:
        GemmaScopeError: As ``train``; or the specs do not agree.
    """
    for name, value in (
        ("checkpoint_every", checkpoint_every),
        ("keep", keep),
        ("log_every", log_every),
    ):
        if value < 1:
            raise GemmaScopeError(f"{name}={value} is out of range", exists="numbers from 1")
    if resume and run_dir is None:
        raise GemmaScopeError(
            "resume=True without run_dir", fix="run_dir= of the run to go on with"
        )
    named = unique_names([whole_spec(spec, preset) for spec in specs])
    _check_agreement(named)
    with run_lock(run_dir, resume=resume):
        source, model_name, place = _source(model, named, corpus, device)
        config = run_config(named, model_name, _kind_of(corpus))
        folder = None if run_dir is None else RunFolder(run_dir, config, resume=resume)
        run = Run(named, source, folder, model_name, place, checkpoint_every, keep, log_every)
        if folder is not None and not resume:
            folder.begin()
        journal = Journal(
            None if folder is None else folder.metrics,
            start=run.step,
            steps=run.steps,
            progress=progress,
            wandb=wandb,
            config=config,
        )
        try:
            with torch.enable_grad():  # whatever the caller has switched off
                run.train(journal)
            return run.finish(journal)
        finally:
            journal.close()


def _check_agreement(specs: Mapping[str, TrainSpec]) -> None:
    if not specs:
        raise GemmaScopeError("There is nothing to train", fix="at least one spec")
    first = next(iter(specs.values()))
    for field in fields(TrainSpec):
        values = {name: getattr(spec, field.name) for name, spec in specs.items()}
        differ = any(value != getattr(first, field.name) for value in values.values())
        if field.name in SHARED and differ:
            raise GemmaScopeError(
                f"Dictionaries trained together differ in {field.name}: {values}",
                fix="one value for all, or a run for each",
            )


def _source(
    model: HookedModel | None,
    specs: Mapping[str, TrainSpec],
    corpus: Corpus | ActivationStore,
    device: str | torch.device | None,
) -> tuple[ShuffledActivations, str, torch.device]:
    """Where activations come from, the name of the model, and the device to train on."""
    spec = next(iter(specs.values()))
    sites = [each.sites(architecture(each).kind) for each in specs.values()]
    hooks = sorted({hook for site in sites for names in site for hook in names})
    if isinstance(corpus, ActivationStore):
        reader: Reader = StoreReader(corpus, hooks, seed=spec.seed)
        name, home = spec.model or corpus.model, torch.device("cpu")
        if set(corpus.exclude) != set(spec.exclude):
            raise GemmaScopeError(
                f"The activations were stored with exclude={corpus.exclude}, the spec says "
                f"{spec.exclude}",
                fix=f"exclude={corpus.exclude}",
            )
    elif model is None:
        raise ModelError("There is no model to get activations from", fix="a model, or a store")
    else:
        stream = TokenStream(model, corpus, context=spec.context, rows=spec.rows, seed=spec.seed)
        reader = ForwardReader(model, stream, hooks, exclude=spec.exclude, bucket=spec.bucket)
        name, home = spec.model or str(model.cfg.model_name), device_of(model)
    source = ShuffledActivations(reader, batch_size=spec.batch_size, seed=spec.seed)
    return source, name, home if device is None else as_device(device)


def _kind_of(corpus: object) -> str:
    return "stored activations" if isinstance(corpus, ActivationStore) else "text"
