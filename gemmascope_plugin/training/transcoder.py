"""A JumpReLU transcoder that SAELens' trainer can train.

SAELens trains autoencoders only. Here a batch is ``[input | target]`` side by side; the encoder sees
the input, the squared error is taken against the target, and everything else (sparsity term, dead
latents, schedules, optimiser) is SAELens'.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from sae_lens import JumpReLUTrainingSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from typing_extensions import override


class JumpReLUTrainingTranscoder(JumpReLUTrainingSAE):
    """``JumpReLUTrainingSAE`` on pairs; input and target have the same width ``d_in``."""

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One step on a batch ``[batch, 2 * d_in]``."""
        x, target = split_pairs(step_input.sae_in)
        with torch.no_grad():
            self.threshold.data.clamp_(min=0.0)
        acts, pre = self.encode_with_hidden_pre(x)
        out = self.decode(acts)
        losses = {"mse_loss": self.mse_loss_fn(out, target).sum(-1).mean()}
        losses |= self.calculate_aux_loss(
            step_input=replace(step_input, sae_in=x),
            feature_acts=acts,
            hidden_pre=pre,
            sae_out=out,
        )
        loss = torch.stack(list(losses.values())).sum()
        return TrainStepOutput(
            sae_in=x, sae_out=out, feature_acts=acts, hidden_pre=pre, loss=loss, losses=losses
        )


def split_pairs(
    pairs: Float[torch.Tensor, "batch two_d"],
) -> tuple[Float[torch.Tensor, "batch d_in"], Float[torch.Tensor, "batch d_in"]]:
    """Input and target of a batch of pairs."""
    x, target = pairs.chunk(2, dim=-1)
    return x, target
