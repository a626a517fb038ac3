"""A run: all its steps, its checkpoints, and what is written at the end.

1. It begins at step 0, or at the newest checkpoint of its folder. Why it stopped, where, from what it can
   go on, and what to change is said in ``TrainingStoppedError``.
2. At every step all dictionaries learn from the same batch; rows of metrics and checkpoints are written
   between steps.
3. At the end every dictionary is finished: the factor on the activations is folded into the weights, so
   that raw activations are read. SAELens' training class says what its inference class is and what of
   its state that keeps. Top-k dictionaries that compared features times the norms of their decoder rows
   have unit rows. JumpReLU dictionaries get Gemma Scope's form: ``b_dec`` is not subtracted from the
   input (``b_enc - b_dec @ W_enc`` instead) and decoder rows have unit norm, encoder, bias and threshold
   taking the norms (arXiv 2408.05147, sections 3.2 and 3.3).
4. L0, FVU and share of features that never fire are measured on the last bucket of raw activations; the
   result is saved by SAELens and exported in Gemma Scope's layout where it has a form in it.

Cost: see ``driver.py``; at the end a copy of the weights and one pass over the tokens that are measured.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError

from gemmascope_plugin.errors import BadFileError, GemmaScopeError
from gemmascope_plugin.files.whole import discard, whole_folder
from gemmascope_plugin.loading.convert import fill, skeleton
from gemmascope_plugin.loading.export import export, export_layers, why_not_exported
from gemmascope_plugin.saes.coder import ARCHITECTURES
from gemmascope_plugin.saes.training.step_parts import fold_decoder
from gemmascope_plugin.training.architectures import architecture
from gemmascope_plugin.training.buckets import Bucket, ShuffledActivations
from gemmascope_plugin.training.learner import Learner, NotFiniteError
from gemmascope_plugin.training.run_folder import (
    Checkpoint,
    RunFolder,
    load_checkpoint,
    save_checkpoint,
)
from gemmascope_plugin.training.run_metrics import Journal, row
from gemmascope_plugin.training.train_spec import Layout, TrainSpec
from gemmascope_plugin.types import SAE

if TYPE_CHECKING:
    from gemmascope_plugin.saes import CLTSAE, CrossCoderSAE

_MEASURED = 1 << 14
"""Tokens that are measured, at most."""
_CHUNK = 1024


class TrainingStoppedError(GemmaScopeError):
    """Training cannot go on: memory, or numbers that are not finite.

    Args:
        problem: What happened.
        step: The step that failed, from 0.
        checkpoint: The last good checkpoint; None if there is none.
        fix: What to change.
    """

    def __init__(self, problem: str, *, step: int, checkpoint: Path | None, fix: str) -> None:
        self.step, self.checkpoint = step, checkpoint
        where = "none" if checkpoint is None else str(checkpoint)
        super().__init__(
            f"Training stopped at step {step}: {problem}",
            exists=f"last good checkpoint: {where}",
            fix=fix,
        )


@contextmanager
def _training_stops(
    step: Callable[[], int], checkpoint: Callable[[], Path | None]
) -> Iterator[None]:
    """Turns faults of memory and numbers into an error that says what to do.

    The functions tell the running step and the last good checkpoint.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as fault:
        reason = next(iter(str(fault).splitlines()), "") or type(fault).__name__
        raise TrainingStoppedError(
            f"out of memory ({reason})",
            step=step(),
            checkpoint=checkpoint(),
            fix="a smaller batch, d_sae, bucket or rows, or a larger device; resume=True goes on from "
            "the checkpoint if only other programs were in the way",
        ) from fault
    except NotFiniteError as fault:
        raise TrainingStoppedError(
            str(fault),
            step=step(),
            checkpoint=checkpoint(),
            fix="a lower lr, a longer lr_warm_up, a smaller max_grad_norm or sparsity_coefficient, in a "
            "new run_dir; resume=True with the same spec would stop at the same step",
        ) from fault


