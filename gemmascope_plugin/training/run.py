"""A run: all its steps, its checkpoints, and what is written at the end.

1. It begins at step 0, or at the newest checkpoint of its folder.
2. At every step all dictionaries learn from the same batch; rows of metrics and checkpoints are written
   between steps.
3. At the end every dictionary is finished, measured on the last bucket of activations, saved by SAELens
   and exported in Gemma Scope's layout where it has a form in it.

Cost: see ``driver.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from gemmascope_plugin.errors import BadFileError, GemmaScopeError
from gemmascope_plugin.files.whole import discard, whole_folder
from gemmascope_plugin.loading.export import export, export_layers, why_not_exported
from gemmascope_plugin.training.architectures import architecture
from gemmascope_plugin.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from gemmascope_plugin.training.finish import finished, measured
from gemmascope_plugin.training.learner import Learner
from gemmascope_plugin.training.run_folder import RunFolder
from gemmascope_plugin.training.run_metrics import Journal, row
from gemmascope_plugin.training.shuffle import ShuffledActivations
from gemmascope_plugin.training.stop_reasons import explained
from gemmascope_plugin.training.train_spec import Layout, TrainSpec


class Run:
    """A run between its beginning, or its newest checkpoint, and its end.

    Args:
        specs: Name to what is trained.
        source: Where activations come from, at its beginning.
        folder: The run's files; None for none.
        model_name: For the metadata.
        device: Where dictionaries are trained.
        checkpoint_every: Steps between checkpoints.
        keep: How many checkpoints to keep.
        log_every: Steps between rows of metrics.

    Raises:
        BadFileError: The newest checkpoint is damaged, or of other activations.
        TrainingStoppedError: Out of memory.
    """

    def __init__(
        self,
        specs: Mapping[str, TrainSpec],
        source: ShuffledActivations,
        folder: RunFolder | None,
        model_name: str,
        device: torch.device,
        checkpoint_every: int,
        keep: int,
        log_every: int,
    ) -> None:
        self.folder, self.source = folder, source
        self.every, self.keep, self.log_every = checkpoint_every, keep, log_every
        self.step = 0
        first = next(iter(specs.values()))
        self.steps, self.batch = first.steps, first.batch
        path = None if folder is None else folder.last_checkpoint
        saved = None if path is None else load_checkpoint(path, specs)
        with explained(lambda: self.step, self._last):
            if saved is not None:
                with _read_from(path):
                    source.restore(saved.source)
            bucket = source.bucket()
            self.learners = {
                name: Learner(spec, bucket, model_name=model_name, device=device)
                for name, spec in specs.items()
            }
        if saved is not None:
            self.step = saved.step
            for name, learner in self.learners.items():
                with _read_from(path):
                    learner.restore(saved.tensors[name], saved.numbers[name])

    def _last(self) -> Path | None:
        return None if self.folder is None else self.folder.last_checkpoint

    def train(self, journal: Journal) -> None:
        """All steps that are left."""
        with explained(lambda: self.step, self._last):
            while self.step < self.steps:
                batch = self.source.next_batch()
                outputs = {name: one.step(batch) for name, one in self.learners.items()}
                self.step += 1
                journal.tick(self.batch)
                if self.step % self.log_every == 0 or self.step == self.steps:
                    journal.write([row(n, self.learners[n], out) for n, out in outputs.items()])
                if self.step % self.every == 0 or self.step == self.steps:
                    self._save()

    def _save(self) -> None:
        if self.folder is None:
            return
        checkpoint = Checkpoint(
            step=self.step,
            source=self.source.state(),
            numbers={name: one.numbers() for name, one in self.learners.items()},
            tensors={name: one.tensors() for name, one in self.learners.items()},
        )
        save_checkpoint(self.folder.checkpoints, checkpoint, keep=self.keep)

    def finish(self, journal: Journal) -> dict[str, Any]:
        """The finished dictionaries, written if there is a folder."""
        results, rows = {}, []
        with explained(lambda: self.step, self._last):
            for name, learner in self.learners.items():
                sae = finished(learner)
                figures = measured(sae, learner, self.source.bucket())
                sae.cfg.metadata.l0, sae.cfg.metadata.fvu = figures["l0"], figures["fvu"]
                rows.append({"dictionary": name, "step": self.step, **figures})
                if self.folder is not None:
                    _write_result(sae, learner.spec, self.folder, name)
                results[name] = sae
        journal.finish(rows)
        return results


@contextmanager
def _read_from(path: Path | None) -> Iterator[None]:
    """What a checkpoint of the right form cannot be put back for is its fault.

    Raises:
        BadFileError: Names the checkpoint.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        OverflowError,
        RuntimeError,
    ) as fault:
        raise BadFileError(
            f"cannot go on from {str(path)!r}: {type(fault).__name__} {fault}",
            fix="delete this folder and resume from the one before",
        ) from fault


def _write_result(sae: Any, spec: TrainSpec, folder: RunFolder, name: str) -> None:
    """SAELens' format, and Gemma Scope's layout where the dictionary has a form in it.

    Raises:
        GemmaScopeError: The disk is full or the folder may not be written; names the path.
    """
    final = folder.result("final", name)
    fix = "free space or mend the permissions, then resume=True"
    with whole_folder(final, "the end of a training run", fix=fix) as part:
        try:
            sae.save_model(part)
        except SafetensorError as fault:
            raise GemmaScopeError(f"cannot write {str(final)!r}: {fault}", fix=fix) from fault
    out, l0 = folder.result("export", name), float(sae.cfg.metadata.l0)
    if spec.layers:
        discard(out)
        export_layers(sae, out, l0=l0, gain=spec.gain)
        return
    layouts: tuple[Layout, ...] = (spec.layout, "gemma-scope-2")
    layout: Layout | None = next(
        (one for one in layouts if not why_not_exported(sae, one, spec.gain)), None
    )
    if spec.layer is None or layout is None:
        return
    discard(out)
    site = "mlp" if architecture(spec).kind == "transcoder" else spec.site
    export(sae, out, layout=layout, site=site, layer=spec.layer, l0=l0, gain=spec.gain)
