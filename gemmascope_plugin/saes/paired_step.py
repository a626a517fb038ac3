"""The end of a training step that reconstructs another tensor than it reads.

The squared error is taken against the target; every other loss is the training class' own, and sees what
was read.  Transcoders, crosscoders and cross-layer transcoders end their steps here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput


def paired_step(
    sae: Any,
    step_input: TrainStepInput,
    x: Float[torch.Tensor, "batch d_in"],
    target: Float[torch.Tensor, "batch d_out"],
    acts: Float[torch.Tensor, "batch d_sae"],
    pre: Float[torch.Tensor, "batch d_sae"],
    out: Float[torch.Tensor, "batch d_out"],
) -> TrainStepOutput:
    """The losses and their sum; ``sae_in`` of the result is the target.

    Args:
        sae: SAELens' training class.
        step_input: Coefficients and dead features.
        x: What was read.
        target: What should have been written.
        acts: Features.
        pre: Pre-activations.
        out: What was written.
    """
    losses = {"mse_loss": sae.mse_loss_fn(out, target).sum(-1).mean()}
    losses |= sae.calculate_aux_loss(
        step_input=replace(step_input, sae_in=x),
        feature_acts=acts,
        hidden_pre=pre,
        sae_out=out,
    )
    loss = torch.stack(list(losses.values())).sum()
    return TrainStepOutput(
        sae_in=target, sae_out=out, feature_acts=acts, hidden_pre=pre, loss=loss, losses=losses
    )