class Run:
    """A run between its beginning, or its newest checkpoint, and its end."""

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
        self.steps, self.batch_size = first.steps, first.batch_size
        path = None if folder is None else folder.last_checkpoint
        saved = None if path is None else load_checkpoint(path, specs)
        with _training_stops(lambda: self.step, self._last):
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
        with _training_stops(lambda: self.step, self._last):
            while self.step < self.steps:
                batch = self.source.next_batch()
                outputs = {name: learner.step(batch) for name, learner in self.learners.items()}
                self.step += 1
                journal.tick(self.batch_size)
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
            numbers={name: learner.numbers() for name, learner in self.learners.items()},
            tensors={name: learner.tensors() for name, learner in self.learners.items()},
        )
        save_checkpoint(self.folder.checkpoints, checkpoint, keep=self.keep)

    def finish(self, journal: Journal) -> dict[str, Any]:
        """The finished dictionaries, written if there is a folder."""
        results, rows = {}, []
        with _training_stops(lambda: self.step, self._last):
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
    """What a checkpoint of the right form cannot be put back for is its fault."""
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


def _write_result(sae: SAE, spec: TrainSpec, folder: RunFolder, name: str) -> None:
    """SAELens' format, and Gemma Scope's layout where the dictionary has a form in it."""
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
        export_layers(cast("CLTSAE | CrossCoderSAE", sae), out, l0=l0, gain=spec.gain)
        return
    layouts: tuple[Layout, ...] = (spec.layout, "gemma-scope-2")
    layout: Layout | None = next(
        (name for name in layouts if not why_not_exported(sae, name, spec.gain)), None
    )
    if spec.layer is None or layout is None:
        return
    discard(out)
    site = "mlp" if architecture(spec).kind == "transcoder" else spec.site
    export(sae, out, layout=layout, site=site, layer=spec.layer, l0=l0, gain=spec.gain)


@torch.no_grad()
def finished(learner: Learner) -> Any:
    """The dictionary as SAELens' inference class, frozen; the learner stays as it is."""
    learner.trainer.set_final_sae_metadata()
    sae: SAE = copy.deepcopy(learner.sae)
    _fold_scales(sae, learner)
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        # What is saved compares features as they are, which is what splicing reads.
        sae.fold_W_dec_norm()
        sae.cfg.rescale_acts_by_decoder_norm = False
    state = {name: value.detach().clone() for name, value in sae.state_dict().items()}
    sae.process_state_dict_for_saving_inference(state)
    config = sae.cfg.get_inference_sae_cfg_dict()
    plain = config["normalize_activations"] == "none"
    if config["architecture"] == "standard":  # ReLU is JumpReLU with thresholds of zero
        config["architecture"] = ARCHITECTURES[0]
        state["threshold"] = torch.zeros_like(state["b_enc"])
    if config["architecture"] in ARCHITECTURES and plain:
        state["threshold"] = state["threshold"].clamp(min=0)
        state |= fold_decoder(state, subtracts_b_dec=config["apply_b_dec_to_input"])
        config["apply_b_dec_to_input"] = False
    result = skeleton(config)
    result.process_state_dict_for_loading(state)
    return fill(result, state, device=learner.device, dtype=sae.dtype)


def _fold_scales(sae: SAE, learner: Learner) -> None:
    """Makes it a dictionary of raw activations; of several layers with unit decoder rows."""
    scales_in, scales_out = learner.scales
    if learner.kind in ("crosscoder", "clt"):
        sae.fold_scales(torch.tensor(scales_in), torch.tensor(scales_out))
        sae.threshold.data.clamp_(min=0)
        sae.fold_W_dec_norm()
    elif learner.kind == "transcoder":
        sae.fold_scales(scales_in[0], scales_out[0])
    elif scales_in[0] != 1:
        sae.fold_activation_norm_scaling_factor(scales_in[0])


@torch.no_grad()
def measured(sae: SAE, learner: Learner, bucket: Bucket) -> dict[str, float]:
    """L0, FVU around the mean, and share of features that never fire, on raw activations."""
    part = {hook: values[:_MEASURED] for hook, values in bucket.items()}
    x, y = learner.tensors_of(part)
    reshape = sae.cfg.reshape_activations == "hook_z"
    if reshape:  # the bucket's heads are flat
        sae.turn_off_forward_pass_hook_z_reshaping()
    fired = torch.zeros(sae.cfg.d_sae, dtype=torch.float64, device=x.device)
    squares = 0.0
    for x_part, target in zip(x.split(_CHUNK), y.split(_CHUNK), strict=True):
        fired += (sae.encode(x_part) != 0).double().sum(0)
        squares += float((sae(x_part) - target).double().pow(2).sum())
    if reshape:
        sae.turn_on_forward_pass_hook_z_reshaping()
    spread = float((y - y.mean(0)).double().pow(2).sum())
    return {
        "l0": float(fired.sum()) / len(x),
        "fvu": squares / spread,
        "dead_share": float((fired == 0).double().mean()),
    }
