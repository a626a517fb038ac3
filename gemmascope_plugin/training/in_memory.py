"""Trains one JumpReLU dictionary on activations in memory and folds it into raw units: the bundled suite.

``train()`` does the same from text, with checkpoints; this is what the shipped dictionaries came from.

1. Inputs and targets are scaled by one number each, so that their mean squared norm is their width.
2. SAELens' ``SAETrainer`` minimises squared error plus the quadratic penalty around a target L0 (Gemma
   Scope 2), on batches drawn without replacement.
3. Decoder rows are folded to unit norm and the scales folded into the weights (arXiv 2408.05147,
   section 3.2): the result reads and writes raw activations, as Gemma Scope files do.

Cost: about one minute for 2,000 steps of 1,024 tokens at 128 x 512 on two cores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float

from gemmascope_plugin.errors import BadFileError, EmptySelectionError
from gemmascope_plugin.training.transcoder import JumpReLUTrainingTranscoder, TranscoderConfig
from gemmascope_plugin.types import SAE

Params = dict[str, torch.Tensor]
"""``W_enc, W_dec, b_enc, b_dec, threshold`` in Gemma Scope's shapes and raw units."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one dictionary is trained."""

    d_sae: int = 512
    target_l0: float = 10.0
    l0_coefficient: float = 0.3
    steps: int = 2000
    batch_size: int = 1024
    """Tokens per step."""
    lr: float = 2e-3
    bandwidth: float = 0.1
    """Of the straight-through estimator, in units of the scaled input."""
    init_threshold: float = 0.1
    dead_window: int = 300
    """Steps without firing after which a latent counts as dead."""
    pre_act_loss: float = 1e-3
    """Coefficient of the loss that pulls dead latents back."""
    seed: int = 0


def train_dictionary(
    x: Float[torch.Tensor, "tokens d_in"],
    target: Float[torch.Tensor, "tokens d_in"] | None,
    recipe: Recipe,
) -> Params:
    """Trains an SAE (``target=None``) or a transcoder and returns its folded parameters.

    Args:
        x: Activations at the input site.
        target: Activations at the output site of a transcoder.
        recipe: Size and schedule.

    Raises:
        EmptySelectionError: Fewer tokens than one batch.
        BadFileError: Activations that are not finite.
    """
    if len(x) < recipe.batch_size:
        raise EmptySelectionError(
            f"{len(x)} tokens are fewer than one batch of {recipe.batch_size}",
            fix="more text, or a smaller batch",
        )
    if not torch.isfinite(x).all() or (target is not None and not torch.isfinite(target).all()):
        raise BadFileError("The activations hold values that are not finite")
    scale_in = _scale(x)
    scale_out = scale_in if target is None else _scale(target)
    data = x * scale_in if target is None else torch.cat([x * scale_in, target * scale_out], -1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        sae = _trainer(data, x.shape[1], target is not None, recipe).fit()
    sae.fold_W_dec_norm()
    return _in_raw_units(sae, scale_in, scale_out)


def _scale(x: Float[torch.Tensor, "tokens d_in"]) -> float:
    return float((x.shape[1] / x.pow(2).sum(-1).mean()).sqrt())


def _trainer(
    data: Float[torch.Tensor, "tokens width"], d_in: int, is_transcoder: bool, recipe: Recipe
) -> Any:
    from sae_lens import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    values: dict[str, Any] = {
        "d_in": d_in,
        "d_sae": recipe.d_sae,
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "jumprelu_init_threshold": recipe.init_threshold,
        "jumprelu_bandwidth": recipe.bandwidth,
        "jumprelu_sparsity_loss_mode": "quadratic",
        "target_l0": recipe.target_l0,
        "l0_coefficient": recipe.l0_coefficient,
        "l0_warm_up_steps": recipe.steps // 4,
        "pre_act_loss_coefficient": recipe.pre_act_loss,
    }
    if is_transcoder:
        d_out = data.shape[1] - d_in
        config = TranscoderConfig(**values, d_out=d_out, tied_init=True)
        sae: Any = JumpReLUTrainingTranscoder(config)
    else:
        sae = JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**values))
    trainer_config = SAETrainerConfig(
        total_training_samples=recipe.steps * recipe.batch_size,
        train_batch_size_samples=recipe.batch_size,
        lr=recipe.lr,
        lr_end=recipe.lr / 50,
        lr_scheduler_name="cosineannealing",
        lr_warm_up_steps=recipe.steps // 50,
        dead_feature_window=recipe.dead_window,
        logger=LoggingConfig(log_to_wandb=False),
    )
    return SAETrainer(trainer_config, sae, _batches(data, recipe))


def _batches(
    data: Float[torch.Tensor, "tokens width"], recipe: Recipe
) -> Iterator[Float[torch.Tensor, "batch width"]]:
    """Endless epochs of shuffled batches."""
    generator = torch.Generator().manual_seed(recipe.seed)
    while True:
        order = torch.randperm(len(data), generator=generator)
        for start in range(0, len(order) - recipe.batch_size + 1, recipe.batch_size):
            yield data[order[start : start + recipe.batch_size]]


@torch.no_grad()
def _in_raw_units(sae: SAE, scale_in: float, scale_out: float) -> Params:
    """Folds the scales: latents shrink by ``scale_out``, the encoder grows by ``scale_in``."""
    params = {
        "W_enc": sae.W_enc * (scale_in / scale_out),
        "W_dec": sae.W_dec,
        "b_enc": sae.b_enc / scale_out,
        "b_dec": sae.b_dec / scale_out,
        "threshold": sae.threshold / scale_out,
    }
    return {name: value.detach().clone().contiguous() for name, value in params.items()}
